"""Settings of every test session. Owns the environment JAX starts in; the tests decide the rest.

The environment is set before JAX is imported, and as environment variables, so that the processes which
tests start get the same. A session has one device, unless the caller forces more: `make test-multi` runs
`tests/multi_device` with eight.
"""

import os
import pathlib
import signal

os.environ["JAX_PLATFORMS"] = "cpu"
# A rank promoted in silence is how a [batch] mask meets a [batch, 1] loss and yields [batch, batch].
os.environ["JAX_NUMPY_RANK_PROMOTION"] = "raise"
# Compiling is most of what tests do; a third of it is optimisation that no assertion depends on.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
# For the same reason, the older of XLA's two ways to emit a fusion, whose code is compiled in a third of the time, and
# one thread a program: there are as many workers as cores. Once only, because the flags are part of a program's key.
os.environ["XLA_FLAGS"] = " ".join(
    dict.fromkeys(
        [
            *os.environ.get("XLA_FLAGS", "").split(),
            "--xla_cpu_use_fusion_emitters=false",
            "--xla_cpu_parallel_codegen_split_count=1",
        ]
    )
)
# What one test, worker or process compiled no other compiles again, nor does the next session. Another folder can be
# named by the first of these variables, and an empty name does without. The last keeps the folder out of the keys.
os.environ.setdefault(
    "JAX_COMPILATION_CACHE_DIR",
    str(pathlib.Path(__file__).resolve().parents[1] / ".pytest_cache" / "compiled"),
)
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")
os.environ.setdefault("JAX_PERSISTENT_CACHE_ENABLE_XLA_CACHES", "none")
# Figures are drawn without a screen.
os.environ["MPLBACKEND"] = "Agg"
# What a shell starts in the background ignores Ctrl-C, and so would the processes that tests send one.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

import jax
import pytest
from jax.experimental.compilation_cache import compilation_cache

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
def no_cache(monkeypatch, tmp_path_factory):
    """Does without JAX's folder of compiled programs, as a user who names none; what a test sets instead is undone.

    The user's own cache, which trainkit then uses, is a fresh one.
    """
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
    before = jax.config.jax_compilation_cache_dir
    jax.config.update("jax_compilation_cache_dir", None)
    compilation_cache.reset_cache()  # it looks at its folder once
    yield
    jax.config.update("jax_compilation_cache_dir", before)
    compilation_cache.reset_cache()


@pytest.fixture
def auto(monkeypatch, no_cache):
    """Lets trainers that leave it open find their steps per call by measurement, which they remember in the cache."""
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
