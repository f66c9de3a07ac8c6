"""Writers of metrics: TensorBoard, JSONL, console, and what joins and guards them.

Owns the interface, which is that of `clu.metric_writers`, the formats, and which logs a run has. What is written, and
when, is for callbacks to say.
"""

from trainkit.writers._attributed import Attributed, Ledger
from trainkit.writers._console import ConsoleWriter
from trainkit.writers._jsonl import JsonlWriter, read_jsonl
from trainkit.writers._multi import MultiWriter
from trainkit.writers._null import NullWriter
from trainkit.writers._open import open_writer
from trainkit.writers._tensorboard import TensorBoardWriter
from trainkit.writers._writer import MetricWriter

__all__ = [
    "Attributed",
    "ConsoleWriter",
    "JsonlWriter",
    "Ledger",
    "MetricWriter",
    "MultiWriter",
    "NullWriter",
    "TensorBoardWriter",
    "open_writer",
    "read_jsonl",
]
