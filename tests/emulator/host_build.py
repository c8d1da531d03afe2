"""Builds the shipped .cu files for the host: g++ instead of nvcc, fibers instead of a GPU."""

import atexit
import contextlib
import fcntl
import hashlib
import importlib.machinery
import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from types import ModuleType

import pybind11
from emulator.kernels import declared_kernels, launched_kernels

EMULATOR = Path(__file__).parent
CSRC = EMULATOR.parent.parent / "csrc"
BINDINGS = CSRC / "bindings.cpp"
# What is built is kept, and shared with the other processes of a test run.
BUILD = EMULATOR.parent.parent / "build" / "emulator"
PLANTED = BUILD / "planted"  # sources with faults (planted_faults.py)
FLAGS = "-std=c++17 -fPIC -fvisibility=hidden -fno-strict-aliasing".split()
FLAGS += "-Wall -Wno-attributes -Wno-unknown-pragmas".split()
# The assembler does not like the type of the sections of __shared__ variables in templates.
FLAGS += ["-Wa,--no-warn"]
# Whatever reads or writes where it should not ends the process. Checks by calls compile in half the
# time of checks in place.
SANITIZERS = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
SANITIZED = [*SANITIZERS, "-g1", "-O1", "--param", "asan-instrumentation-with-call-threshold=0"]
# For the run under sanitizers: the library to load, the file for the names of kernels that ran.
CORE_VARIABLE = "MISTRAL_KERNELS_EMULATED_CORE"
LAUNCHED_VARIABLE = "MISTRAL_KERNELS_EMULATED_KERNELS"


def toolkit_include() -> Path | None:
    """The folder of the CUDA toolkit's headers (types, bf16 and fp16), or None."""
    include = Path(os.environ.get("CUDA_HOME", "/usr/local/cuda"), "include")
    return include if (include / "cuda_fp16.h").is_file() else None


def missing() -> str | None:
    """Why nothing can be built here, or None."""
    if not shutil.which("g++"):
        return "g++ is not installed"
    return None if toolkit_include() else "the headers of a CUDA toolkit are not installed"


@cache
def headers(*folders: Path) -> bytes:
    """All that a source might include from these folders."""
    files = (path for folder in folders for path in folder.rglob("*.*h"))
    return b"".join(path.read_bytes() for path in sorted(files))


def once(folder: Path, kind: str, command: list, content: bytes) -> Path:
    """Runs `command -o FILE` unless that was done before with the same command and content, here
    or by another process; returns the file."""
    digest = hashlib.sha256(repr([*map(str, command)]).encode() + content).hexdigest()[:20]
    target = BUILD / folder / f"{digest}{kind}"
    target.parent.mkdir(parents=True, exist_ok=True)
    with target.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if target.exists():
            target.touch()
        else:
            unfinished = target.with_suffix(".part")
            subprocess.run([*command, "-o", unfinished], check=True)
            unfinished.rename(target)
    return target


def remove_unused(days: int = 7) -> None:
    """Removes what nothing was built from for so many days."""
    oldest = time.time() - days * 24 * 3600
    for path in BUILD.rglob("*"):
        # Another process may do the same.
        with contextlib.suppress(FileNotFoundError):
            if path.is_file() and path.stat().st_mtime < oldest:
                path.unlink()


def flags(folders: list[Path], level: list[str]) -> list:
    """g++ as everything is compiled, apart from what is compiled."""
    others = [pybind11.get_include(), sysconfig.get_path("include"), toolkit_include()]
    command = ["g++", *FLAGS, *level]
    command += [f"-I{path}" for path in folders] + [f"-isystem{path}" for path in others]
    return [*command, '-DMISTRAL_KERNELS_CUDA="emulator"', "-DMISTRAL_KERNELS_PATHS(...)="]


@cache
def compile_object(source: Path, sanitize: bool) -> Path:
    ours = [EMULATOR / "include", CSRC]
    planted = PLANTED in source.parents
    if source == BINDINGS:  # only passes arguments on: most of the compiler's work, built once
        level = ["-O0"]
    elif sanitize:
        level = SANITIZED
    else:
        level = ["-O0", "-w"] if planted else ["-O2"]
    command = flags([source.parent, *ours] if planted else ours, level)
    if source.suffix == ".cu":
        command += ["-include", compiled_headers(*level)]
    content = source.read_bytes() + headers(EMULATOR, *ours, *([source.parent] * planted))
    return once(Path(source.stem), ".o", [*command, "-x", "c++", "-c", source], content)


