"""Checkpoints on disk: what there is, and whether it is whole.

Owns folders and files: written complete or not at all, checked, kept or removed. What a checkpoint holds of a run, and
how one goes on from it, is `_resume/`'s; when one is made, the callback's.
"""

from trainkit.checkpoint._report import CheckpointInfo, verify
from trainkit.checkpoint._report import list_checkpoints as list

__all__ = ["CheckpointInfo", "list", "verify"]
