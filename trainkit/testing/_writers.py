"""The proof of a writer. Owns what is promised of one."""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np
import optax

from trainkit.testing._classifier import Net, NetTrainer, examples
from trainkit.testing._promises import holds, promised
from trainkit.writers._writer import MetricWriter

_CALLS: dict[str, tuple[Any, dict[str, Any]]] = {
    "write_scalars": ({"loss": 0.5, "rate": np.float32(0.1)}, {}),
    "write_summaries": ({"raw": np.arange(6.0).reshape(2, 3)}, {"metadata": None}),
    "write_images": ({"image": np.zeros((2, 4, 5, 3), np.uint8)}, {}),
    "write_videos": ({"video": np.zeros((1, 2, 4, 5, 3), np.uint8)}, {}),
    "write_audios": ({"audio": np.zeros((1, 16, 2), np.float32)}, {"sample_rate": 8000}),
    "write_texts": ({"text": "*hello*"}, {}),
    "write_histograms": ({"weights": np.arange(9.0)}, {"num_buckets": {"weights": 3}}),
    "write_pointcloud": (
        {"cloud": np.zeros((7, 3))},
        {"point_colors": {"cloud": np.zeros((7, 3), np.uint8)}},
    ),
}


def check_writer(make: Callable[[], MetricWriter]) -> None:
    """Proves that a writer takes every call of the interface, and leaves its end to its owner.

    A kind of value that it does not do may raise `NotImplementedError`, scalars excepted.

    Args:
        make: returns a new writer.

    Raises:
        AssertionError: a promise is broken; says which.

    Example:
        >>> from trainkit.writers import NullWriter
        >>> check_writer(NullWriter)
    """
    writer = make()
    with promised("write_hparams takes nested values"):
        _call(writer, "write_hparams", {"rate": 0.1, "model": {"width": 8}})
    for step, (name, (values, keywords)) in enumerate(_CALLS.items(), start=1):
        with promised(f"{name} takes (step, values) with the keywords {sorted(keywords)}"):
            _call(writer, name, step, values, **keywords)
        with promised(f"{name} takes an empty mapping"):
            _call(writer, name, step, {}, **({"sample_rate": 8000} if name == "write_audios" else {}))
    with promised("write_scalars takes arrays of a device, NumPy numbers and NaN"):
        _call(writer, "write_scalars", np.int64(20), {"a": jnp.float32(1), "b": jnp.ones((1,)), "c": np.nan})
    with promised("flush may be called between writes"):
        _call(writer, "flush")
        _call(writer, "write_scalars", 21, {"loss": 0.25})
    with promised("close may be called twice"):
        _call(writer, "close")
        _call(writer, "close")
    _check_in_a_fit(make())


def _check_in_a_fit(writer: MetricWriter) -> None:
    trainer = NetTrainer(Net(norm=False), optax.sgd(0.1), writers=[writer])
    with promised("a writer serves two fits, and can be written to after them"):
        for _ in range(2):
            trainer.fit([examples(4, 0)], epochs=1)
        _call(writer, "write_scalars", 100, {"loss": 0.5})
    writer.close()


def _call(writer: MetricWriter, method: str, *args: Any, **kwargs: Any) -> None:
    try:
        returned = getattr(writer, method)(*args, **kwargs)
    except NotImplementedError:
        if method in ("write_scalars", "flush", "close"):
            raise
        return
    holds(returned is None, f"{method} returns nothing: {returned!r}")
