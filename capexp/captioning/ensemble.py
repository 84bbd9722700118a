"""An ensemble: several decoders that predict each next word of a caption together.

Shapes: N photos, B captions, T steps, M marked steps, V vocabulary, P grid positions, F feature.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from capexp.captioning.decoder import Decoder, DecoderState, RecurrentDecoder


@dataclass(frozen=True)
class EnsembleState(DecoderState):
    """The state of each member."""

    members: tuple[DecoderState, ...]

    def select(self, rows: Tensor) -> "EnsembleState":
        """Return the state of the captions ``rows``."""
        return EnsembleState(tuple(state.select(rows) for state in self.members))

    def repeat(self, times: int) -> "EnsembleState":
        """Return the state with each caption repeated ``times`` times in a row."""
        return EnsembleState(tuple(state.repeat(times) for state in self.members))


class Ensemble(Decoder):
    """Decoders with the same vocabulary and features that read the same captions.

    The probability of the next word is the geometric mean of the members' probabilities, normalised to sum to 1: the
    log-probabilities are averaged. A word to which one member gives probability zero is therefore never emitted.
    """

    def __init__(self, members: Sequence[RecurrentDecoder]) -> None:
        super().__init__()
        self.members = nn.ModuleList(members)
        self.has_attention = any(member.has_attention for member in members)

    def start(self, features: Tensor) -> EnsembleState:
        """Return the state before the first word, from features ``(N, P, F)``."""
        return EnsembleState(tuple(member.start(features) for member in self._decoders()))

    def step(self, state: DecoderState, words: Tensor) -> tuple[Tensor, EnsembleState]:
        """Read one more word ``(B,)`` of each caption; return the log-probabilities ``(B, V)`` of the next one."""
        assert isinstance(state, EnsembleState)
        pairs = zip(self._decoders(), state.members, strict=True)
        logits, states = zip(*[member.step(member_state, words) for member, member_state in pairs], strict=True)
        return _geometric_mean(logits), EnsembleState(states)

    def logits(self, features: Tensor, photos: Tensor | None, words: Tensor, counts: Sequence[int]) -> Tensor:
        """Return the log-probabilities ``(M, V)`` after each word; arguments as in :meth:`Decoder.logits`."""
        return _geometric_mean([member.logits(features, photos, words, counts) for member in self._decoders()])

    def cross_entropy(
        self, features: Tensor, photos: Tensor | None, words: Tensor, targets: Tensor, counts: Sequence[int]
    ) -> Tensor:
        """Return the mean cross-entropy of the ensemble in nats, as :meth:`Decoder.cross_entropy`."""
        return nn.functional.nll_loss(self.logits(features, photos, words, counts), targets)

    @torch.inference_mode()
    def attention_maps(self, features: Tensor, words: Tensor) -> Tensor:
        """Return the attention weights, averaged over the members with attention, as :meth:`Decoder.attention_maps`."""
        maps = [member.attention_maps(features, words) for member in self._decoders() if member.has_attention]
        return torch.stack(maps).mean(0)

    def _decoders(self) -> list[RecurrentDecoder]:
        return cast(list[RecurrentDecoder], list(self.members))


def _geometric_mean(logits: Sequence[Tensor]) -> Tensor:
    """Return the ensemble's log-probabilities ``(..., V)`` from the logits of its members."""
    mean = torch.stack([member.float().log_softmax(-1) for member in logits]).mean(0)
    return mean.log_softmax(-1)
