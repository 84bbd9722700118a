"""Several decoders that say a caption together, word by word.

Shapes: N photos, B captions, T steps, M marked steps, V vocabulary, P grid positions, F feature.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from capexp.captioning.decoder import Decoder, RecurrentDecoder, State


@dataclass(frozen=True)
class EnsembleState(State):
    """Where each member stands."""

    members: tuple[State, ...]

    def select(self, rows: Tensor) -> "EnsembleState":
        """The state of some of the captions."""
        return EnsembleState(tuple(state.select(rows) for state in self.members))

    def repeat(self, times: int) -> "EnsembleState":
        """The state of as many captions in place of each."""
        return EnsembleState(tuple(state.repeat(times) for state in self.members))


class Ensemble(Decoder):
    """Decoders over the same words and features, which read the same captions.

    The next word's log-probability is the mean of theirs, made to sum to one again: their probabilities' geometric
    mean. So a word needs all of them: one that a single member holds impossible is not said.
    """

    def __init__(self, members: Sequence[RecurrentDecoder]) -> None:
        super().__init__()
        self.members = nn.ModuleList(members)
        self.looks = any(member.looks for member in members)

    def start(self, features: Tensor) -> EnsembleState:
        """The state before the first word, from features ``(N, P, F)``."""
        return EnsembleState(tuple(member.start(features) for member in self._decoders()))

    def step(self, state: State, words: Tensor) -> tuple[Tensor, EnsembleState]:
        """Reads one more word ``(B,)`` of each caption and gives the log-probabilities ``(B, V)`` of the next."""
        assert isinstance(state, EnsembleState)
        pairs = zip(self._decoders(), state.members, strict=True)
        logits, states = zip(*[member.step(one, words) for member, one in pairs], strict=True)
        return _together(logits), EnsembleState(states)

    def forward(
        self, features: Tensor, inputs: Tensor, where: Tensor | None = None, photos: Tensor | None = None
    ) -> Tensor:
        """The log-probabilities at each step of captions, ``(B, T, V)`` or ``(M, V)``, as :meth:`Decoder.forward`."""
        return _together([member(features, inputs, where, photos) for member in self._decoders()])

    def cross_entropy(
        self, features: Tensor, photos: Tensor | None, words: Tensor, targets: Tensor, counts: Sequence[int]
    ) -> Tensor:
        """What targets cost by the members' log-probabilities together, as :meth:`Decoder.cross_entropy`."""
        logits = [one.vocabulary(one.outputs(features, photos, words, counts)) for one in self._decoders()]
        return nn.functional.nll_loss(_together(logits), targets)

    @torch.inference_mode()
    def look_back(self, features: Tensor, words: Tensor) -> Tensor:
        """The mean of where those members looked that look, as :meth:`Decoder.look_back`."""
        looked = [member.look_back(features, words) for member in self._decoders() if member.looks]
        return torch.stack(looked).mean(0)

    def _decoders(self) -> list[RecurrentDecoder]:
        return cast(list[RecurrentDecoder], list(self.members))


def _together(logits: Sequence[Tensor]) -> Tensor:
    """Log-probabilities ``(..., V)`` of the members together."""
    mean = torch.stack([one.float().log_softmax(-1) for one in logits]).mean(0)
    return mean.log_softmax(-1)
