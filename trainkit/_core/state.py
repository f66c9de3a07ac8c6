"""`TrainState`: everything that flows in a run and is an array. Owns no behaviour of the loop."""

from collections.abc import Callable, Mapping
from typing import Any, Self

import flax
import flax.core
import flax.serialization
import flax.struct
import flax.training.train_state
import jax
import jax.numpy as jnp
import optax

from trainkit._core.tree import is_key, key_generator
from trainkit._core.typing import Collection, PyTree, Variables

OVERWRITTEN = "_overwrite_with_gradient"
"""The collection of fp8 layers whose gradient is not a direction to move in but the next value."""


class TrainState(flax.training.train_state.TrainState, kw_only=True):
    """Parameters, optimizer state, model state, key and callback state of a run, as one pytree.

    A subclass of Flax's `TrainState`, usable with or without a `Trainer`, inside `jit`, `vmap`, `pmap` and
    `scan`. Add fields by subclassing, as in Flax.

    Attributes:
        step: `int32[]`, updates completed.
        params: the `params` collection.
        opt_state: state of `tx`.
        apply_fn: `model.apply`, static.
        tx: the optax transformation, static.
        batch_stats: the `batch_stats` collection, `{}` when the model has none.
        collections: every other mutable collection by name, `{}` when there is none.
        rng: typed PRNG key `[]`, or None; the key of step n is `jax.random.fold_in(rng, n)`.
        hooks: device state of the callbacks by name, e.g. `hooks["ema"]`.

    Example:
        >>> import flax.linen as nn, jax, jax.numpy as jnp, optax
        >>> model = nn.Dense(2)
        >>> variables = model.init(jax.random.key(0), jnp.ones((1, 3)))
        >>> state = TrainState.from_variables(apply_fn=model.apply, variables=variables, tx=optax.sgd(0.1))
        >>> sorted(state.variables)
        ['params']
    """

    batch_stats: Collection = flax.struct.field(default_factory=dict)
    collections: Mapping[str, Collection] = flax.struct.field(default_factory=dict)
    rng: jax.Array | None = None
    hooks: Mapping[str, PyTree] = flax.struct.field(default_factory=dict)

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        _register_serialization(cls)

    @classmethod
    def create(
        cls,
        *,
        apply_fn: Callable[..., Any],
        params: Collection,
        tx: optax.GradientTransformation,
        **kwargs: Any,
    ) -> Self:
        """Returns a state at step 0 with the optimizer state initialised.

        Args:
            apply_fn: usually `model.apply`.
            params: the `params` collection.
            tx: an optax transformation.
            **kwargs: `batch_stats=`, `collections=`, `rng=`, `hooks=` and the fields of a subclass.
        """
        state = super().create(apply_fn=apply_fn, params=params, tx=tx, **kwargs)
        # A Python int would be weakly typed, and the second step compiled anew.
        return state.replace(step=jnp.zeros((), jnp.int32))

    @classmethod
    def from_variables(
        cls,
        *,
        apply_fn: Callable[..., Any],
        variables: Variables,
        tx: optax.GradientTransformation,
        rng: jax.Array | None = None,
        **kwargs: Any,
    ) -> Self:
        """Returns a state from what `model.init` returned, splitting `params` from the other collections.

        Args:
            apply_fn: usually `model.apply`.
            variables: collections by name, with `params`.
            tx: an optax transformation.
            rng: typed PRNG key `[]`.
            **kwargs: `hooks=` and the fields of a subclass.

        Raises:
            TypeError: `variables` is no mapping.
            ValueError: there is no `params` collection in `variables`.
        """
        if not isinstance(variables, Mapping):
            raise TypeError(
                f"variables is of type {type(variables).__name__}; expected a mapping of collections, "
                "{'params': ..., ...}, as model.init returns it."
            )
        if "params" not in variables:
            raise ValueError(
                f"variables has the collections {sorted(variables)} and no 'params'. "
                "Pass what model.init returned; a model without parameters cannot be trained."
            )
        params, batch_stats, collections = _split(variables)
        return cls.create(
            apply_fn=apply_fn,
            params=params,
            tx=tx,
            batch_stats=batch_stats,
            collections=collections,
            rng=rng,
            **kwargs,
        )

    @property
    def variables(self) -> dict[str, Any]:
        """All collections as `apply` takes them: `{"params": ..., "batch_stats": ..., **collections}`."""
        return {"params": self.params, **self.model_state}

    @property
    def model_state(self) -> dict[str, Any]:
        """`variables` without `params`; collections that are empty are left out."""
        stats = {"batch_stats": self.batch_stats} if self.batch_stats else {}
        return {**stats, **self.collections}

    def replace_model_state(self, updated: Variables) -> Self:
        """Returns the state with the collections in `updated` replaced; others stay, `params` is not allowed.

        Args:
            updated: collections by name, e.g. what `apply(..., mutable=...)` returned.

        Raises:
            ValueError: `updated` holds `params`, which only `apply_gradients` and `replace` change.
        """
        if "params" in updated:
            raise ValueError("updated holds 'params'; replace_model_state takes the other collections.")
        held = self.model_state
        updated = {name: _as_it_was(held.get(name), new) for name, new in updated.items()}
        _, batch_stats, collections = _split({"params": {}, **updated})
        return self.replace(
            batch_stats=batch_stats if "batch_stats" in updated else self.batch_stats,
            collections={**self.collections, **collections},
        )

    def apply_gradients(self, *, grads: PyTree, model_state: Variables | None = None, **kwargs: Any) -> Self:
        """Returns the state after one optimizer update.

        Args:
            grads: gradients of the structure of `params`; or of `variables`, as Flax's own state takes them, where the
                model has fp8 parameters: `{"params": ..., "_overwrite_with_gradient": ...}`.
            model_state: updated collections by name, as `apply(..., mutable=...)` returned them.
            **kwargs: fields to replace, e.g. `batch_stats=updated["batch_stats"]`.

        Returns:
            `step` one higher, `params`, `opt_state` and the given collections and fields replaced; fp8 parameters
            replaced by their gradient.
        """
        if isinstance(grads, Mapping) and OVERWRITTEN in grads and OVERWRITTEN in self.collections:
            model_state = {**(model_state or {}), OVERWRITTEN: grads[OVERWRITTEN]}
            grads = grads["params"]
        state = super().apply_gradients(grads=grads, **kwargs)
        return state if model_state is None else state.replace_model_state(model_state)


