"""The search among the examples at a small size: trials that are pruned, and what TensorBoard finds of each."""

import contextlib
import io
import pathlib
import re
import runpy
import sys
from unittest import mock

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams import plugin_data_pb2

SEARCH = pathlib.Path(__file__).parents[2] / "examples" / "search.py"


def hparams(read):
    """The hyperparameters that TensorBoard's page finds in a run."""
    content = read.summary_metadata["_hparams_/session_start_info"].plugin_data.content
    session = plugin_data_pb2.HParamsPluginData.FromString(content).session_start_info
    return dict(session.hparams)


def test_the_search_prunes_and_logs_each_trial(tmp_path):
    pytest.importorskip("optuna")
    printed = io.StringIO()
    argv = [str(SEARCH), "--trials", "4", "--epochs", "3", "--logdir", str(tmp_path)]
    with mock.patch.object(sys, "argv", argv), contextlib.redirect_stdout(printed):
        runpy.run_path(str(SEARCH), run_name="__main__")
    lines = printed.getvalue().splitlines()
    trials = [line for line in lines if line.startswith("trial ")]
    pruned = [line for line in trials if "pruned: eval/loss is " in line]
    assert len(trials) == 4
    assert lines[-2] == f"{len(pruned)} of 4 trials were pruned"
    assert pruned
    assert re.match(r"best is trial \d with loss 0\.\d+: ", lines[-3])
    (folder,) = tmp_path.iterdir()
    runs = sorted(folder.iterdir())
    assert [run.name for run in runs] == [f"trial-{number:03}" for number in range(4)]
    lengths = set()
    for run in runs:
        read = EventAccumulator(str(run)).Reload()
        assert set(hparams(read)) == {"learning_rate", "width", "dropout"}
        lengths.add(len(read.Scalars("eval/loss")))
    assert max(lengths) == 3
    assert min(lengths) < 3
