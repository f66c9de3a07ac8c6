"""Trained models as files that run without the code of the model."""

from trainkit.export._artifact import Exported, load, save
from trainkit.export._saved_model import saved_model
from trainkit.export._source import Exportable
from trainkit.export._spec import ArraySpec

__all__ = ["ArraySpec", "Exportable", "Exported", "load", "save", "saved_model"]
