"""Weights stored in 8 bits with a scale beside them: `weight = scale * stored`, in float32.

A scale is one number for a matrix, one for each row, or a grid of them for its blocks. Native files
call it `qscale_weight`, Hugging Face ones `weight_scale_inv` (which is not inverted). The scales of
activations beside them serve matrices that multiply in 8 bits, which the model does not.

Source: `Fp8Dequantize` in transformers 5.23; the native names are those that vLLM's
transformers_utils/configs/mistral.py and models/llama.py map to them.
"""

import re

import torch
from torch import Tensor

WEIGHT_SCALE = re.compile(r"(.+\.)(qscale_weight|weight_scale_inv)")
ACTIVATION_SCALE = re.compile(r".+\.(qscale_act|activation_scale)")
DTYPE = "F8_E4M3"  # as safetensors names it
CHUNK = 1 << 20  # elements dequantised at a time, 4 MiB of float32: the rest of a matrix waits


def scale_grid(shape: tuple[int, ...], weight: tuple[int, ...]) -> tuple[int, int] | None:
    """How many scales a matrix has along its rows and columns.

    Args:
        shape: of the scale: (), (1,), (rows,) or (row blocks, column blocks).
        weight: of the matrix.

    Returns:
        (row blocks, column blocks); None if the scale does not fit the matrix.
    """
    grid = {0: (1, 1), 1: (*shape, 1), 2: shape}.get(len(shape))
    if grid is None or len(weight) != 2 or 0 in grid:
        return None
    return None if weight[0] % grid[0] or weight[1] % grid[1] else grid


@torch.no_grad()
def dequantise_(target: Tensor, stored: Tensor, scale: Tensor) -> None:
    """Writes `scale * stored` to `target`, computed in float32 and rounded once.

    Args:
        target: (rows, columns), any floating dtype and device.
        stored: (rows, columns) float8_e4m3fn.
        scale: any floating dtype, of a shape for which there is a `scale_grid`.
    """
    row_blocks, column_blocks = scale_grid(scale.shape, stored.shape)
    scale = scale.to(target.device, torch.float32).view(row_blocks, column_blocks)
    by_row = scale.repeat_interleave(len(stored) // row_blocks, 0)[:, :, None]
    count = max(1, CHUNK // stored.shape[1])
    for start in range(0, len(stored), count):
        rows = slice(start, start + count)
        values = stored[rows].to(target.device).float()
        blocks = values.view(len(values), column_blocks, -1)
        target[rows] = (blocks * by_row[rows]).view(values.shape)
