"""What `import trainkit` does to a process: nothing but load itself.

Every test starts a fresh interpreter, because this one has imported far more already.
"""

import json
import subprocess
import sys

import pytest

# What every user of the package imports anyway; trainkit is measured against it.
BASELINE = "import jax, flax, flax.linen, flax.training.train_state, optax, clu.metrics, orbax.checkpoint"


def run(code: str) -> object:
    """Runs `code` in a fresh interpreter and returns the JSON it printed."""
    process = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False
    )
    assert process.returncode == 0, process.stderr
    return json.loads(process.stdout)


@pytest.fixture(scope="module")
def loaded_packages():
    """Top-level packages that are loaded by trainkit and not by the baseline."""
    return set(
        run(
            f"import json, sys; {BASELINE}\n"
            "before = {name.partition('.')[0] for name in sys.modules}\n"
            "import trainkit\n"
            "after = {name.partition('.')[0] for name in sys.modules}\n"
            "print(json.dumps(sorted(after - before - set(sys.stdlib_module_names))))"
        )
    )


def test_loads_no_third_party_package_of_its_own(loaded_packages):
    assert loaded_packages == {"trainkit"}


@pytest.mark.parametrize("package", ["tensorflow", "torch", "sklearn", "matplotlib", "tensorboardX", "grain"])
def test_does_not_load(package):
    loaded = run(f"import json, sys, trainkit; print(json.dumps({package!r} in sys.modules))")
    assert loaded is False


def test_touches_no_device():
    # JAX refuses to change the number of CPU devices once a backend has started.
    count = run(
        "import json, jax, trainkit\n"
        "jax.config.update('jax_num_cpu_devices', 3)\n"
        "print(json.dumps(len(jax.devices('cpu'))))"
    )
    assert count == 3


def test_installs_no_signal_handler():
    changed = run(
        f"import json, signal; {BASELINE}\n"
        "numbers = sorted(signal.valid_signals())\n"
        "before = [signal.getsignal(number) for number in numbers]\n"
        "import trainkit\n"
        "after = [signal.getsignal(number) for number in numbers]\n"
        "print(json.dumps([int(n) for n, a, b in zip(numbers, before, after) if a is not b]))"
    )
    assert changed == []


def test_configures_no_logging():
    states = run(
        f"import json, logging; {BASELINE}\n"
        "root, own = logging.getLogger(), logging.getLogger('trainkit')\n"
        "def look(): return [len(root.handlers), root.level, len(own.handlers), own.level, own.propagate]\n"
        "before = look()\n"
        "import trainkit\n"
        "print(json.dumps([before, look()]))"
    )
    before, after = states
    assert after == before


def test_warns_about_nothing():
    caught = run(
        f"import json, warnings; {BASELINE}\n"
        "with warnings.catch_warnings(record=True) as caught:\n"
        "    warnings.simplefilter('always')\n"
        "    import trainkit\n"
        "print(json.dumps([str(w.message) for w in caught]))"
    )
    assert caught == []


def test_version_is_the_installed_one():
    version, installed = run(
        "import importlib.metadata, json, trainkit\n"
        "print(json.dumps([trainkit.__version__, importlib.metadata.version('trainkit')]))"
    )
    assert version == installed
