"""Words to numbers and back: how captions are cleaned, and which words a captioner knows.

Entry 0 is PAD, 1 is BOS (begin of caption), 2 is EOS (end of caption); with ``unknown = "token"`` entry 3 is
UNK; the words follow, most frequent first. Only train captions are counted.
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
    """The tokens of a caption.

    ``tutorial``: lower-case, punctuation off, then only words of two letters or more that hold nothing but
    letters. ``standard``: lower-case, split at blanks, tokens without any letter or digit dropped; "a" and
    numbers stay.
    """
    tokens = caption.lower().split()
    if cleaning == "standard":
        return [token for token in tokens if any(character.isalnum() for character in token)]
    bare = (token.translate(_NO_PUNCTUATION) for token in tokens)
    return [token for token in bare if len(token) > 1 and token.isalpha()]


@dataclass(frozen=True)
class Vocabulary:
    """The words that a captioner reads and writes, with the cleaning that makes them."""

    words: tuple[str, ...]
    cleaning: Cleaning
    unknown: Unknown

    def __len__(self) -> int:
        """The number of entries V, PAD, BOS, EOS and (if kept) UNK included."""
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
        """Entries that no caption may hold: PAD, BOS and UNK."""
        return (PAD, BOS, UNK) if self.unknown == "token" else (PAD, BOS)

    def encode(self, caption: str) -> list[int]:
        """The entries of a caption's tokens, without BOS and EOS; unknown words as the policy says."""
        tokens = tokenize(caption, self.cleaning)
        if self.unknown == "token":
            return [self.entries.get(token, UNK) for token in tokens]
        return [self.entries[token] for token in tokens if token in self.entries]

    def decode(self, entries: Iterable[int]) -> str:
        """The caption that some entries spell, up to the first EOS."""
        words = []
        for entry in entries:
            if entry == EOS:
                break
            if entry >= self.first_word:
                words.append(self.words[entry - self.first_word])
        return " ".join(words)

    def digest(self) -> str:
        """Hexadecimal SHA-256 of cleaning, unknown policy and words: losses compare only where it is equal."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()

    def to_json(self) -> str:
        """The vocabulary as JSON."""
        record = {"cleaning": self.cleaning, "unknown": self.unknown, "words": self.words}
        return json.dumps(record, ensure_ascii=False)


def build_vocabulary(captions: Iterable[str], config: VocabularyConfig) -> Vocabulary:
    """Counts the words of the train captions and keeps those seen ``minimum_count`` times or more.

    Raises:
        InputError: no word is left.
    """
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
