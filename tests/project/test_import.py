"""What `import trainkit` does to a process: nothing but load itself.

Both looks are taken in a fresh interpreter, because this one has imported far more already.
"""

import json
import subprocess
import sys

import pytest

# Imports trainkit alone, and last asks for three CPU devices: JAX refuses that once a backend has started.
ALONE = """
import importlib.metadata, json, sys
import trainkit
loaded = sorted({name.partition(".")[0] for name in sys.modules})
import jax
jax.config.update("jax_num_cpu_devices", 3)
print(json.dumps({
    "loaded": loaded,
    "devices": len(jax.devices("cpu")),
    "version": trainkit.__version__,
    "installed": importlib.metadata.version("trainkit"),
}))
"""

# Imports first what trainkit builds on, so that what differs afterwards is trainkit's doing.
AFTER_ITS_DEPENDENCIES = """
import json, logging, signal, sys, warnings
import jax, flax, flax.linen, flax.training.train_state, optax, clu.metrics, orbax.checkpoint

def look():
    root, own = logging.getLogger(), logging.getLogger("trainkit")
    return {
        "packages": sorted({name.partition(".")[0] for name in sys.modules} - sys.stdlib_module_names),
        "signals": [repr(signal.getsignal(number)) for number in sorted(signal.valid_signals())],
        "logging": [len(root.handlers), root.level, len(own.handlers), own.level, own.propagate],
    }

before = look()
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import trainkit
print(json.dumps({"before": before, "after": look(), "warnings": [str(w.message) for w in caught]}))
"""


def run(code):
    """Runs `code` in a fresh interpreter and returns the JSON it printed."""
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert process.returncode == 0, process.stderr
    return json.loads(process.stdout)


@pytest.fixture(scope="module")
def alone():
    return run(ALONE)


@pytest.fixture(scope="module")
def beside():
    return run(AFTER_ITS_DEPENDENCIES)


@pytest.mark.parametrize(
    "package", ["tensorflow", "torch", "sklearn", "matplotlib", "tensorboardX", "tensorboard", "grain", "PIL"]
)
def test_does_not_load(alone, package):
    assert package not in alone["loaded"]


def test_touches_no_device(alone):
    assert alone["devices"] == 3


def test_version_is_the_installed_one(alone):
    assert alone["version"] == alone["installed"]


def test_loads_no_third_party_package_of_its_own(beside):
    assert set(beside["after"]["packages"]) - set(beside["before"]["packages"]) == {"trainkit"}


def test_installs_no_signal_handler(beside):
    assert beside["after"]["signals"] == beside["before"]["signals"]


def test_configures_no_logging(beside):
    assert beside["after"]["logging"] == beside["before"]["logging"]


def test_warns_about_nothing(beside):
    assert beside["warnings"] == []
