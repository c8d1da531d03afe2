"""Low-rank adapters merged into a model's weights, and taken out of them again.

With adapters i loaded every adapted matrix is W = base + sum_i weight_i * scaling_i * B_i @ A_i.
The sum always starts from the base and is rounded once, so that neither the number of adapters nor
what was loaded and unloaded before leaves a trace in it.

Source: https://arxiv.org/abs/2106.09685
"""

import logging
import math
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import fields
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from mistral_kernels.model.adapter_files import Adapter, read_adapter
from mistral_kernels.model.checkpoint_files import open_safetensors
from mistral_kernels.model.config import ModelConfig
from mistral_kernels.model.weight_table import Place
from mistral_kernels.model.weights import check_parameters
from mistral_kernels.ops.checks import compute_dtype, is_number

logger = logging.getLogger("mistral_kernels")

# What is copied and rewritten as one: a parameter and (), or a stacked one and (expert,).
Slab = tuple[str, tuple[int, ...]]


class Merged(NamedTuple):
    """An adapter in the weights."""

    file: Path
    adapter: Adapter
    weight: float


class Adapters:
    """The adapters in a model's weights, and the weights without them.

    The parameters that the methods take are name to tensor, as `parameter_shapes(config)` has
    them; they are changed in place.
    """

    def __init__(self) -> None:
        self._merged: list[Merged] = []
        self._for_good: list[Path] = []
        self._base: dict[Slab, Tensor] = {}

    @property
    def removable(self) -> list[Path]:
        """The files of the adapters that `unload` can take out."""
        return [merged.file for merged in self._merged]

    @torch.no_grad()
    def load(
        self,
        parameters: Mapping[str, Tensor],
        config: ModelConfig,
        path: str | Path,
        scaling: float | None = None,
        *,
        weight: float = 1.0,
        keep_base: bool = True,
    ) -> None:
        """Merges an adapter; see `AdaptableModule.load_lora`."""
        for name, value in (("scaling", 1.0 if scaling is None else scaling), ("weight", weight)):
            if not is_number(value):
                got = type(value).__name__
                raise TypeError(f"load_lora: {name}: expected a number, got {got}")
            if not math.isfinite(value):
                raise ValueError(f"load_lora: {name}: expected a finite number, got {value!r}")
        check_parameters(parameters, config)
        adapter = read_adapter(path, config, scaling)
        merged = Merged(_resolved(adapter.file), adapter, weight)
        if merged.file in self._for_good or any(merged.file == m.file for m in self._merged):
            raise ValueError(f"{adapter.file}: already loaded")
        self._check_copies(parameters, adapter)
        _tell_base(adapter, config)
        changed = _slabs([merged])
        # All memory that a copy takes is taken before any weight changes.
        kept = {
            slab: _part(parameters, slab).to("cpu", copy=True)
            for slab in (changed if keep_base else ())
            if slab not in self._base
        }
        self._base.update(kept)
        self._rewrite(parameters, [*self._merged, merged], changed)
        if not keep_base:
            self._for_good += self.removable
            self._merged.clear()
            self._base.clear()

    @torch.no_grad()
    def unload(
        self,
        parameters: Mapping[str, Tensor],
        config: ModelConfig,
        path: str | Path | None = None,
    ) -> None:
        """Takes out one adapter or all; see `AdaptableModule.unload_lora`."""
        check_parameters(parameters, config)
        gone = self._merged if path is None else [m for m in self._merged if _names(path, m.file)]
        stuck = [f for f in self._for_good if path is None or _names(path, f)]
        if stuck:
            raise ValueError(f"unload_lora: {stuck[0]}: merged for good (keep_base=False)")
        if path is not None and not gone:
            loaded = ", ".join(map(str, self.removable)) or "none"
            raise ValueError(f"unload_lora: {path}: not loaded; loaded are: {loaded}")
        files = {m.file for m in gone}
        rest = [m for m in self._merged if m.file not in files]
        self._rewrite(parameters, rest, _slabs(gone))

    def forget(self) -> None:
        """Takes the weights as they are for the base, as after all of them were overwritten."""
        self._merged.clear()
        self._for_good.clear()
        self._base.clear()

    def to(self, dtype: torch.dtype) -> None:
        """Follows a change of the parameters' dtype."""
        self._base = {slab: base.to(dtype) for slab, base in self._base.items()}

    def _rewrite(
        self, parameters: Mapping[str, Tensor], merged: list[Merged], changed: Iterable[Slab]
    ) -> None:
        """Makes `merged` the adapters in the weights; if that fails, puts back what has a copy."""
        before, self._merged = self._merged, merged
        try:
            self._write(parameters, changed)
        except BaseException:  # no memory left on the device, Ctrl-C
            self._merged = before
            self._write(parameters, [slab for slab in changed if slab in self._base])
            raise
        finally:
            for slab in self._base.keys() - _slabs(self._merged):
                del self._base[slab]

    def _write(self, parameters: Mapping[str, Tensor], changed: Iterable[Slab]) -> None:
        """Recomputes parts of the weights from their base."""
        updates = defaultdict(list)
        for merged in self._merged:
            for update in merged.adapter.updates:
                updates[_slab(update.place)].append((update, merged.weight * update.scaling))
        for slab in changed:
            weight = _part(parameters, slab)
            base = self._base.get(slab, weight)
            if not updates[slab]:
                weight.copy_(base)
                continue
            dtype = compute_dtype(weight.dtype)
            total = base.to(weight.device, dtype, copy=True)
            for update, factor in updates[slab]:
                a, b = (x.to(weight.device, dtype) for x in (update.a, update.b))
                total[update.place.index[len(slab[1]) :]].addmm_(b, a, alpha=factor)
            weight.copy_(total)

    def _check_copies(self, parameters: Mapping[str, Tensor], adapter: Adapter) -> None:
        """Refuses an adapter that brings whole matrices other than the base's."""
        for stored, place in adapter.copies:
            slab = _slab(place)
            base = self._base.get(slab, _part(parameters, slab))[place.index[len(slab[1]) :]].cpu()
            with open_safetensors(stored.path) as file:
                copy = file.get_tensor(stored.key)
            # Either may have been rounded to the dtype that it is stored in.
            if not torch.equal(copy.to(base.dtype), base) and not torch.equal(
                base.to(copy.dtype), copy
            ):
                raise ValueError(
                    f"{stored.path}: {stored.key}: differs from the model's; whole matrices"
                    " cannot be merged, merge and save the model with PEFT"
                )


