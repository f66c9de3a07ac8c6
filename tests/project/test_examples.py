"""The examples at a small size, run as a user runs them: what they print, and what TensorBoard finds."""

import contextlib
import gzip
import io
import pathlib
import re
import runpy
import struct
import sys
from unittest import mock

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams import plugin_data_pb2

DIGITS = pathlib.Path(__file__).parents[2] / "examples" / "digits.py"
LIMIT = 300


def run(*arguments):
    """Runs the example in this process, where warnings are errors; returns the lines it printed."""
    printed = io.StringIO()
    argv = [str(DIGITS), *map(str, arguments)]
    with mock.patch.object(sys, "argv", argv), contextlib.redirect_stdout(printed):
        runpy.run_path(str(DIGITS), run_name="__main__")
    return printed.getvalue().splitlines()


def events(logdir):
    """Returns what TensorBoard reads of the one run in `logdir`."""
    (folder,) = logdir.iterdir()
    return EventAccumulator(str(folder)).Reload()


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    """The lines printed, the folder of the runs and the events of a run of two epochs."""
    logdir = tmp_path_factory.mktemp("digits")
    lines = run("--epochs", 2, "--limit", LIMIT, "--seed", 3, "--logdir", logdir)
    return lines, logdir, events(logdir)


def test_digits_ends_with_the_test_metrics_and_the_command_that_shows_the_logs(digits):
    lines, logdir, _ = digits
    found = re.fullmatch(r"test loss (\d+\.\d+), accuracy (\d\.\d+)", lines[-2])
    assert found, lines
    # A fifth of the examples is tested on: the accuracy is a number of them.
    assert float(found[2]) * LIMIT / 5 == pytest.approx(round(float(found[2]) * LIMIT / 5), abs=0.01)
    assert lines[-1] == f"tensorboard --logdir {logdir}"


def test_digits_logs_the_scalars_of_every_epoch(digits):
    *_, read = digits
    steps_per_epoch = LIMIT * 4 // 5 * 9 // 10 // 64
    names = {"train/loss", "train/accuracy", "eval/loss", "eval/accuracy", "train/learning_rate"}
    assert names <= set(read.Tags()["scalars"])
    for name in names:
        assert [event.step for event in read.Scalars(name)] == [steps_per_epoch, 2 * steps_per_epoch]


def test_digits_logs_pictures_that_can_be_seen(digits):
    *_, read = digits
    assert set(read.Tags()["images"]) == {"test/confusion_matrix", "test/hardest"}
    for name in read.Tags()["images"]:
        (event,) = read.Images(name)
        pixels = np.asarray(Image.open(io.BytesIO(event.encoded_image_string)))
        assert pixels.ndim == 3
        assert min(pixels.shape[:2]) >= 300
        assert pixels.std() > 10


def test_digits_logs_its_hyperparameters(digits):
    *_, read = digits
    metadata = read.SummaryMetadata("_hparams_/session_start_info").plugin_data
    started = plugin_data_pb2.HParamsPluginData.FromString(metadata.content).session_start_info
    assert {name: value.number_value for name, value in started.hparams.items()} == {
        "learning_rate": 3e-3,
        "batch_size": 64,
        "epochs": 2,
        "seed": 3,
    }


def write_idx(path, array):
    """Writes `array`, uint8, in the format of MNIST's files."""
    header = struct.pack(f">BBBB{array.ndim}I", 0, 0, 8, array.ndim, *array.shape)
    open_file = gzip.open if path.suffix == ".gz" else open
    with open_file(path, "wb") as file:
        file.write(header + array.astype(np.uint8).tobytes())


def write_mnist(folder, part, rows, suffix=""):
    """Writes `rows` digits, 24 pixels wide, as MNIST's files of that part."""
    source = load_digits()
    write_idx(
        folder / f"{part}-images-idx3-ubyte{suffix}", source.images[rows].repeat(3, 1).repeat(3, 2) * 15
    )
    write_idx(folder / f"{part}-labels-idx1-ubyte{suffix}", source.target[rows])


@pytest.mark.parametrize(
    ("parts", "suffix", "tested"),
    [({"t10k": slice(0, 300)}, ".gz", 60), ({"train": slice(0, 200), "t10k": slice(200, 270)}, "", 70)],
    ids=["a fifth of t10k, gzipped", "train and t10k"],
)
def test_digits_reads_mnist_files(tmp_path, parts, suffix, tested):
    for part, rows in parts.items():
        write_mnist(tmp_path, part, rows, suffix)
    logdir = tmp_path / "runs"
    lines = run("--epochs", 1, "--data-dir", tmp_path, "--logdir", logdir)
    accuracy = float(lines[-2].rsplit(" ", 1)[1])
    assert accuracy * tested == pytest.approx(round(accuracy * tested), abs=0.01)
    assert "test/hardest" in events(logdir).Tags()["images"]


def test_digits_says_which_files_are_missing(tmp_path):
    with pytest.raises(SystemExit, match="t10k-images-idx3-ubyte"):
        run("--data-dir", tmp_path)
