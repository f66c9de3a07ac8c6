"""Imports flow one way. Parses every module of the package; imports none of them.

The layers, from the lowest to the highest, are the table below. A module may import from lower layers, from
its own package, and from its neighbours unless they are strangers; never upwards and never in a circle.
"""

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = "trainkit"
MAX_LINES = 450


@dataclass(frozen=True)
class Layer:
    """One row of the table: top-level modules and packages of the same height."""

    name: str
    members: tuple[str, ...]
    strangers: bool = False  # members of the layer may not import one another


LAYERS = (
    Layer(
        "L0",
        (
            "_typing",
            "_tree",
            "_when",
            "_precision",
            "_version",
            "_errors",
            "_atomic",
            "_safetensors",
            "_allocator",
            "_compile_cache",
            "_choice",
            "_jaxprs",
        ),
    ),
    # What the packages of L1 are about: they take and return it.
    Layer("L1 state", ("_state", "_context"), strangers=True),
    Layer(
        "L1",
        (
            *("_model", "_history", "_serialize", "_trace"),
            *("hooks", "metrics", "writers", "checkpoint", "data", "parallel"),
        ),
        strangers=True,
    ),
    Layer(
        "L2",
        (
            *(
                "_step",
                "_checks",
                "_feed",
                "_held",
                "_looped",
                "_engine",
                "_windows",
                "_result",
                "_recording",
                "_overview",
            ),
            *("_diagnosis", "_overridable", "_restoring", "_resuming", "_saved", "_timetable", "_ahead"),
            *("_fusing", "_tuning", "_calls", "_remembered", "_footprint"),
            "export",
        ),
    ),
    Layer("L3", ("callbacks",)),
    Layer(
        "L4",
        (
            "_loop",
            "_dispatch",
            "_evaluate",
            "_interrupts",
            "_arguments",
            "_agreement",
            "_record",
            "_request",
            "_run",
            "_failures",
            "_replay",
        ),
    ),
    Layer("L5", ("_trainer", "_lr_find")),
    Layer("L6", ("testing", "_promises")),
    Layer("index", ("__init__",)),
)


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
    def member(self) -> str:
        return self.name.split(".")[0] or "__init__"


def read_package(root: Path) -> dict[str, Module]:
    modules = {}
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        source = path.read_text(encoding="utf-8")
        modules[name] = Module(name, path, len(source.splitlines()), ast.parse(source, str(path)))
    return modules


def layer_of(module: Module) -> int | None:
    """The height of a module; `_step_rules` lives where `_step` does."""
    for height, layer in enumerate(LAYERS):
        for member in layer.members:
            if module.member == member or module.member.startswith(f"{member}_"):
                return height
    return None


@dataclass(frozen=True)
class Import:
    """One import of something in the package: `target` is a dotted name without the package's own."""

    line: int
    target: str
    relative: bool = False


def imports_of(module: Module) -> Iterator[Import]:
    """Every import of the package, at module level, in functions and under TYPE_CHECKING alike."""
    for node in ast.walk(module.tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level:
            yield Import(node.lineno, "", relative=True)
            continue
        elif isinstance(node, ast.ImportFrom):
            names = [node.module or ""]
            if module.is_index:  # `from trainkit import data` in an index names the package data
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
    here, there = layer_of(module), layer_of(target)
    if here is None or there is None or module.member == target.member:
        return None
    if there > here:
        return f"imports upwards: {LAYERS[here].name} from {LAYERS[there].name} ({target.name})"
    if there == here and LAYERS[here].strangers:
        return f"imports its sibling {target.name}: members of {LAYERS[here].name} stay strangers"
    return None


def check_file(module: Module) -> Iterator[str]:
    if layer_of(module) is None:
        yield "has no layer: give it a room in LAYERS"
    stem = module.path.stem
    if not module.is_index and module.name != "testing" and not stem.startswith("_"):
        yield "is not named _name.py"
    if module.lines > MAX_LINES:
        yield f"has {module.lines} lines, more than {MAX_LINES}: split it by what it owns"
    if module.is_index and any(isinstance(node, ast.ClassDef) for node in module.tree.body):
        yield "is an index and defines a class: an index only re-exports"


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
        for edge in imports_of(module):
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


def write_package(root: Path, files: dict[str, str]) -> Path:
    package = root / PACKAGE
    for name, source in {
        "__init__.py": "",
        "data/__init__.py": "",
        "callbacks/__init__.py": "",
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
            "__init__.py": "from trainkit import data\nfrom trainkit._trainer.trainer import Trainer\n",
            "_typing.py": "import numpy\n",
            "_tree.py": "from trainkit._core.typing import PyTree\n",
            "_state.py": "from trainkit._core.tree import leaves\n",
            "data/__init__.py": "from trainkit.data._arrays import Arrays\n",
            "data/_source.py": "import trainkit._core.typing as typing\n",
            "data/_arrays.py": "from trainkit._core.state import S\nfrom trainkit.data._source import Source\n",
            "_step_rules.py": "",
            "_step.py": "from trainkit._step_rules import rule\nfrom trainkit.data._arrays import Arrays\n",
            "_trainer.py": "def run():\n    from trainkit._step.steps import step\n",
            "testing.py": "from trainkit._trainer.trainer import Trainer\n",
        },
    )
    assert violations(package) == []


