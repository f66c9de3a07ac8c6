"""A start of one small training: `python -m tests.engine.starts LOGDIR STEPS`, in the process that is asked.

Prints, as JSON, the programs compiled and the programs found compiled: those kept on disk, by name. Owns the
training; the tests decide where it keeps what it compiles.
"""

import collections
import json
import logging
import re
import sys

import jax
import optax

import trainkit as tk
from tests.helpers.digits import Net, NetTrainer, arrays
from trainkit._engine import compile_cache

_TOLD = re.compile(
    r"PERSISTENT COMPILATION CACHE MISS for '(\w+)'|Persistent compilation cache hit for '(\w+)'"
)


class Told(logging.Handler):
    """Counts the programs that JAX compiled (`missed`) and found (`hit`) while a cache of compiled programs was set."""

    def __init__(self):
        super().__init__(logging.DEBUG)
        self.missed, self.hit = collections.Counter(), collections.Counter()

    def emit(self, record):
        found = _TOLD.match(record.getMessage())
        if found and jax.config.jax_compilation_cache_dir:
            missed, hit = found.groups()
            (self.missed if missed else self.hit)[missed or hit] += 1

    def __enter__(self):
        self._logger = logging.getLogger("jax._src.compiler")
        self._level, self._propagate = self._logger.level, self._logger.propagate
        self._logger.setLevel(logging.DEBUG)
        self._logger.propagate = False
        self._logger.addHandler(self)
        return self

    def __exit__(self, *_):
        self._logger.setLevel(self._level)
        self._logger.propagate = self._propagate
        self._logger.removeHandler(self)


def start(logdir, steps=2, **options):
    """Trains up to that many steps, from where `logdir` stands; returns what was compiled and found of that fit."""
    trainer = NetTrainer(
        Net(),
        optax.adam(0.1),
        logdir=logdir,
        callbacks=[tk.callbacks.Checkpoint(tk.Every(steps=2))],
        **options,
    )
    data = tk.data.Arrays(arrays(64), batch_size=16, shuffle=True)
    with Told() as told:
        trainer.fit(data, steps=steps, resume=True)
    return told


def main():
    logdir, steps = sys.argv[1:]
    compile_cache._LEAST_SECONDS = 0.0
    told = start(logdir, int(steps), steps_per_call=1)
    print(json.dumps([told.missed, told.hit]))


if __name__ == "__main__":
    main()
