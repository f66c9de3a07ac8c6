"""Where the numbers of one step stop being finite: by module, by loss, by leaf. Owns no state and no data."""

import contextlib
import dataclasses
import functools
import threading
from collections.abc import Callable
from typing import Any

import flax.core
import flax.linen as nn
import jax
import jax.numpy as jnp

from trainkit._core.state import TrainState, key_impl, with_raw_key, with_typed_key
from trainkit._core.typing import Batch, PyTree
from trainkit._step.given import Given
from trainkit._step.steps import Steps
from trainkit.hooks._nan_guard import not_finite
from trainkit.parallel._strategy import Role, Strategy


@dataclasses.dataclass(frozen=True)
class Diagnosis:
    """What a step was found to do; `print` it.

    Attributes:
        step: number of the step, the updates completed after it.
        loss: mean loss over its real examples; NaN too where an overridden `train_step` returned none.
        first_module: the first call, in order of completion, whose output was not finite, e.g.
            `CNN/Conv_0 (__call__)`; None where there was none.
        inputs_finite: whether the arguments of that call were finite; None where there was none.
        first_leaf: the first of the loss, the gradients (the parameters, where `train_step` is overridden) and
            the model state that was not finite, e.g. `grads/Dense_0/kernel`; None where all were.
    """

    step: int
    loss: float
    first_module: str | None
    inputs_finite: bool | None
    first_leaf: str | None

    @property
    def finite(self) -> bool:
        """Whether the step was finite. An output that is not does no harm where nothing follows from it."""
        return self.first_leaf is None

    def __str__(self) -> str:
        if self.finite:
            text = f"step {self.step} is finite, with a loss of {self.loss:g}"
            return (
                f"{text}, although the output of {self.first_module} is not."
                if self.first_module
                else f"{text}."
            )
        text = f"step {self.step} is not finite: {self.first_leaf} is the first leaf that is not. "
        if self.first_module:
            inputs = (
                "its inputs are, so look into it and at its parameters"
                if self.inputs_finite
                else "its inputs are not either, so look at the batch and at what the loss computes before it"
            )
            return f"{text}The first module whose output is not finite is {self.first_module}; {inputs}."
        if self.first_leaf == "loss":
            return f"{text}The outputs of all modules are, so look at what the loss computes from them."
        return f"{text}The outputs of all modules and the loss are, so look at the derivatives behind it."


def diagnose(
    steps: Steps,
    strategy: Strategy,
    given: Given | None,
    state: TrainState,
    batch: Batch,
    mask: Any,
    *,
    jit: bool = True,
) -> Diagnosis:
    """Runs one training step up to the update, hooks left out, and says where it stopped being finite.

    Args:
        steps: of the trainer.
        strategy: of the trainer.
        given: what the step is given beside state and batch.
        state: before the step, laid out; it is not donated.
        batch: placed, as the step takes it: a tuple of batches where gradients are accumulated.
        mask: as the step takes it.
        jit: compile the step; else every operation of it runs on its own, so that a debugger can stop in it.
    """
    impl, calls, leaves = key_impl(state), _Calls(), list[str]()

    def run(
        given: Given | None, state: TrainState, batch: Batch, mask: Any
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        with nn.intercept_methods(calls):
            before = with_typed_key(state, impl)
            values = steps.attempt(given, before, batch, mask).told(before)
        found = not_finite(values)
        leaves[:] = found  # a compiled step returns a dictionary sorted, and the order is what is asked for
        return values.loss, found

    compiled = strategy.compile(
        run, inputs=(Role.WHOLE, Role.STATE, Role.ROWS, Role.ROWS), outputs=Role.WHOLE
    )
    with contextlib.nullcontext() if jit else jax.disable_jit():
        loss, found = strategy.fetch(compiled(given, with_raw_key(state), batch, mask))
    jax.effects_barrier()  # what the modules told arrives on a way of its own
    first = calls.first()
    return Diagnosis(
        step=int(state.step) + 1,
        loss=float(loss),
        first_module=first and first[0],
        inputs_finite=first and first[1],
        first_leaf=next((name for name in leaves if found[name]), None),
    )


class _Calls:
    """The calls of modules in a trace in order of completion, and what each told of its numbers when it ran."""

    def __init__(self) -> None:
        self._root = "model"
        self._names: list[str] = []
        self._told: dict[int, tuple[bool, bool]] = {}
        self._lock = threading.Lock()

    def __call__(
        self, method: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], context: Any
    ) -> Any:
        name = f"{self._path(context.module)} ({context.method_name})"
        result = method(*args, **kwargs)
        if context.method_name != "setup":
            self._names.append(name)
            note = functools.partial(self._note, len(self._names) - 1)
            # The one way out of vmap, grad, scan and remat alike.
            jax.debug.callback(note, _all_finite((args, kwargs)), _all_finite(result))
        return result

    def first(self) -> tuple[str, bool] | None:
        """Returns the name of the first call whose output was not finite, and whether its inputs were."""
        return next(
            ((self._names[i], inputs) for i, (inputs, output) in sorted(self._told.items()) if not output),
            None,
        )

    def _path(self, module: nn.Module) -> str:
        root: Any = module
        while isinstance(root.parent, nn.Module):
            root = root.parent
        # Lifted transformations cut the way up, and try modules as roots of scopes of their own kind.
        if not root.path and type(root.parent) is flax.core.Scope:
            self._root = type(root).__name__
        return "/".join((self._root, *module.path))

    def _note(self, index: int, inputs: Any, output: Any) -> None:
        # Told several times where one trace runs for several examples, rounds of a scan, or devices, each of which
        # tells it in a thread of its own.
        with self._lock:
            before = self._told.get(index, (True, True))
            self._told[index] = before[0] and bool(inputs), before[1] and bool(output)


def _all_finite(tree: PyTree) -> jax.Array:
    floats = [
        leaf
        for leaf in jax.tree.leaves(tree)
        if hasattr(leaf, "dtype") and jnp.issubdtype(leaf.dtype, jnp.inexact)
    ]
    return jnp.stack([jnp.isfinite(leaf).all() for leaf in floats]).all() if floats else jnp.asarray(True)
