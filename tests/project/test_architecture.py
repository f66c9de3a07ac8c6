"""The plan of the package can be read off its folders. Parses every module; imports none of them.

A folder is a row of the map, and `ROWS` is all that is written down here: from the ground up, which folders stand
side by side. A module may import from rows below its own and from its own folder; never upwards, never from a
folder beside its own, and never in a circle.
"""

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = "trainkit"
ROWS = (
    ("_core",),
    ("hooks", "metrics", "writers", "checkpoint", "data", "parallel", "optim", "export", "_models"),
    ("_step",),
    ("callbacks", "_feed"),
    ("_calls",),
    ("_engine",),
    ("_resume",),
    ("_debug",),
    ("_loop",),
    ("_trainer",),
    ("testing",),
)
MAX_ROWS, MAX_FOLDERS, MAX_LINES = 12, 20, 450
AT_THE_TOP = ("__init__", "_version")


@dataclass(frozen=True)
class Module:
    """A parsed file of the package."""

    name: str  # dotted, without the package's own name: "data._arrays", "data", "" for the top index
    path: Path
    lines: int
    tree: ast.Module

    @property
    def is_index(self) -> bool:
        return self.path.name == "__init__.py"

    @property
    def folder(self) -> str:
        return self.name.split(".")[0] if self.is_index or "." in self.name else ""

    @property
    def is_private(self) -> bool:
        return self.folder.startswith("_")


def read_package(root: Path) -> dict[str, Module]:
    modules = {}
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        source = path.read_text(encoding="utf-8")
        modules[name] = Module(name, path, len(source.splitlines()), ast.parse(source, str(path)))
    return modules


def row_of(folder: str) -> int | None:
    """The height of a folder: 0 for the ground."""
    return next((height for height, row in enumerate(ROWS) if folder in row), None)


@dataclass(frozen=True)
class Import:
    """One import of something in the package: `target` is a dotted name without the package's own."""

    line: int
    target: str
    relative: bool = False


