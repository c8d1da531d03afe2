"""What `mistral-kernels info` tells: versions, what was built, GPUs, and who serves each op."""

from __future__ import annotations

import platform
from importlib import metadata
from typing import Any

import torch

import mistral_kernels
from mistral_kernels import ops
from mistral_kernels.ops import dispatch


def collect() -> dict[str, Any]:
    """Return the facts about this installation and machine.

    Returns:
        A dictionary that json can write:
        versions: package -> version, None if it is not installed;
        built: what the compiled core was built with, None where there is no core;
        instruction_set: which of the core's CPU instruction sets runs here, None without a core;
        cuda: versions of CUDA: torch's runtime, this build's runtime, the driver; None if absent;
        gpus: name, arch ("sm_90") and memory_bytes of each GPU;
        backends: backend -> None if it can run here, else the reason why not;
        ops: op -> device type -> the backend that "auto" takes there, for float32 on the CPU and
        bfloat16 on the first GPU.
    """
    core = dispatch.native_extension()
    core = None if isinstance(core, ImportError) else core
    devices: dict[str, tuple[tuple[int, int] | None, torch.dtype]] = {"cpu": (None, torch.float32)}
    if torch.cuda.is_available():
        devices["cuda"] = (torch.cuda.get_device_capability(0), torch.bfloat16)
    return {
        "versions": {
            "mistral_kernels": mistral_kernels.__version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "triton": version("triton"),
        },
        "built": core and core.build_info(),
        "instruction_set": instruction_set(),
        "cuda": _cuda_versions(core),
        "gpus": [_gpu(index) for index in range(torch.cuda.device_count())],
        "backends": {name: dispatch.unavailable(name) for name in dispatch.BACKENDS},
        "ops": {
            op: {
                device_type: dispatch.choose(
                    op, device_type=device_type, capability=capability, dtype=dtype
                )
                for device_type, (capability, dtype) in devices.items()
            }
            for op in ops.__all__
        },
    }


def instruction_set() -> str | None:
    """Return the instruction set that the `cpu` backend takes here, None without that backend."""
    if dispatch.unavailable("cpu"):
        return None
    return dispatch.native_extension().instruction_sets()[dispatch.instruction_set()]


def version(package: str) -> str | None:
    """Return the version of an installed package, None if it is not installed."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _cuda_versions(core) -> dict[str, str | None]:
    """CUDA writes 13.0 as 13000; 0 is a driver that is not there."""
    driver, runtime = core.cuda_versions() if core and core.build_info()["cuda"] else (0, 0)
    return {
        "torch_runtime": torch.version.cuda,
        "runtime": f"{runtime // 1000}.{runtime % 1000 // 10}" if runtime else None,
        "driver": f"{driver // 1000}.{driver % 1000 // 10}" if driver else None,
    }


def _gpu(index: int) -> dict[str, Any]:
    properties = torch.cuda.get_device_properties(index)
    return {
        "name": properties.name,
        "arch": f"sm_{properties.major}{properties.minor}",
        "memory_bytes": properties.total_memory,
    }
