"""What needs no second process to be shown: refusals, and what a signal does to one of several."""

import os
import signal
import types

import pytest

from trainkit._loop.interrupts import Interrupts
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
