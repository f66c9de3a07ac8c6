"""Evaluations by other metrics than those of a trainer. Owns that what was compiled for them is kept."""

import clu.metrics

from trainkit._engine.engine import Engine


def measuring(engine: Engine, collection: type[clu.metrics.Collection]) -> Engine:
    """Returns an engine of the same steps that evaluates by another collection, the same at each call.

    Args:
        engine: of the trainer.
        collection: of the metrics.
    """
    if collection not in engine.others:
        engine.others[collection] = Engine(engine.steps, engine.strategy, collection, scaled=False)
    return engine.others[collection]
