"""`ModelSummary`: the layers of the model as a table in the log. Finds nothing out itself."""

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any

from trainkit._core.layer import Layer
from trainkit.callbacks._callback import Callback
from trainkit.callbacks._info import Info
from trainkit.callbacks._shown import check_name

_MOST_SHAPES = 3


class ModelSummary(Callback):
    """Writes the layers of the model as a Markdown table at the start of a run, once.

    A row is a module: its class, what goes in and comes out as it sees it (an example under "vmap", the rows of a
    replica under "pmap"), its own parameters, their bytes, and the operations on floats of its calls in an evaluation
    of one training batch, two for a multiply-add; where parameters are divided over devices, also how, and the bytes
    that one of them holds. What is in a module stands in rows of its own, so that the columns add up to the last row.
    Nothing is compiled for it. `trainer.summary()` is a table of the parameters at any time.

    Args:
        name: in the log.
        depth: int >= 1, names in a path at most; what lies deeper is added to the module around it. None for all.

    Raises:
        TypeError: `name` is no string.
        ValueError: `depth` is no such number.

    Example:
        >>> callback = ModelSummary(depth=2)
    """

    reads_epoch = False

    def __init__(self, *, name: str = "model_summary", depth: int | None = None) -> None:
        check_name("ModelSummary", name)
        if depth is not None and (not isinstance(depth, int) or isinstance(depth, bool) or depth < 1):
            raise ValueError(f"ModelSummary(depth={depth!r}): must be an int of at least 1, or None for all.")
        self._name, self._depth, self._written = name, depth, False

    def on_fit_start(self, info: Info) -> None:
        if not self._written:
            info.writer.write_texts(info.step, {self._name: table(_folded(info.layers(), self._depth))})
            self._written = True

    def state_dict(self) -> dict[str, Any]:
        return {"written": self._written}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._written = bool(state["written"])


def table(layers: Sequence[Layer]) -> str:
    """Returns layers as a Markdown table, the last row their sum."""
    divided = any(layer.sharding not in ("", "whole") for layer in layers)
    head = ["layer", "class", "input", "output", "parameters", "bytes", "FLOPs"]
    rows = [_row(layer, divided) for layer in [*layers, _sum(layers)]]
    if divided:
        head += ["sharding", "bytes per device"]
    lines = [head, ["---"] * 4 + ["---:"] * (len(head) - 4), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _row(layer: Layer, divided: bool) -> list[str]:
    kind = layer.kind + (f" × {layer.calls}" if layer.calls > 1 else "")
    row = [layer.path or "(model)", kind, _shapes(layer.inputs), _shapes(layer.outputs)]
    row += [f"{number:,}" if number else "" for number in (layer.parameters, layer.bytes, layer.flops)]
    if divided:
        row += [layer.sharding, f"{layer.bytes_per_device:,}" if layer.bytes_per_device else ""]
    return row


def _shapes(shapes: tuple[str, ...]) -> str:
    more = f" and {len(shapes) - _MOST_SHAPES} more" if len(shapes) > _MOST_SHAPES else ""
    return ", ".join(shapes[:_MOST_SHAPES]) + more


def _sum(layers: Sequence[Layer], into: Layer | None = None) -> Layer:
    """Returns `into`, by default a row of its own, with the numbers of all layers."""
    flops = [layer.flops for layer in layers if layer.flops is not None]
    return dataclasses.replace(
        into or Layer("**total**"),
        parameters=sum(layer.parameters for layer in layers),
        bytes=sum(layer.bytes for layer in layers),
        bytes_per_device=sum(layer.bytes_per_device for layer in layers),
        sharding="; ".join(dict.fromkeys(one.sharding for one in layers if one.sharding)) if into else "",
        flops=sum(flops) if flops else None,
    )


def _folded(layers: Iterable[Layer], depth: int | None) -> list[Layer]:
    """Returns the layers with those deeper than `depth` added to the ones around them."""
    groups: dict[str, list[Layer]] = {}
    for layer in layers:
        kept = layer.path if depth is None else "/".join(layer.path.split("/")[:depth])
        groups.setdefault(kept, []).append(layer)
    found = []
    for path, group in groups.items():
        first = next((layer for layer in group if layer.path == path), Layer(path))
        found.append(_sum(group, first) if len(group) > 1 else dataclasses.replace(group[0], path=path))
    return found
