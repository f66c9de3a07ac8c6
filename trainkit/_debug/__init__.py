"""Steps that went wrong: what is kept of them, and how one is run again to find where it stops being finite.

It changes nothing of the run, and does not decide what becomes of a step that was refused: that is a hook's.
"""
