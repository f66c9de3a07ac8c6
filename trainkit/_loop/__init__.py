"""One fit and one evaluation: the order of everything that happens in them, and what a trainer remembers between.

It compiles nothing and computes no numbers.
"""
