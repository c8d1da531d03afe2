"""The part of a model that takes low-rank adapters into its weights and out of them."""

from __future__ import annotations

from pathlib import Path

from torch import nn

from mistral_kernels.model.config import ModelConfig
from mistral_kernels.model.lora import Adapters
from mistral_kernels.model.low_bit_weight import refuse_low_bit


class AdaptableModule(nn.Module):
    """A model that takes adapters.

    Attributes:
        config: the model, set by the subclass.
    """

    config: ModelConfig

    def __init__(self) -> None:
        super().__init__()
        self._adapters = Adapters()

    def _apply(self, fn, recurse=True):
        super()._apply(fn, recurse)
        self._adapters.to(next(self.parameters()).dtype)
        return self

    def load_lora(
        self,
        path: str | Path,
        scaling: float | None = None,
        *,
        weight: float = 1.0,
        keep_base: bool = True,
    ) -> None:
        """Merges an adapter into the weights, beside those that are loaded already.

        Every adapted matrix becomes base + sum of weight * scaling * B @ A over the adapters,
        computed in float32 (float64 for a float64 model) and rounded once. A cache that was filled
        before still holds keys and values of the weights of then.

        Args:
            path: a native `lora.safetensors`, PEFT's `adapter_model.safetensors` with its
                `adapter_config.json` beside it, or the folder that holds either.
            scaling: the adapter's factor; None: as its `adapter_config.json` says, or of a native
                adapter the `params.json` beside it; 2.0 where there is none.
            weight: of this adapter among others; 0 and negative ones are allowed.
            keep_base: keep what `unload_lora` needs: the adapter's factors and a copy of every
                matrix that it changes, in host memory; an adapter of all layers copies nearly the
                whole model. False: this adapter and those loaded become part of the weights for
                good, and nothing is kept; should memory run out half-way, the weights are lost.

        Raises:
            FileNotFoundError: there is no such file.
            TypeError, ValueError: the path is none, a number is not finite, the adapter is loaded
                already, or it is malformed, does not fit this model or is more than a low-rank
                update; file and key are named; or weights are in few bits. No weight has changed
                then.
        """
        refuse_low_bit(self, "load_lora")
        parameters = dict(self.named_parameters())
        self._adapters.load(
            parameters, self.config, path, scaling, weight=weight, keep_base=keep_base
        )

    def unload_lora(self, path: str | Path | None = None) -> None:
        """Takes an adapter out of the weights, as if it had never been loaded, bit for bit.

        Args:
            path: as it was given to `load_lora`; None: all adapters, if there are any.

        Raises:
            ValueError: the adapter is not loaded, or was merged for good, or weights are in few
                bits; nothing has changed.
        """
        refuse_low_bit(self, "unload_lora")
        self._adapters.unload(dict(self.named_parameters()), self.config, path)
