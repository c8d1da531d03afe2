"""The accelerated torch ops; `import mistral_kernels.ops` needs only torch.

Each function checks its arguments and calls the registered op `torch.ops.mistral_kernels.<name>`.
"""

from mistral_kernels.ops.decode_attention import decode_attention
from mistral_kernels.ops.expert_mlp import expert_mlp
from mistral_kernels.ops.expert_mlp_low_bit import expert_mlp_low_bit
from mistral_kernels.ops.linear import linear
from mistral_kernels.ops.linear_low_bit import linear_low_bit
from mistral_kernels.ops.prefill_attention import prefill_attention
from mistral_kernels.ops.rms_norm import add_rms_norm, rms_norm
from mistral_kernels.ops.rope import rope, rope_
from mistral_kernels.ops.route_experts import route_experts
from mistral_kernels.ops.silu_mul import silu_mul
from mistral_kernels.ops.store_kv import store_kv_

__all__ = [
    "add_rms_norm",
    "decode_attention",
    "expert_mlp",
    "expert_mlp_low_bit",
    "linear",
    "linear_low_bit",
    "prefill_attention",
    "rms_norm",
    "rope",
    "rope_",
    "route_experts",
    "silu_mul",
    "store_kv_",
]
