"""What the compilers make of every kernel: `python -m benchmarks.codegen`, no GPU needed.

Compiles each Triton kernel with its shipped tile configurations (`codegen_cases` beside
`tile_config`) and each .cu file, for sm_80 and sm_90a, and prints registers, shared memory, stack,
spills and the instructions that matter. Exits with 1 for a spill, too much shared memory, an
instruction that is due but missing, or a kernel that is missing from the table.

A case names the instructions that are `due`; a CUDA kernel does so by comments in its file,
`// codegen: <kernel> is due <instruction>`, for some of its instantiations with a pattern of their
arguments: `// codegen: <kernel><*, true> is due load_16`.
"""

import importlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from types import ModuleType

import triton
from rich.console import Console
from rich.table import Table
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

ROOT = Path(__file__).parent.parent
TRITON_BIN = Path(triton.__file__).parent / "backends/nvidia/bin"
ARCHS = {(8, 0): "sm_80", (9, 0): "sm_90a"}
SHARED_LIMIT = {"sm_80": 163 * 1024, "sm_90a": 227 * 1024}  # bytes a block may take
# The machine instructions behind each name.
INSTRUCTIONS = {
    "mma": r"\b[HIDQ]MMA\b",
    "wgmma": r"\b[HIQ]GMMA\b",
    "cp_async": r"\bLDGSTS\b",
    "tma": r"\b(UTMALDG|UTMASTG|UBLKCP)\b",
    "load_16": r"\bLDG\.\S*128\b",
    "store_16": r"\bSTG\.\S*128\b",
}
TRITON_OPTIONS = ("num_warps", "num_stages", "num_ctas", "maxnreg")


@dataclass(frozen=True)
class Row:
    """One compiled kernel. `shared` includes what is asked for at launch where that is known."""

    language: str
    kernel: str
    case: str
    arch: str
    registers: int
    shared: int
    stack: int
    spills: int  # bytes, stores and loads
    counts: dict[str, int] = field(default_factory=dict)
    due: tuple[str, ...] = ()

    def problems(self) -> list[str]:
        """What is wrong with the kernel, as short sentences."""
        found = []
        if self.spills:
            found.append(f"spills {self.spills} bytes")
        if self.shared > SHARED_LIMIT[self.arch]:
            found.append(f"takes {self.shared} bytes of shared memory")
        found += [f"has no {name}" for name in self.due if not self.counts.get(name)]
        return found


def read_cubin(said: str, cubin: Path) -> dict[str, dict]:
    """Row fields of every kernel, by symbol, from the words of `ptxas -v` and the machine code."""
    rows = {}
    for part in said.split("Compiling entry function '")[1:]:

        def total(pattern: str, part: str = part) -> int:
            return sum(map(int, re.findall(pattern, part)))

        rows[part.partition("'")[0]] = {
            "registers": total(r"Used (\d+) registers"),
            "shared": total(r"(\d+) bytes smem"),
            "stack": total(r"(\d+) bytes stack frame"),
            "spills": total(r"(\d+) bytes spill"),
        }
    sass = output(TRITON_BIN / "cuobjdump", "-sass", cubin) if rows else ""
    for section in sass.split("Function : ")[1:]:
        counts = {name: len(re.findall(regex, section)) for name, regex in INSTRUCTIONS.items()}
        rows[section.split()[0]]["counts"] = counts
    return rows


def output(*command: str | Path) -> str:
    """What a program prints on both streams; raises CalledProcessError if it fails."""
    run = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=True)
    return run.stdout.decode()


def compile_triton(case: dict, arch: tuple[int, int], folder: Path) -> Row:
    """Compiles one of a kernel file's `codegen_cases`."""
    kernel, names = case["kernel"], case["kernel"].arg_names
    config = case["constexprs"]
    options = {name: config[name] for name in TRITON_OPTIONS if name in config}
    types = {name: case["signature"].get(name, "constexpr") for name in names}
    constants = {name: config.get(name) for name in names if types[name] == "constexpr"}
    # Models call with sizes, strides and addresses that are multiples of 16, and so Triton
    # compiles for that.
    aligned = {
        (index,): [["tt.divisibility", 16]]
        for index, name in enumerate(names)
        if types[name][0] in "*i"
    }
    target = GPUTarget("cuda", arch[0] * 10 + arch[1], 32)
    compiled = triton.compile(ASTSource(kernel, types, constants, aligned), target, options)
    ptx, cubin = folder / "kernel.ptx", folder / "kernel.cubin"
    ptx.write_text(compiled.asm["ptx"])
    said = output(TRITON_BIN / "ptxas", "-v", f"-arch={ARCHS[arch]}", ptx, "-o", cubin)
    (fields,) = read_cubin(said, cubin).values()
    fields["shared"] = max(fields["shared"], compiled.metadata.shared)
    return Row(
        "Triton", kernel.__name__, case["case"], ARCHS[arch], due=tuple(case["due"]), **fields
    )


