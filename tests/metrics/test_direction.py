"""Which way metrics improve."""

import clu.metrics
import flax
import pytest

from trainkit.metrics import (
    MAE,
    MSE,
    R2,
    ROCAUC,
    Accumulator,
    Accuracy,
    Mean,
    Perplexity,
    Spearman,
    Std,
    TopKAccuracy,
    register_direction,
)


def test_directions_follow_from_the_class_or_from_the_loss():
    @flax.struct.dataclass
    class Quantile(clu.metrics.Average):
        pass

    collection = clu.metrics.Collection.create(
        accuracy=clu.metrics.Accuracy,
        weighted=Accuracy.with_weights("w"),
        mean=Mean.from_output("loss"),
        other=Mean.from_output("norm"),
        top=TopKAccuracy.with_k(3),
        auc=ROCAUC,
        mae=MAE.with_weights("w"),
        mse=MSE.from_outputs("height"),
        r2=R2,
        rank=Spearman,
        ppl=Perplexity.from_outputs("nll"),
        objective=clu.metrics.Average.from_output("loss"),
        loss=clu.metrics.Average.from_fun(lambda nll, **_: nll),
        spread=Std.from_output("loss"),
        norm=clu.metrics.Average.from_output("norm"),
        quantile=Quantile.from_output("x"),
    )
    accumulator = Accumulator(collection)
    directions = {name: accumulator.direction(name) for name in accumulator.names}
    assert directions == {
        "accuracy": "max",
        "weighted": "max",
        "mean": "min",
        "other": None,
        "top": "max",
        "auc": "max",
        "mae": "min",
        "mse": "min",
        "r2": "max",
        "rank": "max",
        "ppl": "min",
        "objective": "min",
        "loss": "min",
        "spread": None,
        "norm": None,
        "quantile": None,
    }
    assert accumulator.direction("elsewhere") is None
    register_direction(Quantile, "max")
    assert accumulator.direction("quantile") == "max"
    with pytest.raises(ValueError, match=r"Quantile is registered as 'max' already"):
        register_direction(Quantile, "min")
    assert accumulator.direction("quantile") == "max"


def test_register_direction_refuses_other_things():
    with pytest.raises(ValueError, match=r'"min" or "max", got \'up\''):
        register_direction(Std, "up")
    with pytest.raises(TypeError, match=r"subclass of clu.metrics.Metric, got 'loss'"):
        register_direction("loss", "min")
