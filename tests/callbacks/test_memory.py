"""`Memory`: what the devices and the process hold, against what the system and JAX tell in other ways."""

import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import trainkit as tk
from tests.helpers.infos import Recorder, make_info
from tests.helpers.weight import numbers, trainer
from trainkit.callbacks import Lambda, Memory
from trainkit.callbacks import _memory as module

EACH = tk.Every(steps=1)
MIB = 2**20


def resident():
    return 1024 * int(re.search(r"VmRSS:\s*(\d+) kB", Path("/proc/self/status").read_text())[1])


def test_what_is_alive_on_a_cpu_and_resident_on_the_host():
    held, by_hand, on_host = [], [], []

    def hold(info):
        if info.step == 2:
            held.append(jnp.zeros(16 * MIB // 4))
            held.append(np.ones(100 * MIB // 8))
        by_hand.append(sum(array.nbytes for array in jax.live_arrays() if not array.is_deleted()))
        on_host.append(resident())

    history = trainer(Lambda(on_step=hold), Memory(EACH)).fit(numbers(1, 2, 3), epochs=1).history
    assert [value for _, value in history["memory/device_bytes"]] == by_hand
    assert by_hand[1] - by_hand[0] >= 16 * MIB
    host = [value for _, value in history["memory/host_bytes"]]
    np.testing.assert_allclose(host, on_host, atol=8 * MIB, rtol=0)
    assert host[1] - host[0] > 90 * MIB
    assert "memory/device_peak_bytes" not in history


class Told:
    """A device that tells."""

    def __init__(self, used, peak):
        self.stats = {"bytes_in_use": used, "peak_bytes_in_use": peak}

    def memory_stats(self):
        return self.stats


def test_of_several_devices_that_tell_the_fullest_counts():
    assert module._on_devices({Told(10, 70), Told(30, 40)}) == {"device_bytes": 30, "device_peak_bytes": 70}


def test_written_at_its_cadence():
    history = trainer(Memory(tk.Every(steps=2))).fit(numbers(1, 2, 3, 4, 5), epochs=1).history
    assert [step for step, _ in history["memory/host_bytes"]] == [2, 4]
    with pytest.raises(TypeError, match=r"tk\.Every"):
        Memory(50)


def test_a_state_without_parameters_has_no_device():
    class State:
        params = {}

    writer = Recorder()
    Memory().on_step(make_info(50, state=State(), writer=writer))
    ((step, row),) = writer.rows
    assert (step, row["memory/device_bytes"]) == (50, 0)
