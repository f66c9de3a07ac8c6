"""The loop that a trainer is compared with, written by hand: where it starts, and its step."""

import functools

import jax
import optax

import trainkit as tk


def start(model, tx, batch, seed=0):
    """The state a trainer of that seed starts from, made by hand."""
    init_rng, rng = jax.random.split(jax.random.key(seed))
    variables = jax.jit(functools.partial(model.init, train=True))(init_rng, batch["x"])
    return tk.TrainState.from_variables(apply_fn=model.apply, variables=variables, tx=tx, rng=rng)


@functools.partial(jax.jit, donate_argnums=0)
def hand_step(state, batch):
    key = jax.random.fold_in(state.rng, state.step)

    def loss(params):
        logits, updated = state.apply_fn(
            {**state.variables, "params": params},
            batch["x"],
            train=True,
            rngs={"dropout": key},
            mutable=list(state.model_state),
        )
        return optax.softmax_cross_entropy_with_integer_labels(logits, batch["y"]).mean(), updated

    (value, updated), grads = jax.value_and_grad(loss, has_aux=True)(state.params)
    return state.apply_gradients(grads=grads, model_state=updated), value
