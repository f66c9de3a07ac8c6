"""Which module system a model belongs to. Owns no model."""

import functools
import inspect
import sys
from typing import Any

from trainkit._models.linen import LinenModel
from trainkit._models.model import Model
from trainkit._models.precision import Precision


def model_of(model: Any, precision: Precision) -> Model:
    """Returns `model` as steps take it.

    Args:
        model: a `flax.linen.Module`, a `flax.nnx.Module`, or something that makes one of the latter from `rngs`.
        precision: the dtypes in which it computes.

    Raises:
        TypeError: it is none of these.
    """
    if not _is_nnx(model):
        return LinenModel(model, precision)
    # It takes a while to import, which programs that don't use it need not wait for.
    from trainkit._models.nnx import NnxModel

    return NnxModel(model, precision)


def _is_nnx(model: Any) -> bool:
    if inspect.isroutine(model) or isinstance(model, functools.partial):
        return True
    nnx = sys.modules.get("flax.nnx")  # it is there where somebody made a module of it
    if nnx is None:
        return False
    return issubclass(model, nnx.Module) if inspect.isclass(model) else isinstance(model, nnx.Module)
