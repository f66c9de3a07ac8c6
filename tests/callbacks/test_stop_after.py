"""`StopAfter`: steps and passes of the run, seconds of a fit over all of its resumes."""

import functools

import pytest

import trainkit._loop.run
from tests.helpers.runs import TEN, Script, dies_at, saving, sigterm_at
from tests.helpers.weight import numbers, trainer, weight
from trainkit import Every
from trainkit._loop.stopwatch import Stopwatch
from trainkit.callbacks import Lambda, StopAfter
from trainkit.testing import check_callback

THREE = numbers(1, 2, 3)


def test_steps_are_those_of_the_run():
    one = trainer(StopAfter(steps=4))
    result = one.fit(TEN, epochs=9)
    assert (result.step, result.stopped_by) == (4, "stop after 4 steps: at step 4")
    assert weight(result.state) == -(1 + 2 + 3 + 4)
    again = one.fit(TEN, epochs=9)  # the run has them
    assert (again.step, again.stopped_by) == (4, "stop after 4 steps: at step 4")


def test_a_fit_that_ends_before_is_not_stopped_and_further_fits_count_on():
    one = trainer(StopAfter(steps=4))
    assert [(r.step, r.stopped_by is None) for r in (one.fit(TEN, steps=3), one.fit(TEN, steps=3))] == [
        (3, True),
        (4, False),
    ]


def test_what_is_due_where_it_stops_is_done(tmp_path):
    script = Script({4: 7.0})
    one = saving(tmp_path, StopAfter(steps=4), script)
    result = one.fit(TEN, epochs=1, eval_data=script.data)
    assert result.history["eval/loss"] == [(4, 7.0)]
    assert (tmp_path / "checkpoints" / "4").exists()


def test_epochs_are_complete_passes_of_the_run():
    ends = []
    one = trainer(StopAfter(epochs=2), Lambda(on_epoch_end=lambda info: ends.append(info.step)))
    # Broken off inside the first pass and inside the second: neither is done then.
    assert one.fit(THREE, steps=2).stopped_by is None
    assert one.fit(THREE, steps=3).stopped_by is None
    result = one.fit(THREE, epochs=9)
    assert (result.step, result.epoch, result.stopped_by) == (6, 2, "stop after 2 epochs: done at step 6")
    assert ends == [2, 3, 5, 6]
    again = one.fit(THREE, epochs=9)
    assert (again.step, again.epoch, again.stopped_by) == (6, 2, "stop after 2 epochs: done before step 6")


def test_epochs_where_the_length_of_a_pass_is_not_known():
    result = trainer(StopAfter(epochs=2)).fit(lambda: iter(THREE), steps=100)
    assert (result.step, result.epoch) == (6, 2)


@pytest.mark.parametrize("limit", [{"steps": 5}, {"epochs": 2}], ids=str)
def test_a_resumed_run_stops_where_one_never_interrupted_does(tmp_path, limit):
    whole = saving(tmp_path / "whole", StopAfter(**limit)).fit(THREE, epochs=9, resume=True)
    for killer in (sigterm_at(2), dies_at(4), None):
        one = saving(
            tmp_path / "cut", *([killer] if killer else []), StopAfter(**limit), every=Every(steps=1)
        )
        try:
            result = one.fit(THREE, epochs=9, resume=True)
        except ConnectionError:
            continue
    assert (result.step, result.stopped_by) == (whole.step, whole.stopped_by)
    assert weight(result.state) == weight(whole.state)
    over = saving(tmp_path / "cut", StopAfter(**limit)).fit(THREE, epochs=9, resume=True)
    assert (over.step, over.stopped_by) == (whole.step, whole.stopped_by)


class Clock:
    """A clock on which every step takes a second; before the first, 100 s had passed."""

    def __init__(self, monkeypatch):
        self.now = 100.0
        monkeypatch.setattr(
            trainkit._loop.run, "Stopwatch", functools.partial(Stopwatch, clock=lambda: self.now)
        )
        self.ticks = Lambda(on_step=self._tick)

    def _tick(self, info):
        self.now += 1


def test_seconds_are_those_of_one_fit(monkeypatch):
    clock = Clock(monkeypatch)
    one = trainer(clock.ticks, StopAfter(seconds=3))
    first = one.fit(TEN, steps=2)
    assert first.stopped_by is None
    result = one.fit(TEN, epochs=9)
    # Whether it is time is asked before the callbacks of a step, of which one makes it a second later.
    assert result.step - first.step == 4
    assert result.stopped_by == "stop after 3 seconds: 4 s at step 6"


def test_seconds_add_up_over_resumes(monkeypatch, tmp_path):
    clock, ends = Clock(monkeypatch), []
    for killer in (sigterm_at(3), sigterm_at(5), None):
        one = saving(tmp_path, *([killer] if killer else []), clock.ticks, StopAfter(seconds=7))
        ends.append(one.fit(TEN, epochs=99, resume=True))
        clock.now += 1000  # between two lives no time is spent
    assert [result.step for result in ends[:2]] == [3, 5]
    assert ends[-1].step == 8
    assert ends[-1].stopped_by.startswith("stop after 7 seconds: ")
    again = saving(tmp_path, clock.ticks, StopAfter(seconds=7)).fit(TEN, epochs=99, resume=True)
    assert (again.step, again.stopped_by) == (ends[-1].step, ends[-1].stopped_by)


@pytest.mark.parametrize("given", [{}, {"steps": 1, "epochs": 1}, {"steps": 1, "seconds": 2.0}], ids=str)
def test_exactly_one_limit_is_given(given):
    with pytest.raises(ValueError, match="exactly one of steps=, epochs= and seconds="):
        StopAfter(**given)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"steps": 0}, r"StopAfter\(steps=0\): must be a positive int"),
        ({"steps": 2.0}, "positive int"),
        ({"steps": True}, "positive int"),
        ({"epochs": -1}, "positive int"),
        ({"epochs": "2"}, "positive int"),
        ({"seconds": 0.0}, r"StopAfter\(seconds=0.0\): must be a positive finite number"),
        ({"seconds": float("inf")}, "positive finite number"),
        ({"seconds": float("nan")}, "positive finite number"),
    ],
    ids=str,
)
def test_arguments_out_of_range(given, message):
    with pytest.raises(ValueError, match=message):
        StopAfter(**given)


@pytest.mark.parametrize("limit", [{"steps": 1000}, {"epochs": 1000}, {"seconds": 1e6}], ids=str)
def test_conformance(limit):
    check_callback(lambda: StopAfter(**limit))
