"""torch.compile as the tests use it: the whole function in one graph, nothing generated."""

from collections.abc import Callable

import torch


def whole_graph(function: Callable) -> Callable:
    """Return `function` compiled; a graph break is an error.

    What earlier tests compiled is dropped: a limit on recompilations counts functools.partial
    objects of one op as one function.
    """
    torch.compiler.reset()
    return torch.compile(function, fullgraph=True, backend="aot_eager")
