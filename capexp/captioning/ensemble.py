"""Several decoders that say a caption together, word by word, and which experiments they come from.

Shapes: N photos, B captions, T steps, M marked steps, V vocabulary, P grid positions, F feature.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import cast

import torch
from pydantic import BaseModel, ConfigDict, Field, field_validator
from torch import Tensor, nn

from capexp.captioning.decoder import Decoder, RecurrentDecoder, State


class MemberConfig(BaseModel):
    """Captioners of one experiment at some seeds."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    experiment: str = Field(pattern=r"^[^\x00-\x1f\x7f]+$")
    """A name under ``experiments/``, or the path of a TOML file."""
    seeds: tuple[int, ...] = Field(default=(1,), min_length=1)
    settings: Mapping[str, str | int | float | bool] = {}
    """Over those of its file, by dotted name."""

    @field_validator("seeds", mode="before")
    @classmethod
    def _listed(cls, seeds: object) -> object:
        """Strict validation takes a list of JSON for a tuple, but not one that a validator has passed on."""
        return tuple(seeds) if isinstance(seeds, list) else seeds

    @field_validator("settings", mode="before")
    @classmethod
    def _dotted(cls, settings: object) -> object:
        """TOML reads ``{training.epochs = 3}`` as nested tables: back to dotted names."""
        if not isinstance(settings, Mapping):
            return settings
        flat: dict[str, object] = {}
        waiting = list(settings.items())
        while waiting:
            name, value = waiting.pop(0)
            if isinstance(value, Mapping):
                waiting += [(f"{name}.{inner}", deeper) for inner, deeper in value.items()]
            else:
                flat[name] = value
        return flat


class EnsembleConfig(BaseModel):
    """Whose captioners are decoded together; none: the experiment trains one of its own."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    members: tuple[MemberConfig, ...] = ()

    @field_validator("members", mode="before")
    @classmethod
    def _listed(cls, members: object) -> object:
        """As of the seeds."""
        return tuple(members) if isinstance(members, list) else members


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
