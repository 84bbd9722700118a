"""COCO's tokens by example; tests/metrics/test_java.py holds them against the Java tokenizer itself."""

import pytest
from hypothesis import given, settings, strategies as st

from capexp.data.tokenizer import split_characters, split_words

# What the Java tokenizer of COCO's scorer gives, without the punctuation that the scorer drops.
TOKENS = {
    "A dog runs in the snow.": "a dog runs in the snow",
    "It's 5:30 p.m. on Main St. in the U.S.": "it 's 5:30 p.m. on main st. in the u.s.",
    "The U.S.A. team doesn't play.": "the u.s.a. team does n't play",
    '"Hello," she said, "it\'s a dog!"': "hello she said it 's a dog",
    "He said 'hello' to the man.": "he said hello to the man",
    "The dogs' toys aren't here.": "the dogs toys are n't here",
    "It costs $5.50 (about 3 euros).": "it costs $ 5.50 -lrb- about 3 euros -rrb-",
    "A black-and-white dog; a red/blue ball - nice!": "a black-and-white dog a red/blue ball nice",
    "I can't, won't and shan't; cannot and gonna.": "i ca n't wo n't and sha n't can not and gon na",
    "50% of the people": "50 % of the people",
    "#1 fan at www.example.com or me@home.org": "# 1 fan at www.example.com or me@home.org",
    "rock 'n' roll, rock'n'roll": "rock 'n' roll rock 'n' roll",
    "The '90s were great, the 1990's too.": "the '90s were great the 1990 's too",
    "1,000 people, 2.5 miles, 1/2 cup.": "1,000 people 2.5 miles 1/2 cup",
    "wait... what?! Really??": "wait what ?! really ??",
    "An ice-cream--cold.": "an ice-cream cold",
    "The man (in red) [sic] {x}": "the man -lrb- in red -rrb- -lsb- sic -rsb- -lcb- x -rcb-",
    "the child’s toy — and “quotes”…": "the child 's toy and quotes",
    "T-shirt, X-ray, 3-D glasses, 4x4": "t-shirt x-ray 3-d glasses 4x4",
    "'tis the season, y'all": "'t is the season y' all",
    "the dog.the cat ,a man,a woman": "the dog.the cat a man a woman",
    "No. 5 shirt": "no. 5 shirt",
    "I'd've, we'll, they're, you've, I'm": "i 'd 've we 'll they 're you 've i 'm",
    "O'Neil's C++ :)": "o'neil 's c++ :-rrb-",
    "10am 10:30am 2nd": "10am 10:30 am 2nd",
    "a man w/ a hat": "a man w / a hat",
    "£5 €6 20°C": "# 5 $ 6 20 ° c",
    "J. Smith has plan B. The end": "j. smith has plan b the end",
    "AT&T and at&t, Tom & Jerry": "at&t and at & t tom & jerry",
    "*star* a_b = <b>": "* star * a_b = <b>",
    "&amp; &lt;": "& <",
    "gimme lemme wanna gotta": "gim me lem me wan na got ta",
    "Boys playing soccer !!! @user #hashtag": "boys playing soccer !!! @user #hashtag",
}


@pytest.mark.parametrize("caption", TOKENS)
def test_words_by_example(caption: str) -> None:
    assert " ".join(split_words(caption)) == TOKENS[caption]


def test_other_scripts_keep_their_letters_and_marks() -> None:
    assert split_words("Một con chó. कुत्ता। สุนัข, ΑΒΓ; कि") == ("một", "con", "chó", "कुत्ता", "।", "สุนัข", "αβγ", "कि")
    assert split_words("İZMİR") == ("izmir",), "without a stray dot"


WORDS = st.sampled_from(
    ["dog", "runs", "a", "'s", "n't", "t-shirt", "can", "not", "5", "u.s.", "mr.", "red/blue", "p.m."]
)


@settings(max_examples=300, deadline=None)
@given(st.lists(WORDS, max_size=8))
def test_tokens_joined_by_blanks_are_the_same_tokens(tokens: list[str]) -> None:
    """So a generated caption, which is its tokens joined by blanks, is scored on the words that were generated."""
    assert split_words(" ".join(tokens)) == tuple(tokens)


PLAIN = st.sampled_from(["dog", "A", "runs", ".", ",", "I", "U", "St", "no", "cannot", "Gonna", "İt", "Mr", "co"])


@settings(max_examples=500, deadline=None)
@given(st.lists(st.tuples(PLAIN, st.sampled_from([" ", "  "])), max_size=8))
def test_plain_words_need_no_pattern(words: list[tuple[str, str]]) -> None:
    """They are split at blanks, to the tokens that the pattern gives; a digit makes it look at the whole caption."""
    caption = "".join(word + blanks for word, blanks in words)
    assert split_words(f"{caption}5") == (*split_words(caption), "5")


@settings(max_examples=300, deadline=None)
@given(st.text(max_size=80))
def test_any_text_gives_tokens_in_lower_case_without_blanks(text: str) -> None:
    for token in (*split_words(text), *split_characters(text)):
        assert token and token == token.lower()
        assert not any(character.isspace() for character in token)
