"""The last layer of a decoder, by far its largest: from outputs to the next word, and to what a target costs.

Shapes: M outputs, H hidden, V vocabulary, C outputs at a time.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

_AT_ONCE = 2**23
"""Logits that are in memory at a time (32 MiB); eight times as many on a GPU."""
_LINE = 16
"""Values of a line of memory; and what GPUs like sizes of matrices to be a multiple of."""
_SMALL = 40.0
"""Sums of exponentials of logits as small as this, or less what they have in common, are held by float32 alike."""


class VocabularyLayer(nn.Linear):
    """A dense layer over the vocabulary; called, it gives logits."""

    def cross_entropy(
        self, outputs: Tensor, targets: Tensor, smoothing: float = 0.0, real: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """What targets ``(M,)`` cost after outputs ``(M, H)``, in nats: the mean over them, or over the ``real`` ones.

        First as it is, without a gradient; then with so much of each target's probability spread over the vocabulary
        (label smoothing: Szegedy et al., CVPR 2016), to be minimised. The logits are never held all at once, each
        target's pass the layer once, and their gradient is not stored at all. The products of matrices are in the
        precision of the autocast around, all else is in float32.
        """
        kind = outputs.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else self.weight.dtype
        learning = torch.is_grad_enabled()
        counted = torch.ones_like(targets) if real is None else real
        shares = counted / counted.sum()  # (M,): of each target in the mean
        layer = self.weight, self.bias
        with torch.autocast(kind, enabled=False):
            nats, minimised = _CrossEntropy.apply(outputs, *layer, targets, shares, smoothing, dtype, learning)
        return nats, minimised


class _CrossEntropy(torch.autograd.Function):
    """Softmax and its gradient in one pass, as the gradient is needed in any case where one is at all.

    With p a target's probabilities and s the smoothing, the logits' gradient is p - (1 - s) onehot - s / V. Of the
    three only p is made: the rest are sums over the rows of the layer or of the outputs.
    """

    @staticmethod
    def forward(
        ctx: Any,
        outputs: Tensor,
        weight: Tensor,
        bias: Tensor,
        targets: Tensor,
        shares: Tensor,
        smoothing: float,
        dtype: torch.dtype,
        learning: bool,
    ) -> tuple[Tensor, Tensor]:
        count, words = len(outputs), len(weight)
        by_word = _stand_by_word(weight.device)
        layer = weight.to(dtype)  # (V, H)
        if not by_word:
            layer = nn.functional.pad(layer, (0, 0, 0, -words % _LINE))
        parts = -(-count * words // (_AT_ONCE if by_word else 8 * _AT_ONCE))
        size = -(-count // parts // _LINE) * _LINE  # of a part, each as large as the others
        # Outputs of zero behind the last ones, whose shares are zero too: whole lines of memory are read much faster.
        read = nn.functional.pad(outputs.to(dtype), (0, 0, 0, -count % size))
        shared = nn.functional.pad(shares, (0, -count % size)).unsqueeze(1)
        softmax = _by_word(outputs, weight, bias, layer, size) if by_word else _by_output(bias, layer, learning)
        top, normals = shares.amax(), []
        of_outputs = torch.empty_like(read, dtype=torch.float32)
        of_weight, of_bias = None, torch.zeros_like(bias)
        for start in range(0, count, size):
            part, share = read[start : start + size], shared[start : start + size]  # (C, H), (C, 1)
            normal, product, sums = softmax(part)
            normals.append(normal)
            if not learning:
                continue
            scale = share if sums is None else share / sums.unsqueeze(1)  # (C, 1)
            rounded = product.to(dtype)
            of_outputs[start : start + size] = (rounded.t() @ layer) * scale
            added = rounded @ (part * scale).to(dtype)
            if of_weight is None:
                of_weight = added[:words].float()
            else:
                of_weight += added[:words]
            # In lower precision shares that are alike are not rounded, only what they come to.
            of_bias += (product @ (scale[:, 0] / top).to(product.dtype))[:words] * top
        normal = torch.cat(normals)[:count]  # (M,)
        chosen = weight[targets]  # (M, H)
        nats = ((normal - (outputs * chosen).sum(1) - bias[targets]) * shares).sum()
        minimised = nats
        if smoothing:
            # The mean over the vocabulary of minus the log-probabilities.
            middle = weight.mean(0)
            spread = ((normal - outputs.float() @ middle - bias.mean()) * shares).sum()
            minimised = (1 - smoothing) * nats + smoothing * spread
        if learning:
            assert of_weight is not None
            each = shares.unsqueeze(1)  # (M, 1)
            of_outputs = of_outputs[:count].addcmul_(chosen, each, value=smoothing - 1)
            of_weight.index_add_(0, targets, outputs.float() * each, alpha=smoothing - 1)
            of_bias.index_add_(0, targets, shares, alpha=smoothing - 1)
            if smoothing:
                of_outputs -= smoothing * each * middle
                of_weight -= smoothing / words * (shares @ outputs.float())
                of_bias -= smoothing / words
            ctx.save_for_backward(of_outputs.to(outputs.dtype), of_weight, of_bias)
        ctx.mark_non_differentiable(nats)
        return nats, minimised.clone()

    @staticmethod
    def backward(ctx: Any, _: Any, gradient: Tensor) -> Any:
        of_outputs, of_weight, of_bias = ctx.saved_tensors
        if gradient.device.type != "cpu" or gradient != 1:
            of_outputs, of_weight, of_bias = of_outputs * gradient, of_weight * gradient, of_bias * gradient
        return of_outputs, of_weight, of_bias, None, None, None, None, None


def _stand_by_word(device: torch.device) -> bool:
    """Whether logits stand by word on a device, and not by output."""
    return device.type == "cpu"


Softmax = Callable[[Tensor], tuple[Tensor, Tensor, Tensor | None]]
"""From outputs ``(C, H)``: the logarithms of the sums of their logits' exponentials, ``(C,)``; the probabilities
``(V, C)``; and, where those do not sum to one, what they sum to, ``(C,)``."""


def _by_word(outputs: Tensor, weight: Tensor, bias: Tensor, layer: Tensor, size: int) -> Softmax:
    """On a CPU, logits stand by word: the product is faster that way round."""
    held = weight.new_empty(len(weight) * size).view(len(weight), size)
    small = _largest(outputs, weight, bias) < _SMALL

    def softmax(part: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        if layer.dtype == torch.float32:
            values = torch.addmm(bias.unsqueeze(1), layer, part.t(), out=held)  # (V, C)
        else:
            values = torch.add(layer @ part.t(), bias.unsqueeze(1), out=held)
        if small:
            sums = values.exp_().sum(0)
            return sums.log(), values, sums
        top = values.amax(0)
        sums = values.sub_(top).exp_().sum(0)
        return top + sums.log(), values, sums

    return softmax


def _by_output(bias: Tensor, layer: Tensor, learning: bool) -> Softmax:
    """On a GPU logits stand by output, as its softmax takes them; probabilities are told where they are learnt from."""
    # Words of probability zero are behind the last one: products of matrices of uneven width take six times as long.
    padded = nn.functional.pad(bias, (0, len(layer) - len(bias)), value=-torch.inf)

    def softmax(part: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        product = part @ layer.t()
        logits = product + padded  # (C, V)
        logarithms = logits.log_softmax(1)
        normal = logits[:, 0] - logarithms[:, 0]
        return normal, (torch.exp(logarithms, out=product) if learning else product).t(), None

    return softmax


def _largest(outputs: Tensor, weight: Tensor, bias: Tensor) -> float:
    """What no logit is larger than, whatever its sign (Cauchy and Schwarz), without a look at the logits."""
    lengths = [torch.linalg.vector_norm(rows, dim=1, dtype=torch.float32).max() for rows in (outputs, weight)]
    return float(lengths[0] * lengths[1] + bias.abs().max())
