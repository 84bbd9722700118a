"""The vocabulary: how captions are cleaned and tokenized, and which words a captioner knows.

Entry 0 is PAD, 1 is BOS (begin of caption), 2 is EOS (end of caption); with ``unknown = "token"`` entry 3 is
UNK. The words follow, most frequent first. Only train captions are counted.
"""

import hashlib
import json
import string
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

from capexp.errors import InputError
from capexp.settings import Cleaning, Unknown, VocabularyConfig

PAD, BOS, EOS, UNK = 0, 1, 2, 3

_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)


def tokenize(caption: str, cleaning: Cleaning) -> list[str]:
    """Return the tokens of a caption.

    Both cleanings lower the case and split at blanks. ``tutorial`` then removes punctuation and drops tokens that hold
    anything but letters, or fewer than two. ``standard`` drops tokens without a letter or digit; "a" and numbers stay.
    """
    tokens = caption.lower().split()
    if cleaning == "standard":
        return [token for token in tokens if any(character.isalnum() for character in token)]
    bare = (token.translate(_NO_PUNCTUATION) for token in tokens)
    return [token for token in bare if len(token) > 1 and token.isalpha()]


@dataclass(frozen=True)
class Vocabulary:
    """The words that a captioner knows, with the cleaning that gives them."""

    words: tuple[str, ...]
    cleaning: Cleaning
    unknown: Unknown

    def __len__(self) -> int:
        """Return the number of entries V: the words, PAD, BOS, EOS and, if there is one, UNK."""
        return self.first_word + len(self.words)

    @property
    def first_word(self) -> int:
        """The entry of ``words[0]``."""
        return UNK + 1 if self.unknown == "token" else UNK

    @cached_property
    def entries(self) -> dict[str, int]:
        """The entry of each word."""
        return {word: entry for entry, word in enumerate(self.words, start=self.first_word)}

    @property
    def never_emitted(self) -> tuple[int, ...]:
        """The entries that no generated caption may contain: PAD, BOS and UNK."""
        return (PAD, BOS, UNK) if self.unknown == "token" else (PAD, BOS)

    def encode(self, caption: str) -> list[int]:
        """Return the entries of a caption's tokens, without BOS and EOS; unknown words become UNK or are dropped."""
        tokens = tokenize(caption, self.cleaning)
        if self.unknown == "token":
            return [self.entries.get(token, UNK) for token in tokens]
        return [self.entries[token] for token in tokens if token in self.entries]

    def decode(self, entries: Iterable[int]) -> str:
        """Return the words of some entries as a caption, up to the first EOS; PAD, BOS and UNK are left out."""
        words = []
        for entry in entries:
            if entry == EOS:
                break
            if entry >= self.first_word:
                words.append(self.words[entry - self.first_word])
        return " ".join(words)

    def digest(self) -> str:
        """Return the hexadecimal SHA-256 of cleaning, unknown and words; only if it is equal can losses be compared."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()

    def to_json(self) -> str:
        """Return the vocabulary as JSON."""
        record = {"cleaning": self.cleaning, "unknown": self.unknown, "words": self.words}
        return json.dumps(record, ensure_ascii=False)


def build_vocabulary(captions: Iterable[str], config: VocabularyConfig) -> Vocabulary:
    """Count the words of the train captions and keep those that occur ``minimum_count`` times or more."""
    counts = Counter(token for caption in captions for token in tokenize(caption, config.cleaning))
    kept = sorted(
        (word for word, count in counts.items() if count >= config.minimum_count),
        key=lambda word: (-counts[word], word),
    )
    if not kept:
        raise InputError(
            f"vocabulary: no word of the train captions is seen vocabulary.minimum_count = "
            f"{config.minimum_count} times or more with cleaning {config.cleaning!r}; lower the count"
        )
    return Vocabulary(tuple(kept), config.cleaning, config.unknown)
