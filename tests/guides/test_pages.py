"""The pages of the guides show the examples: every file and every marker they name exists."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted((ROOT / "docs" / "guides").glob("*.md"))
INCLUDE = re.compile(r"```\{literalinclude\} (\S+)\n((?::.*\n)*)```")


def examples():
    return sorted(path.stem for path in (ROOT / "examples" / "guides").glob("*.py"))


@pytest.mark.parametrize("name", examples())
def test_every_example_has_a_page_that_shows_its_main(name):
    page = ROOT / "docs" / "guides" / f"{name}.md"
    markers = set()
    for target, options in INCLUDE.findall(page.read_text(encoding="utf-8")):
        lines = (page.parent / target).read_text(encoding="utf-8").splitlines()
        first, last = re.findall(r'"(# (?:start|end): .*)"', options)
        assert lines.count(first) == lines.count(last) == 1
        assert lines.index(first) < lines.index(last)
        assert first.split(": ")[1] == last.split(": ")[1]
        markers.add(first)
    assert "# start: main" in markers


def test_the_index_lists_every_page():
    index = (ROOT / "docs" / "guides" / "index.md").read_text(encoding="utf-8").splitlines()
    assert [page.stem for page in PAGES if page.stem not in (*index, "index")] == []
