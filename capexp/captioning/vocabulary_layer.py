"""The last layer of a decoder, by far its largest: from outputs to the next word, and to what a target costs.

Shapes: M outputs, H hidden, V vocabulary, C outputs at a time.
"""

from typing import Any

import torch
from torch import Tensor, nn

_AT_ONCE = 2**23
"""Logits that are in memory at a time (32 MiB)."""
_LINE = 16
"""Values of a line of memory."""
_SMALL = 40.0
"""Sums of exponentials of logits as small as this, or less what they have in common, are held by float32 alike."""


class VocabularyLayer(nn.Linear):
    """A dense layer over the vocabulary; called, it gives logits."""

    def cross_entropy(self, outputs: Tensor, targets: Tensor, smoothing: float = 0.0) -> tuple[Tensor, Tensor]:
        """What targets ``(M,)`` cost after outputs ``(M, H)``, in nats, the mean over targets.

        First as it is, without a gradient; then with so much of each target's probability spread over the vocabulary
        (label smoothing: Szegedy et al., CVPR 2016), to be minimised. The logits are never held all at once, each
        target's pass the layer once, and their gradient is not stored at all. The products of matrices are in the
        precision of the autocast around, all else is in float32.
        """
        kind = outputs.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else self.weight.dtype
        learning = torch.is_grad_enabled()
        with torch.autocast(kind, enabled=False):
            nats, minimised = _CrossEntropy.apply(outputs, self.weight, self.bias, targets, smoothing, dtype, learning)
        return nats, minimised


class _CrossEntropy(torch.autograd.Function):
    """Softmax and its gradient in one pass, as the gradient is needed in any case where one is at all.

    With p a target's probabilities and s the smoothing, the logits' gradient is p - (1 - s) onehot - s / V. Of the
    three only p is made, not divided by its sum even: the rest are sums over the rows of the layer or of the outputs.
    Logits stand by word, ``(V, C)``: on a CPU the product is faster that way round.
    """

    @staticmethod
    def forward(
        ctx: Any,
        outputs: Tensor,
        weight: Tensor,
        bias: Tensor,
        targets: Tensor,
        smoothing: float,
        dtype: torch.dtype,
        learning: bool,
    ) -> tuple[Tensor, Tensor]:
        count, words = len(outputs), len(weight)
        layer = weight.to(dtype)  # (V, H)
        parts = -(-count * words // _AT_ONCE)
        size = -(-count // parts // _LINE) * _LINE  # of a part, each as large as the others
        # Outputs of zero behind the last ones, whose shares are zero too: whole lines of memory are read much faster.
        read = nn.functional.pad(outputs.to(dtype), (0, 0, 0, -count % size))
        held = weight.new_empty(words * size).view(words, size)
        logarithms = []  # of the sums of exponentials
        of_outputs = torch.empty_like(read, dtype=torch.float32)
        of_weight, of_bias = None, torch.zeros_like(bias)
        small = weight.device.type == "cpu" and _largest(outputs, weight, bias) < _SMALL
        for start in range(0, count, size):
            part = read[start : start + size]  # (C, H)
            if dtype == torch.float32:
                values = torch.addmm(bias.unsqueeze(1), layer, part.t(), out=held)  # (V, C)
            else:
                values = torch.add(layer @ part.t(), bias.unsqueeze(1), out=held)
            if small:
                sums = values.exp_().sum(0)
                logarithms.append(sums.log())
            else:
                top = values.amax(0)
                sums = values.sub_(top).exp_().sum(0)
                logarithms.append(top + sums.log())
            if not learning:
                continue
            product = values.to(dtype)
            shares = (1 / (sums * count)).unsqueeze(1)  # (C, 1)
            shares[count - start :] = 0
            of_outputs[start : start + size] = (product.t() @ layer) * shares
            added = product @ (part * shares).to(dtype)
            if of_weight is None:
                of_weight = added.float()
            else:
                of_weight += added
            of_bias.addmv_(values, shares[:, 0])
        normal = torch.cat(logarithms)[:count]  # (M,)
        chosen = weight[targets]  # (M, H)
        nats = (normal - (outputs * chosen).sum(1) - bias[targets]).mean()
        minimised = nats
        if smoothing:
            # The mean over the vocabulary of minus the log-probabilities.
            middle = weight.mean(0)
            spread = (normal - outputs.float() @ middle - bias.mean()).mean()
            minimised = (1 - smoothing) * nats + smoothing * spread
        if learning:
            assert of_weight is not None
            of_outputs = of_outputs[:count].sub_(chosen, alpha=(1 - smoothing) / count)
            of_weight.index_add_(0, targets, outputs.float(), alpha=(smoothing - 1) / count)
            of_bias.index_add_(0, targets, torch.full_like(normal, (smoothing - 1) / count))
            if smoothing:
                of_outputs -= smoothing / count * middle
                of_weight -= smoothing / words * outputs.float().mean(0)
                of_bias -= smoothing / words
            ctx.save_for_backward(of_outputs.to(outputs.dtype), of_weight, of_bias)
        ctx.mark_non_differentiable(nats)
        return nats, minimised.clone()

    @staticmethod
    def backward(ctx: Any, _: Any, gradient: Tensor) -> Any:
        of_outputs, of_weight, of_bias = ctx.saved_tensors
        if gradient.device.type != "cpu" or gradient != 1:
            of_outputs, of_weight, of_bias = of_outputs * gradient, of_weight * gradient, of_bias * gradient
        return of_outputs, of_weight, of_bias, None, None, None, None


def _largest(outputs: Tensor, weight: Tensor, bias: Tensor) -> float:
    """What no logit is larger than, whatever its sign (Cauchy and Schwarz), without a look at the logits."""
    lengths = [torch.linalg.vector_norm(rows, dim=1, dtype=torch.float32).max() for rows in (outputs, weight)]
    return float(lengths[0] * lengths[1] + bias.abs().max())
