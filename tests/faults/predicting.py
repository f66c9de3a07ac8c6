"""A process that predicts into a folder, and says which batch it was asked for: to be killed."""

import sys

import numpy as np
import optax
from flax import linen as nn

import trainkit as tk

BATCHES, ROWS = 24, 16


def rows(index):
    return np.random.default_rng(index).normal(size=(ROWS, 3)).astype(np.float32)


class Rows(tk.data.Source):
    """Batches that are made when they are asked for."""

    num_examples, steps_per_epoch, batch_size = BATCHES * ROWS, BATCHES, ROWS
    may_be_partial, seekable, keeps_batches = False, True, True

    def __init__(self, say):
        self._say = say

    def batches(self, epoch, start=0):
        for index in range(start, BATCHES):
            self._say(index)
            yield {"x": rows(index), "name": np.array([f"{index}" * (1 + index)] * ROWS)}


class Line(tk.Trainer):
    def loss(self, model, batch, ctx):
        return model(batch["x"])[:, 0] ** 2, {}

    def predict_step(self, model, batch, ctx):
        return {"y": model(batch["x"])}


def make_trainer():
    made = Line(nn.Dense(2), optax.sgd(0.1))
    made.init({"x": rows(0)})
    return made


def main():
    def say(index):
        print(index, flush=True)
        if index == int(sys.argv[2]):
            sys.stdin.read()  # until it is killed

    make_trainer().predict(Rows(say), out=sys.argv[1])
    print("done", flush=True)


if __name__ == "__main__":
    main()
