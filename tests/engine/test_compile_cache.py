"""Compiled programs kept in the folder of a run, unless JAX was given a folder: whoever starts again reads them."""

import jax
import optax
import pytest

from tests.helpers.digits import Net, NetTrainer, batches
from trainkit._engine import compile_cache


@pytest.fixture
def fit(monkeypatch, tmp_path):
    """A function that runs one step in `tmp_path` and returns the names of the programs kept there."""
    monkeypatch.setattr(compile_cache, "_LEAST_SECONDS", 0.0)

    def one():
        NetTrainer(Net(), optax.sgd(0.1), logdir=tmp_path).fit(batches(1), epochs=1)
        return {path.name for path in tmp_path.glob(f"{compile_cache.FOLDER}/*-cache")}

    return one


def test_a_run_keeps_its_programs_and_the_next_finds_them(no_cache, fit):
    before = jax.config.jax_persistent_cache_min_entry_size_bytes
    kept = fit()
    assert any("train" in name for name in kept)
    # Compiled programs are a run's own: what comes after it in the process is not kept.
    assert jax.config.jax_compilation_cache_dir is None
    assert jax.config.jax_persistent_cache_min_entry_size_bytes == before
    assert fit() == kept


def test_a_folder_that_jax_was_given_is_used_instead(no_cache, fit, tmp_path):
    jax.config.update("jax_compilation_cache_dir", str(tmp_path / "given"))
    assert fit() == set()
    assert any("train" in path.name for path in (tmp_path / "given").glob("*-cache"))
    assert jax.config.jax_compilation_cache_dir == str(tmp_path / "given")
