"""A train state from a checkpoint: what it must look like, what of it fits, and where it goes.

Owns the comparison of a checkpoint with a trainer; not the files, nor what else a checkpoint holds.
"""

import dataclasses
import logging
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from trainkit._core.state import TrainState
from trainkit._core.tree import (
    dict_keys,
    differences,
    is_key,
    key_generator,
    named_leaves,
    nested,
    odd_keys,
    path_name,
    signature,
)
from trainkit._core.typing import PyTree
from trainkit._engine.engine import Engine
from trainkit.checkpoint._store import Store

_LOG = logging.getLogger("trainkit")
_MOST_LINES = 20
_MODEL_STATE = ("batch_stats", "collections")
_STARTS = tuple(f"{part}/" for part in _MODEL_STATE)


@dataclasses.dataclass(frozen=True)
class Restored:
    """What `Trainer.restore` did.

    Attributes:
        path: folder of the checkpoint.
        step: of the checkpoint.
        loaded: path names of the arrays taken from it.
        left: one line for each array of the model that was not, with the reason.
    """

    path: str
    step: int
    loaded: tuple[str, ...] = dataclasses.field(repr=False)
    left: tuple[str, ...] = ()


def arrays_of(state: TrainState) -> tuple[dict[str, jax.Array], dict[str, Any]]:
    """Returns the arrays of `state` to be saved, by path name, and the dtype and shape of every one as JSON."""
    named = named_leaves(state)
    spec = {name: [str(leaf.dtype), list(leaf.shape)] for name, leaf in named}
    # An array without elements holds nothing, and Orbax does not take it.
    return {name: leaf for name, leaf in named if leaf.size}, spec


def is_plain(variables: PyTree) -> bool:
    """Says whether `variables` are nested dicts with keys of str or int, which names and `odd_keys` tell all of."""
    paths = (path for path, _ in jax.tree_util.tree_leaves_with_path(variables))
    return all(dict_keys(path) is not None for path in paths)


def keys_of(state: TrainState) -> dict[str, list[str | int]]:
    """Returns what the path names of the variables in `state` do not tell of their keys, see `odd_keys`."""
    fields = {name: getattr(state, name) for name in ("params", *_MODEL_STATE)}
    return odd_keys(fields)


def restore_state(engine: Engine, store: Store, step: int, current: TrainState) -> TrainState:
    """Returns the train state of a checkpoint, on the devices.

    Args:
        engine: of the trainer that goes on with it.
        store: the checkpoints.
        step: which one.
        current: a state of the trainer, whose leaves may be `jax.ShapeDtypeStruct`.

    Raises:
        ValueError: the trainer's state has other paths, shapes or dtypes.
    """
    saved = _spec_of(store, step)
    if current.rng is None:
        current = current.replace(rng=_abstract(*saved["rng"]))
    # A state made by hand lacks the memory of hooks, which a fit adds.
    current = jax.eval_shape(engine.steps.with_hooks, current)
    template = _template(engine, saved, current, store, step)
    return _load(engine, store, step, template)


def restore_built(engine: Engine, store: Store, step: int) -> TrainState:
    """Returns the train state of a checkpoint for a trainer that has none yet; raises as `restore_state`."""
    saved = _spec_of(store, step)
    if not store.meta(step)["plain"]:
        raise ValueError(
            f"the variables in {store.folder / str(step)} are not plain dicts (partitioned parameters, for one), so "
            "their structure is that of a state: call trainer.init(batch) first."
        )
    template = _built(engine, saved, store.meta(step).get("keys", {}))
    _refuse(differences(_signature(saved), signature(template)), store, step)
    return _load(engine, store, step, template)


def restore_partly(
    engine: Engine, store: Store, step: int, current: TrainState, only: Sequence[str] | None
) -> tuple[TrainState, Restored]:
    """Returns `current` with what fits of the model in a checkpoint: parameters and mutable collections.

    At step 0 the memory of hooks begins afresh from what was taken.

    Args:
        engine: of the trainer.
        store: the checkpoints.
        step: which one.
        current: the trainer's state.
        only: prefixes of path names, e.g. `params/encoder`, or `encoder` in every collection; None for the whole model.

    Raises:
        ValueError: nothing fits, or a prefix is that of no array of the model.
    """
    _check_prefixes(current, only)
    saved, names = _spec_of(store, step), []
    saved_signature, left = _signature(saved), []
    for name, leaf in named_leaves(current):
        if not name.startswith(("params/", *_STARTS)):
            continue
        wanted = only is None or any(_begins(name, one) for one in only)
        own = signature({name: leaf})[name]
        if not wanted:
            left.append(f"{name}: not asked for")
        elif name not in saved:
            left.append(f"{name}: not in the checkpoint")
        elif saved_signature[name] != own:
            left.append(f"{name}: saved as {saved_signature[name]}, here {own}")
        elif leaf.size:
            names.append(name)
    leaves = dict(named_leaves(current))
    if not names:
        raise ValueError(
            f"nothing of the checkpoint in {store.folder / str(step)} fits this model: {_lines(left)}"
        )
    arrays = store.load_state(step, {name: _with_sharding(leaves[name]) for name in names})
    arrays = {name: _free(engine, array) for name, array in arrays.items()}
    state = jax.tree_util.tree_map_with_path(lambda path, leaf: arrays.get(path_name(path), leaf), current)
    if not int(state.step):
        # An average of fresh weights would outweigh those taken for a long time.
        state = engine.steps.with_hooks(state.replace(hooks={}))
    if left:
        _LOG.warning("restored in part; left as they were: %s", _lines(left))
    return state, Restored(str(store.folder / str(step)), step, tuple(names), tuple(left))


