"""Settings of every test session. Owns the environment JAX starts in; the tests decide the rest.

The environment is set before JAX is imported, and as environment variables, so that the processes which
tests start get the same. A session has one device, unless the caller forces more: `make test-multi` runs
`tests/multi_device` with eight.
"""

import os

os.environ["JAX_PLATFORMS"] = "cpu"
# A rank promoted in silence is how a [batch] mask meets a [batch, 1] loss and yields [batch, batch].
os.environ["JAX_NUMPY_RANK_PROMOTION"] = "raise"
# Compiling is most of what tests do; a third of it is optimisation that no assertion depends on.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
# Figures are drawn without a screen.
os.environ["MPLBACKEND"] = "Agg"

import jax
import pytest

STEPS_PER_CALL = os.environ.get("TRAINKIT_TEST_STEPS_PER_CALL")
"""Of trainers that leave it open, which `make fused` sets: the same tests pass whatever the calls."""


@pytest.fixture(autouse=True, scope="session")
def _calls():
    import trainkit._trainer

    checked = trainkit._trainer.check_steps_per_call
    with pytest.MonkeyPatch.context() as patch:
        if STEPS_PER_CALL is not None:
            steps = int(STEPS_PER_CALL)
            patch.setattr(
                trainkit._trainer,
                "check_steps_per_call",
                lambda given: checked(steps if given == "auto" else given),
            )
        yield


@pytest.fixture
def auto():
    """Skips the test where the steps of a call are not what trainkit makes them."""
    if STEPS_PER_CALL is not None:
        pytest.skip("is about the calls that trainkit makes by itself")


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
