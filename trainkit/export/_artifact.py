"""`save` and `load`: a model for any batch size and platform in one file, run without its Python code."""

import contextlib
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, final

import jax
import jax.export
import numpy as np

from trainkit._core.atomic import write_atomic
from trainkit._core.files import read_regular
from trainkit._core.typing import PyTree
from trainkit.export._description import Description
from trainkit.export._program import read_program
from trainkit.export._safetensors import decode, encode
from trainkit.export._source import Source, trace
from trainkit.export._spec import check_inputs, names_of, rebuild

_KIND, _SPEC, _PROGRAM, _WEIGHT = "trainkit.kind", "trainkit.spec", "program", "weights/"
_PLATFORMS = ("cpu", "cuda", "rocm", "tpu")


def save(
    path: str | os.PathLike[str],
    source: Source,
    example: PyTree,
    *,
    weights: str = "averaged",
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
        weights: of a trainer, as for `Trainer.evaluate`: "averaged" for those of the first view that a callback gives,
            "live" for the current ones, or the name of a view. Without effect on a pair.
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
    tensors |= {_tensor(name): array for name, array in arrays.items()}
    description = json.dumps(Description.of(traced, platforms).to_json())
    write_atomic(path, encode(tensors, {_KIND: "artifact", _SPEC: description}))


def load(path: str | os.PathLike[str]) -> "Exported":
    """Returns the model that `save` wrote to `path`.

    Raises:
        ValueError: the file is cut short, altered or not from `save`; its program calls what no exported model does;
            it needs another JAX, or 64 bits.
        OSError: there is no file, or something else than one.
        ImportError: the extra `export` is not installed.
    """
    _require_flatbuffers()
    name, content = os.fspath(path), read_regular(os.path.realpath(path))
    with _naming(name):
        tensors, metadata = decode(content)
        if metadata.get(_KIND) != "artifact":
            raise ValueError(f"it holds another kind of content, {metadata.get(_KIND, 'unknown')!r}")
        description = Description.read(metadata.get(_SPEC, ""))
        if missing := {_PROGRAM, *map(_tensor, description.weights)} - tensors.keys():
            raise ValueError(f"it lacks {min(missing)}")
    _check_width(name, [array.dtype for array in tensors.values()], description)
    weights = [tensors[_tensor(weight)] for weight in description.weights]
    with _naming(name):
        program = read_program(tensors[_PROGRAM].tobytes(), description.versions)
        _check_fit(program, weights, description)
    return Exported(program, weights, description)


@contextlib.contextmanager
def _naming(name: str) -> Iterator[None]:
    """Adds to an error which file it is about, and what to do."""
    try:
        yield
    except ValueError as error:
        raise ValueError(
            f"{name}: {error}. Expected a whole file as tk.export.save wrote it; export it anew or take "
            "another copy."
        ) from error


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
        self, program: jax.export.Exported, weights: Sequence[np.ndarray], description: Description
    ) -> None:
        self.inputs, self.outputs = description.inputs, description.outputs
        self.platforms, self.versions = description.platforms, description.versions
        self._structure, self._spread = description.structure, description.spread
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


def _tensor(weight: str) -> str:
    """Returns the name under which a weight is in the file."""
    return f"{_WEIGHT}{weight}"


def _check_platforms(platforms: Sequence[str]) -> None:
    if isinstance(platforms, str) or not platforms or not set(platforms) <= set(_PLATFORMS):
        names = ", ".join(map(repr, _PLATFORMS))
        raise ValueError(f"platforms={platforms!r}: give one or more of {names} in a tuple.")


def _check_fit(program: jax.export.Exported, weights: Sequence[np.ndarray], description: Description) -> None:
    """Refuses a program that takes or returns other numbers of arrays than the description says."""
    given = [(array.shape, array.dtype) for array in weights]
    taken = [(aval.shape, aval.dtype) for aval in program.in_avals]
    if taken[: len(given)] != given or len(taken) != len(given) + len(description.inputs):
        raise ValueError("its program takes other weights or inputs than it says")
    if len(program.out_avals) != len(description.outputs):
        raise ValueError("its program returns other outputs than it says")


def _check_width(name: str, dtypes: Sequence[np.dtype], description: Description) -> None:
    dtypes = [*dtypes, *(np.dtype(spec.dtype) for spec in description.inputs.values())]
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