@cache
def compiled_headers(*level: str) -> Path:
    """What to include first: the headers of every .cu file, which take longer than most of these,
    read and kept by the compiler."""
    header = EMULATOR / "include" / "every_kernel.h"
    command = [*flags([EMULATOR / "include"], level), "-x", "c++-header", header]
    content = header.read_bytes() + headers(EMULATOR)
    return once(Path("headers"), ".h.gch", command, content).with_suffix("")


@cache
def build(name: str, *sources: Path, sanitize: bool = False) -> Path:
    """Compiles `sources` and the emulator into the Python extension `name`; returns its file."""
    sources = (*sources, *sorted(EMULATOR.glob("*.cpp")))
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(compile_object, sources, [sanitize] * len(sources)))
    script = EMULATOR / "shared_memory.ld"
    command = ["g++", *(SANITIZERS if sanitize else []), "-shared", *objects, f"-Wl,-T,{script}"]
    # The file's name only has to end as an extension's does; `load` says the module's.
    return once(Path(name), ".so", command, script.read_bytes())


def build_core(*, sanitize: bool = False, planted: Path | None = None) -> Path:
    """Builds csrc/ as setup.py does, without the CPU kernels; `planted` replaces the source of its
    name."""
    remove_unused()
    sources = sorted(CSRC.rglob("*.cu"))
    if planted:
        # First: of a header's template that two sources have, the linker keeps the first.
        sources = [planted, *(path for path in sources if path.name != planted.name)]
    return build("_C", BINDINGS, *sources, sanitize=sanitize)


@cache
def emulated_core() -> ModuleType:
    """The extension `_C` whose CUDA kernels take CPU pointers, device 0 and stream 0."""
    library = Path(os.environ.get(CORE_VARIABLE) or build_core())
    if names := os.environ.get(LAUNCHED_VARIABLE):
        atexit.register(lambda: Path(names).write_text("\n".join(launched_kernels(library))))
    return load("_C", library)


def load(name: str, path: Path) -> ModuleType:
    """Imports the extension `name` from its file, beside others of that name: pybind11 would return
    the one that was loaded first, so each gets a package of its own."""
    loader = importlib.machinery.ExtensionFileLoader(f"{path.stem}.{name}", str(path))
    module = importlib.util.module_from_spec(importlib.util.spec_from_loader(loader.name, loader))
    loader.exec_module(module)
    return module


def run_sanitized(command: list[str], **environment: str) -> subprocess.CompletedProcess:
    """Runs `command` with AddressSanitizer loaded, since Python is not built with it."""
    libraries = [
        subprocess.run(
            ["g++", f"-print-file-name={name}"], capture_output=True, text=True, check=True
        ).stdout.strip()
        for name in ("libasan.so", "libstdc++.so")
    ]
    environment |= {
        "LD_PRELOAD": " ".join(libraries),
        "ASAN_OPTIONS": "detect_leaks=0",  # the interpreter's own
        "UBSAN_OPTIONS": "print_stacktrace=1",
    }
    return subprocess.run(
        command, env=os.environ | environment, capture_output=True, text=True, timeout=1500
    )


def run_tests_sanitized(test_files: list[Path]) -> None:
    """Runs test files of emulated kernels under both sanitizers, and checks that every kernel of
    csrc/ ran there. Other orders and other numbers touch the same memory: they are left out."""
    chosen = ["-k", "not order_of_threads and not every_code"]
    command = [sys.executable, "-m", "pytest", "-q", "-x", *chosen, *map(str, test_files)]
    with tempfile.NamedTemporaryFile("r") as names:
        environment = {CORE_VARIABLE: str(build_core(sanitize=True)), LAUNCHED_VARIABLE: names.name}
        result = run_sanitized(command, **environment, OMP_NUM_THREADS="1")
        assert result.returncode == 0, result.stdout + result.stderr
        declared = set().union(*(declared_kernels(path) for path in CSRC.rglob("*.cu")))
        missed = declared - set(names.read().split())
    assert not missed, f"kernels that no test launches: {missed}"
