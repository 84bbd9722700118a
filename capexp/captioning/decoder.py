"""What every decoder is: photo features and the words so far to the next word, step by step or a caption at once.

Decoding, scoring and training know decoders by this interface alone.

Captions are read packed: the longest first, the first word of each, then the second of those that have one, and so on;
``counts[t]`` captions have a t-th word. So none of the work is padding.

Shapes: N photos, B captions, M words, T steps, V vocabulary, P grid positions, F feature, H hidden.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

from torch import Tensor, nn

from capexp.captioning.vocabulary_layer import VocabularyLayer
from capexp.data.vocabulary import PAD


class State(ABC):
    """What a decoder carries from one step to the next, for B captions in work."""

    @abstractmethod
    def select(self, rows: Tensor) -> Self:
        """The state of some of the captions, each as often as ``rows`` ``(B',)`` names it."""

    @abstractmethod
    def repeat(self, times: int) -> Self:
        """The state of as many captions in place of each, one behind the other; a GPU is not waited for."""


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
        """Teacher forcing: the logits at each step of inputs ``(B, T)``, PAD behind the shorter ones: ``(B, T, V)``.

        Caption i is of the photo in row ``photos[i]`` of the features, in row i where ``photos`` is None. With a mask
        ``where`` ``(B, T)``, only the steps it marks pass the vocabulary layer, the largest by far: ``(M, V)``.
        """

    @abstractmethod
    def cross_entropy(
        self, features: Tensor, photos: Tensor | None, words: Tensor, targets: Tensor, counts: Sequence[int]
    ) -> Tensor:
        """What targets ``(M,)`` cost after packed words ``(M,)``, in nats, the mean over targets.

        ``photos`` is as in :meth:`forward`.
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
    """A decoder of one network: ``start`` and ``read`` are its own, the rest follows from them."""

    embedding: nn.Embedding
    vocabulary: VocabularyLayer
    """From the output of a step to the logits of the next word."""

    @abstractmethod
    def read(self, state: State, words: Tensor, counts: Sequence[int]) -> tuple[Tensor, State]:
        """Reads packed words ``(M,)``: the outputs before the vocabulary layer, ``(M, H)``, and the state at the end.

        The state is of as many captions as have a first word.
        """

    def outputs(self, features: Tensor, photos: Tensor | None, words: Tensor, counts: Sequence[int]) -> Tensor:
        """Teacher forcing: the outputs before the vocabulary layer after each of packed words ``(M,)``: ``(M, H)``.

        ``photos`` is as in :meth:`forward`.
        """
        state = self.start(features)
        return self.read(state if photos is None else state.select(photos), words, counts)[0]

    def cross_entropy(
        self, features: Tensor, photos: Tensor | None, words: Tensor, targets: Tensor, counts: Sequence[int]
    ) -> Tensor:
        """What targets cost, as :meth:`Decoder.cross_entropy`."""
        return self.vocabulary.cross_entropy(self.outputs(features, photos, words, counts), targets)[0]

    def step(self, state: State, words: Tensor) -> tuple[Tensor, State]:
        """Reads one more word ``(B,)`` of each caption and gives the logits ``(B, V)`` of the next."""
        outputs, state = self.read(state, words, [len(words)])
        return self.vocabulary(outputs), state

    def advance(self, state: State, words: Tensor) -> tuple[Tensor, State]:
        """Reads words ``(B, T)``, PAD behind the shorter captions: ``read`` for those who hold them so.

        The outputs, ``(B, T, H)``, are zero where PAD is, and the state stays where the caption ended.
        """
        packed = Packed.of(words)
        read, state = self.read(state.select(packed.order), packed.words, packed.counts)
        outputs = read.new_zeros(*words.shape, read.shape[1]).index_put((packed.rows, packed.steps), read)
        return outputs, state.select(packed.order.argsort())

    def forward(
        self, features: Tensor, inputs: Tensor, where: Tensor | None = None, photos: Tensor | None = None
    ) -> Tensor:
        """The logits at each step of captions, as :meth:`Decoder.forward`."""
        state = self.start(features)
        outputs, _ = self.advance(state if photos is None else state.select(photos), inputs)
        logits: Tensor = self.vocabulary(outputs if where is None else outputs[where])
        return logits


@dataclass(frozen=True)
class Packed:
    """The words of B captions that were padded."""

    order: Tensor  # (B,): the captions, the longest first
    rows: Tensor  # (M,): the caption of each word
    steps: Tensor  # (M,): and its place there
    words: Tensor  # (M,)
    counts: list[int]  # words of each step

    @classmethod
    def of(cls, words: Tensor) -> "Packed":
        """From words ``(B, T)``; every caption has one at least."""
        real = words != PAD  # (B, T)
        order = real.sum(1).argsort(descending=True, stable=True)
        steps, captions = real[order].t().nonzero(as_tuple=True)
        rows = order[captions]
        return cls(order, rows, steps, words[rows, steps], [count for count in real.sum(0).tolist() if count])


def normalize(features: Tensor, kind: str) -> Tensor:
    """Features ``(N, P, F)``, each vector scaled as ``model.photo_norm`` says."""
    if kind == "unit":
        return nn.functional.normalize(features, dim=-1)
    if kind == "standard":
        return nn.functional.layer_norm(features, features.shape[-1:])
    return features
