"""`Profile`: which steps are traced, under which names, and that a trace ends whatever becomes of the fit."""

import gzip
import json

import jax
import jax.numpy as jnp
import pytest

import trainkit as tk
from tests.helpers.runs import TEN, dies_at, sigterm_at
from tests.helpers.weight import trainer
from trainkit._core.phases import phases_are_named
from trainkit.callbacks import Checkpoint, Lambda, Profile

LOOKS = Lambda(on_step=lambda info: None)
"""Looks at each step, so that each is a call."""


def traced(logdir):
    """What the traces in a folder name, by the folder of each: the numbers of steps, and the other phases."""
    found = {}
    for path in sorted((logdir / "plugins" / "profile").glob("*/*.trace.json.gz")):
        assert list(path.parent.glob("*.xplane.pb"))  # what TensorBoard's page reads
        events = json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]
        steps = [int(event["args"]["step_num"]) for event in events if event.get("name") == "step"]
        names = {event.get("name") for event in events} & {"data", "eval", "save", "callbacks"}
        found[path.parent.name] = sorted(steps), names
    return found


def test_the_steps_after_those_given_are_traced_with_what_is_done_around_them(tmp_path):
    one = trainer(LOOKS, Profile(at=(2, 6), steps=3), logdir=tmp_path)
    one.fit(TEN, epochs=1, eval_data=TEN[:1], eval_every=tk.Every(steps=4))
    found = traced(tmp_path)
    assert {name: steps for name, (steps, _) in found.items()} == {"step_2": [2, 3, 4], "step_6": [6, 7, 8]}
    assert found["step_2"][1] >= {"data", "eval", "callbacks"}
    assert not phases_are_named()


def test_a_fit_that_ends_inside_ends_the_trace_and_a_further_one_traces_the_rest(tmp_path):
    one = trainer(LOOKS, Profile(at=0, steps=4), logdir=tmp_path)
    one.fit(TEN, steps=2)
    one.fit(TEN, steps=4)
    assert {name: steps for name, (steps, _) in traced(tmp_path).items()} == {
        "step_0": [0, 1],
        "step_2": [2, 3],
    }


def test_an_exception_ends_the_trace_and_a_resumed_run_traces_the_rest(tmp_path):
    def run(*others):
        one = trainer(Checkpoint(), LOOKS, Profile(at=2, steps=4), *others, logdir=tmp_path)
        return one.fit(TEN, epochs=1, resume=True)

    run(sigterm_at(3))
    with pytest.raises(ConnectionError):
        run(dies_at(5))
    assert not phases_are_named()
    run()
    assert {name: steps for name, (steps, _) in traced(tmp_path).items()} == {
        "step_2": [2],
        "step_3": [3, 4, 5],
    }
    jax.profiler.start_trace(tmp_path / "free")  # nobody traces any more
    jax.profiler.stop_trace()


def test_where_it_can_not_trace_it_says_so_and_the_fit_goes_on(tmp_path, caplog):
    trainer(Profile(at=2, steps=1)).fit(TEN, steps=3)
    assert "Profile traces nothing: the trainer has no logdir" in caplog.text
    jax.profiler.start_trace(tmp_path / "own")
    try:
        result = trainer(Profile(at=2, steps=1), logdir=tmp_path / "run").fit(TEN, steps=3)
    finally:
        jax.profiler.stop_trace()
    assert result.step == 3
    assert "Profile traces nothing at step 2: " in caplog.text
    assert not (tmp_path / "run" / "plugins").exists()


def test_starting_over_removes_traces_and_nothing_else(tmp_path):
    trainer(Profile(at=0, steps=1), logdir=tmp_path).fit(TEN, epochs=1)
    kept = [tmp_path / "plugins" / "profile" / name / "vm.xplane.pb" for name in ("2026_01_01", "step_x")]
    kept.append(tmp_path / "plugins" / "profile" / "step_0" / "notes.txt")
    for path in kept:
        path.parent.mkdir(exist_ok=True)
        path.write_text("mine")
    trainer(logdir=tmp_path, overwrite=True).fit(TEN, epochs=1)
    assert {path for path in (tmp_path / "plugins").rglob("*") if path.is_file()} == set(kept)


def test_nothing_changes_by_being_traced(tmp_path):
    plain = trainer(logdir=tmp_path / "a").fit(TEN, epochs=1)
    looked = trainer(Profile(at=3, steps=2), logdir=tmp_path / "b").fit(TEN, epochs=1)
    assert jnp.array_equal(plain.state.params["w"], looked.state.params["w"])
    assert dict(plain.history) == dict(looked.history)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"at": -1}, r"Profile\(at=-1\): must be an int, 0 or more"),
        ({"at": True}, "at=True"),
        ({"at": ()}, r"at=\(\)"),
        ({"at": (1, 2.0)}, "must be an int"),
        ({"at": 1, "steps": 0}, r"Profile\(steps=0\): must be an int, 1 or more"),
        ({"at": (1, 4), "steps": 4}, "overlap; begin each at least 4 steps after"),
    ],
    ids=str,
)
def test_arguments_out_of_range(given, message):
    with pytest.raises(ValueError, match=message):
        Profile(**given)
