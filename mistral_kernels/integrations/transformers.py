"""Switches models of transformers to these kernels; importing this module registers them.

    import mistral_kernels.integrations.transformers
    model = AutoModelForCausalLM.from_pretrained(
        name, attn_implementation="mistral_kernels", experts_implementation="mistral_kernels"
    )

`enable(model)` swaps norms, rotary embeddings, feed-forwards and linear layers too; `RollingCache`
keeps what the windows need.
"""

from __future__ import annotations

try:
    from transformers import AttentionInterface, AttentionMaskInterface, __version__
    from transformers.integrations.moe import ExpertsInterface

    if tuple(map(int, __version__.split(".")[:2])) < (5, 17):
        raise ImportError(f"transformers is {__version__}")
except ImportError as error:
    raise ImportError(
        f"mistral_kernels.integrations.transformers needs transformers >= 5.17 ({error}):"
        " pip install 'mistral_kernels[hf]'"
    ) from error

from mistral_kernels.integrations.attention_plan import NAME
from mistral_kernels.integrations.rolling_cache import RollingCache
from mistral_kernels.integrations.transformers_attention import attention_function, mask_function
from mistral_kernels.integrations.transformers_experts import experts_function
from mistral_kernels.integrations.transformers_parts import disable, enable

__all__ = ["NAME", "RollingCache", "disable", "enable"]

# Both under one name: without a mask function transformers passes no mask at all.
AttentionInterface.register(NAME, attention_function)
AttentionMaskInterface.register(NAME, mask_function)
ExpertsInterface.register(NAME, experts_function)
