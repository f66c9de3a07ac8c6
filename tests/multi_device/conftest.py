"""Keeps the tests of this folder to sessions with eight devices, forced before JAX starts."""

import jax
import pytest

NEEDED = 8


@pytest.fixture(autouse=True)
def _eight_devices():
    found = jax.device_count()
    if found < NEEDED:
        pytest.skip(f"needs {NEEDED} devices, this session has {found}: run `make test-multi`")
