"""Other ways to what our ops and models do, one adapter a file; most need a package of their own.

An adapter has a `NAME`, `missing(device)`, and one function per op it serves, named as the op:
`f(shape, dtype, device)` returns a call that takes the inputs that ours gets in that op's benchmark
and returns the same values; a dictionary of such calls where there are several ways, by the names
that they have in the results; or a text, why it cannot serve that shape. Of the op "model" the call
takes our model and returns the adapter's engine on the same weights, see `transformers.Engine`.

What is no work of the call itself (plans, masks, layouts) is made by `f`, outside of what is timed.
An adapter may name devices as `SLOW_ON`, where it takes so long to start that it runs by name only.
"""

import functools
from collections.abc import Callable, Collection, Mapping
from types import ModuleType
from typing import Any

import torch

from benchmarks.peers import (
    eager,
    flash_attn,
    flash_attn_3,
    flashinfer,
    flex_attention,
    grouped_mm,
    liger,
    mistral_inference,
    packages,
    sdpa,
    torch_low_bit,
    transformers,
    transformers_compiled,
    varlen_attention,
    xformers,
)
from mistral_kernels import Transformer

ADAPTERS = {
    adapter.NAME: adapter
    for adapter in (
        *(eager, sdpa, flex_attention, varlen_attention, grouped_mm, torch_low_bit),
        *(transformers, transformers_compiled, mistral_inference),
        *(liger, flashinfer, flash_attn, flash_attn_3, xformers),
    )
}


def wanted_peers(text: str) -> set[str] | None:
    """The names that `--peers` holds: "all" (None), "none", or names with commas between.

    Raises:
        ValueError: a name is no adapter's.
    """
    if text == "all":
        return None
    names = set(text.split(",")) - {"none"}
    if unknown := sorted(names - ADAPTERS.keys()):
        raise ValueError(f"peers must be of {', '.join(ADAPTERS)}, got {', '.join(unknown)}")
    return names


def peers_of(
    op: str, device: str, wanted: Collection[str] | None = None
) -> tuple[dict[str, ModuleType], dict[str, str]]:
    """The adapters that serve an op, and those that cannot here.

    Args:
        op: name of an op, or "model".
        device: "cpu" or "cuda".
        wanted: names of adapters; None for all but those too slow to start on that device.

    Returns:
        found: name -> adapter.
        reasons: name -> why an adapter that serves the op cannot run here.
    """
    found, reasons = {}, {}
    for name, adapter in ADAPTERS.items():
        if not hasattr(adapter, op) or (wanted is not None and name not in wanted):
            continue
        slow = wanted is None and device in getattr(adapter, "SLOW_ON", ())
        reason = f"slow to start on {device}: only by name" if slow else adapter.missing(device)
        if reason is None:
            found[name] = adapter
        else:
            reasons[name] = reason
    return found, reasons


def calls_of(
    op: str,
    shape: tuple,
    dtype: torch.dtype,
    device: str,
    wanted: Collection[str] | None = None,
) -> tuple[dict[str, Callable], dict[str, str]]:
    """The calls of `peers_of` for one shape, and why others have none.

    Returns:
        calls: name in the results -> call.
        reasons: name of an adapter -> why it has no call.
    """
    found, reasons = peers_of(op, device, wanted)
    calls: dict[str, Callable] = {}
    for name, adapter in found.items():
        try:
            made = getattr(adapter, op)(shape, dtype, device)
        except packages.FAILURES as error:  # plans and compilers of others fail in their own ways
            made = f"failed: {packages.first_line(error)}"
        if isinstance(made, str):
            reasons[name] = made
        else:
            calls |= made if isinstance(made, dict) else {name: made}
    return calls, reasons


def engine_calls(
    model: Transformer, engines: Mapping[str, Callable], use: Callable[[Any], Callable]
) -> dict[str, Callable]:
    """Name -> the call that `use(engine)` returns, of the calls of op "model".

    Engines are made by the first call, so that one which cannot be made fails as one that cannot
    run; out of inference mode, as models are loaded.
    """

    def late(engine_of: Callable) -> Callable:
        @functools.cache
        @torch.inference_mode(False)
        @torch.no_grad()
        def made() -> Callable:
            return use(engine_of(model))

        return lambda: made()()

    return {name: late(engine_of) for name, engine_of in engines.items()}
