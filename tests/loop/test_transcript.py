"""The hooks of a run that was broken off and resumed are, put together, those of one that was not."""

import pytest

import trainkit as tk
from tests.helpers.runs import Script, dies_at, saving, sigterm_at
from tests.helpers.transcript import Recorder, lines
from tests.helpers.weight import numbers

THREE = numbers(1, 2, 3)
LOSSES = dict.fromkeys(range(1, 20), 1.0)


def run(logdir, *callbacks, every=None):
    script, recorder = Script(LOSSES), Recorder()
    made = saving(logdir, script, recorder, *callbacks, every=every or tk.Every(steps=4))
    made.fit(THREE, epochs=3, eval_data=script.data, eval_every=tk.Every(steps=2), resume=True)
    return recorder.log


WHOLE = """
    fit_start 0 0
    epoch_start 0 1
    step 1 1
    step 2 1
    eval_start 2 1
    eval_end 2 1
    step 3 1
    epoch_end 3 1
    epoch_start 3 2
    step 4 2
    eval_start 4 2
    eval_end 4 2
    step 5 2
    step 6 2
    eval_start 6 2
    eval_end 6 2
    epoch_end 6 2
    epoch_start 6 3
    step 7 3
    step 8 3
    eval_start 8 3
    eval_end 8 3
    step 9 3
    epoch_end 9 3
    fit_end 9 3
    close
"""


def test_never_broken_off(tmp_path):
    assert run(tmp_path) == lines(WHOLE)


def test_broken_off_in_the_middle_of_a_pass(tmp_path):
    assert run(tmp_path, sigterm_at(5))[-3:] == lines("""
        step 5 2
        fit_end 5 2
        close
    """)
    # The pass goes on: it does not begin again.
    assert run(tmp_path) == lines("""
        fit_start 5 2
        step 6 2
        eval_start 6 2
        eval_end 6 2
        epoch_end 6 2
        epoch_start 6 3
        step 7 3
        step 8 3
        eval_start 8 3
        eval_end 8 3
        step 9 3
        epoch_end 9 3
        fit_end 9 3
        close
    """)


def test_broken_off_at_the_end_of_a_pass_with_an_evaluation_due(tmp_path):
    assert run(tmp_path, sigterm_at(6))[-3:] == lines("""
        step 6 2
        fit_end 6 2
        close
    """)
    # What was due is done first.
    assert run(tmp_path)[:6] == lines("""
        fit_start 6 2
        eval_start 6 2
        eval_end 6 2
        epoch_end 6 2
        epoch_start 6 3
        step 7 3
    """)


def test_broken_off_in_an_evaluation_which_begins_again(tmp_path):
    assert run(tmp_path, sigterm_at(6, "on_eval_start"))[-3:] == lines("""
        eval_start 6 2
        fit_end 6 2
        close
    """)
    assert run(tmp_path)[:4] == lines("""
        fit_start 6 2
        eval_start 6 2
        eval_end 6 2
        epoch_end 6 2
    """)


def test_died_between_checkpoints(tmp_path):
    with pytest.raises(ConnectionError):
        run(tmp_path, dies_at(7))
    assert run(tmp_path)[:4] == lines("""
        fit_start 4 2
        step 5 2
        step 6 2
        eval_start 6 2
    """)


def test_done_and_started_again(tmp_path):
    run(tmp_path)
    assert run(tmp_path) == ["fit_start 9 3", "fit_end 9 3", "close"]


@pytest.mark.parametrize("step", range(1, 10))
def test_the_parts_put_together_are_the_whole(tmp_path, step):
    first, second = run(tmp_path, sigterm_at(step)), run(tmp_path)
    assert first[-2:] == [f"fit_end {step} {(step + 2) // 3}", "close"]
    assert second[0] == f"fit_start {step} {(step + 2) // 3}"
    assert first[:-2] + second[1:] == lines(WHOLE)
