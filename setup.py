"""Builds mistral_kernels._C with ninja: a C++ compiler for the core, nvcc for CUDA, never torch.

Environment: CXX (one that does not exist: pure Python), CXXFLAGS (after our own), CUDA_HOME,
MISTRAL_KERNELS_CUDA=0 (no CUDA code), TORCH_CUDA_ARCH_LIST, MAX_JOBS.
"""

import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pybind11
from ninja.ninja_syntax import Writer, escape
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError, OptionError

DEFAULT_ARCHS = "8.0+PTX;9.0a"  # A100; H100 and H200; anything newer through the PTX
OLDEST_CUDA = (12, 4)
# Each file of csrc/cpu is compiled once for each of these; csrc/launchers.h lists the same names.
AVX2 = ["-mavx2", "-mfma", "-mf16c"]
AVX512 = [*AVX2, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl"]
PATH_MACRO = "MISTRAL_KERNELS_PATH"
INSTRUCTION_SETS = {"portable": []}
if platform.machine() == "x86_64":
    INSTRUCTION_SETS |= {
        "avx2": AVX2,
        "avx512": AVX512,
        "avx512_bf16": [*AVX512, "-mavx512bf16"],
    }
WAY_OUT = "MISTRAL_KERNELS_CUDA=0 installs without CUDA code, CXX=none without any compiled code."


def find_cxx() -> list[str] | None:
    """The C++ compiler as a command, or None where there is none."""
    named = os.environ.get("CXX")
    commands = [shlex.split(named)] if named else [["g++"], ["c++"]]
    return next((command for command in commands if shutil.which(command[0])), None)


def openmp_flag(cxx: list[str]) -> str:
    """Threads come from torch's libgomp, which serves g++ but not clang: one thread then."""
    version = subprocess.run([*cxx, "--version"], capture_output=True, text=True)
    return "-fopenmp-simd" if "clang" in version.stdout else "-fopenmp"


def find_nvcc() -> str | None:
    """nvcc, or None. A CUDA_HOME that is set is the only place looked at: another toolkit than the
    one asked for would be worse than none."""
    if os.environ.get("MISTRAL_KERNELS_CUDA") == "0":
        return None
    if home := os.environ.get("CUDA_HOME"):
        return shutil.which(f"{home}/bin/nvcc")
    return shutil.which("/usr/local/cuda/bin/nvcc") or shutil.which("nvcc")


def first_error(lines: list[str]) -> str:
    """The line to show of what a compiler said."""
    errors = [line for line in lines if re.search(r"\b(error|fatal)\b", line, re.I)]
    return (errors or lines or ["it said nothing"])[0]


def check_nvcc(nvcc: str) -> None:
    """Raises CompileError for an nvcc that does not run or is too old."""
    run = subprocess.run([nvcc, "--version"], capture_output=True, text=True)
    release = re.search(r"release (\d+)\.(\d+)", run.stdout)
    if run.returncode or not release:
        said = first_error((run.stderr + run.stdout).splitlines())
        raise CompileError(f"{nvcc} --version failed: {said}\n{WAY_OUT}")
    if tuple(map(int, release.groups())) < OLDEST_CUDA:
        raise CompileError(f"{nvcc} is {release[0]}, older than 12.4.\n{WAY_OUT}")


def gencode_flags(archs: str) -> list[str]:
    """nvcc flags for a TORCH_CUDA_ARCH_LIST such as `8.0+PTX;9.0a`."""
    flags = []
    for arch in re.split(r"[;\s]+", archs.strip("; ")):
        match = re.fullmatch(r"(\d+)\.(\d+[af]?)(\+PTX)?", arch)
        if not match:
            raise OptionError(f"TORCH_CUDA_ARCH_LIST: expected e.g. {DEFAULT_ARCHS}, got {archs!r}")
        number = match[1] + match[2]
        codes = f"sm_{number},compute_{number}" if match[3] else f"sm_{number}"
        flags.append(f"-gencode=arch=compute_{number},code=[{codes}]")
    return flags


class NinjaBuild(build_ext):
    """Writes build.ninja for csrc/ and runs it."""

    def build_extension(self, ext: Extension) -> None:
        cxx, nvcc = find_cxx(), find_nvcc()
        archs = os.environ.get("TORCH_CUDA_ARCH_LIST") or DEFAULT_ARCHS
        target = Path(self.get_ext_fullpath(ext.name))
        target.parent.mkdir(parents=True, exist_ok=True)
        build_file = Path(self.build_temp, "build.ninja")
        build_file.parent.mkdir(parents=True, exist_ok=True)
        if nvcc:
            check_nvcc(nvcc)
        with build_file.open("w") as file:
            self.write_rules(Writer(file), target, cxx, nvcc, archs)
        self.run_ninja(build_file)
        cuda = f"CUDA for {archs} by {nvcc}" if nvcc else "no CUDA code"
        print(f"\n*** mistral_kernels: built C++ by {shlex.join(cxx)}; {cuda} ***\n", flush=True)

    def write_rules(self, ninja: Writer, target: Path, cxx: list, nvcc: str | None, archs: str):
        # Only torch's OpenMP runtime may be in the process, so libgomp is not linked: its symbols
        # resolve to the one that torch has loaded.
        flags = [
            "-O3",
            "-std=c++17",
            "-Wall",
            "-Wextra",
            "-fPIC",
            "-fvisibility=hidden",
            openmp_flag(cxx),
        ]
        # Nobody reads floating-point exceptions or errno; keeping them would block SIMD code.
        flags += ["-fno-trapping-math", "-fno-math-errno"]
        # Vectors never cross a library's border, where their ABI would matter; and GCC 12 sees
        # uninitialised variables inside its own vector headers.
        flags += ["-Wno-psabi", "-Wno-maybe-uninitialized"]
        flags += shlex.split(os.environ.get("CXXFLAGS", ""))
        includes = ["-Icsrc", f"-I{sysconfig.get_path('include')}", f"-I{pybind11.get_include()}"]
        defines = [f'-DMISTRAL_KERNELS_CUDA="{archs}"'] if nvcc else []
        link = [*cxx, "-shared"]
        depfile = ["-MMD", "-MF"]
        ninja.variable("builddir", self.build_temp)
        ninja.rule(
            "cxx",
            escape(shlex.join([*cxx, *flags, *includes, *defines, *depfile]))
            + " $out.d $path -c $in -o $out",
            depfile="$out.d",
            deps="gcc",
        )
        if nvcc:
            # nvcc's host compiler must be the one that compiles the rest.
            host = [f"-ccbin={cxx[0]}"] if len(cxx) == 1 else []
            cuda_flags = [
                "-O3",
                "-std=c++17",
                "-Xcompiler=-Wall,-fPIC,-fvisibility=hidden",
                "-Icsrc",
            ]
            command = [nvcc, *host, *cuda_flags, *gencode_flags(archs), *depfile]
            link = [nvcc, *host, "-shared", "-cudart=static"]
            ninja.rule(
                "nvcc",
                escape(shlex.join(command)) + " $out.d -c $in -o $out",
                depfile="$out.d",
                deps="gcc",
            )
        ninja.rule("link", escape(shlex.join(link)) + " $in -o $out")

        objects = []

        def compile(rule: str, source: Path, suffix: str = "", flags: str = "") -> None:
            out = f"{self.build_temp}/{source}{suffix}.o"
            objects.extend(ninja.build(out, rule, str(source), variables={"path": flags}))

        for source in sorted(Path("csrc").glob("*.cpp")):
            compile("cxx", source)
        for source in sorted(Path("csrc/cpu").glob("*.cpp")):
            for name, extra in INSTRUCTION_SETS.items():
                compile("cxx", source, f".{name}", shlex.join([*extra, f"-D{PATH_MACRO}={name}"]))
        for source in sorted(Path("csrc").rglob("*.cu")) if nvcc else ():
            compile("nvcc", source)
        ninja.build(str(target), "link", objects)

    def run_ninja(self, build_file: Path) -> None:
        command = [sys.executable, "-m", "ninja", "-f", str(build_file)]
        if jobs := os.environ.get("MAX_JOBS"):
            command += ["-j", jobs]
        run = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        print(run.stdout, flush=True)
        if run.returncode:
            # After ninja's FAILED line and the command come the compiler's own words.
            said = run.stdout.partition("FAILED: ")[2].splitlines()[2:]
            raise CompileError(f"the compiler failed: {first_error(said)}\n{WAY_OUT}")


missing = "no C++ compiler" if sys.platform == "linux" else f"no compiled core for {sys.platform}"
compiled = sys.platform == "linux" and find_cxx() is not None
if not compiled:
    print(f"\n*** mistral_kernels: {missing}, so pure Python only ***\n", flush=True)
setup(
    ext_modules=[Extension("mistral_kernels._C", sources=[])] if compiled else [],
    cmdclass={"build_ext": NinjaBuild},
)
