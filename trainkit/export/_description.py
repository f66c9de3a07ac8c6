"""What a file says of the model in it, beside the program and the weights. Owns its words in JSON, and their check."""

import dataclasses
import importlib.metadata
from collections.abc import Sequence
from typing import Any, Self

from trainkit._core.arrays import dtype_of
from trainkit._version import __version__
from trainkit.export._safetensors import parsed
from trainkit.export._source import Traced
from trainkit.export._spec import ArraySpec, check_structure


@dataclasses.dataclass(frozen=True)
class Description:
    """What a file says of the model in it.

    Attributes:
        versions: of the packages it was made with, by name.
        platforms: those it runs on.
        inputs: specification by name, in the order of the program's arguments.
        outputs: specification by name, in the order of the program's results.
        weights: names, in the order of the program's arguments, before the inputs.
        structure: containers of the outputs, see `structure_of`.
        spread: whether the inputs are several positional arguments, or one tree.
    """

    versions: dict[str, str]
    platforms: tuple[str, ...]
    inputs: dict[str, ArraySpec]
    outputs: dict[str, ArraySpec]
    weights: tuple[str, ...]
    structure: Any
    spread: bool

    @classmethod
    def of(cls, traced: Traced, platforms: Sequence[str]) -> Self:
        """Returns the description of a model that is about to be written."""
        versions = {name: importlib.metadata.version(name) for name in ("jax", "jaxlib", "flax")}
        return cls(
            versions={"trainkit": __version__, **versions},
            platforms=tuple(platforms),
            inputs=traced.inputs,
            outputs=traced.outputs,
            weights=tuple(traced.weights.arrays),
            structure=traced.structure,
            spread=traced.spread,
        )

    def to_json(self) -> dict[str, Any]:
        """Returns what `read` reads as text."""
        return {
            "versions": self.versions,
            "platforms": list(self.platforms),
            # Lists of pairs, because their order is that of the program's arguments.
            "inputs": [[name, spec.to_json()] for name, spec in self.inputs.items()],
            "outputs": [[name, spec.to_json()] for name, spec in self.outputs.items()],
            "weights": list(self.weights),
            "structure": self.structure,
            "spread": self.spread,
        }

    @classmethod
    def read(cls, text: str) -> Self:
        """Returns the description whose `to_json` is `text`.

        Raises:
            ValueError: there is none.
        """
        said = parsed(text, dict)
        versions, spread = said.get("versions"), said.get("spread")
        platforms, weights = _names(said, "platforms"), _names(said, "weights")
        inputs, outputs = _specs(said, "inputs"), _specs(said, "outputs")
        if not isinstance(versions, dict) or not all(
            isinstance(version, str) for version in versions.values()
        ):
            raise ValueError("its description lacks the versions")
        if not isinstance(spread, bool):
            raise ValueError("its description lacks 'spread'")
        for spec in inputs.values():
            dtype_of(spec.dtype)
        check_structure(said.get("structure"), len(outputs))
        return cls(versions, platforms, inputs, outputs, weights, said.get("structure"), spread)


def _names(said: dict[str, Any], key: str) -> tuple[str, ...]:
    names = said.get(key)
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ValueError(f"its description lacks the {key}")
    return tuple(names)


def _specs(said: dict[str, Any], key: str) -> dict[str, ArraySpec]:
    pairs = said.get(key)
    if not isinstance(pairs, list) or not all(isinstance(pair, list) and len(pair) == 2 for pair in pairs):
        raise ValueError(f"its description lacks the {key}")
    specs = {name: ArraySpec.from_json(spec) for name, spec in pairs if isinstance(name, str)}
    if len(specs) != len(pairs):
        raise ValueError(f"its description names {key} twice")
    return specs
