"""Words to entries and back: cleaning by example, and what no caption may do to a vocabulary."""

import json
import subprocess
import sys
from pathlib import Path
from typing import get_args

import pytest
from hypothesis import given, settings, strategies as st

from capexp.data.vocabulary import BOS, EOS, PAD, UNK, Vocabulary, build_vocabulary, tokenize
from capexp.errors import InputError
from capexp.settings import Cleaning, TokenRule, Unknown, VocabularyConfig

CAPTIONS = ("A dog runs .", "a dog sits by 2 dogs .", "The snow-covered dog runs .", "Café dog")


RULES: list[tuple[Cleaning, TokenRule]] = [
    ("tutorial", "words"),
    ("standard", "words"),
    ("standard", "whitespace"),
    ("standard", "characters"),
]


def vocabulary(
    cleaning: Cleaning = "standard", minimum_count: int = 1, unknown: Unknown = "token", rule: TokenRule = "words"
) -> Vocabulary:
    config = VocabularyConfig(cleaning=cleaning, minimum_count=minimum_count, unknown=unknown, tokens=rule)
    return build_vocabulary(CAPTIONS, config)


@pytest.mark.parametrize(
    ("caption", "tutorial", "words", "whitespace"),
    [
        ("A Dog runs .", ["dog", "runs"], ["a", "dog", "runs"], ["a", "dog", "runs"]),
        ("a b I", [], ["a", "b", "i"], ["a", "b", "i"]),
        ("2 dogs , 3rd place", ["dogs", "place"], ["2", "dogs", "3rd", "place"], ["2", "dogs", "3rd", "place"]),
        ("snow-covered hill", ["snowcovered", "hill"], ["snow-covered", "hill"], ["snow-covered", "hill"]),
        (
            'the man\'s " t-shirt "',
            ["the", "mans", "tshirt"],
            ["the", "man", "'s", "t-shirt"],
            ["the", "man's", "t-shirt"],
        ),
        ("dog. cat!", ["dog", "cat"], ["dog", "cat"], ["dog.", "cat!"]),
        ("(red) # & !!", ["red"], ["red"], ["(red)"]),
        ("CAFÉ crème 犬が", ["café", "crème", "犬が"], ["café", "crème", "犬が"], ["café", "crème", "犬が"]),
        ("the man’s — dog", ["the", "dog"], ["the", "man", "'s", "dog"], ["the", "man’s", "dog"]),
        ("İstanbul", ["istanbul"], ["istanbul"], ["i̇stanbul"]),
        ("कुत्ता दौड़ता है।", [], ["कुत्ता", "दौड़ता", "है"], ["कुत्ता", "दौड़ता", "है।"]),
        ("- . ! -- …", [], [], []),
        ("\tA\u00a0dog\u3000runs\n", ["dog", "runs"], ["a", "dog", "runs"], ["a", "dog", "runs"]),
        ("", [], [], []),
    ],
)
def test_cleaning_by_example(caption: str, tutorial: list[str], words: list[str], whitespace: list[str]) -> None:
    assert tokenize(caption, "tutorial", "words") == tutorial
    assert tokenize(caption, "standard", "words") == words
    assert tokenize(caption, "standard", "whitespace") == whitespace


def test_characters_are_letters_and_digits_with_their_marks() -> None:
    assert tokenize("一只狗，3 Cafe\u0301!", "standard", "characters") == [
        "一",
        "只",
        "狗",
        "3",
        "c",
        "a",
        "f",
        "e\u0301",
    ]
    made = build_vocabulary(["一只狗。"], VocabularyConfig(minimum_count=1, tokens="characters"))
    assert made.decode(made.encode("狗一只")) == "狗一只", "without blanks"
    with pytest.raises(ValueError, match="tutorial cleaning drops them"):
        VocabularyConfig(cleaning="tutorial", tokens="characters")


def test_entries_are_ordered_by_frequency_and_then_alphabet() -> None:
    assert vocabulary().words == ("dog", "a", "runs", "2", "by", "café", "dogs", "sits", "snow-covered", "the")
    assert build_vocabulary(reversed(CAPTIONS), VocabularyConfig(minimum_count=1)) == vocabulary()


def test_minimum_count_keeps_words_seen_that_often() -> None:
    assert vocabulary(minimum_count=2).words == ("dog", "a", "runs")
    assert vocabulary(minimum_count=4).words == ("dog",)


@pytest.mark.parametrize(("unknown", "first"), [("drop", 3), ("token", 4)])
def test_special_entries_come_first_and_only_eos_is_ever_emitted(unknown: Unknown, first: int) -> None:
    made = vocabulary(unknown=unknown)
    assert (PAD, BOS, EOS, UNK) == (0, 1, 2, 3)
    assert (made.first_word, made.entries["dog"], len(made)) == (first, first, first + len(made.words))
    assert set(made.never_emitted) == set(range(first)) - {EOS}


