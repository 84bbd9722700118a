"""The reward of sampled captions in the self-critical phase: their CIDEr-D, compared with the photo's other samples.

Shapes: K captions per photo, B captions in all, N photos.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from capexp.data.vocabulary import EOS, PAD, Vocabulary
from capexp.metrics.cider import CiderReferences
from capexp.metrics.scores import is_split_alone, tokenize

_END = ""  # a token for the end of a caption, which is rewarded too: otherwise captions learn to end with "in a"


class Reward:
    """The reward of a caption: its CIDEr-D, with the end as a token. The references' n-grams are counted once."""

    def __init__(self, references: Sequence[Sequence[str]], vocabulary: Vocabulary) -> None:
        rule, words = vocabulary.tokens, enumerate(vocabulary.words, start=vocabulary.first_word)
        self._vocabulary = vocabulary
        self._references = CiderReferences(
            [[(*tokenize(caption, rule), _END) for caption in captions] for captions in references]
        )
        self._end = self._references.token_ids([_END])
        # The scorer's tokens of each entry whose tokens do not depend on the entries beside it.
        self._tokens: dict[int, list[int]] = {EOS: [], PAD: []} | {
            entry: self._references.token_ids(tokenize(word, rule))
            for entry, word in words
            if is_split_alone(word, rule)
        }

    def of(self, photos: Sequence[int], captions: Sequence[Sequence[int]]) -> Tensor:
        """Return the CIDEr-D, from 0 to 10, of captions given as entries of the vocabulary, PAD and EOS included.

        ``photos`` are the positions of their photos in the split.
        """
        scores = self._references.score(photos, [self._token_ids(caption) for caption in captions])
        return torch.from_numpy(scores[:, 0].astype(np.float32))

    def _token_ids(self, caption: Sequence[int]) -> list[int]:
        tokens = self._tokens
        if all(entry in tokens for entry in caption):
            return [token for entry in caption for token in tokens[entry]] + self._end
        text = self._vocabulary.decode(entry for entry in caption if entry not in (EOS, PAD))
        return self._references.token_ids(tokenize(text, self._vocabulary.tokens)) + self._end


def advantages(rewards: Tensor, samples: int) -> Tensor:
    """Return each reward minus the mean reward of the photo's other captions, ``(B,)``; they sum to 0 per photo."""
    by_photo = rewards.view(-1, samples)  # (N, K)
    others = (by_photo.sum(1, keepdim=True) - by_photo) / (samples - 1)
    return (by_photo - others).flatten()