def key_of(state: TrainState) -> jax.Array:
    """Returns the key of `state`.

    Raises:
        ValueError: it has none.
    """
    if state.rng is None:
        raise ValueError(
            "state.rng is None; a trained state needs a key, e.g. state.replace(rng=jax.random.key(0))."
        )
    return state.rng


def key_impl(state: TrainState) -> str:
    """Returns the name of the generator behind the key of `state`."""
    key = key_of(state)
    return str(jax.random.key_impl(key)) if isinstance(key, jax.Array) else key_generator(key.dtype)


def with_raw_key(state: TrainState) -> TrainState:
    """Returns `state` with its key as plain `uint32` data: a typed key costs Python work at each call of a step."""
    return state.replace(rng=jax.random.key_data(key_of(state)))


def with_typed_key(state: TrainState, impl: str) -> TrainState:
    """Undoes `with_raw_key`."""
    return state.replace(rng=jax.random.wrap_key_data(key_of(state), impl=impl))


def _as_it_was(old: Any, new: Any) -> Any:
    """Returns a collection in the kind of dict it was: `apply` returns plain ones, which are of another structure."""
    frozen = isinstance(old, flax.core.FrozenDict) and not isinstance(new, flax.core.FrozenDict)
    return flax.core.freeze(new) if frozen else new


def _split(variables: Variables) -> tuple[Collection, Collection, dict[str, Collection]]:
    """Returns `params`, `batch_stats` (`{}` if absent) and the other collections."""
    others = {name: value for name, value in variables.items() if name not in ("params", "batch_stats")}
    return variables["params"], variables.get("batch_stats", {}), others


def _register_serialization(cls: type[TrainState]) -> None:
    """Makes `flax.serialization` carry typed keys as their key data; all else is as Flax registered it."""
    registry = flax.serialization._STATE_DICT_REGISTRY  # no public accessor; struct.dataclass put it there
    to_dict, from_dict = registry[cls]

    def to_state_dict(state: TrainState) -> dict[str, Any]:
        return to_dict(jax.tree.map(lambda leaf: jax.random.key_data(leaf) if is_key(leaf) else leaf, state))

    def from_state_dict(target: TrainState, state_dict: dict[str, Any]) -> TrainState:
        plain = jax.tree.map(lambda leaf: jax.random.key_data(leaf) if is_key(leaf) else leaf, target)
        restored = from_dict(plain, state_dict)
        return jax.tree.map(_like_key, target, restored)

    flax.serialization.register_serialization_state(cls, to_state_dict, from_state_dict, override=True)


def _like_key(target: Any, leaf: Any) -> Any:
    """Returns `leaf` as typed keys where `target` holds them."""
    return jax.random.wrap_key_data(leaf, impl=jax.random.key_impl(target)) if is_key(target) else leaf


_register_serialization(TrainState)
