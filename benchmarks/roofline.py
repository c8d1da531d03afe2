"""What data sheets allow: the time that bytes and operations of a headline shape take at least.

Predictions, never measurements. A Triton file's `codegen_cases` say the work of their headline
shapes, `"work": {shape: (bytes, operations)}`; a .cu file says it in a comment (compilers.py).
Bytes are those that must pass between memory and the chip once, operations those that count:
masked tiles do not. A launch costs some 2 to 3 us more.
"""

import re
from pathlib import Path
from types import ModuleType
from typing import NamedTuple


class Gpu(NamedTuple):
    """Peaks of a data sheet."""

    bytes_s: float
    flops_s: float  # bf16 by tensor cores, dense


GPUS = {
    "A100": Gpu(2.039e12, 312e12),  # 80 GB, SXM
    "H100": Gpu(3.35e12, 989e12),  # SXM
    "H200": Gpu(4.8e12, 989e12),
}


class Prediction(NamedTuple):
    """The work of one kernel at one shape."""

    language: str
    kernel: str
    shape: str
    bytes: float
    flops: float

    def time_us(self, gpu: str) -> float:
        """The longer one of the two times."""
        return 1e6 * max(self.bytes / GPUS[gpu].bytes_s, self.flops / GPUS[gpu].flops_s)

    def bound_by(self) -> str:
        """ "memory", "matrix units", or on which GPUs it is the latter."""
        matrix = [
            name for name, peak in GPUS.items()
            if self.flops / peak.flops_s > self.bytes / peak.bytes_s
        ]  # fmt: skip
        if len(matrix) in (0, len(GPUS)):
            return "matrix units" if matrix else "memory"
        return f"matrix units on {', '.join(matrix)}"


def triton_predictions(module: ModuleType) -> list[Prediction]:
    """Those of a kernel file; they are the same for every architecture."""
    found = []
    for case in module.codegen_cases((9, 0)):
        for shape, (moved, flops) in case.get("work", {}).items():
            found.append(Prediction("Triton", case["kernel"].__name__, shape, moved, flops))
    return found


def cuda_predictions(source: Path) -> list[Prediction]:
    """Those that the comments of a .cu file make."""
    number = r"([\d.]+(?:e\d+)?)"
    pattern = rf"// codegen: (\w+) moves {number} bytes(?:, does {number} operations)? for (.+)"
    return [
        Prediction("CUDA", kernel, shape, float(moved), float(flops or 0))
        for kernel, moved, flops, shape in re.findall(pattern, source.read_text())
    ]
