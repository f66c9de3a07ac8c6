"""The same models in PyTorch: a loop by hand, and Lightning, which is compared with that. Imports no JAX."""

import functools
import logging
import warnings
from collections.abc import Iterator
from typing import Any

import _data
import torch
from _task import Make, Running, Task
from torch import nn
from torch.nn import functional as F


class Block(nn.Module):
    """A basic block of a ResNet."""

    def __init__(self, width: int, features: int, stride: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(width, features, 3, stride, 1, bias=False),
            nn.BatchNorm2d(features),
            nn.ReLU(),
            nn.Conv2d(features, features, 3, 1, 1, bias=False),
            nn.BatchNorm2d(features),
        )
        self.short = nn.Sequential()
        if width != features or stride != 1:
            conv = nn.Conv2d(width, features, 1, stride, bias=False)
            self.short = nn.Sequential(conv, nn.BatchNorm2d(features))

    def forward(self, x):
        return F.relu(self.body(x) + self.short(x))


class Transformer(nn.Module):
    """A decoder over characters, pre-norm, with learned positions."""

    def __init__(self, options: dict[str, Any]) -> None:
        super().__init__()
        width, heads = options["width"], options["heads"]
        self.embed = nn.Embedding(options["vocabulary"], width)
        self.positions = nn.Parameter(0.02 * torch.randn(options["context"], width))
        layer = functools.partial(
            nn.TransformerEncoderLayer,
            width,
            heads,
            4 * width,
            0.0,
            "gelu",
            batch_first=True,
            norm_first=True,
        )
        self.layers = nn.ModuleList(layer() for _ in range(options["layers"]))
        self.head = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, options["vocabulary"]))
        mask = nn.Transformer.generate_square_subsequent_mask(options["context"])
        self.register_buffer("mask", mask)

    def forward(self, x):
        h = self.embed(x) + self.positions
        for layer in self.layers:
            h = layer(h, src_mask=self.mask, is_causal=True)
        return self.head(h)


def model_of(task: Task) -> tuple[nn.Module, torch.optim.Optimizer]:
    """Returns the model and the optimizer of a workload."""
    options = task.options
    match task.name:
        case "W1":
            model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))
            return model, torch.optim.Adam(model.parameters(), 1e-3)
        case "W2":
            stack: list[nn.Module] = []
            for before, features in ((1, 32), (32, 64)):
                stack += [nn.Conv2d(before, features, 3, 1, 1), nn.ReLU(), nn.AvgPool2d(2)]
            head = [nn.Flatten(), nn.Linear(64 * 49, 256), nn.ReLU(), nn.Linear(256, 10)]
            model = nn.Sequential(*stack, *head)
            return model, torch.optim.SGD(model.parameters(), 0.1, 0.9)
        case "W3":
            model = _resnet(options)
            return model, torch.optim.SGD(model.parameters(), 0.05, 0.9)
        case "W4":
            model = Transformer(options)
            return model, torch.optim.AdamW(model.parameters(), 1e-3, weight_decay=1e-4)
    raise ValueError(f"no workload {task.name!r} in PyTorch")


def _resnet(options: dict[str, Any]) -> nn.Module:
    width = options["width"]
    stack: list[nn.Module] = [nn.Conv2d(3, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
    for stage in range(3):
        for block in range(options["blocks"]):
            features = options["width"] * 2**stage
            stack.append(Block(width, features, 2 if stage and not block else 1))
            width = features
    return nn.Sequential(*stack, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, options["classes"]))


class Batches:
    """Shuffled batches for ever, as tensors."""

    def __init__(self, task: Task) -> None:
        arrays = dict(task.arrays)
        if "tokens" not in arrays and arrays["image"].ndim == 4:
            arrays["image"] = arrays["image"].transpose(0, 3, 1, 2).copy()
        self._batches = _data.batches(arrays, task.options["batch_size"])

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        for batch in self._batches:
            tensors = {name: torch.from_numpy(leaf) for name, leaf in batch.items()}
            if "tokens" in tensors:
                tokens = tensors["tokens"].long()
                yield tokens[:, :-1], tokens[:, 1:]
            else:
                yield tensors["image"], tensors["label"].long()


def loss_and_accuracy(model: nn.Module, batch: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the mean loss of a batch and the share of right answers, detached."""
    x, y = batch
    logits = model(x).flatten(0, -2)
    y = y.flatten()
    return F.cross_entropy(logits, y), (logits.detach().argmax(-1) == y).float().mean()


def by_hand(task: Task, tmp: str) -> Running:
    """The plain loop, the metrics summed in tensors."""
    model, optimizer = model_of(task)
    batches, totals = iter(Batches(task)), torch.zeros(2)

    def run(steps: int) -> int:
        for _ in range(steps):
            optimizer.zero_grad()
            loss, accuracy = loss_and_accuracy(model, next(batches))
            loss.backward()
            optimizer.step()
            totals.add_(torch.stack([loss.detach(), accuracy]))
        return steps

    return Running(run)


def by_lightning(task: Task, tmp: str, *, log: bool = False) -> Running:
    """`Trainer.fit` with everything switched off that can be; with `log` both metrics by `self.log`."""
    import lightning

    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")

    class Module(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.model, self.optimizer = model_of(task)
            self.totals = torch.zeros(2)

        def configure_optimizers(self):
            return self.optimizer

        def training_step(self, batch, index):
            loss, accuracy = loss_and_accuracy(self.model, batch)
            if log:
                self.log("loss", loss)
                self.log("accuracy", accuracy)
            else:
                self.totals.add_(torch.stack([loss.detach(), accuracy]))
            return loss

    module, batches = Module(), Batches(task)

    def run(steps: int) -> int:
        trainer = lightning.Trainer(
            accelerator="cpu",
            max_steps=steps,
            max_epochs=-1,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            default_root_dir=tmp,
        )
        trainer.fit(module, batches)
        return steps

    return Running(run)


CONTESTANTS: dict[str, Make] = {
    "torch by hand": by_hand,
    "Lightning": by_lightning,
    "Lightning, self.log": functools.partial(by_lightning, log=True),
}