def test_unknown_words_are_dropped_or_become_the_token() -> None:
    caption = "A zebra sits by the dog"
    drop, token = vocabulary(unknown="drop"), vocabulary(unknown="token")
    assert [drop.words[entry - 3] for entry in drop.encode(caption)] == ["a", "sits", "by", "the", "dog"]
    assert [entry == UNK for entry in token.encode(caption)] == [False, True, False, False, False, False]
    assert drop.decode(drop.encode(caption)) == token.decode(token.encode(caption)) == "a sits by the dog"


@pytest.mark.parametrize("unknown", get_args(Unknown))
@pytest.mark.parametrize(("cleaning", "rule"), RULES)
def test_known_captions_come_back_as_their_tokens(cleaning: Cleaning, rule: TokenRule, unknown: Unknown) -> None:
    made = vocabulary(cleaning, unknown=unknown, rule=rule)
    for caption in CAPTIONS:
        blank = "" if rule == "characters" else " "
        assert made.decode(made.encode(caption)) == blank.join(tokenize(caption, cleaning, rule))


def test_decoding_stops_at_eos_and_spells_no_special_entry() -> None:
    made = vocabulary()
    dog, runs = made.encode("dog runs")
    assert made.decode([BOS, dog, PAD, UNK, runs, EOS, dog, PAD]) == "dog runs"


def test_words_of_other_captions_never_enter() -> None:
    made = vocabulary()
    before = made.words
    made.encode("a zebra in an ocean")
    assert made.words == before and len(made.entries) == len(before)
    assert "zebra" not in made.entries


def test_digest_depends_on_cleaning_unknown_and_words_and_on_nothing_else() -> None:
    words = ("dog", "runs")
    made = Vocabulary(words, "standard", "token")
    others = (
        Vocabulary(words, "tutorial", "token"),
        Vocabulary(words, "standard", "drop"),
        Vocabulary(("runs", "dog"), "standard", "token"),
        Vocabulary(("dog runs",), "standard", "token"),
        Vocabulary(words, "standard", "token", "words"),
        Vocabulary(words, "standard", "token", "characters"),
    )
    assert made.digest() == Vocabulary(words, "standard", "token").digest()
    assert len({made.digest(), *(other.digest() for other in others)}) == 7
    assert others[0].digest() == Vocabulary(words, "tutorial", "token", "words").digest(), "it splits at blanks anyway"


def test_vocabulary_is_the_same_in_every_process() -> None:
    code = (
        "from capexp.data.vocabulary import VocabularyConfig, build_vocabulary\n"
        f"print(build_vocabulary({CAPTIONS!r}, VocabularyConfig(minimum_count=1)).digest())"
    )
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=root)
    assert done.stdout.strip() == vocabulary().digest()


def test_json_holds_all_of_it() -> None:
    made = vocabulary()
    record = json.loads(made.to_json())
    assert Vocabulary(tuple(record["words"]), record["cleaning"], record["unknown"], record["tokens"]) == made
    before = Vocabulary(made.words, "standard", "token")
    assert "tokens" not in json.loads(before.to_json()), "as vocabularies were written before there was a choice"


@pytest.mark.parametrize(("captions", "count"), [((), 1), ((". !",), 1), (CAPTIONS, 5)])
def test_empty_vocabulary_is_refused(captions: tuple[str, ...], count: int) -> None:
    with pytest.raises(InputError, match=f"^vocabulary: .*minimum_count = {count} .*'standard'") as caught:
        build_vocabulary(captions, VocabularyConfig(minimum_count=count))
    assert len(str(caught.value).splitlines()) == 1


WORDS = st.sampled_from(("dog", "Runs", "a", "café", "<pad>", "<unk>", "startseq", "endseq", "PAD", "EOS", "zebra"))


@settings(max_examples=100, deadline=None)
@given(
    text=st.one_of(st.text(max_size=60), st.lists(WORDS, max_size=12).map(" ".join)),
    kind=st.sampled_from(RULES),
    unknown=st.sampled_from(get_args(Unknown)),
)
def test_no_text_encodes_to_pad_bos_or_eos_and_only_known_words_come_back(
    text: str, kind: tuple[Cleaning, TokenRule], unknown: Unknown
) -> None:
    cleaning, rule = kind
    made = vocabulary(cleaning, unknown=unknown, rule=rule)
    entries = made.encode(text)
    assert not {PAD, BOS, EOS} & set(entries)
    assert all(0 <= entry < len(made) for entry in entries)
    known = [token for token in tokenize(text, cleaning, rule) if token in made.entries]
    decoded = made.decode(entries)
    assert decoded == ("" if rule == "characters" else " ").join(known)
    assert made.encode(decoded) == [entry for entry in entries if entry not in made.never_emitted]
