"""Settings of these tests. Owns that Ctrl-C means something."""

import signal

import pytest


@pytest.fixture(autouse=True)
def heeds_ctrl_c():
    """Undoes what a shell does that starts the tests in the background: it has them ignore Ctrl-C."""
    before = signal.getsignal(signal.SIGINT)
    if before is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)
