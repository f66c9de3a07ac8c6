"""`save` and `load`: a model for any batch size and platform in one file, run without its Python code."""

import importlib.metadata
import json
import os
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, final

import jax
import jax.export
import numpy as np

from trainkit._core.atomic import write_atomic
from trainkit._core.typing import PyTree
from trainkit._version import __version__
from trainkit.export._safetensors import decode, encode
from trainkit.export._source import Source, Traced, Weights, trace
from trainkit.export._spec import ArraySpec, check_inputs, names_of, rebuild

_KIND, _SPEC, _PROGRAM, _WEIGHT = "trainkit.kind", "trainkit.spec", "program", "weights/"
_PLATFORMS = ("cpu", "cuda", "rocm", "tpu")


def save(
    path: str | os.PathLike[str],
    source: Source,
    example: PyTree,
    *,
    weights: Weights = "ema",
    platforms: Sequence[str] = ("cpu", "cuda", "tpu"),
    method: str | Callable[..., Any] | None = None,
    kwargs: Mapping[str, Any] | None = None,
) -> None:
    """Writes a trained model to one file that `load` runs without the model's code, for any batch size.

    Of a trainer `predict_step` is exported, with `ctx.train` False; of a pair, `module.apply(variables,
    *example)`. The file holds the program as StableHLO, the weights beside it as `.safetensors` tensors, the
    specification of inputs and outputs and the versions it was made with. It is written whole or not at all,
    with a checksum.

    Args:
        path: file to write; an existing one is replaced.
        source: a trainer, or `(module, variables)`.
        example: inputs of any batch size: the batch of a trainer; for a pair a tuple of positional arguments,
            or one argument. Leaves `[batch, ...]`, or 0-d. Only shapes and dtypes count.
        weights: of a trainer, "ema" for the averaged weights where a callback keeps an average, "live" for
            the current ones. Without effect on a pair.
        platforms: of "cpu", "cuda", "rocm" and "tpu", those the file shall run on.
        method: of a pair, the method to apply instead of `__call__`.
        kwargs: of a pair, keyword arguments fixed at export, e.g. `{"train": False}`.

    Raises:
        TypeError: `source` or an input is of the wrong kind.
        ValueError: the inputs disagree in the batch size, or an option is out of range.
        ImportError: the extra `export` is not installed.

    Example:
        >>> import flax.linen as nn, pathlib, tempfile
        >>> x = np.ones((2, 3), np.float32)
        >>> variables = nn.Dense(4).init(jax.random.key(0), x)
        >>> path = pathlib.Path(tempfile.mkdtemp()) / "dense.tk"
        >>> save(path, (nn.Dense(4), variables), x)
        >>> load(path)(np.ones((5, 3), np.float32)).shape
        (5, 4)
    """
    _check_platforms(platforms)
    _require_flatbuffers()
    traced = trace(source, example, weights=weights, method=method, kwargs=kwargs)
    arrays = traced.weights.arrays
    lower = jax.export.export(jax.jit(traced.function), platforms=tuple(platforms))
    program = lower(list(arrays.values()), traced.shapes).serialize()
    tensors = {_PROGRAM: np.frombuffer(program, np.uint8)}
    tensors |= {f"{_WEIGHT}{name}": array for name, array in arrays.items()}
    description = json.dumps(_description(traced, platforms))
    write_atomic(path, encode(tensors, {_KIND: "artifact", _SPEC: description}))


def load(path: str | os.PathLike[str]) -> "Exported":
    """Returns the model that `save` wrote to `path`.

    Raises:
        ValueError: the file is cut short, altered or not from `save`; it needs another JAX, or 64 bits.
        ImportError: the extra `export` is not installed.
    """
    _require_flatbuffers()
    name, content = os.fspath(path), pathlib.Path(path).read_bytes()
    try:
        tensors, metadata = decode(content)
        if metadata.get(_KIND) != "artifact":
            raise ValueError(f"it holds another kind of content, {metadata.get(_KIND, 'unknown')!r}")
    except ValueError as error:
        raise ValueError(
            f"{name}: {error}. Expected a whole file as tk.export.save wrote it; export it anew or take "
            "another copy."
        ) from error
    description = json.loads(metadata[_SPEC])
    _check_width(name, [array.dtype for array in tensors.values()], description)
    try:
        program = jax.export.deserialize(bytearray(tensors[_PROGRAM]))
    except ValueError as error:
        raise ValueError(
            f"{name}: written with {description['versions']}, and jax {jax.__version__} cannot read it. "
            "Export it anew with this version, or install a jax at most some months away from it."
        ) from error
    weights = [tensors[f"{_WEIGHT}{weight}"] for weight in description["weights"]]
    return Exported(program, weights, description)


