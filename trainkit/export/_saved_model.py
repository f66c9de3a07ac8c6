"""`saved_model`: a model as a TensorFlow SavedModel, which runs where JAX is not installed."""

import os
import pathlib
import re
import shutil
import uuid
from collections.abc import Callable, Iterable, Mapping
from types import ModuleType
from typing import Any

import jax

from trainkit._core.atomic import sync_folder
from trainkit._core.typing import PyTree
from trainkit.export._source import Source, Traced, trace
from trainkit.export._spec import BATCH, ArraySpec, rebuild


def saved_model(
    path: str | os.PathLike[str],
    source: Source,
    example: PyTree,
    *,
    weights: str = "averaged",
    method: str | Callable[..., Any] | None = None,
    kwargs: Mapping[str, Any] | None = None,
) -> None:
    """Writes a trained model as a TensorFlow SavedModel for any batch size, for CPU, GPU and TPU.

    `tf.saved_model.load(path)` gives an object that is called as the model is; the signature
    `serving_default` takes and returns tensors by name, the paths with `_` for `/`. Needs the extra
    `tensorflow`.

    Args:
        path: folder to write; it must not exist. It appears complete or not at all.
        source: as for `trainkit.export.save`, and so are the rest.
        example: inputs of any batch size.
        weights: as for `trainkit.export.save`.
        method: of a pair, the method to apply.
        kwargs: of a pair, keyword arguments fixed at export.

    Raises:
        FileExistsError: there is something at `path`.
        ImportError: TensorFlow is not installed.
        TypeError: `source` or an input is of the wrong kind.
        ValueError: the inputs disagree in the batch size, or an option is out of range.
    """
    target = pathlib.Path(path)
    if target.exists():
        raise FileExistsError(f"{target} exists; nothing is replaced. Remove it, or name another folder.")
    tf, jax2tf = _libraries()
    traced = trace(source, example, weights=weights, method=method, kwargs=kwargs)
    module, signature = _module(tf, jax2tf, traced)
    temporary = target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        tf.saved_model.save(module, str(temporary), signatures={"serving_default": signature})
        os.rename(temporary, target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    sync_folder(target.parent)


def _module(tf: ModuleType, jax2tf: ModuleType, traced: Traced) -> tuple[Any, Any]:
    """Returns a TensorFlow module that is called as the model is, and its function of tensors by name."""
    convert = jax2tf.convert(
        traced.function,
        polymorphic_shapes=[None, [_polymorphic(spec) for spec in traced.inputs.values()]],
        with_gradient=False,
        native_serialization_platforms=("cpu", "cuda", "tpu"),
    )
    module = tf.Module()
    # Variables and not constants: a graph is limited to 2 GB, and they are stored once for both functions.
    module.model_weights = [tf.Variable(array, trainable=False) for array in traced.weights.arrays.values()]
    names, results = _plain(traced.inputs, "input"), _plain(traced.outputs, "output")
    specs = {
        name: tf.TensorSpec([None if size == BATCH else size for size in spec.shape], spec.dtype, name)
        for name, spec in zip(names, traced.inputs.values(), strict=True)
    }

    def run(inputs: list[Any]) -> list[Any]:
        return convert(list(module.model_weights), inputs)

    def call(*args: PyTree) -> PyTree:
        return rebuild(traced.structure, run(jax.tree.leaves(args)))

    def serve(**inputs: Any) -> dict[str, Any]:
        return dict(zip(results, run([inputs[name] for name in names]), strict=True))

    arguments = jax.tree.unflatten(jax.tree.structure(traced.arguments), list(specs.values()))
    module.__call__ = tf.function(call, autograph=False, input_signature=arguments)
    return module, tf.function(serve, autograph=False).get_concrete_function(**specs)


def _polymorphic(spec: ArraySpec) -> str | None:
    return ", ".join(map(str, spec.shape)) if BATCH in spec.shape else None


def _plain(paths: Iterable[str], prefix: str) -> list[str]:
    """Returns paths as TensorFlow takes them for names of arguments; `prefix` goes before a digit."""
    plain = [re.sub(r"\W", "_", path) for path in paths]
    names = [f"{prefix}_{name}" if name[:1].isdigit() else name for name in plain]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"two {prefix}s would be named {twice[0]} in the SavedModel; rename a key.")
    return names


def _libraries() -> tuple[ModuleType, ModuleType]:
    try:
        import tensorflow as tf
        from jax.experimental import jax2tf
    except ImportError as error:
        raise ImportError(
            "tk.export.saved_model needs TensorFlow, which is not installed: "
            "pip install 'trainkit[tensorflow]'. tk.export.save does without."
        ) from error
    return tf, jax2tf
