"""Weights in and out: state_dict and load_state_dict in native names, and whole folders."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn

from mistral_kernels.model.adaptable_module import AdaptableModule
from mistral_kernels.model.config import ModelConfig
from mistral_kernels.model.hub import resolve_folder
from mistral_kernels.model.layouts import Layout
from mistral_kernels.model.low_bit_weight import LowBitWeight, refuse_low_bit
from mistral_kernels.model.saving import save_checkpoint
from mistral_kernels.model.weight_table import parameter_shapes
from mistral_kernels.model.weight_views import WeightView, weight_views
from mistral_kernels.model.weights import Checkpoint
from mistral_kernels.ops.checks import FLOATS
from mistral_kernels.ops.low_bit import LowBit


class SavableModule(AdaptableModule):
    """A model whose weights leave and enter it as the tensors of a checkpoint.

    The model itself holds fewer, larger parameters, whatever layout it was loaded from. To torch
    this stays an ordinary module: prefix, keep_vars, strict and assign mean what they mean there,
    also where the model is part of another module.
    """

    folder: Path | None
    quantisation: str | None

    @classmethod
    def from_folder(
        cls,
        folder: str | Path,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        max_batch_size: int = 1,
        backend: str = "auto",
        layout: Layout | None = None,
        allow_pickle: bool = False,
        dequantise: bool = False,
    ) -> Self:
        """Loads a checkpoint folder; nothing is allocated before all of it has been checked.

        Args:
            folder: Mistral-native (`params.json`, `consolidated*.safetensors`) or Hugging Face
                (`config.json`, `*.safetensors`); or the name of a model on the Hugging Face hub,
                which is downloaded where the cache lacks it, see `resolve_folder`.
            device: None: cuda if present, else cpu.
            dtype: None: the checkpoint's.
            max_batch_size: most sequences that `generate` and `stream` run at once.
            backend: a preference, see the class.
            layout: "native" or "huggingface" where a folder holds both; None: native wins.
            allow_pickle: also reads `consolidated.NN.pth` (or `.pt`) and `pytorch_model*.bin`, by
                torch's restricted unpickler, which runs no code of theirs.
            dequantise: widens weights in few bits to the model's dtype, as adapters and
                `save_pretrained` need them. The model then takes the memory of a full one.

        Returns:
            The model, ready to run; its parameters are frozen.

        Raises:
            FileNotFoundError: the folder, its configuration or a weight file is missing.
            DownloadError: an OSError; a model of the hub cannot be downloaded.
            ValueError: a file is damaged or unsupported; the text names file and key.
        """
        ModelConfig.from_folder(folder, layout)  # what is not supported is never downloaded
        folder = resolve_folder(folder, layout=layout)
        config = ModelConfig.from_folder(folder, layout)
        checkpoint = Checkpoint(
            folder, config, layout, allow_pickle=allow_pickle, dequantise=dequantise
        )
        if device is None:
            device = "cuda" if torch.cuda.is_available() else "cpu"
        model = cls(
            checkpoint.config,
            device=device,
            dtype=checkpoint.dtype if dtype is None else dtype,
            max_batch_size=max_batch_size,
            backend=backend,
            low_bit=checkpoint.forms,
        )
        checkpoint.copy_to(model._weights())
        model.quantisation = str(checkpoint.quantisation) if checkpoint.forms else None
        model.folder = folder.absolute()  # the current folder may change before it is used
        return model

    def save_pretrained(
        self,
        folder: str | Path,
        *,
        layout: Layout = "native",
        max_shard_bytes: int = 5_000_000_000,
        overwrite: bool = False,
    ) -> None:
        """Writes the model, adapters merged, and its tokenizer to a checkpoint folder.

        Args:
            folder: where; made if absent. It appears when all is written, and not before.
            layout: "native" or "huggingface", whichever the model was read from; transformers
                loads the latter.
            max_shard_bytes: most bytes of tensors a file.
            overwrite: replace the checkpoint that the folder holds, be it the model's own. Without
                it only an empty folder is taken; one with other files in it is never replaced.

        Raises:
            TypeError, ValueError: an argument is out of range, the layout's configuration file
                cannot express the model, or weights are in few bits.
            OSError: the folder is taken or cannot be written, or the disk is full. Then nothing is
                left behind, and what was there is untouched.
        """
        refuse_low_bit(self, "save_pretrained")
        save_checkpoint(
            self._held(),
            self.config,
            folder,
            layout=layout,
            max_shard_bytes=max_shard_bytes,
            overwrite=overwrite,
            source=self.folder,
        )

    def state_dict(
        self,
        *,
        destination: dict[str, Any] | None = None,
        prefix: str = "",
        keep_vars: bool = False,
    ) -> dict[str, Any]:
        """The weights under native checkpoint names, such as `layers.0.attention.wq.weight`.

        Args:
            destination, prefix, keep_vars: as in torch.

        Returns:
            Key to tensor, a view of the model's memory. Of a model in Hugging Face's rope layout
            wq and wk are copies, since their rows change places.

        Raises:
            ValueError: weights are in few bits, which those names cannot express. `torch.save` and
                `copy.deepcopy` take the model as a whole.
        """
        refuse_low_bit(self, "state_dict")
        state = super().state_dict(destination=destination, prefix=prefix, keep_vars=keep_vars)
        held = {name: state.pop(prefix + name) for name in parameter_shapes(self.config)}
        for key, view in weight_views(held, self.config, "native").items():
            state[prefix + key] = view.read()
        return state

    def load_state_dict(
        self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False
    ):
        """Takes weights under native checkpoint names, as `state_dict` gives them.

        Adapters in the model are replaced with the weights. Some of the weights alone are refused
        while there are any that can be taken out: the others would keep a part of them for good.

        Args:
            state_dict: key to tensor; each is converted to the model's dtype and device.
            strict: the keys must be exactly those of the model.
            assign: the model takes the tensors' dtype and device (which must be one of each)
                instead, as a model on the meta device must; then every key is needed. The memory
                is new all the same, as several tensors make up one parameter.

        Returns:
            Named tuple of missing_keys and unexpected_keys.

        Raises:
            RuntimeError: keys are missing or unexpected (if strict), or tensors do not fit; all of
                them are named, and no weight has changed.
            ValueError: weights are in few bits.
        """
        refuse_low_bit(self, "load_state_dict")
        views = self._native_views()
        if strict and isinstance(state_dict, Mapping):
            # torch would complain of these only after it has copied the others.
            wrong = {
                "Missing": [f'"{key}"' for key in views if key not in state_dict],
                "Unexpected": [f'"{key}"' for key in state_dict if key not in views],
            }
            errors = [
                f"{kind} key(s) in state_dict: {', '.join(keys)}. "
                for kind, keys in wrong.items()
                if keys
            ]
            if errors:
                known = {key: view for key, view in views.items() if key in state_dict}
                text = "\n\t".join(errors + _mistakes(state_dict, known, assign))
                name = type(self).__name__
                raise RuntimeError(f"Error(s) in loading state_dict for {name}:\n\t{text}")
        return super().load_state_dict(state_dict, strict, assign)

    def _weights(self) -> dict[str, Tensor | LowBit]:
        """Name to weight, as `parameter_shapes(config)` has them."""
        found = {}
        for name in parameter_shapes(self.config):
            owner, _, leaf = name.rpartition(".")
            held = getattr(self.get_submodule(owner), leaf)
            found[name] = held.tensors if isinstance(held, LowBitWeight) else held
        return found

    def _held(self, prefix: str = "") -> dict[str, nn.Parameter]:
        names = parameter_shapes(self.config)
        return {prefix + name: self.get_parameter(name) for name in names}

    def _native_views(self) -> dict[str, WeightView]:
        return weight_views(self._held(), self.config, "native")

    def _renew(self, like: Tensor) -> None:
        """Replaces every parameter by an uninitialised one of another tensor's dtype and device."""
        for name, old in self._held().items():
            owner, _, leaf = name.rpartition(".")
            new = torch.empty(old.shape, dtype=like.dtype, device=like.device)
            setattr(self.get_submodule(owner), leaf, nn.Parameter(new, old.requires_grad))
        self._apply(lambda tensor: tensor)  # so that the model notices its new device and dtype

    def _load_from_state_dict(
        self, state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
    ):
        views = {prefix + key: view for key, view in self._native_views().items()}
        assign = local_metadata.get("assign_to_params_buffers", False)
        given = {key: state_dict.pop(key) for key in views if key in state_dict}
        missing_keys += [key for key in views if key not in given]
        complete = len(given) == len(views)
        errors = _mistakes(given, views, assign)
        if given and not complete and (files := self._adapters.removable):
            errors.append(f"{files[0]} is merged: unload_lora() first, or give all weights.")
        error_msgs += errors
        if not errors:
            if assign:
                self._renew(next(iter(given.values())))
            views = self._native_views()
            with torch.no_grad():
                for key, tensor in given.items():
                    views[key.removeprefix(prefix)].write(tensor)
            if complete:
                self._adapters.forget()
        # The search for keys goes on in the submodules. They find every parameter under its own
        # name: it is the very one they hold, so nothing is copied. All else is unexpected.
        held = self._held(prefix)
        unexpected_keys += [key for key in state_dict if key in held]
        state_dict.update(held)
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )


