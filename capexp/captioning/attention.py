"""The attention decoder: at each word it looks at the places of a photo's grid that matter for the next one.

Shapes: N photos, B captions, M words, T steps, V vocabulary, P grid positions, F feature, E embedding, H hidden,
A attention, K captions of one photo.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from capexp.captioning.decoder import RecurrentDecoder, State, normalize
from capexp.captioning.dropout import Dropout
from capexp.captioning.recurrent_linear import RecurrentLinear
from capexp.captioning.vocabulary_layer import VocabularyLayer
from capexp.data.vocabulary import BOS, PAD
from capexp.settings import ModelConfig


@dataclass(frozen=True)
class Grid:
    """The grids of N photos, at which B captions look: computed once a photo, however many captions it has."""

    keys: Tensor  # (N, P, A): what is compared with what a caption looks for
    values: Tensor  # (N, P, H): what it sees there
    photos: Tensor  # (B,): the photo of each caption
    places: Tensor  # (B,): a place for each caption, K a photo
    most: int  # K, the most captions that one photo has

    @classmethod
    def of(cls, keys: Tensor, values: Tensor) -> "Grid":
        """With one caption a photo."""
        each = torch.arange(len(keys), device=keys.device)
        return cls(keys, values, each, each, 1)

    def select(self, rows: Tensor) -> "Grid":
        """For some of the captions; the photos' grids are not copied."""
        photos = self.photos[rows]
        if torch.equal(photos, self.photos):  # beam search reorders the captions of a photo only
            return self
        counts = photos.bincount(minlength=len(self.keys))
        most = int(counts.max())
        order = photos.argsort(stable=True)
        first = counts.cumsum(0) - counts
        rank = torch.empty_like(photos)
        rank[order] = torch.arange(len(photos), device=photos.device) - first[photos[order]]
        return replace(self, photos=photos, places=photos * most + rank, most=most)

    def repeat(self, times: int) -> "Grid":
        """For as many captions in place of each."""
        places = self.places.unsqueeze(1) * times + torch.arange(times, device=self.places.device)
        return replace(
            self, photos=self.photos.repeat_interleave(times), places=places.flatten(), most=self.most * times
        )

    def look(self, queries: Tensor) -> tuple[Tensor, Tensor]:
        """What captions see ``(B', H)`` by their queries ``(B', A)``, and how they spread their attention ``(B', P)``.

        The first B' captions look; the others have ended.
        """
        photos, positions, size = self.keys.shape
        # All captions of a photo share one product of matrices, instead of a copy of the grid each.
        places = self.places[: len(queries)]
        slots = queries.new_zeros(photos * self.most, size).index_copy(0, places, queries)
        scores = slots.view(photos, self.most, size) @ self.keys.transpose(1, 2) / math.sqrt(size)  # (N, K, P)
        weights = scores.softmax(-1)
        seen = weights.to(self.values.dtype) @ self.values  # (N, K, H)
        return seen.flatten(0, 1).index_select(0, places), weights.view(-1, positions)[places]


@dataclass(frozen=True)
class AttentionState(State):
    """Where both LSTMs stand, and where they look."""

    grid: Grid
    gates: Tensor  # (N, 4H): the photo's part in the attention LSTM's gates
    hidden: tuple[Tensor, Tensor]  # (B, H) each: of the attention LSTM, of the language LSTM
    cells: tuple[Tensor, Tensor]  # (B, H) each
    weights: Tensor  # (B, P): where the last word was looked for; they sum to 1

    def select(self, rows: Tensor) -> "AttentionState":
        """The state of some of the captions."""
        (h1, h2), (c1, c2) = self.hidden, self.cells
        return AttentionState(
            self.grid.select(rows), self.gates, (h1[rows], h2[rows]), (c1[rows], c2[rows]), self.weights[rows]
        )

    def repeat(self, times: int) -> "AttentionState":
        """The state of as many captions in place of each."""
        each = (*self.hidden, *self.cells, self.weights)
        h1, h2, c1, c2, weights = (value.repeat_interleave(times, 0) for value in each)
        return AttentionState(self.grid.repeat(times), self.gates, (h1, h2), (c1, c2), weights)


