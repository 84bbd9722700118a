"""The last and by far the largest layer of a decoder: from outputs to logits, and to the cross-entropy of targets.

Shapes: M outputs, H hidden, V vocabulary, C outputs in one chunk.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

_CHUNK_LOGITS = 2**23
"""Logits in memory at a time (32 MiB); eight times as many on a GPU."""
_LINE = 16
"""Float32 values in a cache line (64 bytes). GPUs too are fastest on matrices whose sizes are multiples of it."""
_FORBIDDEN = -1e30
"""The bias of an entry with probability zero. It is finite, so that a share of zero times its cross-entropy is zero."""
_SMALL = 40.0
"""While all logits are smaller than this in absolute value, float32 can hold the sum of their exponentials: the largest
logit need not be subtracted first."""


class VocabularyLayer(nn.Linear):
    """A linear layer over the vocabulary. Calling it gives logits."""

    def forward(self, outputs: Tensor) -> Tensor:
        """Return the logits ``(M, V)`` of outputs ``(M, H)``.

        On a CPU, without a gradient, each row of the logits begins a cache line, which makes the product faster.
        """
        is_plain = outputs.dtype == self.weight.dtype and not torch.is_autocast_enabled(outputs.device.type)
        if torch.is_grad_enabled() or not is_plain or not _is_by_word(outputs.device):
            return super().forward(outputs)
        words = self.out_features
        lines = outputs.new_empty(len(outputs), -(-words // _LINE) * _LINE)
        return torch.addmm(self.bias, outputs, self.weight.t(), out=lines[:, :words])

    def cross_entropy(
        self,
        outputs: Tensor,
        targets: Tensor,
        smoothing: float = 0.0,
        real: Tensor | None = None,
        weights: Tensor | None = None,
        forbidden: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Compute the cross-entropy of targets ``(M,)`` given outputs ``(M, H)``, in chunks.

        Return ``(loss, smoothed_loss)``, means in nats over all targets, or over those where ``real`` ``(M,)`` is true.
        The first is the plain cross-entropy and is not differentiable. The second has label smoothing (Szegedy et al.,
        CVPR 2016), which spreads the share ``smoothing`` of each target's probability over the vocabulary; it is the
        one to minimise.

        ``weights`` ``(M,)`` multiply the targets' terms in the second mean; they may be negative. ``forbidden`` are
        entries of the vocabulary that get probability zero; they must not be targets, except where ``real`` is false.
        Neither goes with label smoothing.

        The ``(M, V)`` logits are never in memory all at once: each chunk goes through the layer once, and the gradient
        of its logits is not stored. Matrix products are in the precision of the surrounding autocast, everything else
        is in float32.
        """
        assert not smoothing or (weights is None and forbidden is None)
        kind = outputs.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else self.weight.dtype
        needs_gradient = torch.is_grad_enabled()
        counted = torch.ones_like(targets) if real is None else real
        shares = counted / counted.sum()  # (M,): the weight of each target in the mean
        weighted = shares if weights is None else shares * weights
        bias = self.bias if forbidden is None else self.bias.index_fill(0, forbidden, _FORBIDDEN)
        layer = self.weight, bias
        with torch.autocast(kind, enabled=False):
            loss, smoothed = _CrossEntropy.apply(
                outputs, *layer, targets, shares, weighted, smoothing, dtype, needs_gradient
            )
        return loss, smoothed


