"""README stays a page, and every relative link of the manual leads to a file and a heading that are there."""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = sorted(ROOT.glob("*.md")) + sorted(ROOT.glob("docs/*.md")) + sorted(ROOT.glob("experiments/**/*.md"))


def prose(page: Path) -> str:
    """The text of a page without its fenced code."""
    return re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)


def links(page: Path) -> Iterator[str]:
    """The targets of a page's links and pictures, those on the web left out."""
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if not re.match(r"[a-z]+:", target):
            yield target


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    found: set[str] = set()
    for heading in re.findall(r"^#+ +(.+?) *$", prose(page), flags=re.MULTILINE):
        plain = "".join(letter for letter in heading.lower() if letter.isalnum() or letter in " -_").replace(" ", "-")
        again = sum(re.fullmatch(rf"{re.escape(plain)}(-\d+)?", one) is not None for one in found)
        found.add(f"{plain}-{again}" if again else plain)
    return found


def test_readme_is_one_page_of_8_kib() -> None:
    assert (ROOT / "README.md").stat().st_size <= 8192


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_relative_link_resolves(page: Path) -> None:
    for target in links(page):
        name, _, anchor = target.partition("#")
        file = (page.parent / name).resolve() if name else page
        assert file.exists(), f"{page.name}: {target}: no such file"
        assert file.is_relative_to(ROOT), f"{page.name}: {target}: outside the checkout"
        if anchor:
            assert anchor in anchors(file), f"{page.name}: {target}: no such heading"


@pytest.mark.parametrize("page", sorted(ROOT.glob("docs/*.md")), ids=lambda page: page.stem)
def test_the_table_of_contents_names_every_section(page: Path) -> None:
    sections = re.findall(r"^## +(.+?) *$", prose(page), flags=re.MULTILINE)
    listed = re.findall(r"^- \[(.+?)\]\(#", prose(page), flags=re.MULTILINE)
    assert listed == sections