class AttentionDecoder(RecurrentDecoder):
    """Two LSTMs over a grid of features (Anderson et al., "Bottom-up and top-down attention", CVPR 2018).

    The attention LSTM reads the word, the whole photo and what the language LSTM has said, and from its output the
    grid is looked at; the language LSTM reads what was seen and says the next word. Attention is a scaled dot product
    instead of their additive one: it is a product of matrices for all captions of a photo together.
    """

    def __init__(self, config: ModelConfig, features: tuple[int, int], vocabulary_size: int) -> None:
        super().__init__()
        positions, size = features
        self.looks = positions > 1
        units = config.lstm_units
        self.units = units
        self.photo_norm = config.photo_norm
        self.dropout = Dropout(config.dropout)
        self.output_dropout = Dropout(config.output_dropout)
        self.embedding = nn.Embedding(vocabulary_size, config.embedding_size, padding_idx=PAD)
        self.values = nn.Linear(size, units)
        self.keys = nn.Linear(units, config.attention_size, bias=False)
        self.queries = RecurrentLinear(units, config.attention_size, bias=False)
        # The attention LSTM's gates are a sum: what is known of all steps at once, and what each step adds.
        self.word_gates = nn.Linear(config.embedding_size, 4 * units)
        self.photo_gates = nn.Linear(units, 4 * units, bias=False)
        self.attention_gates = RecurrentLinear(2 * units, 4 * units, bias=False)
        self.language_gates = RecurrentLinear(3 * units, 4 * units)
        self.vocabulary = VocabularyLayer(units, vocabulary_size)
        self._initialize()

    def _initialize(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        # A fresh LSTM says little, and behind two of them little is heard of the words: with Keras's smaller values for
        # these two layers the first hundred steps on Flickr8k come to 4.96 nats a token instead of 4.08.
        nn.init.normal_(self.embedding.weight)
        nn.init.normal_(self.vocabulary.weight, std=0.1)
        with torch.no_grad():
            self.embedding.weight[PAD] = 0
            for gates in (self.word_gates, self.language_gates):
                gates.bias[self.units : 2 * self.units] = 1  # remember, to begin with

    def start(self, features: Tensor) -> AttentionState:
        """The state before the first word, from features ``(N, P, F)``."""
        values = self.dropout(torch.relu(self.values(normalize(features, self.photo_norm))))  # (N, P, H)
        grid = Grid.of(self.keys(values), values)
        gates = self.photo_gates(values.mean(1))  # (N, 4H)
        # In the features' precision: in bfloat16, which the layers may give, a cell would forget by rounding.
        zeros = features.new_zeros(len(values), self.units)
        nowhere = features.new_zeros(features.shape[:2])
        return AttentionState(grid, gates, (zeros, zeros), (zeros, zeros), nowhere)

    def read(self, state: State, words: Tensor, counts: Sequence[int]) -> tuple[Tensor, AttentionState]:
        """Reads packed words ``(M,)``: the outputs before the vocabulary layer, ``(M, H)``."""
        assert isinstance(state, AttentionState)
        captions = state.grid.photos
        known = state.gates.index_select(0, torch.cat([captions[:count] for count in counts]))
        known = known + self.word_gates(self.dropout(self.embedding(words)))  # (M, 4H)
        (h1, h2), (c1, c2), weights = state.hidden, state.cells, state.weights
        layers = (self.attention_gates, self.language_gates, self.queries)
        attend, say, ask = (layer.over_steps() for layer in layers)
        outputs, ended = [], []
        for gates in known.split(list(counts)):
            reading = len(gates)
            if reading < len(h1):
                ended.append([value[reading:] for value in (h1, h2, c1, c2, weights)])
                h1, h2, c1, c2, weights = (value[:reading] for value in (h1, h2, c1, c2, weights))
            h1, c1 = _lstm(gates + attend(torch.cat([h1, h2], 1)), c1)
            seen, weights = state.grid.look(ask(h1))
            h2, c2 = _lstm(say(torch.cat([seen, h1, h2], 1)), c2)
            outputs.append(h2)
        parts = [[h1, h2, c1, c2, weights], *reversed(ended)]
        h1, h2, c1, c2, weights = (torch.cat(values) for values in zip(*parts, strict=True))
        state = replace(state, hidden=(h1, h2), cells=(c1, c2), weights=weights)
        return self.output_dropout(torch.cat(outputs)), state

    @torch.inference_mode()
    def look_back(self, features: Tensor, words: Tensor) -> Tensor:
        """Where each photo was looked at for each word, as :meth:`Decoder.look_back`."""
        self.eval()
        state, weights = self.start(features), []
        read = torch.cat([torch.full_like(words[:, :1], BOS), words[:, :-1]], 1)  # (N, T)
        for step in range(words.shape[1]):
            _, state = self.read(state, read[:, step], [len(words)])
            weights.append(state.weights)
        return torch.stack(weights, 1)


def _lstm(gates: Tensor, cell: Tensor) -> tuple[Tensor, Tensor]:
    """One step of an LSTM from its gates ``(B, 4H)`` before their functions: output and cell, ``(B, H)`` each."""
    enter, keep, new, leave = gates.chunk(4, 1)
    cell = keep.sigmoid() * cell + enter.sigmoid() * new.tanh()
    return leave.sigmoid() * cell.tanh(), cell
