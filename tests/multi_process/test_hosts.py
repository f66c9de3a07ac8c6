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
