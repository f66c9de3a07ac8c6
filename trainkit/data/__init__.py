"""Data sources, prefetching and the IDX reader.

Owns what a source is, the order of its rows and the place in it. Padding and the way to the devices are `_feed/`'s; no
file here knows a step.
"""

from trainkit.data._arrays import Arrays
from trainkit.data._base import Source
from trainkit.data._batch import GlobalBatch
from trainkit.data._idx import read_idx
from trainkit.data._prefetch import prefetch
from trainkit.data._source import as_source
from trainkit.data._take import take

__all__ = ["Arrays", "GlobalBatch", "Source", "as_source", "prefetch", "read_idx", "take"]
