"""`prefetch`: order, exceptions, how far it reads ahead, and that no thread outlives it."""

import gc
import os
import signal
import threading

import pytest

from trainkit.data import _prefetch, prefetch

PATIENCE = 30.0


def threads():
    return [thread for thread in threading.enumerate() if thread.name == "trainkit-prefetch"]


@pytest.fixture(autouse=True)
def no_thread_is_left():
    yield
    assert not threads()


@pytest.mark.parametrize("size", [1, 3, 1000])
def test_order_is_kept(size):
    with prefetch(range(200), size) as ahead:
        assert list(ahead) == list(range(200))


def test_place_runs_in_the_thread():
    seen = []

    def place(item):
        seen.append(threading.current_thread().name)
        return -item

    with prefetch(range(3), 2, place) as ahead:
        assert list(ahead) == [0, -1, -2]
    assert seen == ["trainkit-prefetch"] * 3


def test_the_end_ends_the_thread_and_stays_the_end():
    ahead = prefetch([1], 1)
    assert list(ahead) == [1]
    assert not threads()
    assert list(ahead) == []


@pytest.mark.parametrize("kind", [ValueError, StopAsyncIteration, KeyboardInterrupt])
def test_an_exception_comes_where_its_batch_would_have(kind):
    def source():
        yield 1
        yield 2
        raise kind("broken")

    ahead = prefetch(source(), 10)
    assert [next(ahead), next(ahead)] == [1, 2]
    with pytest.raises(kind, match="broken"):
        next(ahead)
    assert not threads()
    with pytest.raises(StopIteration):
        next(ahead)


def test_an_exception_in_place():
    with pytest.raises(ZeroDivisionError), prefetch([1, 0], 2, lambda item: 1 // item) as ahead:
        assert list(ahead) == [1]


def test_at_most_size_items_are_held():
    made, released = [], threading.Semaphore(0)

    def source():
        for item in range(20):
            made.append(item)
            released.release()
            yield item

    with prefetch(source(), 3) as ahead:
        for taken in range(1, 18):
            next(ahead)
            # Room for one more was made: wait until it is filled, then nothing further may be.
            while len(made) < taken + 3:
                assert released.acquire(timeout=PATIENCE)
            assert len(made) == taken + 3


def test_no_more_than_size_are_pulled_without_a_consumer():
    full = threading.Event()
    pulled = []

    def source():
        for item in range(100):
            pulled.append(item)
            if item == 3:
                full.set()
            yield item

    with prefetch(source(), 4):
        assert full.wait(PATIENCE)
    assert pulled == [0, 1, 2, 3]


def test_early_close_ends_the_thread_and_the_source():
    closed = threading.Event()

    def source():
        try:
            while True:
                yield 0
        finally:
            closed.set()

    ahead = prefetch(source(), 2)
    next(ahead)
    ahead.close()
    assert not threads()
    assert closed.is_set()
    ahead.close()
    with pytest.raises(StopIteration):
        next(ahead)


def test_an_exception_of_the_consumer_ends_the_thread():
    def consume():
        with prefetch(iter(int, 1), 2) as ahead:
            next(ahead)
            raise RuntimeError("consumer")

    with pytest.raises(RuntimeError, match="consumer"):
        consume()
    assert not threads()


def test_a_dropped_iterator_ends_its_thread():
    ahead = prefetch(iter(int, 1), 2)
    next(ahead)
    (thread,) = threads()
    del ahead
    gc.collect()
    thread.join(PATIENCE)
    assert not thread.is_alive()


def test_ctrl_c_while_waiting_ends_the_thread():
    waiting, interrupted = threading.Event(), threading.Event()

    def source():
        assert waiting.wait(PATIENCE)
        os.kill(os.getpid(), signal.SIGINT)
        interrupted.wait(PATIENCE)
        yield 0

    def on_interrupt(number, frame):
        interrupted.set()
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGINT, on_interrupt)
    try:
        ahead = prefetch(source(), 1)
        waiting.set()
        with pytest.raises(KeyboardInterrupt):
            next(ahead)
    finally:
        signal.signal(signal.SIGINT, before)
    assert not threads()


def test_ctrl_c_while_starting_ends_the_thread(monkeypatch):
    start = threading.Thread.start

    def interrupted(thread):
        start(thread)
        raise KeyboardInterrupt

    monkeypatch.setattr(threading.Thread, "start", interrupted)
    with pytest.raises(KeyboardInterrupt):
        prefetch(iter(int, 1), 1)
    for thread in threads():
        thread.join(PATIENCE)


def test_a_source_that_hangs_is_left_behind(monkeypatch, caplog):
    monkeypatch.setattr(_prefetch, "_JOIN_SECONDS", 0.0)
    begun, released = threading.Event(), threading.Event()

    def source():
        begun.set()
        released.wait(PATIENCE)
        yield 0

    ahead = prefetch(source(), 1)
    assert begun.wait(PATIENCE)
    (thread,) = threads()
    ahead.close()
    assert "still busy" in caplog.text
    released.set()
    thread.join(PATIENCE)
    assert not thread.is_alive()


def test_size_below_one():
    with pytest.raises(ValueError, match="size must be at least 1, got 0"):
        prefetch([], 0)