def imports_of(tree: ast.Module, *, of_index: bool = False) -> Iterator[Import]:
    """Every import of the package, at module level, in functions and under TYPE_CHECKING alike."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level:
            yield Import(node.lineno, "", relative=True)
            continue
        elif isinstance(node, ast.ImportFrom):
            names = [node.module or ""]
            if of_index:  # `from trainkit import data` in an index names the package data
                names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            if name == PACKAGE or name.startswith(f"{PACKAGE}."):
                yield Import(node.lineno, name.removeprefix(PACKAGE).removeprefix("."))


def resolve(module: Module, target: str, modules: dict[str, Module]) -> Module | None:
    """The module that a dotted name lives in: `data._arrays.Arrays` of an index is in `data._arrays`."""
    if target in modules:
        return modules[target]
    owner = target.rpartition(".")[0]
    return modules.get(owner) if module.is_index and owner != module.name else None


def check_edge(module: Module, target: Module) -> str | None:
    """What is wrong with an import across folders; those of the top index are free."""
    here, there = row_of(module.folder), row_of(target.folder)
    if here is None or there is None or module.folder == target.folder:
        return None
    if there > here:
        return f"imports upwards: {module.folder}/ stands below {target.folder}/ ({target.name})"
    if there == here:
        return f"imports {target.name}: {module.folder}/ and {target.folder}/ stand side by side"
    return None


def check_file(module: Module) -> Iterator[str]:
    stem, parts = module.path.stem, module.name.split(".") if module.name else []
    if not module.folder:
        if stem not in AT_THE_TOP:
            yield f"lies at the top, where only {' and '.join(AT_THE_TOP)} stand: give it a folder"
    elif row_of(module.folder) is None:
        yield f"is in {module.folder}/, which is in no row of the map: give the folder its place in ROWS"
    elif len(parts) > 2:
        yield "is in a folder within a folder: a folder is a row of the map"
    elif not module.is_index and module.is_private == stem.startswith("_"):
        kind, wanted = ("private", "name.py") if module.is_private else ("public", "_name.py")
        yield f"is in a {kind} folder and is not named {wanted}"
    if module.lines > MAX_LINES:
        yield f"has {module.lines} lines, more than {MAX_LINES}: split it by what it owns"
    if module.is_index and not ast.get_docstring(module.tree):
        yield "is an index without a docstring: say what the folder owns, and what it does not"
    if module.is_index and any(isinstance(node, ast.ClassDef) for node in module.tree.body):
        yield "is an index and defines a class: an index only re-exports"
    if module.is_index and module.is_private and len(module.tree.body) > 1:
        yield "is the index of a private folder and holds more than its docstring"


def check_exports(module: Module, modules: dict[str, Module]) -> Iterator[str]:
    """Holds `__all__` of a public index to what is there: what it imports, and the names it loads at first use."""
    if not module.is_index or module.is_private:
        return
    there: set[str] = set()
    declared: list[str] | None = None
    for node in ast.walk(module.tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == PACKAGE:
            there |= {alias.asname or alias.name for alias in node.names}
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            if node.targets[0].id == "__all__":
                declared = [str(name) for name in ast.literal_eval(node.value)]
            elif node.targets[0].id.startswith("_LAZY"):
                there |= set(ast.literal_eval(node.value))
    if declared is None:
        if there:
            yield "has no __all__"
        return
    if len(set(declared)) != len(declared):
        yield "names something twice in __all__"
    if missing := sorted(there - set(declared)):
        yield f"leaves {', '.join(missing)} out of __all__"
    if unknown := sorted(set(declared) - there):
        yield f"has {', '.join(unknown)} in __all__, which it does not import"


def find_cycle(graph: dict[str, set[str]]) -> list[str] | None:
    """The first circle that a depth-first walk meets."""
    done: set[str] = set()

    def walk(node: str, trail: list[str]) -> list[str] | None:
        if node in trail:
            return [*trail[trail.index(node) :], node]
        if node in done:
            return None
        for following in sorted(graph[node]):
            if found := walk(following, [*trail, node]):
                return found
        done.add(node)
        return None

    for start in sorted(graph):
        if found := walk(start, []):
            return found
    return None


def violations(root: Path) -> list[str]:
    """Everything in the package at `root` that breaks a rule, one line each."""
    modules = read_package(root)
    found, graph = [], {name: set() for name in modules}
    for module in modules.values():
        place = str(module.path.relative_to(root.parent))
        found += [f"{place} {problem}" for problem in check_file(module)]
        found += [f"{place} {problem}" for problem in check_exports(module, modules)]
        for edge in imports_of(module.tree, of_index=module.is_index):
            if edge.relative:
                found.append(f"{place}:{edge.line} has a relative import: write the whole name")
                continue
            target = resolve(module, edge.target, modules)
            if target is None:
                found.append(f"{place}:{edge.line} imports {PACKAGE}.{edge.target}, which is not there")
                continue
            if target.is_index and not module.is_index:
                index = ".".join(filter(None, (PACKAGE, target.name)))
                found.append(f"{place}:{edge.line} imports from the index {index}: name the defining module")
                continue
            graph[module.name].add(target.name)
            if problem := check_edge(module, target):
                found.append(f"{place}:{edge.line} {problem}")
    if cycle := find_cycle(graph):
        found.append(f"import cycle: {' -> '.join(name or PACKAGE for name in cycle)}")
    return found


def test_the_package_keeps_the_rules():
    found = violations(ROOT / PACKAGE)
    assert not found, "\n".join(["", *found])


def test_the_map_is_small_enough_to_be_kept_in_mind():
    folders = [folder for row in ROWS for folder in row]
    assert len(set(folders)) == len(folders) <= MAX_FOLDERS
    assert len(ROWS) <= MAX_ROWS
    there = {path.parent.name for path in (ROOT / PACKAGE).glob("*/__init__.py")}
    assert there == set(folders)


def test_the_tests_are_laid_out_as_the_package_is():
    # A folder of the package is tested by the one of its name, without the underscore; what needs eight devices or
    # several processes has a folder of its own.
    tests = {path.name for path in (ROOT / "tests").iterdir() if list(path.glob("test_*.py"))}
    rows = {folder.lstrip("_") for row in ROWS for folder in row}
    others = {"project", "guides", "faults", "multi_device", "multi_process"}
    assert tests <= rows | others
    assert not list((ROOT / "tests").glob("test_*.py"))


@pytest.mark.parametrize("folder", ["examples", "benchmarks", "docs"])
def test_a_private_folder_is_imported_from_within_the_package_only(folder):
    private = {name for row in ROWS for name in row if name.startswith("_")}
    for path in sorted((ROOT / folder).rglob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        reached = [edge for edge in imports_of(tree) if edge.target.split(".")[0] in private]
        assert not reached, f"{path}: {reached}"


def test_the_readme_has_a_line_for_every_folder():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    missing = [folder for row in ROWS for folder in row if f"[`{folder}/`](trainkit/{folder})" not in text]
    assert not missing


def write_package(root: Path, files: dict[str, str]) -> Path:
    package = root / PACKAGE
    for name, source in {
        "__init__.py": '"""Top."""',
        "data/__init__.py": '"""Data."""',
        "callbacks/__init__.py": '"""Callbacks."""',
        "_core/__init__.py": '"""Core."""',
        "_step/__init__.py": '"""Step."""',
        **files,
    }.items():
        path = package / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(source, encoding="utf-8")
    return package


def test_a_sound_package_has_no_violations(tmp_path):
    package = write_package(
        tmp_path,
        {
            "__init__.py": (
                '"""Top."""\nfrom trainkit import data\nfrom trainkit._step.steps import Steps\n'
                '_LAZY = {"load": "trainkit.data._arrays"}\n__all__ = ["Steps", "data", "load"]\n'
            ),
            "_version.py": "",
            "_core/typing.py": "import numpy\n",
            "_core/tree.py": "from trainkit._core.typing import PyTree\n",
            "data/__init__.py": (
                '"""Data."""\nfrom trainkit.data._arrays import Arrays\n__all__ = ["Arrays"]\n'
            ),
            "data/_source.py": "import trainkit._core.typing as typing\n",
            "data/_arrays.py": "from trainkit._core.tree import t\nfrom trainkit.data._source import Source\n",
            "_step/steps.py": "def run():\n    from trainkit.data._arrays import Arrays\n",
        },
    )
    assert violations(package) == []


INDEX = '"""Data."""\nfrom trainkit.data._arrays import Arrays\n'


@pytest.mark.parametrize(
    ("files", "problem"),
    [
        pytest.param(
            {"_core/tree.py": "from trainkit._step.steps import Steps", "_step/steps.py": ""},
            "trainkit/_core/tree.py:1 imports upwards: _core/ stands below _step/ (_step.steps)",
            id="upward edge",
        ),
        pytest.param(
            {
                "_step/steps.py": "def f():\n    from trainkit.callbacks._ema import EMA",
                "callbacks/_ema.py": "",
            },
            "trainkit/_step/steps.py:2 imports upwards: _step/ stands below callbacks/ (callbacks._ema)",
            id="upward edge inside a function",
        ),
        pytest.param(
            {
                "_core/cadence.py": "from typing import *\nif TYPE_CHECKING:\n    import trainkit._step.steps\n",
                "_step/steps.py": "",
            },
            "trainkit/_core/cadence.py:3 imports upwards: _core/ stands below _step/ (_step.steps)",
            id="upward edge for types only",
        ),
        pytest.param(
            {
                "data/_arrays.py": "from trainkit.metrics._std import Std",
                "metrics/_std.py": "",
                "metrics/__init__.py": '"""Metrics."""',
            },
            "trainkit/data/_arrays.py:1 imports metrics._std: data/ and metrics/ stand side by side",
            id="edge to a folder beside",
        ),
        pytest.param(
            {
                "_core/tree.py": "import trainkit._core.cadence",
                "_core/cadence.py": "import trainkit._core.errors",
                "_core/errors.py": "import trainkit._core.tree",
            },
            "import cycle: _core.cadence -> _core.errors -> _core.tree -> _core.cadence",
            id="cycle",
        ),
        pytest.param(
            {"data/_arrays.py": "from ._source import Source", "data/_source.py": ""},
            "trainkit/data/_arrays.py:1 has a relative import: write the whole name",
            id="relative import",
        ),
        pytest.param(
            {"_step/steps.py": "from trainkit.data import Arrays"},
            "trainkit/_step/steps.py:1 imports from the index trainkit.data: name the defining module",
            id="import from a package index",
        ),
        pytest.param(
            {"_step/steps.py": "import trainkit"},
            "trainkit/_step/steps.py:1 imports from the index trainkit: name the defining module",
            id="import of the top index",
        ),
        pytest.param(
            {"_step/steps.py": "from trainkit.data._gone import Arrays"},
            "trainkit/_step/steps.py:1 imports trainkit.data._gone, which is not there",
            id="missing module",
        ),
        pytest.param(
            {"__init__.py": '"""Top."""\nfrom trainkit import metrics\n__all__ = ["metrics"]'},
            "trainkit/__init__.py:2 imports trainkit.metrics, which is not there",
            id="missing package",
        ),
        pytest.param(
            {"data/arrays.py": ""},
            "trainkit/data/arrays.py is in a public folder and is not named _name.py",
            id="plain name in a public folder",
        ),
        pytest.param(
            {"_step/_steps.py": ""},
            "trainkit/_step/_steps.py is in a private folder and is not named name.py",
            id="underscore in a private folder",
        ),
        pytest.param(
            {"_core/tree.py": "x = 1\n" * (MAX_LINES + 1)},
            f"trainkit/_core/tree.py has {MAX_LINES + 1} lines, more than {MAX_LINES}: split it by what it owns",
            id="long file",
        ),
        pytest.param(
            {"_attic.py": ""},
            "trainkit/_attic.py lies at the top, where only __init__ and _version stand: give it a folder",
            id="module at the top",
        ),
        pytest.param(
            {"_attic/__init__.py": '"""Attic."""'},
            "trainkit/_attic/__init__.py is in _attic/, which is in no row of the map: "
            "give the folder its place in ROWS",
            id="folder without a row",
        ),
        pytest.param(
            {"data/old/_arrays.py": ""},
            "trainkit/data/old/_arrays.py is in a folder within a folder: a folder is a row of the map",
            id="folder within a folder",
        ),
        pytest.param(
            {"data/__init__.py": '"""Data."""\nclass Arrays: ...'},
            "trainkit/data/__init__.py is an index and defines a class: an index only re-exports",
            id="code in an index",
        ),
        pytest.param(
            {"_step/__init__.py": '"""Step."""\nx = 1'},
            "trainkit/_step/__init__.py is the index of a private folder and holds more than its docstring",
            id="private index with more than words",
        ),
        pytest.param(
            {"_step/__init__.py": ""},
            "trainkit/_step/__init__.py is an index without a docstring: "
            "say what the folder owns, and what it does not",
            id="index without words",
        ),
        pytest.param(
            {"data/__init__.py": INDEX, "data/_arrays.py": ""},
            "trainkit/data/__init__.py has no __all__",
            id="index without __all__",
        ),
        pytest.param(
            {"data/__init__.py": f"{INDEX}__all__ = []", "data/_arrays.py": ""},
            "trainkit/data/__init__.py leaves Arrays out of __all__",
            id="name left out of __all__",
        ),
        pytest.param(
            {"data/__init__.py": f'{INDEX}__all__ = ["Arrays", "Gone"]', "data/_arrays.py": ""},
            "trainkit/data/__init__.py has Gone in __all__, which it does not import",
            id="name in __all__ that is not there",
        ),
    ],
)
def test_each_kind_of_violation_is_found(tmp_path, files, problem):
    assert violations(write_package(tmp_path, files)) == [problem]
