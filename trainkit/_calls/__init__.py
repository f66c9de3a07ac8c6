"""Several steps in one call of a compiled program: the programs, and the measurement that chooses among them.

It owns no step and does not know what is due between two calls.
"""
