"""Which module system a model belongs to. Owns no model."""

from typing import Any

from trainkit._models.linen import LinenModel
from trainkit._models.model import Model
from trainkit._models.nnx import NnxModel, is_nnx
from trainkit._models.precision import Precision


def model_of(model: Any, precision: Precision) -> Model:
    """Returns `model` as steps take it.

    Args:
        model: a `flax.linen.Module`, a `flax.nnx.Module`, or something that makes one of the latter from `rngs`.
        precision: the dtypes in which it computes.

    Raises:
        TypeError: it is none of these.
    """
    return NnxModel(model, precision) if is_nnx(model) else LinenModel(model, precision)
