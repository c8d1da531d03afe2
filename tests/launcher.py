"""How C++ and CUDA launchers are called: raw pointers, sizes, strides."""

from collections.abc import Callable

from torch import Tensor

from mistral_kernels.ops.dispatch import KERNEL_DTYPES


def launch_rms_norm(
    launch: Callable,
    x: Tensor,
    weight: Tensor,
    residual: Tensor | None,
    normed: Tensor,
    summed: Tensor,
    eps: float,
    *queue: int,
) -> None:
    """Runs a launcher on 2-D tensors; `queue` is what comes last, see csrc/bindings.cpp."""
    launch(
        x.data_ptr(),
        0 if residual is None else residual.data_ptr(),
        weight.data_ptr(),
        normed.data_ptr(),
        0 if residual is None else summed.data_ptr(),
        *x.shape,
        x.stride(0),
        0 if residual is None else residual.stride(0),
        eps,
        KERNEL_DTYPES.index(x.dtype),
        *queue,
    )
