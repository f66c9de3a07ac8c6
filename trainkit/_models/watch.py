"""What a module draws and sows while a function runs in its scope: which key streams it wants, which values are fresh.

Flax has no hook for either, so the methods of `nn.Module` that draw and sow are wrapped while a function is traced;
in every scope that was not marked here they do what Flax wrote. Owns no variables and no keys.
"""

import contextlib
import functools
import itertools
import threading
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal

import flax.core
import flax.errors
import flax.linen as nn
import jax

Mode = Literal["init", "train", "eval"]
Path = tuple[str, ...]
"""A collection, the path of a module in it, and the name of a variable."""

_FLAG = "trainkit_run"
_NUMBERS = itertools.count()
_PARAMS = "params"


class Watch:
    """What the runs of one module were seen to do.

    It only grows, and outlives a trace: where a transformation takes a trace from its cache no Python runs, and
    nothing can be seen.

    Attributes:
        number: of this object in the process; an address may be used again.
        sown: the variables that `sow` and `perturb` wrote.
        mixed: collections that evaluation would keep as they are, had nothing been sown into them.
    """

    def __init__(self) -> None:
        self.number = next(_NUMBERS)
        self.sown: set[Path] = set()
        self.mixed: set[str] = set()
        self._streams: dict[Mode, set[str]] = {"init": {_PARAMS}, "train": set(), "eval": set()}
        self._drawn: set[str] = set()
        self._asked: set[str] = set()

    @property
    def streams(self) -> frozenset[str]:
        """The key streams that runs drew from."""
        return frozenset(self._drawn)

    def settle(self, mode: Mode, kept: frozenset[str], attempt: Callable[["Run"], Any]) -> Any:
        """Returns `attempt(run)` of the first run that had all streams and fresh values that it turned out to need.

        Args:
            mode: of the run.
            kept: collections that the run may not change.
            attempt: traces the module once, marked with `run`.
        """
        while True:
            run = Run(self, mode, self._known(mode), kept - self.mixed, frozenset(self.sown))
            with contextlib.suppress(_Again), _wrapped():
                result = attempt(run)
                if not run.missed:  # a module may have caught what was raised
                    return result

    def drew(self, mode: Mode, stream: str) -> None:
        """Notes that a stream is drawn from."""
        self._streams[mode].add(stream)
        if stream != _PARAMS:
            self._drawn.add(stream)

    def asked(self, mode: Mode, stream: str) -> None:
        """Notes that a module asked whether there is a stream."""
        self._asked.add(stream)
        if mode != "eval":
            self._streams[mode].add(stream)

    def _known(self, mode: Mode) -> frozenset[str]:
        # What another mode drew is likely drawn here: the trace need not begin again to find it.
        others = self._drawn - self._asked if mode == "eval" else self._drawn | self._asked
        return frozenset(self._streams[mode] | others)