@pytest.mark.parametrize(
    ("files", "problem"),
    [
        pytest.param(
            {"_tree.py": "from trainkit._core.state import TrainState", "_state.py": ""},
            "trainkit/_core/tree.py:1 imports upwards: L0 from L1 state (_state)",
            id="upward edge",
        ),
        pytest.param(
            {"_step.py": "def f():\n    from trainkit.callbacks._ema import EMA", "callbacks/_ema.py": ""},
            "trainkit/_step/steps.py:2 imports upwards: L2 from L3 (callbacks._ema)",
            id="upward edge inside a function",
        ),
        pytest.param(
            {
                "_when.py": "from typing import *\nif TYPE_CHECKING:\n    import trainkit._loop.loop\n",
                "_loop.py": "",
            },
            "trainkit/_core/cadence.py:3 imports upwards: L0 from L4 (_loop)",
            id="upward edge for types only",
        ),
        pytest.param(
            {"data/_arrays.py": "from trainkit.metrics._std import Std", "metrics/_std.py": ""},
            "trainkit/data/_arrays.py:1 imports its sibling metrics._std: members of L1 stay strangers",
            id="sibling edge",
        ),
        pytest.param(
            {"data/__init__.py": "from trainkit.metrics._std import Std", "metrics/_std.py": ""},
            "trainkit/data/__init__.py:1 imports its sibling metrics._std: members of L1 stay strangers",
            id="sibling edge of an index",
        ),
        pytest.param(
            {
                "_tree.py": "import trainkit._core.cadence",
                "_when.py": "import trainkit._core.errors",
                "_errors.py": "import trainkit._core.tree",
            },
            "import cycle: _errors -> _tree -> _when -> _errors",
            id="cycle",
        ),
        pytest.param(
            {"data/_arrays.py": "from ._source import Source", "data/_source.py": ""},
            "trainkit/data/_arrays.py:1 has a relative import: write the whole name",
            id="relative import",
        ),
        pytest.param(
            {"_step.py": "from trainkit.data import Arrays"},
            "trainkit/_step/steps.py:1 imports from the index trainkit.data: name the defining module",
            id="import from a package index",
        ),
        pytest.param(
            {"_step.py": "import trainkit"},
            "trainkit/_step/steps.py:1 imports from the index trainkit: name the defining module",
            id="import of the top index",
        ),
        pytest.param(
            {"_step.py": "from trainkit import _tree", "_tree.py": ""},
            "trainkit/_step/steps.py:1 imports from the index trainkit: name the defining module",
            id="module taken from the top index",
        ),
        pytest.param(
            {"_step.py": "from trainkit.data._gone import Arrays"},
            "trainkit/_step/steps.py:1 imports trainkit.data._gone, which is not there",
            id="missing module",
        ),
        pytest.param(
            {"__init__.py": "from trainkit import metrics"},
            "trainkit/__init__.py:1 imports trainkit.metrics, which is not there",
            id="missing package",
        ),
        pytest.param(
            {"data/arrays.py": ""}, "trainkit/data/arrays.py is not named _name.py", id="public module name"
        ),
        pytest.param(
            {"_tree.py": "x = 1\n" * (MAX_LINES + 1)},
            f"trainkit/_core/tree.py has {MAX_LINES + 1} lines, more than {MAX_LINES}: split it by what it owns",
            id="long file",
        ),
        pytest.param(
            {"_attic.py": ""}, "trainkit/_attic.py has no layer: give it a room in LAYERS", id="no layer"
        ),
        pytest.param(
            {"data/__init__.py": "class Arrays: ..."},
            "trainkit/data/__init__.py is an index and defines a class: an index only re-exports",
            id="code in an index",
        ),
    ],
)
def test_each_kind_of_violation_is_found(tmp_path, files, problem):
    assert violations(write_package(tmp_path, files)) == [problem]
