"""Every writer has the interface and takes every call; a new writer joins with one line in `WRITERS`."""

import ast
import importlib.util
import inspect
import io
import pathlib
import subprocess
import sys
import types

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from tests.helpers.writer_calls import CALLS, events
from trainkit.writers import (
    Attributed,
    ConsoleWriter,
    JsonlWriter,
    Ledger,
    MetricWriter,
    MultiWriter,
    NullWriter,
    TensorBoardWriter,
    open_writer,
    read_jsonl,
)

WRITERS = {
    "null": lambda folder: NullWriter(),
    "console": lambda folder: ConsoleWriter(io.StringIO()),
    "tensorboard": lambda folder: TensorBoardWriter(folder),
    "jsonl": lambda folder: JsonlWriter(folder),
    "multi": lambda folder: MultiWriter(NullWriter(), JsonlWriter(folder)),
    "attributed": lambda folder: Attributed(JsonlWriter(folder), "owner", Ledger()),
    "open_writer": lambda folder: open_writer(folder),
}


@pytest.fixture(params=WRITERS)
def writer(request, tmp_path):
    made = WRITERS[request.param](tmp_path)
    yield made
    made.close()
    if isinstance(made, Attributed):
        made._writer.close()


def clu_folder() -> pathlib.Path:
    return pathlib.Path(importlib.util.find_spec("clu").origin).parent / "metric_writers"


def parameters_of(function: ast.FunctionDef) -> list[tuple]:
    arguments = function.args
    required = len(arguments.args) - len(arguments.defaults)
    positional = [(a.arg, "positional", i >= required) for i, a in enumerate(arguments.args)]
    defaults = zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True)
    return positional + [(a.arg, "keyword", default is not None) for a, default in defaults]


def signature_of(function) -> list[tuple]:
    kinds = {inspect.Parameter.POSITIONAL_OR_KEYWORD: "positional", inspect.Parameter.KEYWORD_ONLY: "keyword"}
    found = inspect.signature(function).parameters.values()
    return [(p.name, kinds[p.kind], p.default is not inspect.Parameter.empty) for p in found]


def test_the_interface_is_that_of_clu():
    tree = ast.parse((clu_folder() / "interface.py").read_text())
    (declared,) = (
        node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == "MetricWriter"
    )
    theirs = {node.name: parameters_of(node) for node in declared.body if isinstance(node, ast.FunctionDef)}
    ours = {name: signature_of(getattr(MetricWriter, name)) for name in MetricWriter.__abstractmethods__}
    # The released CLU has no point clouds; its next version declares them with these keywords.
    theirs.setdefault(
        "write_pointcloud",
        [
            ("self", "positional", False),
            ("step", "positional", False),
            ("point_clouds", "positional", False),
            ("point_colors", "keyword", True),
            ("configs", "keyword", True),
        ],
    )
    assert ours == theirs


@pytest.mark.parametrize(
    "made", [ConsoleWriter, JsonlWriter, MultiWriter, NullWriter, TensorBoardWriter, Attributed]
)
def test_every_writer_keeps_the_signatures(made):
    for name in MetricWriter.__abstractmethods__:
        assert signature_of(getattr(made, name)) == signature_of(getattr(MetricWriter, name)), name


@pytest.mark.parametrize("call", CALLS)
def test_every_call_is_taken_without_a_warning(writer, call):
    assert CALLS[call](writer) is None


def test_arrays_of_a_device_are_taken(writer):
    writer.write_scalars(1, {"loss": jnp.float32(0.5), "half": jnp.bfloat16(0.5), "count": jnp.int32(3)})
    writer.write_scalars(np.int64(2), {"one": jnp.ones((1,)), "nan": jnp.nan, "big": np.int64(2**60)})
    writer.write_images(jnp.int32(2), {"image": jnp.zeros((4, 4, 1), jnp.bfloat16)})
    writer.write_histograms(2, {"w": jnp.arange(4, dtype=jnp.float16)})


@pytest.mark.parametrize(
    "method", [name for name in CALLS if name.startswith("write_") and "hparams" not in name]
)
def test_empty_mappings_are_taken(writer, method):
    extra = {"sample_rate": 8} if method == "write_audios" else {}
    assert getattr(writer, method)(1, {}, **extra) is None


@pytest.mark.parametrize("name", ["null", "console", "tensorboard", "jsonl", "multi", "open_writer"])
def test_close_twice_is_taken(name, tmp_path):
    writer = WRITERS[name](tmp_path)
    writer.write_scalars(1, {"loss": 0.5})
    writer.close()
    assert writer.close() is None


@pytest.fixture
def clu_writers(monkeypatch):
    """CLU's own classes, imported past their package index, which needs TensorFlow."""
    package = types.ModuleType("clu.metric_writers")
    package.__path__ = [str(clu_folder())]
    monkeypatch.setitem(sys.modules, "clu.metric_writers", package)
    yield lambda name: importlib.import_module(f"clu.metric_writers.{name}")
    for name in [name for name in sys.modules if name.startswith("clu.metric_writers.")]:
        monkeypatch.delitem(sys.modules, name)


def test_a_writer_of_clu_takes_part_in_the_fan_out(clu_writers, tmp_path, caplog):
    theirs = clu_writers("logging_writer").LoggingWriter()
    both = MultiWriter(theirs, JsonlWriter(tmp_path))
    with caplog.at_level("INFO"):
        both.write_scalars(3, {"loss": jnp.float32(0.25)})
        both.write_histograms(3, {"w": np.arange(8.0)}, num_buckets={"w": 2})
        with pytest.warns(UserWarning, match=r"LoggingWriter.write_pointcloud is not supported"):
            both.write_pointcloud(3, {"cloud": np.zeros((2, 3))})
        both.write_scalars(4, {"loss": 0.125})
        both.close()
    assert "[3] loss=0.25" in caplog.text
    assert "[4] loss=0.125" in caplog.text
    assert [line["step"] for line in read_jsonl(tmp_path / "metrics.jsonl")] == [3, 3, 3, 4]


def test_our_writers_take_part_in_that_of_clu(clu_writers, tmp_path):
    theirs = clu_writers("multi_writer").MultiWriter([TensorBoardWriter(tmp_path)])
    for name, call in CALLS.items():
        if hasattr(theirs, name):
            call(theirs)
    theirs.close()
    assert events(tmp_path).Scalars("loss")[0].value == 0.5


def test_ml_dtypes_scalars_reach_the_log(tmp_path):
    with_half = TensorBoardWriter(tmp_path)
    with_half.write_scalars(1, {"half": ml_dtypes.bfloat16(1.5)})
    with_half.close()
    assert events(tmp_path).Scalars("half")[0].value == 1.5


def test_the_import_is_lazy():
    code = (
        "import sys, trainkit.writers; print([m for m in ('tensorboardX', 'tensorflow') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
