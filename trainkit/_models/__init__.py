"""The one place that knows module systems: how a model is initialised, bound and run, and in which precision.

It owns no state and no loss; another module system joins by one more `Model`.
"""
