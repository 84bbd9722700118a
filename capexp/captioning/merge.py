"""The merge decoder of the tutorial: the LSTM reads the words only, the photo is added to its output.

Shapes: B captions, M words, V vocabulary, F feature, E embedding, H hidden.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from capexp.captioning import lstm
from capexp.captioning.decoder import DecoderState, RecurrentDecoder, normalize
from capexp.captioning.dropout import Dropout
from capexp.captioning.vocabulary_layer import VocabularyLayer
from capexp.data.vocabulary import PAD
from capexp.errors import InputError
from capexp.settings import ModelConfig


@dataclass(frozen=True)
class MergeState(DecoderState):
    """The encoded photo of each caption, and the hidden and cell state of the LSTM."""

    photo: Tensor  # (B, H)
    hidden: Tensor  # (B, H)
    cell: Tensor  # (B, H)

    def select(self, rows: Tensor) -> "MergeState":
        """Return the state of the captions ``rows``."""
        return MergeState(self.photo[rows], self.hidden[rows], self.cell[rows])

    def repeat(self, times: int) -> "MergeState":
        """Return the state with each caption repeated ``times`` times in a row."""
        return MergeState(*(value.repeat_interleave(times, 0) for value in (self.photo, self.hidden, self.cell)))


class MergeDecoder(RecurrentDecoder):
    """The merge model (Tanti, Gatt and Camilleri, 2018), with the layers of the Flickr8k tutorial.

    The LSTM reads the words only. The photo's vector, projected to the size of the LSTM's output, is added to that
    output. The LSTM states therefore do not depend on the photo, and one pass over a caption gives the logits of all
    its prefixes.
    """

    def __init__(self, config: ModelConfig, features: tuple[int, int], vocabulary_size: int) -> None:
        super().__init__()
        positions, size = features
        if positions != 1:
            raise InputError(
                f"model.decoder = 'merge' takes one vector a photo, not a grid of {positions}; "
                "set features.pool = 'mean' or features.layer = 'fc2', or model.decoder = 'attention'"
            )
        units = config.lstm_units
        self.photo_norm = config.photo_norm
        self.dropout = Dropout(config.dropout)
        self.output_dropout = Dropout(config.output_dropout)
        self.photo = nn.Linear(size, units)
        self.embedding = nn.Embedding(vocabulary_size, config.embedding_size, padding_idx=PAD)
        self.lstm = nn.LSTM(config.embedding_size, units)
        self.dense = nn.Linear(units, units)
        self.vocabulary = VocabularyLayer(units, vocabulary_size)
        self._initialize()

    def _initialize(self) -> None:
        """Initialise the weights as Keras does, which the tutorial uses."""
        for layer in (self.photo, self.dense, self.vocabulary):
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)
        nn.init.uniform_(self.embedding.weight, -0.05, 0.05)
        with torch.no_grad():
            self.embedding.weight[PAD] = 0
        weights = dict(self.lstm.named_parameters())
        nn.init.xavier_uniform_(weights["weight_ih_l0"])
        nn.init.orthogonal_(weights["weight_hh_l0"])
        nn.init.zeros_(weights["bias_ih_l0"])
        units = self.lstm.hidden_size
        nn.init.ones_(weights["bias_ih_l0"].data[units : 2 * units])  # forget gate: open at first, the cell is kept
        # Torch gives an LSTM two biases, which are only ever added to each other. One is enough.
        nn.init.zeros_(weights["bias_hh_l0"])
        weights["bias_hh_l0"].requires_grad_(False)

    def start(self, features: Tensor) -> MergeState:
        """Return the state before the first word, from features ``(B, 1, F)``."""
        photo = normalize(features, self.photo_norm)[:, 0]  # (B, F)
        photo = torch.relu(self.photo(self.dropout(photo)))  # (B, H)
        zeros = photo.new_zeros(len(photo), self.lstm.hidden_size)
        return MergeState(photo, zeros, zeros)

    def read(self, state: DecoderState, words: Tensor, counts: Sequence[int]) -> tuple[Tensor, MergeState]:
        """Read packed words ``(M,)``; return the outputs ``(M, H)`` before the vocabulary layer, and the state."""
        assert isinstance(state, MergeState)
        embedded = self.dropout(self.embedding(words))  # (M, E)
        outputs, hidden, cell = lstm.run(self.lstm, embedded, counts, state.hidden, state.cell)
        captions = torch.arange(counts[0], device=words.device)
        rows = torch.cat([captions[:count] for count in counts])  # (M,): the caption of each word
        merged = torch.relu(self.dense(outputs + state.photo.index_select(0, rows)))  # (M, H)
        return self.output_dropout(merged), MergeState(state.photo, hidden, cell)