def _mistakes(given: Mapping[str, Any], views: Mapping[str, WeightView], assign: bool) -> list[str]:
    """What keeps the tensors given from being loaded, in torch's words where it has some."""
    mistakes, kinds = [], set()
    for key, view in views.items():
        if key not in given:
            if assign:
                mistakes.append(f"assign=True replaces every parameter, but {key} is not given.")
            continue
        tensor, shape = given[key], torch.Size(view.place.shape)
        if not isinstance(tensor, Tensor):
            mistakes.append(f"{key}: expected a tensor, got {type(tensor).__name__}.")
            continue
        kinds.add((tensor.dtype, tensor.device))
        if tensor.shape != shape:
            mistakes.append(
                f"size mismatch for {key}: copying a param with shape {tensor.shape} from "
                f"checkpoint, the shape in current model is {shape}."
            )
        elif not assign and tensor.is_meta != view.parameter.is_meta:
            place = (
                "the checkpoint's" if tensor.is_meta else "the model's (assign=True gives it some)"
            )
            mistakes.append(f"{key}: {place} tensor is on the meta device and has no memory.")
    if assign and (len(kinds) > 1 or any(dtype not in FLOATS for dtype, _ in kinds)):
        found = ", ".join(sorted(f"{dtype} on {device}" for dtype, device in kinds))
        expected = ", ".join(map(str, FLOATS))
        mistakes.append(f"assign=True needs one device and one dtype of {expected}, got {found}.")
    return mistakes
