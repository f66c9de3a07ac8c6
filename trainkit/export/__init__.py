"""Trained models as files that run without the code of the model; and any tree of arrays as one checked file.

Owns those formats and what can be exported. It neither trains nor knows checkpoints, which hold a whole run and are
`checkpoint/`'s.
"""

from trainkit.export._artifact import Exported, load, save
from trainkit.export._saved_model import saved_model
from trainkit.export._source import Exportable
from trainkit.export._spec import ArraySpec

__all__ = ["ArraySpec", "Exportable", "Exported", "load", "save", "saved_model"]
