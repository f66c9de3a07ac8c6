"""Checkpoints of weights alone: what is in one, and the state that it gives. Owns no files."""

import logging

import jax

from trainkit._core.state import TrainState
from trainkit._core.tree import differences, named_leaves, path_name, signature
from trainkit._engine.engine import Engine
from trainkit._resume.restore import (
    STARTS,
    Restored,
    built_of,
    check_plain,
    lines,
    load_leaves,
    refuse,
    signature_of,
    spec_of,
)
from trainkit.checkpoint._store import Store

_LOG = logging.getLogger("trainkit")


def weights_of(engine: Engine, state: TrainState) -> set[str]:
    """Returns the path names of what is saved of a state: the model, and what the views of the trainer look at."""
    return {name for name, _ in named_leaves(state) if _is_model(name)} | engine.views.reads(state)


def _is_model(name: str) -> bool:
    return name in ("step", "rng") or name.startswith(("params/", *STARTS))


def restore_weights(
    engine: Engine, store: Store, step: int, current: TrainState | None
) -> tuple[TrainState, Restored]:
    """Returns the state with the weights of a checkpoint; the optimizer and the memory of other hooks begin afresh.

    Args:
        engine: of the trainer.
        store: the checkpoints.
        step: which one.
        current: the state of the trainer, None where it has none yet.

    Raises:
        ValueError: the model has other paths, shapes or dtypes.
    """
    saved = signature_of(spec_of(store, step))
    if current is None:
        check_plain(store, step)
        base = built_of(engine, spec_of(store, step), store.meta(step).get("keys", {}))
    else:
        base = engine.complete(current, 0)
    own = signature(base)
    model = {name: kind for name, kind in own.items() if _is_model(name)}
    refuse(differences({name: kind for name, kind in saved.items() if _is_model(name)}, model), store, step)
    names = [name for name, kind in saved.items() if own.get(name) == kind]
    arrays = load_leaves(engine, store, step, base, names)

    def loaded(path: tuple[object, ...], leaf: jax.Array) -> jax.Array:
        return arrays.get(path_name(path), leaf)

    # First the model, of which all that begins afresh is made; then what the views look at.
    known = {name: array for name, array in arrays.items() if _is_model(name)}
    base = jax.tree_util.tree_map_with_path(lambda path, leaf: known.get(path_name(path), leaf), base)
    base = base.replace(opt_state=base.tx.init(base.params), hooks={})
    state = jax.tree_util.tree_map_with_path(loaded, engine.steps.with_hooks(base))
    left = tuple(f"{name}: not of this trainer" for name in saved if name not in names)
    if left:
        _LOG.warning("restored without what no callback of this trainer has: %s", lines(left))
    _LOG.info("the checkpoint of step %d holds weights only: the optimizer begins afresh.", step)
    path = str(store.folder / str(step))
    return engine.strategy.lay_out(state), Restored(path, step, tuple(names), left)
