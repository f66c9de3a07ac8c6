"""Settings of every test session. Owns the environment JAX starts in; the tests decide the rest.

The environment is set before JAX is imported, and as environment variables, so that the processes which
tests start get the same. A session has one device, unless the caller forces more: `make test-multi` runs
`tests/multi_device` with eight.
"""

import os
import signal

os.environ["JAX_PLATFORMS"] = "cpu"
# A rank promoted in silence is how a [batch] mask meets a [batch, 1] loss and yields [batch, batch].
os.environ["JAX_NUMPY_RANK_PROMOTION"] = "raise"
# Compiling is most of what tests do; a third of it is optimisation that no assertion depends on.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
# Figures are drawn without a screen.
os.environ["MPLBACKEND"] = "Agg"
# What a shell starts in the background ignores Ctrl-C, and so would the processes that tests send one.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

import jax
import pytest

import trainkit._trainer.trainer
from trainkit._trainer.arguments import check_steps_per_call

STEPS_PER_CALL = int(os.environ.get("TRAINKIT_TEST_STEPS_PER_CALL", 1))
"""Of trainers that leave it open: found by measurement it would depend on what else the machine does. `make fused`
gives another number: the same tests pass whatever the calls."""


@pytest.fixture(autouse=True, scope="session")
def _calls():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainkit._trainer.trainer, "check_steps_per_call", _number_of_steps)
        yield


def _number_of_steps(given):
    return check_steps_per_call(STEPS_PER_CALL if given == "auto" else given)


@pytest.fixture
def auto(monkeypatch):
    """Lets trainers that leave it open find their steps per call by measurement."""
    monkeypatch.setattr(trainkit._trainer.trainer, "check_steps_per_call", check_steps_per_call)


@pytest.fixture
def one_device():
    """The first device, for a strategy that is compared with a loop written for one device."""
    return jax.devices()[0]


@pytest.fixture
def devices():
    """A function that gives the first `n` devices, and skips the test where there are fewer."""

    def first(n):
        found = jax.devices()
        if len(found) < n:
            pytest.skip(f"needs {n} devices, this session has {len(found)}: run `make test-multi`")
        return found[:n]

    return first


@pytest.fixture
def strict_dtypes():
    """Refuses implicit dtype promotion during one test.

    Not the rule for the session: `optax.adam` and `clu.metrics` promote int32 to float32 themselves.
    """
    with jax.numpy_dtype_promotion("strict"):
        yield