def _tell_base(adapter: Adapter, config: ModelConfig) -> None:
    """Logs the model that an adapter was made for, with a warning if it is known to be another.

    v0.1 and v0.2 of Mistral 7B, say, differ in rope and window, not in the shape of any matrix. It
    is no error, as whoever made the model at hand may have changed them on purpose.
    """
    if not adapter.base:
        return
    logger.info("%s: an adapter for %s", adapter.file, adapter.base)
    try:
        known = ModelConfig.known(adapter.base)
    except ValueError:  # a fine-tune, or a folder of any name
        return
    compared = [f.name for f in fields(config) if f.compare and f.name != "interleaved"]
    other = [name for name in compared if getattr(known, name) != getattr(config, name)]
    if other:
        text = "%s: an adapter for %s, which differs from this model in %s"
        logger.warning(text, adapter.file, adapter.base, ", ".join(other))


def _resolved(file: Path) -> Path:
    """One name for one file; the file itself may be a link, as hub caches have them."""
    return file.parent.resolve() / file.name


def _names(path: str | Path, file: Path) -> bool:
    """Whether a path leads to an adapter's file, or to the folder that holds it."""
    path = Path(path)
    return file == _resolved(path) or file.parent == path.resolve()


def _slab(place: Place) -> Slab:
    experts = tuple(i for i in place.index[:1] if isinstance(i, int))
    return place.parameter, experts


def _slabs(merged: Iterable[Merged]) -> set[Slab]:
    return {_slab(update.place) for m in merged for update in m.adapter.updates}


def _part(parameters: Mapping[str, Tensor], slab: Slab) -> Tensor:
    parameter, index = slab
    return parameters[parameter][index]
