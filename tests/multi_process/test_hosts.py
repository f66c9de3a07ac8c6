"""What needs no second process to be shown: refusals, and what a signal does to one of several."""

import os
import signal
import types

import pytest

from trainkit._core.cadence import NEVER
from trainkit._loop.interrupts import Interrupts
from trainkit._loop.meetings import Meetings
from trainkit.parallel import Pmap


def on_processes(*indices):
    return [types.SimpleNamespace(process_index=index, platform="cpu") for index in indices]


def test_pmap_refuses_processes_with_unequally_many_devices():
    strategy = Pmap(devices=on_processes(0, 0, 1))
    with pytest.raises(ValueError, match="process 0 has 2, process 1 has 1"):
        _ = strategy.shards


def test_pmap_counts_the_devices_of_all_processes():
    strategy = Pmap(devices=on_processes(0, 0, 1, 1))
    assert (strategy.shards, strategy.processes) == (4, 2)


@pytest.mark.parametrize("alone", [True, False])
def test_a_signal_is_acted_on_at_once_by_a_process_alone(alone):
    interrupts = Interrupts(alone=alone)
    with interrupts.listening():
        os.kill(os.getpid(), signal.SIGTERM)
    assert interrupts.noted == "SIGTERM"
    assert interrupts.received == ("SIGTERM" if alone else None)


@pytest.mark.parametrize("alone", [True, False])
def test_what_sigusr1_asks_is_done_once_and_of_several_when_they_have_agreed(alone):
    interrupts = Interrupts(alone=alone)
    with interrupts.listening():
        os.kill(os.getpid(), signal.SIGUSR1)
    assert interrupts.asked is alone
    if not alone:
        assert interrupts.agree(0.1) == 0.1  # this process is all there are
    assert (interrupts.noted, interrupts.asked) == (None, True)
    assert [interrupts.take_save(), interrupts.take_save(), interrupts.asked] == [True, False, False]


# Seconds a step takes, and the steps at which processes then meet: every 10 s, and every 32 steps at most. What the
# first call takes, which compiles, counts once.
@pytest.mark.parametrize(
    ("first", "each", "met"),
    [
        (0.001, 0.001, [1, 33, 65, 97]),
        (60.0, 0.001, [1, 2, 34, 66]),
        (60.0, 2.0, [1, 2, 7, 12]),
        (60.0, 25.0, [1, 2, 3, 4]),
    ],
)
def test_processes_meet_as_often_as_slow_steps_ask_for(first, each, met):
    now, found = [0.0], []
    meetings = Meetings(Interrupts(alone=False), lambda: now[0], 0, together=True)
    for step in range(1, met[-1] + 1):
        now[0] += first if step == 1 else each
        if step >= meetings.next_step:
            meetings.meet(step, ())
            found.append(step)
            assert meetings.seconds == now[0]
    assert found == met


def test_they_meet_in_an_evaluation_too():
    now, found, interrupts = [0.0], [], Interrupts(alone=False)
    meetings = Meetings(interrupts, lambda: now[0], 0, together=True)
    now[0] += 60
    meetings.meet(3, ())  # a step takes 20 s
    look = meetings.during_evaluation()
    for batches in range(9):
        before = meetings.seconds
        look(batches, ())
        found += [batches] if meetings.seconds != before else []
        now[0] += 4
    assert found == [1, 3, 5, 7]


def test_one_process_meets_nobody():
    assert Meetings(Interrupts(), lambda: 0.0, 0, together=False).next_step == NEVER