@final
class Exported:
    """A model as `tk.export.load` returns it. Calling it runs it on the default device of JAX.

    Attributes:
        inputs: specification by name; the names are paths in the batch, or in the tuple of arguments.
        outputs: specification by name.
        platforms: those it runs on.
        versions: of the packages it was made with, by name.
    """

    def __init__(
        self, program: jax.export.Exported, weights: Sequence[np.ndarray], description: Mapping[str, Any]
    ) -> None:
        self.inputs = {name: ArraySpec.from_json(spec) for name, spec in description["inputs"]}
        self.outputs = {name: ArraySpec.from_json(spec) for name, spec in description["outputs"]}
        self.platforms: tuple[str, ...] = tuple(description["platforms"])
        self.versions: dict[str, str] = dict(description["versions"])
        self._structure, self._spread = description["structure"], description["spread"]
        self._weights = [jax.numpy.asarray(weight) for weight in weights]
        self._call = jax.jit(program.call)

    def __call__(self, *args: PyTree) -> PyTree:
        """Returns the outputs, JAX arrays in the dicts, lists and tuples that the model returned.

        A batch size that is new compiles once.

        Args:
            *args: the batch of a trainer, or the arguments of a module, with leaves as `inputs` says.

        Raises:
            TypeError: another number of arguments than were exported.
            ValueError: an input is missing, unexpected, or of a wrong shape or dtype; every one is named.
        """
        if not self._spread and len(args) != 1:
            raise TypeError(f"got {len(args)} arguments; the exported model takes one, {self._described()}.")
        tree = args if self._spread else args[0]
        given = dict(zip(names_of(tree, "input"), jax.tree.leaves(tree), strict=True))
        arrays = check_inputs(self.inputs, given)
        return rebuild(self._structure, self._call(self._weights, list(arrays.values())))

    def __repr__(self) -> str:
        outputs = ", ".join(f"{name} {spec}" for name, spec in self.outputs.items())
        return f"Exported({self._described()} -> {outputs}; {', '.join(self.platforms)})"

    def _described(self) -> str:
        return ", ".join(f"{name} {spec}" for name, spec in self.inputs.items())


def _description(traced: Traced, platforms: Sequence[str]) -> dict[str, Any]:
    versions = {name: importlib.metadata.version(name) for name in ("jax", "jaxlib", "flax")}
    return {
        "versions": {"trainkit": __version__, **versions},
        "platforms": list(platforms),
        # Lists of pairs, because their order is that of the program's arguments.
        "inputs": [[name, spec.to_json()] for name, spec in traced.inputs.items()],
        "outputs": [[name, spec.to_json()] for name, spec in traced.outputs.items()],
        "weights": list(traced.weights.arrays),
        "structure": traced.structure,
        "spread": traced.spread,
    }


def _check_platforms(platforms: Sequence[str]) -> None:
    if isinstance(platforms, str) or not platforms or not set(platforms) <= set(_PLATFORMS):
        names = ", ".join(map(repr, _PLATFORMS))
        raise ValueError(f"platforms={platforms!r}: give one or more of {names} in a tuple.")


def _check_width(name: str, dtypes: Sequence[np.dtype], description: Mapping[str, Any]) -> None:
    dtypes = [*dtypes, *(np.dtype(spec["dtype"]) for _, spec in description["inputs"])]
    wide = sorted({str(dtype) for dtype in dtypes if jax.dtypes.canonicalize_dtype(dtype) != dtype})
    if wide:
        raise ValueError(
            f"{name} computes in {', '.join(wide)}, which JAX is set to narrow. "
            "Set jax.config.update('jax_enable_x64', True) first."
        )


def _require_flatbuffers() -> None:
    try:
        import flatbuffers  # noqa: F401 - jax.export imports it in the middle of its work, with a bare error
    except ImportError as error:
        raise ImportError(
            "tk.export needs the package flatbuffers, which is not installed: pip install 'trainkit[export]'."
        ) from error
