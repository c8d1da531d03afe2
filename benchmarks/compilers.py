"""Kernels made into machine code by Triton and by nvcc, with no GPU.

A Triton file lists what to compile as `codegen_cases`; a .cu file is compiled whole. Comments in it
say what Triton's cases say in Python, `// codegen: ` and one of

    <kernel> is due <mma | wgmma | cp_async | tma | load_16 | store_16>
    <kernel> takes <bytes> bytes of shared memory at launch
    <kernel> moves <bytes> bytes[, does <n> operations] for <shape>

on one line; with a pattern, as in `rope_kernel<*, true>`, the first two are about instantiations
with such arguments. `wgmma` stands for what other architectures have in its place, too.
"""

import contextlib
import functools
import importlib
import io
import os
import re
import shutil
import tempfile
from fnmatch import fnmatchcase
from pathlib import Path
from types import ModuleType

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, CompiledKernel
from triton.errors import TritonError

from benchmarks.machine_code import ARCHS, Compiled, Row, output, read_code

ROOT = Path(__file__).resolve().parents[1]
TRITON_OPTIONS = ("num_warps", "num_stages", "num_ctas", "maxnreg")


def capability(arch: str) -> tuple[int, int]:
    """(9, 0) for sm_90a."""
    number = int(re.search(r"\d+", arch)[0])
    return number // 10, number % 10


def triton_modules() -> dict[str, ModuleType]:
    """The files of kernels/ that have kernels, by stem; some only hold functions for others."""
    found = {}
    for path in sorted((ROOT / "kernels").glob("*.py")):
        module = triton_module(path.stem)
        if triton_kernels(module):
            found[path.stem] = module
    return found


def triton_module(stem: str) -> ModuleType:
    return importlib.import_module(f"mistral_kernels.kernels.{stem}")


def triton_kernels(module: ModuleType) -> set[str]:
    """The names of a file's own kernels."""
    return {
        name
        for name, value in vars(module).items()
        if isinstance(value, triton.JITFunction)
        and name.endswith("_kernel")
        and value.__module__ == module.__name__
    }


def compile_triton(cases: list[dict], arch: str) -> list[Row]:
    """Compiles some of a kernel file's `codegen_cases` for `arch`."""
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        made, compiled = [], []
        for i, case in enumerate(cases):
            try:
                made.append(_run_triton(case, arch))
            except (TritonError, RuntimeError) as error:
                error.add_note(f"{case['kernel'].__name__}, {case['case']}, for {arch}")
                raise
            said, kernel = made[-1]
            compiled.append(Compiled(said, Path(folder) / f"{i}.cubin"))
            compiled[-1].cubin.write_bytes(kernel.asm["cubin"])
        found = read_code(compiled, arch)
    for case, (_, kernel), fields in zip(cases, made, found, strict=True):
        (fields,) = fields.values()
        fields["shared"] = max(fields["shared"], kernel.metadata.shared)
        fields["tensor_columns"] = getattr(kernel.metadata, "tmem_size", None) or 0
        name, due = case["kernel"].__name__, tuple(case["due"])
        rows.append(Row("Triton", name, case["case"], arch, due=due, **fields))
    return rows


def _run_triton(case: dict, arch: str) -> tuple[str, CompiledKernel]:
    """What ptxas said, and the kernel."""
    kernel, names = case["kernel"], case["kernel"].arg_names
    config = case["constexprs"]
    options = {name: config[name] for name in TRITON_OPTIONS if name in config}
    types = {name: case["signature"].get(name, "constexpr") for name in names}
    constants = {name: config.get(name) for name in names if types[name] == "constexpr"}
    # Models call with sizes, strides and addresses that are multiples of 16, and so Triton
    # compiles for that, unless the kernel says that it is not to look.
    aligned = {
        (param.num,): [["tt.divisibility", 16]]
        for param in kernel.params
        if types[param.name][0] in "*i" and not param.do_not_specialize
    }
    major, minor = capability(arch)
    target = GPUTarget("cuda", major * 10 + minor, 32)
    said, knobs = io.StringIO(), triton.knobs
    # Triton calls the ptxas of its own choice, and tells what it said only of a new compilation.
    with knobs.compilation.scope(), knobs.nvidia.scope(), contextlib.redirect_stdout(said):
        knobs.compilation.always_compile = knobs.nvidia.dump_ptxas_log = True
        compiled = triton.compile(ASTSource(kernel, types, constants, aligned), target, options)
    return said.getvalue(), compiled


def find_nvcc() -> str | None:
    """nvcc as setup.py finds it."""
    if home := os.environ.get("CUDA_HOME"):
        return shutil.which(f"{home}/bin/nvcc")
    return shutil.which("/usr/local/cuda/bin/nvcc") or shutil.which("nvcc")


@functools.cache
def nvcc_archs(nvcc: str) -> tuple[str, ...]:
    """Those of ARCHS that nvcc knows: before 12.8 it has no sm_100a and no sm_120a."""
    known = output(nvcc, "--list-gpu-arch").split()
    return tuple(arch for arch in ARCHS if arch.strip("a").replace("sm", "compute") in known)


def nvcc_version() -> str | None:
    """As nvcc says it: 13.0; None without nvcc."""
    nvcc = find_nvcc()
    return re.search(r"release ([\d.]+)", output(nvcc, "--version"))[1] if nvcc else None


def cuda_files() -> list[Path]:
    return sorted((ROOT / "csrc/cuda").glob("*.cu"))


def cuda_kernels(source: Path) -> set[str]:
    """The names of the kernels that a .cu file defines."""
    bounds = r"(?:__launch_bounds__\([^)]*\)\s*)?"
    return set(re.findall(rf"__global__\s+void\s+{bounds}(\w+)\s*\(", source.read_text()))


def compile_cuda(nvcc: str, source: Path, arch: str) -> list[Row]:
    """Compiles every kernel of a .cu file."""
    flags = ["-O3", "-std=c++17", f"-I{ROOT / 'csrc'}", f"-arch={arch}", "-Xptxas=-v"]
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernels.cubin"
        said = output(nvcc, *flags, "-cubin", source, "-o", cubin)
        (fields,) = read_code([Compiled(said, cubin)], arch)
    names = output("c++filt", *fields).splitlines() if fields else []
    text, rows = source.read_text(), []
    due = re.findall(r"// codegen: (\w+)(?:<(.*)>)? is due (\w+)", text)
    asked = re.findall(r"// codegen: (\w+)(?:<(.*)>)? takes (\d+) bytes of shared memory", text)
    for name, values in zip(names, fields.values(), strict=True):
        name = name.replace("(anonymous namespace)", "")
        kernel, case = re.search(r"(\w+)(?:<(.*?)>)?\(", name).groups("")

        def meant(owner: str, pattern: str, kernel=kernel, case=case) -> bool:
            return owner == kernel and fnmatchcase(case, pattern or "*")

        wanted = tuple(instruction for *whose, instruction in due if meant(*whose))
        values["shared"] += sum(int(size) for *whose, size in asked if meant(*whose))
        rows.append(Row("CUDA", kernel, case, arch, due=wanted, **values))
    return rows
