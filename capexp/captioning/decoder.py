"""What every decoder is: photo features and the words so far to the next word, step by step or a caption at once.

Decoding, scoring and training know decoders by this interface alone.

Shapes: N photos, B captions, T steps, V vocabulary, P grid positions, F feature, H hidden.
"""

from abc import ABC, abstractmethod
from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn


class ModelConfig(BaseModel):
    """The decoder and its sizes; by default the tutorial's."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    decoder: Literal["merge", "attention"] = "merge"
    embedding_size: int = Field(default=256, ge=1, le=8192)
    lstm_units: int = Field(default=256, ge=1, le=8192)
    attention_size: int = Field(default=256, ge=1, le=8192)
    """Of the attention decoder: the width in which what it looks for and what is there are compared."""
    dropout: float = Field(default=0.5, ge=0, lt=1)
    output_dropout: float = Field(default=0.0, ge=0, lt=1)
    """Dropout before the vocabulary layer, which the tutorial has none of."""
    photo_norm: Literal["none", "unit", "standard"] = "none"
    """``unit`` scales each vector of a photo's features to length 1 before the decoder reads it, ``standard`` to mean
    0 and variance 1."""


class State(ABC):
    """What a decoder carries from one step to the next, for B captions in work."""

    @abstractmethod
    def select(self, rows: Tensor) -> Self:
        """The state of some of the captions, each as often as ``rows`` ``(B',)`` names it."""


class Decoder(nn.Module, ABC):
    """A decoder: what decoding, scoring and training need of it."""

    looks: bool = False
    """Whether it looks at places of the photo, so that :meth:`look_back` can tell where."""

    @abstractmethod
    def start(self, features: Tensor) -> State:
        """The state before the first word, of a caption a photo, from features ``(N, P, F)``."""

    @abstractmethod
    def step(self, state: State, words: Tensor) -> tuple[Tensor, State]:
        """Reads one more word ``(B,)`` of each caption and gives the logits ``(B, V)`` of the next."""

    @abstractmethod
    def forward(
        self, features: Tensor, inputs: Tensor, where: Tensor | None = None, photos: Tensor | None = None
    ) -> Tensor:
        """Teacher forcing: the logits at each step of inputs ``(B, T)``: ``(B, T, V)``.

        Caption i is of the photo in row ``photos[i]`` of the features, in row i where ``photos`` is None. With a mask
        ``where`` ``(B, T)``, only the steps it marks pass the vocabulary layer, the largest by far: ``(M, V)``.
        """

    def look_back(self, features: Tensor, words: Tensor) -> Tensor:
        """Where each photo, of features ``(N, P, F)``, was looked at for each of its caption's words ``(N, T)``.

        ``(N, T, P)``, without meaning where a caption has ended, in PAD. Only of a decoder that looks.
        """
        raise NotImplementedError

    def parameter_count(self) -> int:
        """Trainable parameters."""
        return sum(value.numel() for value in self.parameters() if value.requires_grad)


class RecurrentDecoder(Decoder):
    """A decoder of one network: ``start`` and ``advance`` are its own, the rest follows from them."""

    embedding: nn.Embedding
    vocabulary: nn.Linear
    """From the output of a step to the logits of the next word."""

    @abstractmethod
    def advance(self, state: State, words: Tensor) -> tuple[Tensor, State]:
        """Reads words ``(B, T)`` and gives the output before the vocabulary layer, ``(B, T, H)``."""

    def step(self, state: State, words: Tensor) -> tuple[Tensor, State]:
        """Reads one more word ``(B,)`` of each caption and gives the logits ``(B, V)`` of the next."""
        outputs, state = self.advance(state, words.unsqueeze(1))
        return self.vocabulary(outputs[:, 0]), state

    def forward(
        self, features: Tensor, inputs: Tensor, where: Tensor | None = None, photos: Tensor | None = None
    ) -> Tensor:
        """The logits at each step of captions, as :meth:`Decoder.forward`."""
        state = self.start(features)
        outputs, _ = self.advance(state if photos is None else state.select(photos), inputs)
        logits: Tensor = self.vocabulary(outputs if where is None else outputs[where])
        return logits


def normalize(features: Tensor, kind: str) -> Tensor:
    """Features ``(N, P, F)``, each vector scaled as ``model.photo_norm`` says."""
    if kind == "unit":
        return nn.functional.normalize(features, dim=-1)
    if kind == "standard":
        return nn.functional.layer_norm(features, features.shape[-1:])
    return features
