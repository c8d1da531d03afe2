"""Tiny random models of transformers, with its own eager attention and experts."""

import torch
import transformers
from torch import Tensor
from transformers import PreTrainedModel
from transformers.utils import logging

import mistral_kernels.integrations.transformers as switch

logging.disable_progress_bar()
logging.set_verbosity_error()

VOCAB = 61
OURS = {"attn_implementation": switch.NAME, "experts_implementation": switch.NAME}
SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "initializer_range": 0.2,
    "pad_token_id": 0,
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 1e6,
    "factor": 4.0,
    "original_max_position_embeddings": 8,
    "beta_fast": 2.0,
    "beta_slow": 0.25,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
    "llama_4_scaling_beta": 0.1,
}
MOE = {"num_local_experts": 5, "num_experts_per_tok": 2}


def stock(
    family: str = "Mistral", dtype: torch.dtype = torch.float32, **changes
) -> PreTrainedModel:
    """A model of `family`, the same weights for the same fields; norms are not the 1 that would
    hide a swapped one."""
    config = getattr(transformers, f"{family}Config")(**(SIZES | changes))
    torch.manual_seed(0)
    eager = {"attn_implementation": "eager", "experts_implementation": "eager"}
    model = transformers.AutoModelForCausalLM.from_config(config, **eager).eval()
    for parameter in model.parameters():
        if parameter.dim() == 1:
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
    return model.to(dtype)


def switched(model: PreTrainedModel) -> PreTrainedModel:
    """The same model on our attention and experts."""
    model.set_attn_implementation(switch.NAME)
    model.set_experts_implementation(switch.NAME)
    return model


def random_ids(batch: int, tokens: int) -> Tensor:
    """No id is 0, which is the padding."""
    return torch.randint(1, VOCAB, (batch, tokens), generator=torch.Generator().manual_seed(1))


def padded(ids: Tensor, *lengths: int) -> dict[str, Tensor]:
    """Arguments of a batch whose rows have `lengths` tokens, padded on the left."""
    mask = torch.arange(ids.shape[1]) >= ids.shape[1] - torch.tensor(lengths)[:, None]
    return {"input_ids": ids * mask, "attention_mask": mask.long()}


def fed(
    model: PreTrainedModel, ids: Tensor, mask: Tensor, cache, chunks: tuple[int, ...]
) -> Tensor:
    """Logits of a batch fed in chunks through a cache."""
    logits, end = [], 0
    for chunk in chunks:
        begin, end = end, end + chunk
        step = {"attention_mask": mask[:, :end], "past_key_values": cache, "use_cache": True}
        logits.append(model(ids[:, begin:end], **step).logits)
    assert end == ids.shape[1]
    return torch.cat(logits, 1)
