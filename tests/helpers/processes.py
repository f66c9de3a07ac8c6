"""Programs in processes of their own, and small disks for them."""

import pathlib
import shutil
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]


def on_a_disk(folder, options):
    """Returns what goes before a command that finds a small disk at a folder; skips where none can be mounted.

    Args:
        folder: exists.
        options: of the disk, e.g. `size=8k`.
    """
    # In a mount namespace of its own: it goes with the process.
    mount = f'mount -t tmpfs -o {options} tmpfs {folder} && exec "$@"'
    alone = ["unshare", "-m", "sh", "-c", mount, "sh"]
    if shutil.which("unshare") is None or subprocess.run([*alone, "true"], capture_output=True).returncode:
        pytest.skip("needs the right to mount a small disk")
    return alone


def start_and_wait(code, *args):
    """Returns the process of a program that has printed "ready", and goes on at a line of its input."""
    process = subprocess.Popen(
        [sys.executable, "-c", code, *args],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout.readline() == "ready\n", process.communicate()[1]
    return process
