"""Carries a collection of metrics through compiled steps and sums it up on the host.

Owns which metrics live on the device and which on the host, and the layout of what is carried. What a metric
means is CLU's protocol, `clu.metrics.Metric`; when to read it is the caller's affair.
"""

import contextlib
import functools
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from clu import metrics

from trainkit._core.tree import differences, signature
from trainkit._core.typing import Outputs
from trainkit.metrics._checks import metric_classes, metric_spec
from trainkit.metrics._collecting import Collecting
from trainkit.metrics._direction import Direction, direction_of
from trainkit.metrics._inputs import output_name
from trainkit.metrics._mean import is_weightless, of_weighted_loss
from trainkit.metrics._packing import Packed, Packing
from trainkit.metrics._variant import variant

Collected = dict[str, Any]


@flax.struct.dataclass
class LossMetrics(metrics.Collection):
    """The mean of the output `loss`, under the name `loss`: the metrics of a trainer that is given none."""

    loss: metrics.Average.from_output("loss")  # pyright: ignore[reportInvalidTypeForm]


class Accumulator:
    """What a step needs to accumulate one collection of metrics on the device.

    Metrics are carried "packed", as a flat tuple of few arrays: see `update`. Metrics that collect rows
    (`clu.metrics.CollectingMetric`) are not carried; `collect` returns what they need of each batch, and
    `compute` takes all of it.

    Args:
        collection: subclass of `clu.metrics.Collection`.
        weighted: whether the loss is a `tk.Weighted` one: its mean is then weighted by the output `weight`.
        beside: names of rows that stay on the host beside the outputs, which collecting metrics may ask for too.

    Raises:
        TypeError: if the collection or one of its metrics can't be used, saying why.

    Example:
        >>> import jax.numpy as jnp
        >>> from trainkit.metrics import Accumulator, LossMetrics
        >>> accumulator = Accumulator(LossMetrics)
        >>> outputs = {"loss": jnp.array([1.0, 2.0]), "mask": jnp.array([True, True])}
        >>> accumulator.specify(**outputs)
        >>> packed = accumulator.update(accumulator.empty(), **outputs)
        >>> accumulator.compute(accumulator.merge([packed]))
        {'loss': 1.5}
    """

    def __init__(
        self,
        collection: type[metrics.Collection],
        *,
        weighted: bool = False,
        beside: Iterable[str] = (),
    ) -> None:
        self._collection, self._beside = collection, frozenset(beside)
        self._classes = metric_classes(collection)
        if weighted:
            self._classes = {name: of_weighted_loss(name, one) for name, one in self._classes.items()}
        self._collecting = {k: m for k, m in self._classes.items() if issubclass(m, metrics.CollectingMetric)}
        on_device = {name: metric for name, metric in self._classes.items() if name not in self._collecting}
        # CLU reads only a class's own annotations, so inherited metrics need a collection of their own too.
        own = collection.__annotations__ == self._classes
        self._device = collection if own and not self._collecting else metrics.Collection.create(**on_device)
        self._packing: Packing | None = None
        self._scalars: set[str] = set()
        self._empty: tuple[np.ndarray, ...] = ()

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the metrics, in the collection's order."""
        return tuple(self._classes)

    @property
    def has_collecting(self) -> bool:
        """Whether some metric needs the rows of every batch on the host."""
        return bool(self._collecting)

    def reads_scalar(self, name: str) -> bool:
        """Says whether a metric is made from one output that is a scalar, as far as its class tells."""
        metric = self._classes.get(name)
        output = None if metric is None else output_name(metric) or getattr(metric, "output", None)
        return output is not None and output in self._scalars

    def direction(self, name: str) -> Direction | None:
        """Returns which way a metric improves.

        Args:
            name: a name in the collection.

        Returns:
            "min" or "max" where the metric's class is registered or it is the mean loss, else None.
        """
        return direction_of(self._classes[name], name) if name in self._classes else None

    def specify(self, **outputs: Any) -> None:
        """Checks the metrics against what a step gives them, and fixes the shapes that are carried.

        Runs nothing but `empty()` on the device and compiles nothing. May be called again, e.g. for another
        batch shape, as long as what is carried stays the same.

        Args:
            **outputs: arrays or `jax.ShapeDtypeStruct` by name, as `update` will get them.

        Raises:
            ValueError: if a metric asks for an output that isn't there, a mask doesn't fit, or the carried
                shapes are not constant.
            TypeError: if labels have another dtype than a metric takes.
        """
        outputs = jax.eval_shape(_single_precision, outputs)
        with _clu_arithmetic():
            for name, metric in self._classes.items():
                if (asked := self._of_outputs(metric, outputs)) is not None:
                    metric_spec(name, asked, outputs)
            packing = Packing.of(self._carried_spec(outputs))
        if self._packing not in (None, packing):
            old, new = (signature(p.treedef.unflatten(p.leaves)) for p in (self._packing, packing))
            raise ValueError(
                "The metrics would carry other shapes than before: "
                f"{'; '.join(differences(old, new))}. Metrics must have a state that doesn't depend on the "
                "batch."
            )
        self._packing = packing
        self._scalars = {name for name, value in outputs.items() if not getattr(value, "ndim", 1)}
        # A caller may be inside of a trace; the values must be concrete all the same.
        with jax.ensure_compile_time_eval():
            self._empty = packing.pack_on_host(self._device.empty())

    def _carried_spec(self, outputs: Outputs) -> metrics.Collection:
        single = jax.eval_shape(lambda given: self._device.single_from_model_output(**given), dict(outputs))
        empty = jax.eval_shape(self._device.empty)
        old, new = jax.tree.structure(empty), jax.tree.structure(single)
        if old != new:
            raise ValueError(
                "Metrics must have the same structure when empty and when made from a batch, got "
                f"{old} and {new}. Make empty() return arrays in the same fields as from_model_output()."
            )
        merge = functools.partial(jax.eval_shape, lambda a, b: a.merge(b))
        carried = merge(empty, single)
        changed = differences(signature(carried), signature(merge(carried, single)))
        if changed:
            raise ValueError(
                f"Metrics must keep their shapes when merged, but these change: {'; '.join(changed)}. "
                "Collect rows with trainkit.metrics.collecting instead, or give the state a fixed size."
            )
        return carried

    def _layout(self) -> Packing:
        if self._packing is None:
            raise RuntimeError("The accumulator's shapes are not known yet. Call specify(**outputs) first.")
        return self._packing

    def empty(self) -> Packed:
        """Returns the packed metrics of no examples, as NumPy arrays of their own."""
        self._layout()
        return tuple(part.copy() for part in self._empty)

    def update(self, packed: Packed, /, *, axis_name: str | None = None, **outputs: Any) -> Packed:
        """Merges the metrics of one batch into the packed ones; traceable.

        Half-precision outputs are widened to float32 first, so that sums lose nothing.

        Args:
            packed: from `empty` or `update`: one uint32 vector, then every large array on its own.
            axis_name: mapped axis over which the metrics are gathered, so that every replica carries those
                of the whole batch; None where `outputs` are the whole batch.
            **outputs: `loss`, `mask` and whatever the metrics ask for, `[batch, ...]`.

        Returns:
            The packed metrics, of the same shapes and dtypes.
        """
        layout = self._layout()
        outputs = _single_precision(outputs)
        with _clu_arithmetic():
            if axis_name is None:
                batch = self._device.single_from_model_output(**outputs)
            else:
                batch = self._device.gather_from_model_output(axis_name=axis_name, **outputs)
            return layout.pack(layout.unpack(packed).merge(batch))

    def collect(self, **outputs: Any) -> Collected:
        """Returns what the collecting metrics need of one batch; traceable.

        Args:
            **outputs: as for `update`.

        Returns:
            The arrays by name, `[batch, ...]`, with the `mask` where there is one; `{}` without collecting
            metrics.
        """
        if not self._collecting:
            return {}
        outputs = _single_precision(outputs)
        collected = {"mask": outputs["mask"]} if outputs.get("mask") is not None else {}
        for name, metric in self._collecting.items():
            if issubclass(metric, Collecting):
                asked: Any = self._of_outputs(metric, outputs)
                collected |= {} if asked is None else {key: outputs[key] for key in asked.wanted(outputs)}
            else:
                values = metric.from_model_output(**outputs).values
                collected |= {f"{name}/{key}": jnp.concatenate(parts) for key, parts in values.items()}
        return collected

    @staticmethod
    def real_rows(collected: Mapping[str, Any]) -> dict[str, np.ndarray]:
        """Returns what `collect` returned for one batch, on the host and without the masked rows.

        Args:
            collected: arrays by name; doing it twice changes nothing.

        Returns:
            NumPy arrays by name.
        """
        arrays = {name: np.asarray(value) for name, value in collected.items()}
        if "mask" not in arrays:
            return arrays
        mask = arrays["mask"].astype(bool)
        # CLU makes one row of a scalar output: no row of an example.
        return {k: v[mask] if v.shape[:1] == mask.shape else v for k, v in arrays.items()}

    def unpack(self, packed: Packed) -> metrics.Collection:
        """Returns packed metrics, NumPy or JAX arrays, as the metrics carried, with leaves of float64 and int64."""
        return self._layout().unpack_wide(packed)

    def merge(
        self, packed: Sequence[Packed | metrics.Collection], start: metrics.Collection | None = None
    ) -> metrics.Collection:
        """Merges packed metrics on the host, in 64 bits, where long sums and counts stay exact.

        Args:
            packed: packed metrics in the order of their steps, as NumPy or JAX arrays, or what `unpack` makes of them.
            start: what an earlier call returned for the steps before; None where there are none.

        Returns:
            The metrics carried, with NumPy leaves of float64 and int64.
        """
        parts = [part if isinstance(part, metrics.Collection) else self.unpack(part) for part in packed]
        # One that was never updated would erase the value of metrics that keep the last one.
        used = [part for part in parts if part._reduction_counter.value > 1]
        merged, *others = [*([] if start is None else [start]), *used] or [self.unpack(self._empty)]
        if others:
            with _host_arithmetic():
                merged = functools.reduce(lambda a, b: a.merge(b), others, merged)
        return merged

    def compute(
        self, merged: metrics.Collection, collected: Sequence[Mapping[str, Any]] | None = None
    ) -> dict[str, float | np.ndarray]:
        """Computes the final values on the host.

        Args:
            merged: from `merge`.
            collected: what `collect` returned for every batch, with or without the masked rows; None leaves
                the collecting metrics out.

        Returns:
            By name, a float for a scalar and an array for anything else. A metric that computes several
            values gives them as `name/key`. Without examples a value is NaN.
        """
        with _host_arithmetic():
            if not self._collecting:
                # By the class given, whose compute() may add values of its own.
                return _on_host(self._collection(**vars(merged)).compute())
            if collected is None:
                return _on_host(merged.compute())
            rows = [self.real_rows(batch) for batch in collected]
            if not any(len(array) for batch in rows for array in batch.values()):
                return _on_host({**merged.compute(), **dict.fromkeys(self._collecting, np.nan)}, self.names)
            parts = {**vars(merged), **{name: self._gathered(name, rows) for name in self._collecting}}
            return _on_host(self._collection(**parts).compute(), self.names)

    def weightless(self, merged: metrics.Collection) -> set[str]:
        """Returns the names of the weighted metrics that have seen no weight, and so have no value."""
        return {name for name, metric in vars(merged).items() if is_weightless(metric)}

    def _of_outputs(self, metric: type[metrics.Metric], outputs: Outputs) -> type[metrics.Metric] | None:
        """Returns the part of a metric that is made from outputs, which leaves out the rows beside; None for none."""
        if not issubclass(metric, Collecting):
            return metric
        wanted = metric.wanted(outputs)
        rest = tuple([name for name in wanted if name in outputs or name not in self._beside])
        if len(rest) == len(wanted):
            return metric
        return variant(Collecting, metric.__name__, names=rest) if rest else None

    def _gathered(self, name: str, rows: list[dict[str, np.ndarray]]) -> metrics.CollectingMetric:
        metric = self._collecting[name]
        if issubclass(metric, Collecting):
            keys = {key: key for key in metric.wanted(rows[0])}
        else:
            keys = {key.removeprefix(f"{name}/"): key for key in rows[0] if key.startswith(f"{name}/")}
        values = {key: tuple(batch[source] for batch in rows) for key, source in keys.items()}
        return metric(values=values)  # pyright: ignore[reportCallIssue]


