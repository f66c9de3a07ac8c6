"""Going back to a checkpoint: the run is that in which the batches passed over never were."""

import json

import numpy as np
import optax
import pytest

import trainkit as tk
from tests.helpers.runs import assert_equal, sigterm_at, steps_in
from tests.helpers.weight import Weight, WeightTrainer, numbers, weight
from trainkit.callbacks import Checkpoint, LogMetrics, NanGuard

EACH, TWO = tk.Every(steps=1), tk.Every(steps=2)
NAN = float("nan")
BAD = numbers(1, 2, 3, 4, NAN, 6, 7, 8, 9, 10)


def made(logdir, *callbacks, keepers=None, guard=EACH):
    keepers = [Checkpoint(TWO)] if keepers is None else keepers
    return WeightTrainer(
        Weight(),
        optax.sgd(1.0),
        callbacks=[LogMetrics(EACH), NanGuard("rollback", guard), *keepers, *callbacks],
        logdir=logdir,
    )


def logged(logdir):
    lines = [json.loads(line) for line in (logdir / "metrics.jsonl").read_text().splitlines()]
    return [
        (line["step"], line["scalars"]["train/loss"])
        for line in lines
        if "train/loss" in line.get("scalars", {})
    ]


@pytest.fixture(scope="module")
def by_hand(tmp_path_factory):
    """The run on the batches that count; each step is noticed one step later, when the sixth was done as well."""
    logdir = tmp_path_factory.mktemp("hand")
    result = made(logdir).fit(numbers(1, 2, 3, 4, 7, 8, 9, 10), epochs=1)
    return result, logged(logdir)


def test_it_goes_on_without_the_batches_since(tmp_path, by_hand):
    expected, log = by_hand
    result = made(tmp_path).fit(BAD, epochs=1)
    assert result.step == expected.step == 8
    assert weight(result.state) == -(1 + 2 + 3 + 4 + 7 + 8 + 9 + 10)
    assert_equal(result.state, expected.state)
    assert logged(tmp_path) == log
    assert dict(result.history) == dict(expected.history)
    assert all(info.problems == () for info in tk.checkpoint.verify(tmp_path))


@pytest.mark.parametrize("step", [5, 6, 7])
def test_broken_off_before_or_after_it_ends_the_same(tmp_path, by_hand, step):
    expected, log = by_hand
    made(tmp_path, sigterm_at(step)).fit(BAD, epochs=1, resume=True)
    result = made(tmp_path).fit(BAD, epochs=1, resume=True)
    # A signal between the bad step and the look at it does not make the bad step good.
    assert np.isfinite(weight(result.state))
    if step == 7:
        assert_equal(result.state, expected.state)
        assert logged(tmp_path) == log
    steps = [at for at, _ in logged(tmp_path)]
    assert steps == sorted(set(steps))


def test_with_two_folders_it_goes_back_to_the_newest_of_all(tmp_path, by_hand):
    keepers = [Checkpoint(tk.Every(steps=3), folder=tmp_path / "a"), Checkpoint(TWO, folder=tmp_path / "b")]
    result = made(tmp_path, keepers=keepers).fit(BAD, epochs=1)
    assert_equal(result.state, by_hand[0].state)
    assert steps_in(tmp_path / "a") == [3, 6, 8]
    assert steps_in(tmp_path / "b") == [4, 6, 8]
    for name in "ab":
        fresh = made(None, keepers=[])
        for step in steps_in(tmp_path / name):
            fresh.restore(tmp_path / name, step=step)
            assert weight(fresh.state) == -sum([1, 2, 3, 4, 7, 8, 9, 10][:step])


def test_never_saved_before_the_guard_has_looked(tmp_path):
    """The host looks every 50 steps, the checkpoint comes every 2."""
    result = made(tmp_path, guard=tk.Every(steps=50)).fit(BAD, epochs=1)
    assert np.isfinite(weight(result.state))
    fresh = made(None, keepers=[])
    for info in tk.checkpoint.list(tmp_path):
        fresh.restore(tmp_path, step=info.step)
        assert int(fresh.state.hooks["nan_guard"].bad_step) == 0


def test_at_the_very_end(tmp_path):
    result = made(tmp_path).fit(numbers(1, 2, 3, 4, 5, NAN), epochs=1)
    assert (result.step, weight(result.state)) == (4, -10)
    assert [at for at, _ in logged(tmp_path)] == [1, 2, 3, 4]


def test_by_steps_others_take_their_place(tmp_path):
    result = made(tmp_path).fit(BAD, steps=10)
    assert result.step == 10
    assert weight(result.state) == -(1 + 2 + 3 + 4 + 7 + 8 + 9 + 10 + 1 + 2)


def test_without_a_checkpoint_to_go_back_to(tmp_path):
    with pytest.raises(
        RuntimeError, match=r"step 5 is not finite.*no checkpoint to go back to: add tk.callbacks"
    ):
        made(tmp_path / "a", keepers=[]).fit(BAD, epochs=1)
    with pytest.raises(
        RuntimeError, match=r"step 5 is not finite.*no checkpoint was saved yet.*save earlier"
    ):
        made(tmp_path / "b", keepers=[Checkpoint(tk.Every(steps=8))]).fit(BAD, epochs=1)
