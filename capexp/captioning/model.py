"""The decoders: photo features and the words so far to the next word.

Shapes: B batch, T steps, V vocabulary, P grid positions, F feature, E embedding, H hidden.
"""

from typing import Literal

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

from capexp.data.errors import InputError
from capexp.data.vocabulary import PAD


class ModelConfig(BaseModel):
    """The decoder and its sizes; by default the tutorial's."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    decoder: Literal["merge"] = "merge"
    embedding_size: int = Field(default=256, ge=1, le=8192)
    lstm_units: int = Field(default=256, ge=1, le=8192)
    dropout: float = Field(default=0.5, ge=0, lt=1)
    output_dropout: float = Field(default=0.0, ge=0, lt=1)
    """Dropout before the vocabulary layer, which the tutorial has none of."""
    photo_norm: Literal["none", "unit"] = "none"
    """``unit`` scales each photo's features to length 1 before the decoder reads them."""


class DecoderState:
    """What a decoder carries from one step to the next, for B captions in work."""

    def __init__(self, photo: Tensor, hidden: Tensor, cell: Tensor) -> None:
        self.photo = photo  # (B, H)
        self.hidden = hidden  # (1, B, H)
        self.cell = cell  # (1, B, H)

    def select(self, rows: Tensor) -> "DecoderState":
        """The state of some of the captions, each as often as ``rows`` ``(N,)`` names it."""
        return DecoderState(self.photo[rows], self.hidden[:, rows], self.cell[:, rows])


class MergeDecoder(nn.Module):
    """The merge model (Tanti, Gatt and Camilleri, 2018), with the layers of the Flickr8k tutorial.

    The LSTM reads words only; the photo, made as wide as the LSTM's output, is added to it afterwards. So one
    pass over a whole caption gives the logits of all its prefixes.
    """

    def __init__(self, config: ModelConfig, features: tuple[int, int], vocabulary_size: int) -> None:
        super().__init__()
        positions, size = features
        if positions != 1:
            raise InputError(
                f"model.decoder = 'merge' takes one vector a photo, not a grid of {positions}; "
                "set features.pool = 'mean' or features.layer = 'fc2'"
            )
        units = config.lstm_units
        self.photo_norm = config.photo_norm
        self.dropout = nn.Dropout(config.dropout)
        self.output_dropout = nn.Dropout(config.output_dropout)
        self.photo = nn.Linear(size, units)
        self.embedding = nn.Embedding(vocabulary_size, config.embedding_size, padding_idx=PAD)
        self.lstm = nn.LSTM(config.embedding_size, units, batch_first=True)
        self.dense = nn.Linear(units, units)
        self.vocabulary = nn.Linear(units, vocabulary_size)
        self._initialize()

    def _initialize(self) -> None:
        """Keras's initial values, which the tutorial trains from."""
        for layer in (self.photo, self.dense, self.vocabulary):
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)
        nn.init.uniform_(self.embedding.weight, -0.05, 0.05)
        with torch.no_grad():
            self.embedding.weight[PAD] = 0
        lstm = dict(self.lstm.named_parameters())
        nn.init.xavier_uniform_(lstm["weight_ih_l0"])
        nn.init.orthogonal_(lstm["weight_hh_l0"])
        nn.init.zeros_(lstm["bias_ih_l0"])
        units = self.lstm.hidden_size
        nn.init.ones_(lstm["bias_ih_l0"].data[units : 2 * units])  # remember, to begin with
        # Torch gives an LSTM two biases that are only ever added; one is enough.
        nn.init.zeros_(lstm["bias_hh_l0"])
        lstm["bias_hh_l0"].requires_grad_(False)

    def start(self, features: Tensor) -> DecoderState:
        """The state before the first word, from features ``(B, 1, F)``."""
        photo = features[:, 0]  # (B, F)
        if self.photo_norm == "unit":
            photo = nn.functional.normalize(photo, dim=1)
        photo = torch.relu(self.photo(self.dropout(photo)))  # (B, H)
        zeros = photo.new_zeros(1, len(photo), self.lstm.hidden_size)
        return DecoderState(photo, zeros, zeros)

    def advance(self, state: DecoderState, words: Tensor) -> tuple[Tensor, DecoderState]:
        """Reads words ``(B, T)`` and gives the output before the vocabulary layer, ``(B, T, H)``."""
        embedded = self.dropout(self.embedding(words))  # (B, T, E)
        outputs, (hidden, cell) = self.lstm(embedded, (state.hidden, state.cell))  # (B, T, H)
        merged = torch.relu(self.dense(outputs + state.photo.unsqueeze(1)))
        return self.output_dropout(merged), DecoderState(state.photo, hidden, cell)

    def step(self, state: DecoderState, words: Tensor) -> tuple[Tensor, DecoderState]:
        """Reads one more word ``(B,)`` of each caption and gives the logits ``(B, V)`` of the next."""
        outputs, state = self.advance(state, words.unsqueeze(1))
        return self.vocabulary(outputs[:, 0]), state

    def forward(self, features: Tensor, inputs: Tensor, where: Tensor | None = None) -> Tensor:
        """Teacher forcing: the logits at each step of inputs ``(B, T)``: ``(B, T, V)``.

        With a mask ``where`` ``(B, T)``, only the steps it marks pass the vocabulary layer, the largest by
        far: ``(N, V)``.
        """
        outputs, _ = self.advance(self.start(features), inputs)
        logits: Tensor = self.vocabulary(outputs if where is None else outputs[where])
        return logits

    def parameter_count(self) -> int:
        """Trainable parameters."""
        return sum(value.numel() for value in self.parameters() if value.requires_grad)


def build_decoder(config: ModelConfig, features: tuple[int, int], vocabulary_size: int) -> MergeDecoder:
    """A decoder with fresh weights, for features ``(P, F)`` of a photo and V words.

    Raises:
        InputError: features that the decoder cannot take.
    """
    return MergeDecoder(config, features, vocabulary_size)
