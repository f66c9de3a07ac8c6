"""Checkpoints on disk: what there is, and whether it is whole."""

from trainkit.checkpoint._report import CheckpointInfo, verify
from trainkit.checkpoint._report import list_checkpoints as list

__all__ = ["CheckpointInfo", "list", "verify"]
