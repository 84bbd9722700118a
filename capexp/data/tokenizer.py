"""Splits captions into tokens.

COCO's scorer runs the Penn Treebank tokenizer of Stanford CoreNLP over captions and references, lower-cases the tokens
and drops punctuation (Chen et al., 2015). :func:`split_words` gives the same tokens. At most one in a thousand captions
is split differently: of Flickr8k's 35,000 train and dev captions, of the same captions with punctuation attached to the
words, and of made-up captions (``tests/metrics/test_java.py``). One differs on purpose: ``rif=ding`` stays one word, as
in earlier versions of the project.
"""

import re
import unicodedata
from functools import lru_cache


def _marks() -> str:
    """Return the ranges of Unicode's combining marks, which Python's ``\\w`` leaves out."""
    ranges: list[list[int]] = []
    for code in range(0x300, 0x12000):
        if unicodedata.category(chr(code)).startswith("M"):
            if ranges and ranges[-1][1] == code - 1:
                ranges[-1][1] = code
            else:
                ranges.append([code, code])
    return "".join(f"{chr(first)}-{chr(last)}" for first, last in ranges)


_LETTER = r"[^\W\d_]"
_CHARACTER = rf"(?:[^\W_]|[{_marks()}])"  # a letter, a digit or a combining mark
_APOSTROPHE = r"['’]"
_END = rf"(?![\w/-]|{_APOSTROPHE}\w)"  # the end of a word that is split in two
_ABBREVIATIONS = (
    "mr|mrs|ms|dr|drs|prof|st|sr|jr|ave|blvd|rd|etc|vs|inc|ltd|corp|co|bros|dept|ft|gen|col|capt|lt|sgt|gov|sen|rep|rev"
    "|hon|messrs|esq|ph\\.d|univ|assn|govt|mt|cie|alex|wm|jos|cf|al|ed|eds|est|tel|ca|pp|op"
)
_CAPITAL_ABBREVIATIONS = "Jan|Feb|Mar|Apr|Jun|Jul|Aug|Sept?|Oct|Nov|Dec|Mon|Tues?|Wed|Thurs?|Fri|Sat|Sun"
# Words that begin a sentence: a full stop between a single letter and one of them ends a sentence.
_SENTENCE_STARTS = (
    "A|About|After|An|As|At|But|He|Her|Here|However|If|In|It|Last|Many|More|Mr|Ms|Now|Once|One|Other|Our|She|Since|So"
    "|Some|Such|That|The|Their|Then|There|These|They|This|We|When|While|What|Yet|You"
)
_BEFORE_NOT = rf"(?!n{_APOSTROPHE}t(?![^\W_]))"  # "isn't" is split before "n't"
# One alternative for each kind of token. The first that matches at a position is taken.
_TOKEN = re.compile(
    rf"""
    (?P<address> (?:https?://|www\.) [^\s"<>()]* [^\s"<>().,;:!?'’]
        | [\w.+-]+ @ {_CHARACTER}+ (?:[.-]{_CHARACTER}+)* \.{_LETTER}{{2,}} )
  | (?P<markup> </?[a-zA-Z][^<>\n]*/?> )
  | (?P<entity> &(?:amp|lt|gt|quot|apos|nbsp); )
  | (?P<name> [@#]{_LETTER}\w* )                                                        # @user, #hashtag
  | (?P<decade> (?<!['’]) {_APOSTROPHE}\d0s\b )                                         # '90s
  | (?P<and> (?<![^\W_]){_APOSTROPHE}n{_APOSTROPHE}(?![^\W_])                           # rock 'n' roll
        | (?<=[^\W_]){_APOSTROPHE}n{_APOSTROPHE}(?=[^\W_]) )
  | (?P<short> (?<![^\W_]){_APOSTROPHE} (?: [Tt](?=\s*(?:is|was)\b) | (?:em|til) ) )    # 'tis, 'em
  | (?P<initials> (?:{_LETTER}\.)+ {_LETTER}\.? (?:-{_CHARACTER}+)* (?![^\W_])          # U.S., p.m.
        | (?<![^\W_]) {_LETTER}\. (?!{_CHARACTER} | \s+(?:{_SENTENCE_STARTS})\b) )      # J. Smith
  | (?P<abbreviation> (?:(?i:{_ABBREVIATIONS})|{_CAPITAL_ABBREVIATIONS}) \. (?!{_CHARACTER}) (?:-{_CHARACTER}+)*
        | (?i:no|figs?|vols?) \. (?=\s*\d) )
  | (?P<half> (?i: can(?=not{_END}) | gon(?=na{_END}) | got(?=ta{_END}) | wan(?=na{_END}) | gim(?=me{_END})
        | lem(?=me{_END}) | y{_APOSTROPHE}(?=\s*all\b) ) )                              # can not
  | (?P<not> (?i:n{_APOSTROPHE}t) (?![^\W_]) )                                          # is n't
  | (?P<clitic> (?<!['’]) {_APOSTROPHE} (?i:s|m|d|re|ve|ll) (?![^\W_]) )                # dog 's
  | (?P<number> \d+:\d\d(?::\d\d)? (?=(?i:[ap]m)\b)                    # 10:30 am
        | \d++ (?:[.,:/-]\d++)*+ (?:(?=:|{_APOSTROPHE}) | (?![/-]?{_CHARACTER}))        # 1,000 and 5-6 and 1/2
        | \d++ (?:[.,:]\d++)++ (?=/) | \d++ (?::\d++)++ (?=-) )
  | (?P<prefixed> (?i:[dol]) {_APOSTROPHE} {_LETTER}{_CHARACTER}* (?:-{_CHARACTER}+)* ) # O'Neil
  | (?P<word> [A-Z]+&[A-Z]+ (?!{_CHARACTER}) | {_LETTER}\+\+                            # AT&T, C++
        | (?:\d+(?:[.,]\d+)+(?=[-/]) | {_CHARACTER}) (?:{_BEFORE_NOT}{_CHARACTER} | _)*
          (?:[-/.=]{_CHARACTER} (?:{_BEFORE_NOT}{_CHARACTER} | _)*)* )                   # black-and-white, and/or
  | (?P<marks> [?!]{{2,}} )                                                             # COCO drops single ones
  | (?P<smiley> [:;=]-?[()] )
  | (?P<bracket> [()\[\]{{}}] )
  | (?P<dropped> \.+ | -+ | [–—―…‘’“”"'`.?!,:;\s] )
  | (?P<sign> (?P<repeated>[*_@<>~^])(?P=repeated)* | . )
    """,
    re.VERBOSE | re.DOTALL,
)
_SPELLED = str.maketrans(
    {"’": "'", "£": "#", "€": "$"}
    | {"(": "-lrb-", ")": "-rrb-", "[": "-lsb-", "]": "-rsb-", "{": "-lcb-", "}": "-rcb-"}
)
BRACKETS = frozenset(_SPELLED[ord(bracket)] for bracket in "()[]{}")
"""The tokens of brackets, which COCO's scorer keeps."""
_ENTITIES = {"&amp;": "&", "&lt;": "<", "&gt;": ">"}
# What most captions are: words of ASCII letters, and full stops and commas that stand alone.
_SIMPLE = re.compile(r"(?:[A-Za-z]+|[.,])(?: +(?:[A-Za-z]+|[.,]))* *")
_HALVES = re.compile("(?i:cannot|gonna|gotta|wanna|gimme|lemme)")