def _begins(name: str, prefix: str) -> bool:
    """Says whether a path name begins with `prefix`, with or without the collection in front."""
    prefix = prefix.strip("/")
    within = name.split("/", 2 if name.startswith("collections/") else 1)[-1]
    return any(one == prefix or one.startswith(f"{prefix}/") for one in (name, within))


def _check_prefixes(current: TrainState, only: Sequence[str] | None) -> None:
    names = [name for name, _ in named_leaves(current) if name.startswith(("params/", *_STARTS))]
    for prefix in only or ():
        if not any(_begins(name, prefix) for name in names):
            parts = sorted({"/".join(name.split("/")[:2]) for name in names})
            raise ValueError(
                f"partial={prefix!r} is the beginning of no array of this model; they begin with {_lines(parts)}. A "
                "prefix ends at a slash and may leave out the collection: 'params/encoder' or 'encoder'."
            )


def _template(
    engine: Engine, saved: Mapping[str, Any], current: TrainState, store: Store, step: int
) -> TrainState:
    found = differences(_signature(saved), signature(current))
    if not found:
        return current
    # Some models settle the shapes of their collections at the first step: the saved shapes are right where
    # the parameters are the same and a state made of the saved variables has what was saved.
    meta = store.meta(step)
    built = _built(engine, saved, meta.get("keys", {})) if meta["plain"] else current
    same_params = not differences(_signature(_part(saved, "params")), signature({"params": current.params}))
    if same_params and type(current) is TrainState and not differences(_signature(saved), signature(built)):
        return built
    _refuse(found, store, step)
    raise AssertionError  # not reached: there were differences


def _refuse(found: list[str], store: Store, step: int) -> None:
    if found:
        raise ValueError(
            f"the checkpoint in {store.folder / str(step)} is of another model, optimizer or set of callbacks "
            f"(saved -> now): {_lines(found)}. Make them equal, or load what fits with "
            "trainer.restore(..., partial=True)."
        )


def _built(engine: Engine, saved: Mapping[str, Any], keys: Mapping[str, list[str | int]]) -> TrainState:
    """Returns the abstract state that a trainer would have with the saved variables."""
    variables, stats, others = (
        nested({name: _abstract(*spec) for name, spec in _part(saved, field).items()}, keys)
        for field in ("params", *_MODEL_STATE)
    )
    variables = {"params": {}, **variables, **stats, **others.get("collections", {})}
    return jax.eval_shape(engine.steps.state_of, variables, _abstract(*saved["rng"]))


def _part(saved: Mapping[str, Any], field: str) -> dict[str, Any]:
    return {name: spec for name, spec in saved.items() if name.startswith(f"{field}/")}


def _spec_of(store: Store, step: int) -> dict[str, Any]:
    return store.meta(step)["arrays"]


def _signature(saved: Mapping[str, Any]) -> dict[str, str]:
    return {name: f"{dtype}[{', '.join(map(str, shape))}]" for name, (dtype, shape) in saved.items()}


def _abstract(dtype: str, shape: Sequence[int]) -> jax.ShapeDtypeStruct:
    if dtype.startswith("key<"):
        return jax.eval_shape(lambda: jax.random.key(0, impl=key_generator(dtype)))
    return jax.ShapeDtypeStruct(tuple(shape), jnp.dtype(dtype))


def _with_sharding(leaf: jax.Array) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=getattr(leaf, "sharding", None))


def _load(engine: Engine, store: Store, step: int, template: TrainState) -> TrainState:
    shardings = engine.strategy.shardings(template)
    if shardings is None:
        targets = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), template)
    else:
        targets = jax.tree.map(
            lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place),
            template,
            shardings,
        )
    named = {name: leaf for name, leaf in named_leaves(targets) if leaf.size}
    arrays = dict(store.load_state(step, named))

    def value(path: tuple[Any, ...], leaf: Any) -> Any:
        if not leaf.size:
            return jnp.zeros(leaf.shape, leaf.dtype)
        array = arrays.pop(path_name(path))
        if is_key(leaf) and not is_key(array):  # read to the host, a key is its data
            return jax.random.wrap_key_data(array, impl=key_generator(leaf.dtype))
        return _free(engine, array)

    return engine.strategy.lay_out(jax.tree_util.tree_map_with_path(value, targets))


def _free(engine: Engine, array: Any) -> Any:
    """Returns an array that was read to the default device as one that is computed there.

    Orbax ties what it reads to its device, and a program for arrays that are tied is another program. One by one, so
    that the host need not hold all of them.
    """
    if not engine.strategy.takes_host_batches or not isinstance(array, jax.Array):
        return array
    if is_key(array):
        return jax.random.wrap_key_data(
            _free(engine, jax.random.key_data(array)), impl=jax.random.key_impl(array)
        )
    return jax.device_put(jax.device_get(array))


def _lines(found: Sequence[str]) -> str:
    more = f"; and {len(found) - _MOST_LINES} more" if len(found) > _MOST_LINES else ""
    return "; ".join(found[:_MOST_LINES]) + more
