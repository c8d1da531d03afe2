"""What a launcher asks of the GPU before it chooses tiles and a grid."""

import functools

import torch

_SHARED_KB = {(8, 0): 163, (8, 7): 163, (9, 0): 227, (10, 0): 227, (10, 3): 227}


def shared_bytes(arch: tuple[int, int]) -> int:
    """Shared memory that a block can have; 99 KB where a compute capability is not listed."""
    return _SHARED_KB.get(arch, 99) << 10


@functools.cache
def processor(device: torch.device) -> tuple[tuple[int, int], int]:
    """Compute capability and multiprocessors; for the interpreter, on CPU tensors, an A100's."""
    if device.type != "cuda":
        return (8, 0), 108
    properties = torch.cuda.get_device_properties(device)
    return (properties.major, properties.minor), properties.multi_processor_count