class _CrossEntropy(torch.autograd.Function):
    """Softmax and gradient in one pass: ``forward`` computes the gradients too, since training needs both anyway.

    With p the probabilities of the vocabulary at a target and s the smoothing, the gradient of its logits is
    p - (1 - s) onehot - s / V. Only the term p is materialised; the other two are sums over rows of the layer or of the
    outputs.
    """

    @staticmethod
    def forward(
        ctx: Any,
        outputs: Tensor,
        weight: Tensor,
        bias: Tensor,
        targets: Tensor,
        shares: Tensor,
        weighted: Tensor,
        smoothing: float,
        dtype: torch.dtype,
        needs_gradient: bool,
    ) -> tuple[Tensor, Tensor]:
        count, words = len(outputs), len(weight)
        # Divide the outputs into chunks of equal size.
        by_word = _is_by_word(weight.device)
        layer = weight.to(dtype)  # (V, H)
        if not by_word:
            layer = nn.functional.pad(layer, (0, 0, 0, -words % _LINE))
        chunks = -(-count * words // (_CHUNK_LOGITS if by_word else 8 * _CHUNK_LOGITS))
        size = -(-count // chunks // _LINE) * _LINE
        # The last chunk is padded with outputs of zero whose shares are zero: whole cache lines are read much faster.
        padded_outputs = nn.functional.pad(outputs.to(dtype), (0, 0, 0, -count % size))
        padded_shares = nn.functional.pad(weighted, (0, -count % size)).unsqueeze(1)
        softmax = (
            _softmax_by_word(outputs, weight, bias, layer, size)
            if by_word
            else _softmax_by_output(bias, layer, needs_gradient)
        )
        # The log-normalisers of all chunks, and the term p of the gradients.
        largest_share, log_sums = weighted.abs().amax().clamp(min=torch.finfo(torch.float32).tiny), []
        grad_outputs = torch.empty_like(padded_outputs, dtype=torch.float32)
        grad_weight, grad_bias = None, torch.zeros_like(bias)
        for start in range(0, count, size):
            chunk, share = padded_outputs[start : start + size], padded_shares[start : start + size]  # (C, H), (C, 1)
            log_sum, probabilities, sums = softmax(chunk)
            log_sums.append(log_sum)
            if not needs_gradient:
                continue
            scale = share if sums is None else share / sums.unsqueeze(1)  # (C, 1)
            rounded = probabilities.to(dtype)
            grad_outputs[start : start + size] = (rounded.t() @ layer) * scale
            chunk_grad_weight = rounded @ (chunk * scale).to(dtype)
            if grad_weight is None:
                grad_weight = chunk_grad_weight[:words].float()
            else:
                grad_weight += chunk_grad_weight[:words]
            # In lower precision, equal shares divided by the largest are exactly 1: only the result is rounded.
            grad_bias += (probabilities @ (scale[:, 0] / largest_share).to(probabilities.dtype))[:words] * largest_share
        # The losses.
        log_sum = torch.cat(log_sums)[:count]  # (M,)
        target_weights = weight[targets]  # (M, H)
        losses = log_sum - (outputs * target_weights).sum(1) - bias[targets]
        loss, smoothed = (losses * shares).sum(), (losses * weighted).sum()
        if smoothing:
            # Cross-entropy against the uniform distribution: minus the mean log-probability over the vocabulary.
            mean_weight = weight.mean(0)
            uniform = ((log_sum - outputs.float() @ mean_weight - bias.mean()) * weighted).sum()
            smoothed = (1 - smoothing) * smoothed + smoothing * uniform
        # The other two terms of the gradients: one for the target, one for the smoothing.
        if needs_gradient:
            assert grad_weight is not None
            share_column = weighted.unsqueeze(1)  # (M, 1)
            grad_outputs = grad_outputs[:count].addcmul_(target_weights, share_column, value=smoothing - 1)
            grad_weight.index_add_(0, targets, outputs.float() * share_column, alpha=smoothing - 1)
            grad_bias.index_add_(0, targets, weighted, alpha=smoothing - 1)
            if smoothing:
                grad_outputs -= smoothing * share_column * mean_weight
                grad_weight -= smoothing / words * (weighted @ outputs.float())
                grad_bias -= smoothing / words
            ctx.save_for_backward(grad_outputs.to(outputs.dtype), grad_weight, grad_bias)
        ctx.mark_non_differentiable(loss)
        return loss, smoothed

    @staticmethod
    def backward(ctx: Any, _: Any, gradient: Tensor) -> Any:
        grad_outputs, grad_weight, grad_bias = ctx.saved_tensors
        if gradient.device.type != "cpu" or gradient != 1:
            grad_outputs, grad_weight, grad_bias = grad_outputs * gradient, grad_weight * gradient, grad_bias * gradient
        return grad_outputs, grad_weight, grad_bias, None, None, None, None, None, None


def _is_by_word(device: torch.device) -> bool:
    """Return whether logits on a device have the layout ``(V, C)``, a row per word, instead of ``(C, V)``."""
    return device.type == "cpu"


Softmax = Callable[[Tensor], tuple[Tensor, Tensor, Tensor | None]]
"""A function of outputs ``(C, H)`` with three results: the log-sum-exp of their logits, ``(C,)``; the probabilities
``(V, C)``; and the sums ``(C,)`` of the probabilities, or None if these are normalised."""


def _softmax_by_word(outputs: Tensor, weight: Tensor, bias: Tensor, layer: Tensor, size: int) -> Softmax:
    """Return a softmax over logits ``(V, C)``: on a CPU the matrix product is faster in this layout."""
    buffer = weight.new_empty(len(weight) * size).view(len(weight), size)
    small = _logit_bound(outputs, weight, bias) < _SMALL

    def softmax(chunk: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        if layer.dtype == torch.float32:
            logits = torch.addmm(bias.unsqueeze(1), layer, chunk.t(), out=buffer)  # (V, C)
        else:
            logits = torch.add(layer @ chunk.t(), bias.unsqueeze(1), out=buffer)
        if small:
            sums = logits.exp_().sum(0)
            return sums.log(), logits, sums
        top = logits.amax(0)
        sums = logits.sub_(top).exp_().sum(0)
        return top + sums.log(), logits, sums

    return softmax


def _softmax_by_output(bias: Tensor, layer: Tensor, needs_gradient: bool) -> Softmax:
    """Return a softmax over logits ``(C, V)``, the layout that suits torch's softmax on a GPU.

    Its second result contains probabilities only if a gradient is needed.
    """
    # The vocabulary is padded with words of probability zero: matrix products of uneven width take six times as long.
    padded_bias = nn.functional.pad(bias, (0, len(layer) - len(bias)), value=-torch.inf)
    frequent = padded_bias.argmax(keepdim=True)  # an entry that is not forbidden

    def softmax(chunk: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        product = chunk @ layer.t()
        logits = product + padded_bias  # (C, V)
        log_probabilities = logits.log_softmax(1)
        log_sum = (logits.index_select(1, frequent) - log_probabilities.index_select(1, frequent)).squeeze(1)
        return log_sum, (torch.exp(log_probabilities, out=product) if needs_gradient else product).t(), None

    return softmax


def _logit_bound(outputs: Tensor, weight: Tensor, bias: Tensor) -> float:
    """Return an upper bound of the allowed logits' absolute values, by the Cauchy-Schwarz inequality."""
    norms = [torch.linalg.vector_norm(rows, dim=1, dtype=torch.float32).max() for rows in (outputs, weight)]
    return float(norms[0] * norms[1] + bias.where(bias != _FORBIDDEN, 0.0).abs().max())
