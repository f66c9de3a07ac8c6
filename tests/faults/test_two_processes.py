"""Two processes of which one gets a signal: both do the same at the same step, and go on as if nothing had been."""

import json
import os
import socket
import subprocess
import sys

from tests.faults.kill import ROOT, environment
from tests.faults.two import EPOCHS, EVALUATED, PER_EPOCH, SIGNALLED, STOPPED
from tests.helpers.runs import scalars_of


def test_a_signal_to_one_of_two_processes_is_acted_on_by_both(tmp_path):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    env = {
        **environment(tmp_path / "cache"),
        "XLA_FLAGS": f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=1",
        "NPROC": "4",
    }
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.faults.two", str(index), str(port), tmp_path],
            cwd=ROOT,
            env=env,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for index in range(2)
    ]
    try:
        for process in processes:
            output, _ = process.communicate(timeout=180)
            assert process.returncode == 0, output
    finally:
        for process in processes:
            process.kill()
            process.communicate()  # closes its pipe too
    first, second = (json.loads((tmp_path / f"{index}.json").read_text()) for index in range(2))
    assert first == second
    end = PER_EPOCH * EPOCHS
    for name, ended, saved in (
        ("between steps", [STOPPED, 6, "SIGTERM"], [50, STOPPED]),
        ("between slow steps", [SIGNALLED + 1, 6, "SIGTERM"], [50, SIGNALLED + 1]),
        ("in an evaluation", [EVALUATED, 3, "SIGTERM"], [25, EVALUATED]),
        ("too late", [end, EPOCHS, "SIGHUP"], [50, end]),
        ("saved", [end, EPOCHS, None], [STOPPED, end]),
    ):
        (_, *result, _), steps, last = first[name]
        assert (name, result, steps) == (name, ended, saved)
        assert (name, last) == (name, first["whole"])
        assert scalars_of(tmp_path / name) == scalars_of(tmp_path / "whole")
