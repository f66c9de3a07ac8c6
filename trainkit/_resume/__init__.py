"""What a checkpoint holds of a run, and how a trainer takes it up again.

It does not own files, which are `checkpoint/`'s, nor when a run is saved.
"""