def compile_cuda(nvcc: str, source: Path, arch: str, folder: Path) -> list[Row]:
    """Compiles every kernel of a .cu file."""
    cubin = folder / f"{source.stem}-{arch}.cubin"
    flags = ["-O3", "-std=c++17", f"-I{ROOT / 'csrc'}", f"-arch={arch}", "-Xptxas=-v"]
    fields = read_cubin(output(nvcc, *flags, "-cubin", source, "-o", cubin), cubin)
    names = output("c++filt", *fields).splitlines() if fields else []
    due = re.findall(r"// codegen: (\w+)(?:<(.*)>)? is due (\w+)", source.read_text())
    rows = []
    for name, values in zip(names, fields.values(), strict=True):
        kernel, case = re.search(
            r"(\w+)(?:<(.*?)>)?\(", name.replace("(anonymous namespace)", "")
        ).groups()
        wanted = tuple(
            instruction
            for owner, pattern, instruction in due
            if owner == kernel and fnmatchcase(case or "", pattern or "*")
        )
        rows.append(Row("CUDA", kernel, case or "", arch, due=wanted, **values))
    return rows


def find_nvcc() -> str | None:
    """nvcc as setup.py finds it."""
    if home := os.environ.get("CUDA_HOME"):
        return shutil.which(f"{home}/bin/nvcc")
    return shutil.which("/usr/local/cuda/bin/nvcc") or shutil.which("nvcc")


def triton_rows(module: ModuleType, folder: Path) -> tuple[list[Row], set[str]]:
    """The rows of a kernel file, and the kernels in it that its cases leave out.

    A file that holds only functions for other files' kernels has neither.
    """
    declared = {
        name
        for name, value in vars(module).items()
        if isinstance(value, triton.JITFunction) and name.endswith("_kernel")
    }
    if not declared:
        return [], set()
    rows = [
        compile_triton(case, arch, folder) for arch in ARCHS for case in module.codegen_cases(arch)
    ]
    return rows, declared - {row.kernel for row in rows}


def cuda_rows(nvcc: str, source: Path, folder: Path) -> tuple[list[Row], set[str]]:
    """The rows of a .cu file, and the kernels in it that were compiled for nothing: templates
    that are never instantiated."""
    bounds = r"(?:__launch_bounds__\([^)]*\)\s*)?"
    declared = set(re.findall(rf"__global__\s+void\s+{bounds}(\w+)\s*\(", source.read_text()))
    rows = [row for arch in ARCHS.values() for row in compile_cuda(nvcc, source, arch, folder)]
    return rows, declared - {row.kernel for row in rows}


def print_table(rows: list[Row]) -> None:
    table = Table("language", "kernel", "case", "arch", box=None)
    for column in ("registers", "shared", "stack", "spills", *INSTRUCTIONS):
        table.add_column(column, justify="right")
    table.add_column("problem", style="red")
    for row in rows:
        numbers = [row.registers, row.shared, row.stack, row.spills, *row.counts.values()]
        problem = "; ".join(row.problems())
        table.add_row(row.language, row.kernel, row.case, row.arch, *map(str, numbers), problem)
    Console(width=160).print(table)


def main() -> int:
    rows, left_out = [], set()
    nvcc = find_nvcc()
    with tempfile.TemporaryDirectory() as name:
        for path in sorted((ROOT / "kernels").glob("*.py")):
            module = importlib.import_module(f"mistral_kernels.kernels.{path.stem}")
            new = triton_rows(module, Path(name))
            rows, left_out = rows + new[0], left_out | new[1]
        for path in sorted((ROOT / "csrc/cuda").glob("*.cu")) if nvcc else []:
            new = cuda_rows(nvcc, path, Path(name))
            rows, left_out = rows + new[0], left_out | new[1]
    print_table(rows)
    if not nvcc:
        print("nvcc was not found: the .cu files are not in the table")
    for kernel in sorted(left_out):
        print(f"{kernel}: not in the table")
    return 1 if left_out or any(row.problems() for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
