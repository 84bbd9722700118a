"""Docstrings, comments and pages name things instead of circling them."""

import ast
import io
import re
import tokenize
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
CIRCLING = {
    r"what (it|they|he|one|each) (came|comes) to": "name the result",
    r"what (is|are|was|were) (told|shown|held|drawn)": "name the thing",
    r"(is|are|was|were) told of": "say who reports or logs what",
    r"(be|is|are|was|were) gone on with": "say: resumed",
    r"those of (this|these|that) (one|ones)": "repeat the noun",
    r"of whose": "start a new sentence",
}
"""Phrases that a reader has to translate, with the remedy."""


def texts() -> Iterator[tuple[str, int, str]]:
    """File, line and text of every docstring, comment and paragraph of a page."""
    for path in sorted((ROOT / "capexp").rglob("*.py")):
        source = path.read_text(encoding="utf-8")
        name = str(path.relative_to(ROOT))
        for node in ast.walk(ast.parse(source)):
            if (
                isinstance(node, ast.Expr)
                and isinstance(node.value, ast.Constant)
                and isinstance(node.value.value, str)
            ):
                yield name, node.lineno, node.value.value
        for token in tokenize.generate_tokens(io.StringIO(source).readline):
            if token.type == tokenize.COMMENT:
                yield name, token.start[0], token.string
    for path in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))):
        yield str(path.relative_to(ROOT)), 1, path.read_text(encoding="utf-8")


def test_no_text_circles_the_thing_that_it_means() -> None:
    found = [
        f"{name}, from line {line}: {match[0]!r}: {remedy}"
        for name, line, text in texts()
        for phrase, remedy in CIRCLING.items()
        if (match := re.search(rf"\b{phrase}\b", " ".join(text.split()), re.IGNORECASE))
    ]
    assert not found, "\n".join(found)
