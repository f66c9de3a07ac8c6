"""What is kept of a step that went wrong: a new process replays it, and files that are others are refused by name."""

import json
import os
import pathlib
import shutil
import zipfile

import jax.numpy as jnp
import numpy as np
import optax
import pytest

import trainkit as tk
from tests.helpers.compare import assert_same
from tests.helpers.digits import Net, NetTrainer, batches
from trainkit._debug.failures import kept_batches
from trainkit.callbacks import NanGuard


def new_trainer(logdir):
    return NetTrainer(Net(), optax.adam(1e-2), callbacks=[NanGuard("raise")], logdir=logdir)


def spoilt():
    data = batches(6)
    data[3]["x"] = np.full_like(data[3]["x"], np.nan)
    for batch in data:
        batch["half"] = np.asarray(jnp.arange(len(batch["y"]), dtype=jnp.bfloat16))
    return data


@pytest.fixture(scope="module")
def failed(tmp_path_factory):
    """The logdir of a fit whose step 4 went wrong."""
    logdir = tmp_path_factory.mktemp("run")
    with pytest.raises(tk.NonFiniteError, match="step 4"):
        new_trainer(logdir).fit(spoilt(), epochs=1)
    return logdir


@pytest.fixture
def logdir(failed, tmp_path):
    """A copy of it."""
    return shutil.copytree(failed, tmp_path / "run")


def test_a_trainer_without_a_state_replays_the_step(failed):
    found = new_trainer(failed).replay(4)
    assert found.step == 4
    assert np.isnan(found.loss)
    assert found.inputs_finite is False


def test_batches_come_back_bit_for_bit(failed):
    (kept,) = kept_batches(failed, 4)
    assert_same(kept, spoilt()[3])


def rewritten(path, **changes):
    about = json.loads(path.read_text())
    path.write_text(json.dumps({**about, **changes}))


def packed(path, compression):
    """Writes the arrays anew, a gigabyte of zeros among them."""
    with zipfile.ZipFile(path) as archive:
        content = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, data in content.items():
            archive.writestr(name, data)


def claims(path):
    with zipfile.ZipFile(path) as archive:
        names = archive.namelist()
    header = b"{'descr': '<f4', 'fortran_order': False, 'shape': (9000000000000,), }"
    data = b"\x93NUMPY\x01\x00" + (len(header) + 1).to_bytes(2, "little") + header + b"\n"
    with zipfile.ZipFile(path, "w") as archive:
        for name in names:
            archive.writestr(name, data)


CHANGES = {
    "compressed": lambda folder: packed(folder / "batches.npz", zipfile.ZIP_DEFLATED),
    "claims terabytes": lambda folder: claims(folder / "batches.npz"),
    "no zip": lambda folder: (folder / "batches.npz").write_bytes(b"PK nothing"),
    "empty": lambda folder: (folder / "batches.npz").write_bytes(b""),
    "deep": lambda folder: (folder / "failure.json").write_text("[" * 50_000),
    "a list": lambda folder: (folder / "failure.json").write_text("[]"),
    "no dtypes": lambda folder: rewritten(folder / "failure.json", dtypes=None),
    "other dtypes": lambda folder: rewritten(
        folder / "failure.json", dtypes={"0": "int64", "1": "int64", "2": "O"}
    ),
    "no batches": lambda folder: rewritten(folder / "failure.json", batches=[]),
    "an array that is not there": lambda folder: rewritten(
        folder / "failure.json", batches=[{"__trainkit__": "stored", "name": "9"}]
    ),
}


@pytest.mark.parametrize("change", CHANGES)
def test_files_that_are_not_what_was_kept_are_named(logdir, change):
    CHANGES[change](logdir / "failures" / "4")
    with pytest.raises(
        ValueError, match=r"failures/4/failure\.json and batches\.npz beside it are not what was kept"
    ):
        kept_batches(logdir, 4)


def test_a_pipe_in_their_place_is_named_at_once(logdir):
    path = logdir / "failures" / "4" / "batches.npz"
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(OSError, match="is a pipe"):
        kept_batches(logdir, 4)


@pytest.mark.parametrize("name", ["failures", "failures/4"])
def test_a_link_leads_nowhere(tmp_path, name):
    logdir, theirs = tmp_path / "run", tmp_path / "theirs"
    (theirs / "4").mkdir(parents=True)
    (theirs / "precious").write_text("mine")
    (theirs / "4" / "precious").write_text("mine")
    link = logdir / name
    link.parent.mkdir(parents=True)
    link.symlink_to(theirs)
    with pytest.raises(tk.NonFiniteError) as error:
        new_trainer(logdir).fit(spoilt(), epochs=1)
    assert sorted(str(path.relative_to(theirs)) for path in theirs.rglob("*")) == [
        "4",
        "4/precious",
        "precious",
    ]
    if name == "failures":
        assert any("could not be kept" in note for note in error.value.__notes__)
    else:  # the link itself made room
        assert isinstance(link, pathlib.Path)
        assert not link.is_symlink()
        assert kept_batches(logdir, 4) is not None
