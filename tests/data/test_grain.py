"""Grain datasets and loaders as sources, against Grain's own iteration."""

import itertools

import numpy as np
import pytest

from trainkit.data import as_source

grain = pytest.importorskip("grain")

SIZE, ROWS, STEPS = 10, 4, 3


def mapped():
    return grain.MapDataset.range(SIZE).shuffle(seed=3).map(lambda index: {"x": np.int64(index)})


def seen(iterator):
    return [batch["x"].tolist() for batch in iterator]


def test_map_dataset_equals_its_repeated_iteration():
    repeated = iter(mapped().batch(ROWS).repeat(3).to_iter_dataset())
    expected = seen(repeated)
    source = as_source(mapped().batch(ROWS))
    assert source.steps_per_epoch == STEPS
    assert list(itertools.chain(*(seen(source.batches(epoch)) for epoch in range(3)))) == expected
    assert expected[:STEPS] != expected[STEPS : 2 * STEPS]


def test_map_dataset_seeks_to_every_position():
    source = as_source(mapped().batch(ROWS))
    for epoch in range(2):
        whole = seen(source.batches(epoch))
        for start in range(STEPS + 1):
            assert seen(source.batches(epoch, start)) == whole[start:]


def test_endless_map_dataset_reshuffles():
    source = as_source(mapped().batch(ROWS).repeat())
    assert source.steps_per_epoch is None
    finite = as_source(mapped().batch(ROWS))
    two_passes = seen(finite.batches(0)) + seen(finite.batches(1))
    assert seen(itertools.islice(source.batches(0), 2 * STEPS)) == two_passes
    assert seen(itertools.islice(source.batches(0, start=4), 2)) == two_passes[4:]


def test_iter_dataset_is_replayed():
    dataset = mapped().to_iter_dataset(grain.ReadOptions(num_threads=0)).batch(ROWS)
    expected = seen(dataset)
    source = as_source(dataset)
    assert not source.seekable
    assert seen(source.batches(0)) == seen(source.batches(1)) == expected
    assert seen(source.batches(0, start=2)) == expected[2:]


def test_data_loader_is_replayed():
    loader = grain.DataLoader(
        data_source=[{"x": np.int64(index)} for index in range(SIZE)],
        sampler=grain.samplers.IndexSampler(SIZE, shuffle=True, seed=1, num_epochs=1),
        operations=[grain.transforms.Batch(ROWS)],
        worker_count=0,
    )
    expected = seen(loader)
    assert len(expected) == STEPS
    source = as_source(loader)
    assert seen(source.batches(0)) == expected
    assert seen(source.batches(1, start=1)) == expected[1:]


def test_a_grain_iterator_serves_one_epoch():
    source = as_source(iter(mapped().to_iter_dataset(grain.ReadOptions(num_threads=0)).batch(ROWS)))
    assert len(seen(source.batches(0))) == STEPS
    with pytest.raises(ValueError, match="passed over once"):
        next(source.batches(1))
