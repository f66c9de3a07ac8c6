"""README.md and docs/ say what is true: their Python blocks run and their relative links lead somewhere."""

import re
import sys
import types
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FENCE = re.compile(r"^(?P<indent> *)(?P<ticks>`{3,}|~{3,})(?P<info>[^`]*)$")
# `[text](target)`, images, and definitions of the form `[name]: target`.
LINK = re.compile(r"\[[^\]]*\]\(\s*<?([^)\s>]+)>?[^)]*\)|^\s*\[[^\]]+\]:\s*(\S+)", re.MULTILINE)


@dataclass(frozen=True)
class Block:
    """A fenced block: the words after its fence, its text, and the line its text starts at."""

    info: str
    text: str
    line: int

    @property
    def runs(self) -> bool:
        return self.info.split()[:1] == ["python"] and "no-run" not in self.info.split()


def split(text: str) -> tuple[list[Block], str]:
    """The fenced blocks of a page, and the page without them."""
    blocks: list[Block] = []
    prose: list[str] = []
    opened: re.Match[str] | None = None
    body: list[str] = []
    for number, line in enumerate(text.splitlines(), start=1):
        fence = FENCE.match(line)
        if opened is None and fence:
            opened, body = fence, []
        elif opened is None:
            prose.append(line)
        elif fence and fence["ticks"].startswith(opened["ticks"]) and not fence["info"].strip():
            blocks.append(Block(opened["info"].strip(), "\n".join(body), number - len(body)))
            opened = None
        else:
            body.append(line.removeprefix(opened["indent"]))
    return blocks, "\n".join(prose)


def run_blocks(path: Path) -> int:
    """Runs the Python blocks of a page in order, in one namespace, and returns how many there were."""
    # A registered module, because dataclasses and pickle look the module of a class up.
    module = types.ModuleType(f"docs_{path.stem}")
    sys.modules[module.__name__] = module
    blocks = [block for block in split(path.read_text(encoding="utf-8"))[0] if block.runs]
    try:
        for block in blocks:
            # The empty lines make a traceback name the line of the page.
            source = "\n" * (block.line - 1) + block.text
            exec(compile(source, str(path), "exec"), module.__dict__)
    finally:
        del sys.modules[module.__name__]
    return len(blocks)


def broken_links(path: Path) -> list[str]:
    prose = re.sub(r"`[^`\n]*`", "", split(path.read_text(encoding="utf-8"))[1])
    targets = [inline or definition for inline, definition in LINK.findall(prose)]
    files = [target.partition("#")[0] for target in targets if not re.match(r"[a-z][a-z0-9+.-]*:", target)]
    return [file for file in files if file and not (path.parent / file).exists()]


def pages() -> list[Path]:
    found = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md")]
    found += sorted(path for path in (ROOT / "docs").rglob("*.md") if "_build" not in path.parts)
    return [path for path in found if path.exists()]


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize(
    "path", [p for p in pages() if any(b.runs for b in split(p.read_text(encoding="utf-8"))[0])], ids=name_of
)
def test_python_blocks_run(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert run_blocks(path) > 0


@pytest.mark.parametrize("path", pages(), ids=name_of)
def test_relative_links_resolve(path):
    assert broken_links(path) == []


PAGE = """\
[here](page.md) [gone](gone.md#part) ![img](img.png) [web](https://example.org/x) [top](#top) `[no](code.md)`

```python
x = 1
```

```python no-run
raise AssertionError
```

```text
[no](link.md)
```

- in a list

  ````python
  y = x + 1
  note = '''
  ```
  '''
  ````

[ref]: also-gone.md
"""


def test_a_page_is_read_as_written(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(PAGE, encoding="utf-8")
    assert run_blocks(page) == 2
    assert broken_links(page) == ["gone.md", "img.png", "also-gone.md"]


def test_a_failing_block_names_the_line_of_the_page(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("# Title\n\n```python\nx = 1\nraise ValueError('here')\n```\n", encoding="utf-8")
    with pytest.raises(ValueError, match="here") as caught:
        run_blocks(page)
    last = caught.traceback[-1]
    assert (str(last.path), last.lineno + 1) == (str(page), 5)


def test_blocks_of_one_page_share_a_namespace_of_their_own(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("```python\ny\n```\n", encoding="utf-8")
    with pytest.raises(NameError, match="'y' is not defined"):
        run_blocks(page)
