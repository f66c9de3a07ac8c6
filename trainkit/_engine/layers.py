"""The modules of a model with their shapes, parameters and operations, found by tracing. Compiles nothing."""

import collections
import dataclasses
import logging
from typing import Any

import flax.linen as nn
import jax

from trainkit._core.flops import count
from trainkit._core.held import bytes_of, bytes_per_device, sharding_of
from trainkit._core.layer import Layer
from trainkit._core.state import TrainState
from trainkit._core.tree import path_name
from trainkit._core.typing import PyTree
from trainkit._engine.engine import Engine
from trainkit._models.layers import LayerCalls
from trainkit._step.inspection import evaluation_of

OUTSIDE = "(outside)"
"""The path of what is computed in no module, such as the loss."""

_LOG = logging.getLogger("trainkit")


def layers_of(engine: Engine, state: TrainState) -> list[Layer]:
    """Returns the modules in the order of their first calls, then those that have parameters and were not called.

    They are those of an evaluation of one training batch. What it computes outside of modules comes last, under the
    path `OUTSIDE`.

    Args:
        engine: of the trainer, whose training step is prepared.
        state: the train state.
    """
    calls, flops = LayerCalls(), None
    if engine.train_spec is not None:
        try:
            with calls.watching():
                jaxpr = evaluation_of(engine.steps, engine.strategy, engine.given(), state, engine.train_spec)
            flops = count(jaxpr)
        except Exception as error:  # a trainer with a `train_step` of its own need not be able to evaluate
            _LOG.info("the shapes of layers are not known, since an evaluation can't be traced: %r", error)
            calls = LayerCalls()
    held = _by_module(state.params)
    found = [
        _with_parameters(
            dataclasses.replace(layer, flops=None if flops is None else flops[number]),
            held.pop(layer.path, ()),
        )
        for number, layer in enumerate(calls.layers.values())
    ]
    found += [_with_parameters(Layer(path), leaves) for path, leaves in held.items()]
    if flops is not None and flops[None]:
        found.append(Layer(OUTSIDE, flops=flops[None]))
    return found


def _by_module(params: PyTree) -> dict[str, list[Any]]:
    """Returns the parameters of each module, by its path."""
    found: dict[str, list[Any]] = collections.defaultdict(list)
    boxed = jax.tree_util.tree_leaves_with_path(params, is_leaf=lambda leaf: isinstance(leaf, nn.Partitioned))
    for path, leaf in boxed:
        found[path_name(path).rpartition("/")[0]].append(nn.meta.unbox(leaf))
    return dict(found)


def _with_parameters(layer: Layer, leaves: Any) -> Layer:
    ways = list(dict.fromkeys(map(sharding_of, leaves)))
    return dataclasses.replace(
        layer,
        parameters=sum(leaf.size for leaf in leaves),
        bytes=sum(map(bytes_of, leaves)),
        bytes_per_device=sum(map(bytes_per_device, leaves)),
        sharding="; ".join(ways),
    )