def _single_precision(outputs: Outputs) -> dict[str, Any]:
    def widened(leaf: Any) -> jax.Array:
        leaf = jnp.asarray(leaf)
        is_half = jnp.issubdtype(leaf.dtype, jnp.floating) and leaf.dtype.itemsize < 4
        return leaf.astype(jnp.float32) if is_half else leaf

    return jax.tree.map(widened, dict(outputs))


def _is_news(record: logging.LogRecord) -> bool:
    return not str(record.msg).startswith("Ignoring mask for model output")


@contextlib.contextmanager
def _clu_arithmetic() -> Iterator[None]:
    """Lets CLU's metrics trace under strict settings, and without a warning for each scalar output.

    A mask ignored for anything but a scalar has been refused by then.
    """
    logger = logging.getLogger("absl")
    logger.addFilter(_is_news)
    try:
        with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
            yield
    finally:
        logger.removeFilter(_is_news)


@contextlib.contextmanager
def _host_arithmetic() -> Iterator[None]:
    """Keeps 64 bits in metrics that call `jax.numpy`, off the accelerators, and silent where a count is 0."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(np.errstate(all="ignore"))
        stack.enter_context(jax.enable_x64(True))
        stack.enter_context(jax.numpy_dtype_promotion("standard"))
        stack.enter_context(jax.numpy_rank_promotion("allow"))
        # Where JAX_PLATFORMS leaves the CPU out, there is only the accelerator.
        with contextlib.suppress(RuntimeError):
            stack.enter_context(jax.default_device(jax.local_devices(backend="cpu")[0]))
        yield


def _on_host(values: Mapping[str, Any], order: Sequence[str] = ()) -> dict[str, float | np.ndarray]:
    flat = {}
    for name in sorted(values, key=lambda name: order.index(name) if name in order else len(order)):
        value = values[name]
        parts = (
            {f"{name}/{key}": v for key, v in value.items()} if isinstance(value, Mapping) else {name: value}
        )
        for key, part in parts.items():
            array = np.asarray(part)
            flat[key] = array if array.ndim else float(array)
    return flat
