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

from capexp.data.tokenizer import BRACKETS, lower, split_characters, split_words
from capexp.errors import InputError
from capexp.settings import Cleaning, TokenRule, Unknown, VocabularyConfig

PAD, BOS, EOS, UNK = 0, 1, 2, 3

_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)


def tokenize(caption: str, cleaning: Cleaning, rule: TokenRule) -> list[str]:
    """Return the tokens of a caption.

    Cleaning ``standard`` splits by ``rule`` and drops brackets and tokens without a letter or digit. ``tutorial``
    splits at whitespace, removes punctuation, and drops tokens of one character and tokens with anything but letters.
    """
    if rule == "characters":
        return split_characters(caption)
    if cleaning == "standard" and rule == "words":
        # Most tokens are letters alone.
        return [
            token
            for token in split_words(caption)
            if token.isalpha() or (any(map(str.isalnum, token)) and token not in BRACKETS)
        ]
    in_lower_case = caption.lower() if rule == "whitespace" else lower(caption)
    if cleaning == "tutorial":
        bare = (token.translate(_NO_PUNCTUATION) for token in in_lower_case.split())
        return [token for token in bare if len(token) > 1 and token.isalpha()]
    return [token for token in in_lower_case.split() if any(map(str.isalnum, token))]


@dataclass(frozen=True)
class Vocabulary:
    """The words that a captioner knows, with the cleaning that gives them."""

    words: tuple[str, ...]
    cleaning: Cleaning
    unknown: Unknown
    tokens: TokenRule = "whitespace"
    """How captions are split; vocabularies of earlier versions of the project do not say so, and mean whitespace."""

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
        tokens = tokenize(caption, self.cleaning, self.tokens)
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
        return ("" if self.tokens == "characters" else " ").join(words)

    def spell(self, caption: str) -> list[str]:
        """Return the words of a generated caption, as :meth:`decode` has joined them."""
        return split_characters(caption) if self.tokens == "characters" else caption.split()

    def digest(self) -> str:
        """Return the hexadecimal SHA-256 of all that determines the entries.

        Losses can be compared only between vocabularies with the same digest.
        """
        record = self._record()
        if self.cleaning == "tutorial":
            record.pop("tokens", None)  # it splits at whitespace anyway: the rule affects only scores
        return hashlib.sha256(json.dumps(record, ensure_ascii=False).encode()).hexdigest()

    def to_json(self) -> str:
        """Return the vocabulary as JSON."""
        return json.dumps(self._record(), ensure_ascii=False)

    def _record(self) -> dict[str, object]:
        record: dict[str, object] = {"cleaning": self.cleaning, "unknown": self.unknown, "words": self.words}
        return record if self.tokens == "whitespace" else record | {"tokens": self.tokens}


def build_vocabulary(captions: Iterable[str], config: VocabularyConfig) -> Vocabulary:
    """Count the words of the train captions and keep those that occur ``minimum_count`` times or more."""
    counts = Counter(token for caption in captions for token in tokenize(caption, config.cleaning, config.tokens))
    kept = sorted(
        (word for word, count in counts.items() if count >= config.minimum_count),
        key=lambda word: (-counts[word], word),
    )
    if not kept:
        raise InputError(
            f"vocabulary: no word of the train captions is seen vocabulary.minimum_count = "
            f"{config.minimum_count} times or more with cleaning {config.cleaning!r}; lower the count"
        )
    return Vocabulary(tuple(kept), config.cleaning, config.unknown, config.tokens)
