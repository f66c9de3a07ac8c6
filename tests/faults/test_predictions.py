"""Predictions into a folder by processes that are killed, again and again, by a real SIGKILL."""

import json
import signal
import subprocess
import sys

import jax
import numpy as np
import pytest

from tests.faults.kill import ROOT, environment
from tests.faults.predicting import BATCHES, ROWS, Rows, make_trainer, rows


def killed(folder, cache, last):
    """Lets a process predict, and kills it while it waits for the batch `last`; returns what it asked for."""
    command = [sys.executable, "-m", "tests.faults.predicting", str(folder), str(last)]
    process = subprocess.Popen(
        command, cwd=ROOT, env=environment(cache), stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0
    )
    asked = []
    try:
        while not asked or asked[-1] != last:
            line = process.stdout.readline()
            assert line, "it ended"
            asked.append(int(line))
    finally:
        process.send_signal(signal.SIGKILL)
        process.communicate()
    assert process.returncode == -signal.SIGKILL
    return asked


def whole(folder):
    """How many batches the journal says are whole."""
    lines = (folder / "predictions.jsonl").read_text().splitlines()
    return max(json.loads(line).get("batches", 0) for line in lines)


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


def test_killed_twice_it_goes_on_and_returns_every_row_in_order(tmp_path, cache):
    folder = tmp_path / "out"
    assert killed(folder, cache, 9)[:3] == [0, 1, 2]
    first = whole(folder)
    assert 3 <= first <= 9
    # The first batch is read again, to see that the data are the same; then those that are missing.
    assert killed(folder, cache, 17)[:2] == [0, first]
    second = whole(folder)
    assert first + 3 <= second <= 17
    assert not list(folder.glob("*.npy"))
    asked, made = [], make_trainer()
    got = made.predict(Rows(asked.append), out=folder)
    assert asked == [0, *range(second, BATCHES)]
    params = jax.device_get(made.state.params)
    x = np.concatenate([rows(index) for index in range(BATCHES)])
    np.testing.assert_allclose(got["y"], x @ params["kernel"] + params["bias"], rtol=1e-5, atol=1e-6)
    assert got["name"].tolist() == [f"{i}" * (1 + i) for i in range(BATCHES) for _ in range(ROWS)]
    np.testing.assert_array_equal(np.load(folder / "y.npy"), got["y"])