def lower(text: str) -> str:
    """Return the text in lower case; the dot of ``İ`` does not stay behind as a mark of its own."""
    return text.lower().replace("i\u0307", "i")


@lru_cache(2**17)  # a run splits each of its captions several times: for its vocabulary, its batches and its scores
def split_words(caption: str) -> tuple[str, ...]:
    """Return the tokens of COCO's scorer: Penn Treebank tokens in lower case, without punctuation.

    Brackets stay, as ``-lrb-`` and ``-rrb-``, and so do signs such as ``#``, ``&`` and ``!!``.
    """
    if _SIMPLE.fullmatch(caption) and not _HALVES.search(caption):
        return tuple(word for word in caption.lower().split() if word not in (".", ","))
    tokens = []
    for match in _TOKEN.finditer(caption):
        kind, token = match.lastgroup, match[0]
        if kind == "dropped":
            continue
        if kind == "entity":
            token = _ENTITIES.get(token, "")
        elif kind in ("bracket", "smiley", "repeated", "sign"):
            token = token.translate(_SPELLED)
        else:
            token = token.replace("’", "'")
        if token:
            tokens.append(lower(token))
    return tuple(tokens)


def split_characters(caption: str) -> list[str]:
    """Return each letter and digit in lower case, with its combining marks; spaces and punctuation are dropped."""
    tokens: list[str] = []
    for character in lower(caption):
        if tokens and unicodedata.category(character).startswith("M"):
            tokens[-1] += character
        elif character.isalnum():
            tokens.append(character)
    return tokens
