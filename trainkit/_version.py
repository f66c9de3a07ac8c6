"""Owns the version of the package, the only place where it is written; imports nothing."""

# The build reads this line without importing the package, so it must stay a plain literal.
__version__ = "0.1.0"
