"""`predict(out=...)`: what is written is what NumPy computes, and nothing else in the folder is touched."""

import json
import os

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn

import trainkit as tk
from trainkit._loop.npy_files import JOURNAL, NpyFiles
from trainkit._loop.npy_leaf import Leaf

X = np.random.default_rng(0).normal(size=(22, 3)).astype(np.float32)
NAMES = np.array(["a", "bb", "a name that is much longer than others", "ü"] * 6)[:22]


class Line(tk.Trainer):
    def loss(self, model, batch, ctx):
        return model(batch["x"])[:, 0] ** 2, {}

    def predict_step(self, model, batch, ctx):
        return model(batch["x"])


class Several(Line):
    def predict_step(self, model, batch, ctx):
        y = model(batch["x"])
        return {"head": {"y": y, "half": y.astype(jnp.bfloat16)}, "n": jnp.ones(len(y), jnp.int32)}


class Counted(tk.data.Source):
    """Batches of 4 rows that can be sought, or not; notes which were read."""

    def __init__(self, *, seekable=True, known=True, dies_at=None, names=False):
        self.seekable, self.read, self._dies_at, self._names = seekable, [], dies_at, names
        self.batch_size, self.keeps_batches = 4, True
        if known:
            self.num_examples, self.steps_per_epoch = 22, 6

    def batches(self, epoch, start=0):
        for index in range(start, 6):
            if index == self._dies_at:
                raise ConnectionError
            self.read.append(index)
            rows = slice(4 * index, 4 * index + 4)
            yield {"x": X[rows], **({"meta": {"id": NAMES[rows]}} if self._names else {})}


def trainer(cls=Line, **options):
    made = cls(nn.Dense(2), optax.sgd(0.1), **options)
    made.init({"x": X})
    return made


def expected(made):
    params = jax.device_get(made.state.params)
    return X @ params["kernel"] + params["bias"]


def assert_right(got, made):
    assert isinstance(got, np.memmap)
    np.testing.assert_allclose(got, expected(made), rtol=1e-5, atol=1e-6)


@pytest.fixture(scope="module")
def line():
    return trainer()


def test_one_file_a_leaf_named_by_its_path(tmp_path):
    made = trainer(Several)
    got = made.predict(Counted(names=True), out=tmp_path / "new" / "out")
    folder, y = tmp_path / "new" / "out", expected(made)
    assert sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()) == [
        "head/half.npy",
        "head/y.npy",
        "meta/id.npy",
        "n.npy",
        JOURNAL,
    ]
    assert_right(got["head"]["y"], made)
    with pytest.raises(ValueError, match="read-only"):
        got["head"]["y"][0] = 0
    # Anyone reads them.
    np.testing.assert_array_equal(np.load(folder / "head" / "y.npy"), got["head"]["y"])
    assert np.load(folder / "meta" / "id.npy").tolist() == got["meta/id"].tolist() == NAMES.tolist()
    assert got["head"]["half"].dtype == jnp.bfloat16
    np.testing.assert_allclose(got["head"]["half"].astype(np.float32), y, rtol=1e-2, atol=1e-2)
    np.testing.assert_array_equal(got["n"], np.ones(22, np.int32))
    # In memory it is the same tree.
    plain = made.predict(Counted(names=True))
    assert jax.tree.structure(plain) == jax.tree.structure(dict(got))


