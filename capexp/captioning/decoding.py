"""From a decoder's next-word logits to captions.

Shapes: B batch, V vocabulary.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from capexp.captioning.model import MergeDecoder
from capexp.data.vocabulary import BOS, EOS, Vocabulary


class DecodingConfig(BaseModel):
    """How captions are decoded."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    method: Literal["greedy"] = "greedy"
    maximum_length: int = Field(default=30, ge=1, le=1000)


@dataclass(frozen=True)
class Hypothesis:
    """A caption as entries of the vocabulary, without BOS and EOS."""

    tokens: tuple[int, ...]
    log_probability: float
    """Natural logarithm of the caption's probability, EOS included where the decoder chose to end."""


@torch.inference_mode()
def decode(decoder: MergeDecoder, features: Tensor, vocabulary: Vocabulary, config: DecodingConfig) -> list[Hypothesis]:
    """The most probable next word again and again, for a batch of features ``(B, P, F)`` at once.

    PAD, BOS and UNK are never emitted, and probabilities are those among the entries that may be; a caption
    ends with EOS or at ``maximum_length`` words.
    """
    decoder.eval()
    state = decoder.start(features)
    words = torch.full((len(features),), BOS, device=features.device)
    forbidden = torch.tensor(vocabulary.never_emitted, device=features.device)
    ended = torch.zeros(len(features), dtype=torch.bool, device=features.device)
    total = torch.zeros(len(features), device=features.device)
    chosen = []
    for _ in range(config.maximum_length):
        logits, state = decoder.step(state, words)  # (B, V)
        log_probabilities = logits.float().index_fill(1, forbidden, -torch.inf).log_softmax(1)
        best, words = log_probabilities.max(1)  # (B,)
        words = torch.where(ended, EOS, words)
        total += torch.where(ended, 0.0, best)
        ended |= words == EOS
        chosen.append(words)
        if bool(ended.all()):
            break
    hypotheses = []
    for entries, log_probability in zip(torch.stack(chosen, 1).tolist(), total.tolist(), strict=True):
        length = entries.index(EOS) if EOS in entries else len(entries)
        hypotheses.append(Hypothesis(tuple(entries[:length]), log_probability))
    return hypotheses
