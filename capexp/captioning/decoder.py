"""The interface of all decoders: from photo features and the words so far to the logits of the next word.

Decoding, scoring and training use decoders through this interface alone, step by step or a whole caption at once.

Captions are read as a packed batch, without padding: the captions are sorted by length, the longest first; the batch
contains the first word of each caption, then the second word of each caption that has one, and so on. ``counts[t]`` is
the number of captions that have a t-th word.

Shapes: N photos, B captions, M words, T steps, V vocabulary, P grid positions, F feature, H hidden.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor, nn

from capexp.captioning.vocabulary_layer import VocabularyLayer
from capexp.data.vocabulary import PAD


class DecoderState(ABC):
    """What a decoder carries from one step to the next, for B captions."""

    @abstractmethod
    def select(self, rows: Tensor) -> Self:
        """Return the state of the captions ``rows`` ``(B',)``; a caption may be named several times."""

    @abstractmethod
    def repeat(self, times: int) -> Self:
        """Return the state with each caption repeated ``times`` times in a row, without synchronising with the GPU."""


class Decoder(nn.Module, ABC):
    """The base class of decoders: the methods that decoding, scoring and training need."""

    has_attention: bool = False
    """Whether the decoder attends to the positions of a grid, so that it has :meth:`attention_maps`."""

    @abstractmethod
    def start(self, features: Tensor) -> DecoderState:
        """Return the state before the first word, for one caption per photo, from features ``(N, P, F)``."""

    @abstractmethod
    def step(self, state: DecoderState, words: Tensor) -> tuple[Tensor, DecoderState]:
        """Read one more word ``(B,)`` of each caption; return the logits ``(B, V)`` of the next one, and the state."""

    @abstractmethod
    def logits(self, features: Tensor, photos: Tensor | None, words: Tensor, counts: Sequence[int]) -> Tensor:
        """Return the logits ``(M, V)`` after each of packed words ``(M,)``, with teacher forcing.

        ``photos[i]`` is the row of caption i's photo in the features; without ``photos`` it is row i. Caption 0 is the
        longest, and ``counts`` are the numbers of captions that have a word at each step.
        """

    @abstractmethod
    def cross_entropy(
        self, features: Tensor, photos: Tensor | None, words: Tensor, targets: Tensor, counts: Sequence[int]
    ) -> Tensor:
        """Return the mean cross-entropy, in nats, of targets ``(M,)`` after packed words ``(M,)``.

        ``photos`` is as in :meth:`Decoder.logits`.
        """

    def attention_maps(self, features: Tensor, words: Tensor) -> Tensor:
        """Return the attention weights ``(N, T, P)`` for each word ``(N, T)`` of a caption of each photo ``(N, P, F)``.

        The weights are meaningless at PAD, where a caption has ended. Only for a decoder with attention.
        """
        raise NotImplementedError

    def parameter_count(self) -> int:
        """Return the number of trainable parameters."""
        return sum(value.numel() for value in self.parameters() if value.requires_grad)


class RecurrentDecoder(Decoder):
    """A decoder of one network. A subclass defines ``start`` and ``read``; all other methods are built on these."""

    embedding: nn.Embedding
    vocabulary: VocabularyLayer
    """The layer that turns the output of a step into the logits of the next word."""

    @abstractmethod
    def read(self, state: DecoderState, words: Tensor, counts: Sequence[int]) -> tuple[Tensor, DecoderState]:
        """Read packed words ``(M,)``; return the outputs ``(M, H)`` before the vocabulary layer, and the final state.

        Both the given and the final state have one row for each caption.
        """

    def outputs(self, features: Tensor, photos: Tensor | None, words: Tensor, counts: Sequence[int]) -> Tensor:
        """Return the outputs ``(M, H)`` before the vocabulary layer for packed words ``(M,)``, with teacher forcing.

        ``photos`` is as in :meth:`Decoder.logits`.
        """
        state = self.start(features)
        return self.read(state if photos is None else state.select(photos), words, counts)[0]

    def logits(self, features: Tensor, photos: Tensor | None, words: Tensor, counts: Sequence[int]) -> Tensor:
        """Return the logits after each word, as :meth:`Decoder.logits`."""
        logits: Tensor = self.vocabulary(self.outputs(features, photos, words, counts))
        return logits

    def cross_entropy(
        self, features: Tensor, photos: Tensor | None, words: Tensor, targets: Tensor, counts: Sequence[int]
    ) -> Tensor:
        """Return the mean cross-entropy in nats, as :meth:`Decoder.cross_entropy`."""
        return self.vocabulary.cross_entropy(self.outputs(features, photos, words, counts), targets)[0]

    def step(self, state: DecoderState, words: Tensor) -> tuple[Tensor, DecoderState]:
        """Read one more word ``(B,)`` of each caption; return the logits ``(B, V)`` of the next one, and the state."""
        outputs, state = self.read(state, words, [len(words)])
        return self.vocabulary(outputs), state


@dataclass(frozen=True)
class Packed:
    """The words of B padded captions as a packed batch."""

    order: Tensor  # (B,): the captions, the longest first
    rows: Tensor  # (M,): the caption of each word
    steps: Tensor  # (M,): the position of each word in its caption
    words: Tensor  # (M,)
    counts: list[int]  # the number of words at each step

    @classmethod
    def of(cls, words: Tensor) -> "Packed":
        """Pack words ``(B, T)``; every caption has at least one word."""
        real = words != PAD  # (B, T)
        order = real.sum(1).argsort(descending=True, stable=True)
        steps, captions = real[order].t().nonzero(as_tuple=True)
        rows = order[captions]
        return cls(order, rows, steps, words[rows, steps], [count for count in real.sum(0).tolist() if count])


def normalize(features: Tensor, kind: str) -> Tensor:
    """Return features ``(N, P, F)`` with each vector scaled as ``model.photo_norm`` says."""
    if kind == "unit":
        return nn.functional.normalize(features, dim=-1)
    if kind == "standard":
        return nn.functional.layer_norm(features, features.shape[-1:])
    return features


def distinct(values: Tensor) -> tuple[Tensor, Tensor | None]:
    """Return the distinct ones among some integers ``(B,)``, and the place of each integer among these.

    On a GPU, where counting them would mean waiting, it returns all integers, and None for their places.
    """
    if values.is_cuda:
        return values, None
    kept, places = torch.unique(values, return_inverse=True)
    return (values, None) if len(kept) == len(values) else (kept, places)
