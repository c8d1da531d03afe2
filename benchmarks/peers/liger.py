"""Liger's Triton kernels; signatures of liger_kernel 0.6.

They are made for training: they also keep what a backward needs, which is timed. Its rope turns
the halves of a head, not pairs, and is no peer of this benchmark's.
"""

from benchmarks.peers import packages

NAME = "liger"
PLACES = (
    "liger_kernel.ops.rms_norm:LigerRMSNormFunction",
    "liger_kernel.ops.fused_add_rms_norm:LigerFusedAddRMSNormFunction",
    "liger_kernel.ops.swiglu:LigerSiLUMulFunction",
)


def missing(device: str) -> str | None:
    return packages.missing("liger_kernel", *PLACES, needs_cuda=True, device=device)


def rms_norm(shape, dtype, device):
    from liger_kernel.ops.rms_norm import LigerRMSNormFunction

    # "llama" rounds the normed value to x's dtype before it meets the weight, as Mistral does;
    # in_place concerns the backward only.
    return lambda x, weight, eps: LigerRMSNormFunction.apply(x, weight, eps, 0.0, "llama", False)


def add_rms_norm(shape, dtype, device):
    from liger_kernel.ops.fused_add_rms_norm import LigerFusedAddRMSNormFunction

    def run(x, residual, weight, eps):
        how = (eps, 0.0, "llama", False)
        return LigerFusedAddRMSNormFunction.apply(x, residual, weight, *how)[0]

    return run


def silu_mul(shape, dtype, device):
    from liger_kernel.ops.swiglu import LigerSiLUMulFunction

    # It takes gate and up apart; it copies them, as halves of rows are not contiguous, so its time
    # holds two copies unless a model keeps them apart. They are split here, outside of its call.
    return lambda gate_up: LigerSiLUMulFunction.apply(*gate_up.chunk(2, -1))