@pytest.mark.parametrize("options", [{}, {"seekable": False}, {"seekable": False, "known": False}])
def test_broken_off_it_goes_on_after_the_batches_that_are_whole(tmp_path, line, options):
    with pytest.raises(ConnectionError):
        line.predict(Counted(dies_at=5, **options), out=tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["output.npy.part", JOURNAL]
    # A line, and rows, that a killed process did not finish.
    with open(tmp_path / JOURNAL, "ab") as file:
        file.write(b'{"batches": 3, "ro')
    with open(tmp_path / "output.npy.part", "ab") as file:
        file.write(b"half a row")
    source = Counted(**options)
    assert_right(line.predict(source, out=tmp_path), line)
    # The first tells whether the data are the same.
    assert source.read == ([0, 5] if source.seekable else [0, 1, 2, 3, 4, 5])
    again = Counted(**options)
    assert_right(line.predict(again, out=tmp_path), line)
    assert again.read == ([0] if options.get("known", True) else [0, 1, 2, 3, 4, 5])


def _write_three(folder, line):
    """Leaves the first three batches whole, by cutting the journal and the file of all six."""
    line.predict(Counted(), out=folder)
    lines = (folder / JOURNAL).read_bytes().splitlines(keepends=True)
    (folder / JOURNAL).write_bytes(b"".join(lines[:4]))
    os.rename(folder / "output.npy", folder / "output.npy.part")


def _flip(folder, line):
    path = folder / "output.npy.part"
    content = bytearray(path.read_bytes())
    content[-1 - 4 * 2 * 10] ^= 1
    path.write_bytes(content)
    return line


def _cut(folder, line):
    os.truncate(folder / "output.npy.part", 200)
    return line


def _gone(folder, line):
    os.remove(folder / "output.npy.part")
    return line


def _other_weights(folder, line):
    return trainer(seed=1)


def _other_program(folder, line):
    class Twice(Line):
        def predict_step(self, model, batch, ctx):
            return 2 * model(batch["x"]) / 2

    return trainer(Twice)


def _other_names(folder, line):
    class Named(Line):
        def predict_step(self, model, batch, ctx):
            return {"y": model(batch["x"])}

    return trainer(Named)


@pytest.mark.parametrize("change", [_flip, _cut, _gone, _other_weights, _other_program, _other_names])
def test_what_is_not_the_same_prediction_begins_anew(tmp_path, line, change):
    _write_three(tmp_path, line)
    made, source = change(tmp_path, line), Counted()
    got = made.predict(source, out=tmp_path)
    assert_right(got["y"] if isinstance(got, dict) else got, made)
    assert source.read == [0, 1, 2, 3, 4, 5]
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {JOURNAL, "y.npy" if isinstance(got, dict) else "output.npy"}


def test_other_data_begin_anew(tmp_path, line):
    line.predict(Counted(), out=tmp_path)
    got = line.predict([{"x": X[:3]}], out=tmp_path)
    np.testing.assert_allclose(got, expected(line)[:3], rtol=1e-5, atol=1e-6)
    assert_right(line.predict(Counted(), out=tmp_path), line)
    part = line.predict(Counted(), limit=2, out=tmp_path)
    np.testing.assert_allclose(part, expected(line)[:8], rtol=1e-5, atol=1e-6)


def test_a_generator_of_unknown_length(tmp_path, line):
    def batches():
        for start in range(0, 22, 5):
            yield {"x": X[start : start + 5]}

    assert_right(line.predict(batches(), out=tmp_path), line)
    assert_right(line.predict(batches, out=tmp_path), line)
    with pytest.raises(ValueError, match="yielded no batch"):
        line.predict(iter(()), out=tmp_path / "empty")
    # Shorter than what was written for the same beginning.
    with pytest.raises(ValueError, match=r"the predictions for 5 batches, and the data ended after 2"):
        line.predict(({"x": X[start : start + 5]} for start in (0, 5)), out=tmp_path)


@pytest.mark.parametrize("name", ["output.npy", "output.npy.part", JOURNAL])
def test_files_of_others_are_left_alone(tmp_path, line, name):
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / name).write_text("mine")
    with pytest.raises(ValueError, match=rf"{name}' is there, and was not written by predict"):
        line.predict(Counted(), out=tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"notes.txt", name}
    assert (tmp_path / name).read_text() == (tmp_path / "notes.txt").read_text() == "mine"
    (tmp_path / name).unlink()
    assert_right(line.predict(Counted(), out=tmp_path), line)
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_one_prediction_at_a_time(tmp_path, line):
    leaf = Leaf("output", np.dtype("<f4"), (2,))
    first = NpyFiles(tmp_path, 1, [leaf])
    first.write([np.zeros((3, 2), np.float32)])
    with pytest.raises(ValueError, match=r"another prediction is being written to .*a folder of its own"):
        line.predict(Counted(), out=tmp_path)
    assert first.finish()["output"].shape == (3, 2)
    assert_right(line.predict(Counted(), out=tmp_path), line)


