"""From what a user passes as `strategy=` to a `Strategy`."""

from trainkit.parallel._mesh import Mesh
from trainkit.parallel._per_example import PerExample
from trainkit.parallel._pmap import Pmap
from trainkit.parallel._strategy import Strategy

_BY_NAME = {"jit": Mesh, "vmap": PerExample, "pmap": Pmap}


def resolve_strategy(strategy: str | Strategy) -> Strategy:
    """Returns the strategy that `strategy` names, or is.

    Raises:
        ValueError: no strategy has that name.
        TypeError: neither a name nor a strategy.
    """
    if isinstance(strategy, Strategy):
        return strategy
    names = ", ".join(map(repr, _BY_NAME))
    if isinstance(strategy, type):
        raise TypeError(
            f"strategy={strategy.__name__}: got the class; pass an object, {strategy.__name__}()."
        )
    if not isinstance(strategy, str):
        raise TypeError(f"strategy={strategy!r}: expected a name ({names}) or a Strategy.")
    if strategy not in _BY_NAME:
        raise ValueError(f"strategy={strategy!r}: the names are {names}.")
    return _BY_NAME[strategy]()