class Run:
    """One run of a module: what it was given, and what it was seen to miss.

    Attributes:
        streams: the key streams it has.
        fixed: collections that it may not change.
        sown: variables that were left out of what it was given.
        missed: whether it has to be run again with more.
    """

    def __init__(
        self, watch: Watch, mode: Mode, streams: frozenset[str], fixed: frozenset[str], sown: frozenset[Path]
    ) -> None:
        self._watch = watch
        self._mode: Mode = mode
        self.streams, self.fixed, self.sown = streams, fixed, sown
        self.missed = False
        self._fresh: set[Path] = set()
        self._hash = hash((watch.number, mode, streams, fixed, sown))

    def __hash__(self) -> int:
        # `nn.jit` keeps traces by the hash of all flags: those of equal runs are one, those of other modules are not.
        return self._hash

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Run) and self._hash == other._hash

    def marking(self, fn: Callable[..., Any]) -> Callable[..., Any]:
        """Returns `fn`, a function of a bound module, with the scope of the module marked with this run."""

        def marked(module: nn.Module, *args: Any) -> Any:
            scope = module.scope
            assert scope is not None  # it is bound
            scope.flags = flax.core.freeze({**scope.flags, _FLAG: self})
            return fn(module, *args)

        return marked

    def keys(self, rng: jax.Array) -> dict[str, jax.Array]:
        """Returns `rng` behind each stream."""
        return dict.fromkeys(sorted(self.streams), rng)

    def make_rng(self, original: Callable[..., Any], module: Any, name: str = _PARAMS) -> Any:
        """Draws from a stream, which is there from the next attempt on if it was not."""
        self._watch.drew(self._mode, name)
        if name not in self.streams:
            self._again()
        scope = module.scope
        if self._mode == "init" and name != _PARAMS and scope.has_rng(name) and scope.has_rng(_PARAMS):
            # In `module.init(key, ...)` every stream is that of the parameters: those drawn later in the same
            # scope keep their numbers.
            scope.rng_counters[_PARAMS] += 1
        try:
            return original(module, name)
        except flax.errors.InvalidRngError as error:
            error.add_note(
                f"trainkit: the module has every stream it asks for, but a lifted transformation around it does not "
                f"pass {name!r} on; add split_rngs={{{name!r}: True}} to that nn.vmap, nn.scan or nn.RNN."
            )
            raise

    def has_rng(self, original: Callable[..., Any], module: Any, name: str) -> bool:
        """Says whether there is a stream: any in training, in evaluation only one that is drawn from regardless."""
        if name != _PARAMS:
            self._watch.asked(self._mode, name)
            if self._mode != "eval" and name not in self.streams:
                self._again()
        return original(module, name)

    def sow(
        self, original: Callable[..., Any], module: Any, col: str, name: str, *args: Any, **more: Any
    ) -> Any:
        """Sows a value, into a place that was empty when the run began."""
        self._write(module.scope, col, name)
        return original(module, col, name, *args, **more)

    def perturb(
        self,
        original: Callable[..., Any],
        module: Any,
        name: str,
        value: Any,
        collection: str = "perturbations",
    ) -> Any:
        """Adds a perturbation, which was not there when the run began."""
        self._write(module.scope, collection, name)
        return original(module, name, value, collection)

    def _write(self, scope: Any, col: str, name: str) -> None:
        key = (col, *scope.path, name)
        if col in self.fixed:
            self._watch.mixed.add(col)
            self._again()
        if key in self.sown or key in self._fresh or not scope.is_mutable_collection(col):
            return
        self._watch.sown.add(key)
        if scope.has_variable(col, name):
            self._again()
        self._fresh.add(key)

    def _again(self) -> None:
        self.missed = True
        raise _Again


class _Again(BaseException):
    """Ends an attempt; no module that catches its own errors should catch it."""


def without(variables: Mapping[str, Any], paths: frozenset[Path] | set[Path]) -> dict[str, Any]:
    """Returns collections without the variables at `paths`, nor the branches that held nothing else."""
    pruned = dict(variables)
    for path in paths:
        _remove(pruned, path)
    return pruned


def with_those_of(
    variables: dict[str, Any], others: Mapping[str, Any], paths: frozenset[Path] | set[Path]
) -> dict[str, Any]:
    """Returns collections with the variables at `paths` as they are in `others`, where they are there."""
    filled = dict(variables)
    for path in paths:
        found: Any = others
        for part in path:
            found = found.get(part) if isinstance(found, Mapping) else None
        if found is None:
            continue
        node = filled
        for part in path[:-1]:
            node[part] = dict(node.get(part, {}))
            node = node[part]
        node[path[-1]] = found
    return filled


def _remove(node: dict[str, Any], path: Path) -> None:
    first, *rest = path
    if first not in node:
        return
    if not rest:
        del node[first]
    elif isinstance(node[first], Mapping):
        inner = dict(node[first])
        _remove(inner, tuple(rest))
        if inner or not node[first]:
            node[first] = inner
        else:
            del node[first]


_WRAPPED = ("make_rng", "has_rng", "sow", "perturb")
_LOCK = threading.Lock()
_originals: dict[str, Callable[..., Any]] = {}
_users = 0


@contextlib.contextmanager
def _wrapped() -> Iterator[None]:
    """Wraps the methods of `nn.Module` that draw and sow, for as long as any thread is in here."""
    global _users
    with _LOCK:
        _users += 1
        if _users == 1:
            for name in _WRAPPED:
                _originals[name] = getattr(nn.Module, name)
                setattr(nn.Module, name, _wrapper(name, _originals[name]))
    try:
        yield
    finally:
        with _LOCK:
            _users -= 1
            if not _users:
                for name in _WRAPPED:
                    setattr(nn.Module, name, _originals[name])


def _wrapper(name: str, original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def method(module: Any, *args: Any, **kwargs: Any) -> Any:
        run = None if module.scope is None else module.scope.flags.get(_FLAG)
        return (
            original(module, *args, **kwargs)
            if run is None
            else getattr(run, name)(original, module, *args, **kwargs)
        )

    return method
