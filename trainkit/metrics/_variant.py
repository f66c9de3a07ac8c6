"""Makes a metric class with other settings. Owns nothing but that."""

from typing import Any, TypeVar, cast

import flax.struct
from clu import metrics

MetricT = TypeVar("MetricT", bound=metrics.Metric)


def variant(base: type[MetricT], name: str, **settings: Any) -> type[MetricT]:
    """Returns a subclass of `base` with other class attributes.

    CLU's collections are annotated with classes and make the instances themselves, so that settings have to
    be attributes of a class.

    Args:
        base: the metric class.
        name: of the new class, for messages.
        **settings: class attributes.

    Returns:
        A metric class, registered as a pytree.
    """
    made = flax.struct.dataclass(type(name, (base,), {**settings, "__module__": base.__module__}))
    return cast(type[MetricT], made)
