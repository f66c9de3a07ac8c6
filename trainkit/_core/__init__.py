"""What every other folder speaks of: the train state, cadences, the history, errors, paths in trees.

Owns values and pure functions on them. It runs no step, opens no log and knows no device layout.
"""
