"""The attention decoder: for each word it attends to the positions of a photo's grid of features.

Shapes: N photos, B captions, M words, T steps, V vocabulary, P grid positions, F feature, E embedding, H hidden,
A attention, K captions of one photo, D distinct histories of captions.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from capexp.captioning.decoder import DecoderState, RecurrentDecoder, distinct, normalize
from capexp.captioning.dropout import Dropout
from capexp.captioning.recurrent_linear import RecurrentLinear
from capexp.captioning.vocabulary_layer import VocabularyLayer
from capexp.data.vocabulary import BOS, PAD
from capexp.settings import ModelConfig

_MANY = 16
"""Captions per photo from which on a step averages the gates of the grid's positions, see :meth:`Grid.with_gates`.

Then a caption's 49 products with a weight are saved if it has four steps or more.
"""


@dataclass(frozen=True)
class Grid:
    """The keys and values of N photos' grids, to which B captions attend.

    They are computed once per photo, however many captions the photo has.
    """

    keys: Tensor  # (N, P, A): compared with the captions' queries
    values: Tensor  # (N, P, H): averaged by the attention weights
    photos: Tensor  # (B,): the photo of each caption
    slots: Tensor  # (B,): a slot of its own for each caption, among the K slots of its photo
    capacity: int  # K, the slots per photo: the largest number of captions that one photo has
    gates: Tensor | None = None  # (N, P, 4H): averaged in place of the values, see :meth:`with_gates`

    @classmethod
    def of(cls, keys: Tensor, values: Tensor) -> "Grid":
        """Return the grids with one caption per photo."""
        photos = torch.arange(len(keys), device=keys.device)
        return cls(keys, values, photos, photos, 1)

    def select(self, rows: Tensor) -> "Grid":
        """Return the grids for the captions ``rows``; keys and values are not copied."""
        photos = self.photos[rows]
        if torch.equal(photos, self.photos):  # beam search only reorders the captions of each photo
            return self
        counts = photos.bincount(minlength=len(self.keys))
        capacity = int(counts.max())
        order = photos.argsort(stable=True)
        first = counts.cumsum(0) - counts
        rank = torch.empty_like(photos)  # (B,): the rank of each caption among the captions of its photo
        rank[order] = torch.arange(len(photos), device=photos.device) - first[photos[order]]
        return replace(self, photos=photos, slots=photos * capacity + rank, capacity=capacity)

    def repeat(self, times: int) -> "Grid":
        """Return the grids for captions that are each repeated ``times`` times in a row."""
        slots = self.slots.unsqueeze(1) * times + torch.arange(times, device=self.slots.device)
        return replace(
            self, photos=self.photos.repeat_interleave(times), slots=slots.flatten(), capacity=self.capacity * times
        )

    def with_gates(self, weight: Tensor) -> "Grid":
        """Return grids whose attended features are gates ``(B', 4H)``: their product with a weight ``(4H, H)``.

        The order of average and product is changed: the product is computed once for all positions of a photo, instead
        of at each step for each of its captions.
        """
        return self if self.gates is not None else replace(self, gates=nn.functional.linear(self.values, weight))

    def attend(self, queries: Tensor) -> tuple[Tensor, Tensor]:
        """Return the attended features ``(B', H)`` and the attention weights ``(B', P)`` for queries ``(B', A)``.

        There is one query for each of the first B' captions; the other captions have ended.
        """
        photos, positions, size = self.keys.shape
        # One matrix product for all captions of a photo, instead of a copy of the grid for each caption.
        slots = self.slots[: len(queries)]
        by_slot = queries.new_zeros(photos * self.capacity, size).index_copy(0, slots, queries)
        scores = by_slot.view(photos, self.capacity, size) @ self.keys.transpose(1, 2) / math.sqrt(size)  # (N, K, P)
        weights = scores.softmax(-1)
        values = self.values if self.gates is None else self.gates
        attended = weights.to(values.dtype) @ values  # (N, K, H)
        return attended.flatten(0, 1).index_select(0, slots), weights.view(-1, positions)[slots]


@dataclass(frozen=True)
class AttentionState(DecoderState):
    """The hidden and cell states of both LSTMs, and the last attention weights.

    Captions that continue the same caption share one row of these: a step multiplies each row by the recurrent weights
    once, however many captions go on from it.
    """

    grid: Grid
    gates: Tensor  # (N, 4H): the photo's contribution to the attention LSTM's gates
    hidden: tuple[Tensor, Tensor]  # (D, H) each: the attention LSTM's and the language LSTM's
    cells: tuple[Tensor, Tensor]  # (D, H) each: the same
    weights: Tensor  # (D, P): the attention weights with which the last output was computed; they sum to 1
    rows: Tensor | None = None  # (B,): the row of each caption; None if row i is caption i's

    def select(self, rows: Tensor) -> "AttentionState":
        """Return the state of the captions ``rows``."""
        kept, places = distinct(rows if self.rows is None else self.rows[rows])
        return replace(self._of_rows(kept), grid=self.grid.select(rows), rows=places)

    def repeat(self, times: int) -> "AttentionState":
        """Return the state with each caption repeated ``times`` times in a row."""
        grid = self.grid.repeat(times)
        rows = torch.arange(len(self.hidden[0]), device=grid.photos.device) if self.rows is None else self.rows
        return replace(self, grid=grid, rows=rows.repeat_interleave(times))

    def with_own_rows(self) -> "AttentionState":
        """Return the same state with a row for each caption."""
        return self if self.rows is None else replace(self._of_rows(self.rows), rows=None)

    def _of_rows(self, rows: Tensor) -> "AttentionState":
        (h1, h2), (c1, c2) = self.hidden, self.cells
        return replace(self, hidden=(h1[rows], h2[rows]), cells=(c1[rows], c2[rows]), weights=self.weights[rows])


class AttentionDecoder(RecurrentDecoder):
    """Two LSTMs over a grid of features (Anderson et al., "Bottom-up and top-down attention", CVPR 2018).

    At each step the attention LSTM reads the word, the mean of the photo's grid and the last output of the language
    LSTM; its output gives the query for the attention over the grid. The language LSTM reads the attended features and
    the attention LSTM's output; its output predicts the next word. The attention is a scaled dot product instead of the
    paper's additive one, because that is one matrix product for all captions of a photo.
    """

    def __init__(self, config: ModelConfig, features: tuple[int, int], vocabulary_size: int) -> None:
        super().__init__()
        positions, size = features
        self.has_attention = positions > 1
        units = config.lstm_units
        self.units = units
        self.photo_norm = config.photo_norm
        self.dropout = Dropout(config.dropout)
        self.output_dropout = Dropout(config.output_dropout)
        self.embedding = nn.Embedding(vocabulary_size, config.embedding_size, padding_idx=PAD)
        self.values = nn.Linear(size, units)
        self.keys = nn.Linear(units, config.attention_size, bias=False)
        self.queries = RecurrentLinear(units, config.attention_size, bias=False)
        # The attention LSTM's gates are a sum of three products. The products with the words and the photo are
        # computed for all steps at once, the product with the two LSTMs' outputs at each step.
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
        # An untrained LSTM has small outputs, so that after two of them the words have little effect. With Keras's
        # smaller initial values for the embedding and the vocabulary layer, the first hundred steps on Flickr8k reach
        # 4.96 nats per token instead of 4.08.
        nn.init.normal_(self.embedding.weight)
        nn.init.normal_(self.vocabulary.weight, std=0.1)
        with torch.no_grad():
            self.embedding.weight[PAD] = 0
            for gates in (self.word_gates, self.language_gates):
                gates.bias[self.units : 2 * self.units] = 1  # forget gate: open at first, so that the cell is kept

    def start(self, features: Tensor) -> AttentionState:
        """Return the state before the first word, from features ``(N, P, F)``."""
        values = self.dropout(torch.relu(self.values(normalize(features, self.photo_norm))))  # (N, P, H)
        grid = Grid.of(self.keys(values), values)
        gates = self.photo_gates(values.mean(1))  # (N, 4H)
        # In the precision of the features: the layers may return bfloat16, whose rounding would make a cell forget.
        zeros = features.new_zeros(len(values), self.units)
        weights = features.new_zeros(features.shape[:2])
        return AttentionState(grid, gates, (zeros, zeros), (zeros, zeros), weights)

    def read(self, state: DecoderState, words: Tensor, counts: Sequence[int]) -> tuple[Tensor, AttentionState]:
        """Read packed words ``(M,)``; return the outputs ``(M, H)`` before the vocabulary layer, and the state."""
        assert isinstance(state, AttentionState)
        state = state.with_own_rows()
        # The part of the attention LSTM's gates that is known for all steps at once.
        captions = state.grid.photos
        precomputed = state.gates.index_select(0, torch.cat([captions[:count] for count in counts]))
        precomputed = precomputed + self.word_gates(self.dropout(self.embedding(words)))  # (M, 4H)
        # The steps; the state of the captions that have ended is set aside.
        (h1, h2), (c1, c2), weights = state.hidden, state.cells, state.weights
        layers = (self.attention_gates, self.language_gates, self.queries)
        attention_gates, language_gates, query = (layer.over_steps() for layer in layers)
        outputs, ended = [], []
        for gates in precomputed.split(list(counts)):
            active = len(gates)
            if active < len(h1):
                ended.append([value[active:] for value in (h1, h2, c1, c2, weights)])
                h1, h2, c1, c2, weights = (value[:active] for value in (h1, h2, c1, c2, weights))
            h1, c1 = _lstm_step(gates + attention_gates(torch.cat([h1, h2], 1)), c1)
            attended, weights = state.grid.attend(query(h1))
            h2, c2 = _lstm_step(language_gates(torch.cat([attended, h1, h2], 1)), c2)
            outputs.append(h2)
        # The longest captions come first, so those that ended last come next.
        parts = [[h1, h2, c1, c2, weights], *reversed(ended)]
        h1, h2, c1, c2, weights = (torch.cat(values) for values in zip(*parts, strict=True))
        state = replace(state, hidden=(h1, h2), cells=(c1, c2), weights=weights)
        return self.output_dropout(torch.cat(outputs)), state

    def step(self, state: DecoderState, words: Tensor) -> tuple[Tensor, AttentionState]:
        """Read one more word of each caption, as :meth:`Decoder.step`.

        The same as :meth:`read`, but what depends only on a word, or only on a row of the state, is computed once for
        all captions with that word or row.
        """
        assert isinstance(state, AttentionState)
        (h1, h2), (c1, c2), rows, grid = state.hidden, state.cells, state.rows, state.grid
        from_attended, from_h1, from_h2 = torch.split(self.language_gates.weight, self.units, 1)
        if len(words) >= _MANY * len(grid.keys):
            grid = grid.with_gates(from_attended)
        entries, places = distinct(words)
        gates = _of(self.word_gates(self.dropout(self.embedding(entries))), places)  # (B, 4H)
        gates = gates + state.gates.index_select(0, grid.photos)
        gates = gates + _of(self.attention_gates(torch.cat([h1, h2], 1)), rows)
        language_gates = _of(nn.functional.linear(h2, from_h2, self.language_gates.bias), rows)  # (B, 4H)
        h1, c1 = _lstm_step(gates, _of(c1, rows))
        attended, weights = grid.attend(self.queries(h1))
        if grid.gates is None:
            attended = nn.functional.linear(attended, from_attended)
        language_gates = language_gates + attended + nn.functional.linear(h1, from_h1)
        h2, c2 = _lstm_step(language_gates, _of(c2, rows))
        state = AttentionState(grid, state.gates, (h1, h2), (c1, c2), weights)
        return self.vocabulary(self.output_dropout(h2)), state

    @torch.inference_mode()
    def attention_maps(self, features: Tensor, words: Tensor) -> Tensor:
        """Return the attention weights ``(N, T, P)`` for each word of a caption, as :meth:`Decoder.attention_maps`."""
        self.eval()
        state, weights = self.start(features), []
        inputs = torch.cat([torch.full_like(words[:, :1], BOS), words[:, :-1]], 1)  # (N, T)
        for step in range(words.shape[1]):
            _, state = self.read(state, inputs[:, step], [len(words)])
            weights.append(state.weights)
        return torch.stack(weights, 1)


def _lstm_step(gates: Tensor, cell: Tensor) -> tuple[Tensor, Tensor]:
    """Return output and cell of one LSTM step, ``(B, H)`` each, from its gates ``(B, 4H)`` before their activations."""
    input_gate, forget_gate, candidate, output_gate = gates.chunk(4, 1)
    cell = forget_gate.sigmoid() * cell + input_gate.sigmoid() * candidate.tanh()
    return output_gate.sigmoid() * cell.tanh(), cell


def _of(values: Tensor, rows: Tensor | None) -> Tensor:
    """Return ``values[rows]``, or the values as they are without rows."""
    return values if rows is None else values.index_select(0, rows)
