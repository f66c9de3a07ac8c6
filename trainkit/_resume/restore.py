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
STARTS = tuple(f"{part}/" for part in _MODEL_STATE)


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
    saved = spec_of(store, step)
    if current.rng is None:
        current = current.replace(rng=_abstract(*saved["rng"]))
    # A state made by hand lacks the memory of hooks, which a fit adds.
    current = jax.eval_shape(engine.steps.with_hooks, current)
    template = _template(engine, saved, current, store, step)
    return _load(engine, store, step, template)


def restore_built(engine: Engine, store: Store, step: int) -> TrainState:
    """Returns the train state of a checkpoint for a trainer that has none yet; raises as `restore_state`."""
    saved = spec_of(store, step)
    check_plain(store, step)
    template = built_of(engine, saved, store.meta(step).get("keys", {}))
    refuse(differences(signature_of(saved), signature(template)), store, step)
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
    saved, names = spec_of(store, step), []
    saved_signature, left = signature_of(saved), []
    for name, leaf in named_leaves(current):
        if not name.startswith(("params/", *STARTS)):
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
            f"nothing of the checkpoint in {store.folder / str(step)} fits this model: {lines(left)}"
        )
    arrays = store.load_state(step, {name: _with_sharding(leaves[name]) for name in names})
    arrays = {name: _free(engine, array) for name, array in arrays.items()}
    state = jax.tree_util.tree_map_with_path(lambda path, leaf: arrays.get(path_name(path), leaf), current)
    if not int(state.step):
        # An average of fresh weights would outweigh those taken for a long time.
        state = engine.steps.with_hooks(state.replace(hooks={}))
    if left:
        _LOG.warning("restored in part; left as they were: %s", lines(left))
    return state, Restored(str(store.folder / str(step)), step, tuple(names), tuple(left))


def _begins(name: str, prefix: str) -> bool:
    """Says whether a path name begins with `prefix`, with or without the collection in front."""
    prefix = prefix.strip("/")
    within = name.split("/", 2 if name.startswith("collections/") else 1)[-1]
    return any(one == prefix or one.startswith(f"{prefix}/") for one in (name, within))


def _check_prefixes(current: TrainState, only: Sequence[str] | None) -> None:
    names = [name for name, _ in named_leaves(current) if name.startswith(("params/", *STARTS))]
    for prefix in only or ():
        if not any(_begins(name, prefix) for name in names):
            parts = sorted({"/".join(name.split("/")[:2]) for name in names})
            raise ValueError(
                f"partial={prefix!r} is the beginning of no array of this model; they begin with {lines(parts)}. A "
                "prefix ends at a slash and may leave out the collection: 'params/encoder' or 'encoder'."
            )


def _template(
    engine: Engine, saved: Mapping[str, Any], current: TrainState, store: Store, step: int
) -> TrainState:
    found = differences(signature_of(saved), signature(current))
    if not found:
        return current
    # Some models settle the shapes of their collections at the first step: the saved shapes are right where
    # the parameters are the same and a state made of the saved variables has what was saved.
    meta = store.meta(step)
    built = built_of(engine, saved, meta.get("keys", {})) if meta["plain"] else current
    same_params = not differences(signature_of(_part(saved, "params")), signature({"params": current.params}))
    if same_params and type(current) is TrainState and not differences(signature_of(saved), signature(built)):
        return built
    refuse(found, store, step)
    raise AssertionError  # not reached: there were differences


def check_plain(store: Store, step: int) -> None:
    """Refuses a checkpoint whose variables no state can be made of without the model."""
    if not store.meta(step)["plain"]:
        raise ValueError(
            f"the variables in {store.folder / str(step)} are not plain dicts (partitioned parameters, for one), so "
            "their structure is that of a state: call trainer.init(batch) first."
        )


def refuse(found: list[str], store: Store, step: int) -> None:
    """Refuses a checkpoint of another trainer, from the lines that `differences` gave."""
    if found:
        raise ValueError(
            f"the checkpoint in {store.folder / str(step)} is of another model, optimizer or set of callbacks "
            f"(saved -> now): {lines(found)}. Make them equal, or load what fits with "
            "trainer.restore(..., partial=True)."
        )


def built_of(engine: Engine, saved: Mapping[str, Any], keys: Mapping[str, list[str | int]]) -> TrainState:
    """Returns the abstract state that a trainer would have with the saved variables."""
    variables, stats, others = (
        nested({name: _abstract(*spec) for name, spec in _part(saved, field).items()}, keys)
        for field in ("params", *_MODEL_STATE)
    )
    variables = {"params": {}, **variables, **stats, **others.get("collections", {})}
    return jax.eval_shape(engine.steps.state_of, variables, _abstract(*saved["rng"]))


def _part(saved: Mapping[str, Any], field: str) -> dict[str, Any]:
    return {name: spec for name, spec in saved.items() if name.startswith(f"{field}/")}


def spec_of(store: Store, step: int) -> dict[str, Any]:
    """Returns the dtype and shape of each array of a checkpoint by path name."""
    return store.meta(step)["arrays"]


def signature_of(saved: Mapping[str, Any]) -> dict[str, str]:
    """Returns what `spec_of` gave as `signature` does."""
    return {name: f"{dtype}[{', '.join(map(str, shape))}]" for name, (dtype, shape) in saved.items()}


def _abstract(dtype: str, shape: Sequence[int]) -> jax.ShapeDtypeStruct:
    if dtype.startswith("key<"):
        return jax.eval_shape(lambda: jax.random.key(0, impl=key_generator(dtype)))
    return jax.ShapeDtypeStruct(tuple(shape), jnp.dtype(dtype))


def _with_sharding(leaf: jax.Array) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=getattr(leaf, "sharding", None))


def _load(engine: Engine, store: Store, step: int, template: TrainState) -> TrainState:
    arrays = load_leaves(engine, store, step, template, [name for name, _ in named_leaves(template)])
    loaded = jax.tree_util.tree_map_with_path(lambda path, _: arrays.pop(path_name(path)), template)
    return engine.strategy.lay_out(loaded)


def load_leaves(
    engine: Engine, store: Store, step: int, template: TrainState, names: Sequence[str]
) -> dict[str, jax.Array]:
    """Returns arrays of a checkpoint by path name, where the strategy lays them out.

    Args:
        engine: of the trainer.
        store: the checkpoints.
        step: which one.
        template: a state of that form, whose leaves may be `jax.ShapeDtypeStruct`.
        names: those wanted.
    """
    shardings = engine.strategy.shardings(template)
    if shardings is None:
        targets = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), template)
    else:
        targets = jax.tree.map(
            lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place),
            template,
            shardings,
        )
    wanted = {name: leaf for name, leaf in named_leaves(targets) if name in set(names)}
    arrays = dict(store.load_state(step, {name: leaf for name, leaf in wanted.items() if leaf.size}))

    def value(name: str, leaf: Any) -> Any:
        if not leaf.size:
            return jnp.zeros(leaf.shape, leaf.dtype)
        array = arrays.pop(name)
        if is_key(leaf) and not is_key(array):  # read to the host, a key is its data
            return jax.random.wrap_key_data(array, impl=key_generator(leaf.dtype))
        return _free(engine, array)

    return {name: value(name, leaf) for name, leaf in wanted.items()}


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


def lines(found: Sequence[str]) -> str:
    """Returns the first of many lines as one."""
    more = f"; and {len(found) - _MOST_LINES} more" if len(found) > _MOST_LINES else ""
    return "; ".join(found[:_MOST_LINES]) + more
