"""Which collectives a compiled program has."""

import math
import re
from typing import Any, NamedTuple

_KINDS = "all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter"


class Collective(NamedTuple):
    """One collective of a compiled program.

    Attributes:
      kind: XLA's name: "all-reduce", "all-gather", "reduce-scatter", "all-to-all" or
        "collective-permute".
      shapes: of the arrays that it returns, on one device. XLA combines small collectives into one
        with several. The operands of an asynchronous one may be among them.
    """

    kind: str
    shapes: tuple[tuple[int, ...], ...]

    @property
    def elements(self) -> int:
        """The size of the largest array."""
        return max(map(math.prod, self.shapes), default=1)


def audit(compiled: Any, *, elements: int = 0) -> list[Collective]:
    """Returns the collectives of a compiled program.

    Where the compiler places the collectives, StableHLO does not show them. Compare with the
    unmodified model, and look for collectives of activations: with ``elements`` = tokens x D on a
    device, smaller collectives are left out.

    Args:
      compiled: what ``jax.jit(f).lower(...).compile()`` returns, or its text. A collective in the
        body of a loop is listed once.
      elements: how many elements the largest array of a collective must have to be listed.
    """
    text = compiled if isinstance(compiled, str) else compiled.as_text()
    found = []
    for result, kind in re.findall(rf"= (.*?) ({_KINDS})(?:-start)?\(", text):
        arrays = re.findall(r"\w+\[([\d,]*)\]", result)
        shapes = tuple(tuple(map(int, filter(None, dims.split(",")))) for dims in arrays)
        found.append(Collective(kind, shapes))
    return [collective for collective in found if collective.elements >= elements]