def test_a_link_is_not_followed(tmp_path, line):
    out = tmp_path / "out"
    line.predict(Counted(), out=out)
    (tmp_path / "target").write_text("mine")
    (out / "output.npy").unlink()
    (out / "output.npy").symlink_to(tmp_path / "target")
    with pytest.raises(OSError, match="symbolic link"):
        line.predict(Counted(), out=out)
    assert (tmp_path / "target").read_text() == "mine"


def test_a_journal_names_no_file_outside(tmp_path, line):
    out, mine = tmp_path / "out", tmp_path / "mine.npy"
    out.mkdir()
    mine.write_text("mine")
    line_of = {"for": 1, "leaves": [["../mine", "<f4", [2]]]}
    (out / JOURNAL).write_text(json.dumps(line_of) + "\n")
    assert_right(line.predict(Counted(), out=out), line)
    assert mine.read_text() == "mine"


def test_what_a_file_does_not_hold(tmp_path, line):
    objects = np.empty(4, object)
    objects[:] = [{}, {}, {}, {}]
    with pytest.raises(TypeError, match=r"the leaf 'id' of a batch holds objects \(dict\)"):
        line.predict([{"x": X[:4], "id": objects}], out=tmp_path)

    class Units(Line):
        batch_axis = None

        def loss(self, model, batch, ctx):
            return (model(batch["x"]) ** 2).mean(), {}

    made = Units(nn.Dense(2), optax.sgd(0.1))
    made.init({"x": X})
    with pytest.raises(ValueError, match=r"one unit .*leave out= away"):
        made.predict([{"x": X}], out=tmp_path)

    class Empty(Line):
        def predict_step(self, model, batch, ctx):
            return {}

    with pytest.raises(ValueError, match="predict_step gives no array"):
        trainer(Empty).predict([{"x": X}], out=tmp_path / "empty")

    class Dots(Line):
        def predict_step(self, model, batch, ctx):
            return {"..": model(batch["x"])}

    with pytest.raises(ValueError, match=r"the leaf '\.\.' can't be the name of a file"):
        trainer(Dots).predict([{"x": X}], out=tmp_path / "dots")


def test_strings_and_bytes_in_objects(tmp_path, line):
    ids = np.array(["one", "three"], object)
    data = [{"x": X[:2], "id": ids}, {"x": X[2:4], "id": np.array(["ab", "seventeen"], object)}]

    class Named(Line):
        def predict_step(self, model, batch, ctx):
            return {"y": model(batch["x"])}

    got = trainer(Named).predict(data, out=tmp_path)
    assert got["id"].tolist() == ["one", "three", "ab", "seventeen"]


def test_rows_without_elements_and_numbers_of_any_kind(tmp_path):
    leaves = [
        Leaf("empty", np.dtype("<f4"), (0,)),
        Leaf("flag", np.dtype(bool), ()),
        Leaf("deep/z", np.dtype("<c8"), (2, 1)),
    ]
    files = NpyFiles(tmp_path, 1, leaves)
    for rows in (3, 2):
        files.write(
            [
                np.zeros((rows, 0), np.float32),
                np.arange(rows) % 2 == 0,
                np.full((rows, 2, 1), 1j * rows, np.complex64),
            ]
        )
    got = files.finish()
    assert {name: array.shape for name, array in got.items()} == {
        "empty": (5, 0),
        "flag": (5,),
        "deep/z": (5, 2, 1),
    }
    assert np.load(tmp_path / "flag.npy").tolist() == [True, False, True, True, False]
    assert np.load(tmp_path / "deep" / "z.npy")[4, 1, 0] == 2j
    with pytest.raises(ValueError, match=r"two leaves would be written to a\.npy"):
        NpyFiles(tmp_path / "x", 1, [leaves[1].__class__("a", np.dtype(bool), ())] * 2)
