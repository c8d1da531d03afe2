"""Every way to install the package, each in a virtual environment of its own.

The environments see this interpreter's packages through a .pth file, so torch is not installed
again; the package is built with pip's build isolation, as users build it. A package named `kernels`
stands in each for Hugging Face's, which the folder kernels/ of this repository must not hide.
The forms share what the C++ compiler made of a file, most of the time a build takes.
"""

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
import triton

ROOT = Path(__file__).parent.parent
NO_CUDA = {"MISTRAL_KERNELS_CUDA": "0"}
# Settings of the developer's shell that would change a build.
SETTINGS = (
    "CXX",
    "CXXFLAGS",
    "CUDA_HOME",
    "MISTRAL_KERNELS_CUDA",
    "TORCH_CUDA_ARCH_LIST",
    "PYTHONPATH",
)
HAS_NVCC = bool(shutil.which("/usr/local/cuda/bin/nvcc") or shutil.which("nvcc"))
needs_nvcc = pytest.mark.skipif(not HAS_NVCC, reason="nvcc is not installed")


# g++ for CXX: copies what it made before of the same file with the same macros and instruction set.
CACHING_CXX = """
import shutil, subprocess, sys
from pathlib import Path

kept, arguments = Path(sys.argv[1]), sys.argv[2:]
if "-c" in arguments:
    source, out = (arguments[arguments.index(option) + 1] for option in ("-c", "-o"))
    options = [word for word in arguments if word.startswith(("-m", "-D"))]
    made = kept / " ".join([source, *options]).replace("/", ":")
    if not made.exists():
        subprocess.run(["g++", *arguments], check=True)
        shutil.copy(out + ".d", f"{made}.d")
        shutil.copy(out, made)
    else:
        shutil.copy(f"{made}.d", out + ".d")
        shutil.copy(made, out)
else:
    sys.exit(subprocess.run(["g++", *arguments]).returncode)
"""


@pytest.fixture(scope="module")
def cxx(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("cxx")
    (folder / "cxx.py").write_text(CACHING_CXX)
    return f"{sys.executable} {folder / 'cxx.py'} {folder}"


class Environment:
    """A virtual environment with a `kernels` package in it; `cxx` is its C++ compiler."""

    def __init__(self, folder: Path, cxx: str) -> None:
        self.cxx = cxx
        subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
        self.bin = folder / "bin"
        packages = Path(sysconfig.get_path("purelib", vars={"base": str(folder)}))
        (packages / "parent.pth").write_text(sysconfig.get_path("purelib") + "\n")
        (packages / "kernels").mkdir()
        (packages / "kernels/__init__.py").write_text('OWNER = "Hugging Face"\n')

    def python(self, *arguments, cwd: Path, **settings: str) -> subprocess.CompletedProcess:
        """Runs Python in `cwd` with `settings` for environment variables."""
        variables = {name: value for name, value in os.environ.items() if name not in SETTINGS}
        # What is built is imported, not timed: compile quickly.
        variables |= {"CXXFLAGS": "-O0", "CXX": self.cxx}
        command = [self.bin / "python", *arguments]
        return subprocess.run(
            command,
            cwd=cwd,
            env=variables | settings,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=600,
        )

    def install(self, *what, cwd: Path, **settings: str) -> subprocess.CompletedProcess:
        command = ["-m", "pip", "install", "-v", "--no-deps", "--ignore-installed", *what]
        return self.python(*command, cwd=cwd, **settings)


@pytest.fixture(scope="module")
def repository(tmp_path_factory) -> Path:
    """A copy of the working tree without what was built in it."""
    copy = tmp_path_factory.mktemp("checkout") / "repository"
    ignored = shutil.ignore_patterns(".*", "build", "dist", "*.so", "*.egg-info", "__pycache__")
    shutil.copytree(ROOT, copy, symlinks=True, ignore=ignored)
    return copy


@pytest.fixture
def environment(tmp_path, cxx) -> Environment:
    return Environment(tmp_path / "venv", cxx)


def imports(environment: Environment, cwd: Path) -> str:
    """Checks that both packages named `kernels` are themselves for a Python started in `cwd`;
    returns the CUDA architectures in `_C`, or "pure Python"."""
    code = """
import importlib.util, kernels, mistral_kernels.kernels.rms_norm as ours
assert kernels.OWNER == "Hugging Face", kernels
assert ours.rms_norm_kernel
if importlib.util.find_spec("mistral_kernels._C"):
    from mistral_kernels import _C
    print(_C.build_info()["cuda_archs"])
else:
    print("pure Python")
"""
    result = environment.python("-c", code, cwd=cwd)
    assert result.returncode == 0, result.stdout
    return result.stdout.strip()


def check(environment: Environment, installed, repository: Path, cwd: Path, core: str) -> None:
    """The install succeeded, with `core` as its compiled part, and imports are right."""
    assert installed.returncode == 0, installed.stdout
    assert imports(environment, cwd) == core
    imports(environment, repository)
    assert (environment.bin / "mistral-kernels").is_file()


def test_pip_install_without_nvcc(environment, repository, tmp_path):
    installed = environment.install(repository, cwd=tmp_path, CUDA_HOME="/nowhere")
    check(environment, installed, repository, tmp_path, core="None")
    assert "built C++" in installed.stdout and "no CUDA code" in installed.stdout


def test_editable(environment, repository, tmp_path):
    installed = environment.install("-e", repository, cwd=tmp_path, **NO_CUDA)
    check(environment, installed, repository, tmp_path, core="None")
    where = "import mistral_kernels; print(mistral_kernels.__file__)"
    assert str(repository) in environment.python("-c", where, cwd=tmp_path).stdout


def test_sdist_and_wheel(environment, repository, tmp_path):
    code = "import sys; from setuptools import build_meta; build_meta.build_sdist(sys.argv[1])"
    made = environment.python("-c", code, tmp_path, cwd=repository)
    assert made.returncode == 0, made.stdout
    (archive,) = tmp_path.glob("*.tar.gz")
    command = ["-m", "pip", "wheel", "--no-deps", "-w", tmp_path, archive]
    made = environment.python(*command, cwd=tmp_path, **NO_CUDA)
    assert made.returncode == 0, made.stdout
    installed = environment.install(*tmp_path.glob("*.whl"), cwd=tmp_path)
    check(environment, installed, repository, tmp_path, core="None")


def test_no_compiler(environment, repository, tmp_path):
    installed = environment.install(repository, cwd=tmp_path, PATH=str(environment.bin), CXX="")
    check(environment, installed, repository, tmp_path, core="pure Python")
    assert "no C++ compiler" in installed.stdout


@needs_nvcc
def test_cuda_without_a_gpu():
    """Of the installed core: nvcc takes too long to build it a second time here."""
    from mistral_kernels import _C

    archs = _C.build_info()["cuda_archs"]
    assert archs == "8.0+PTX;9.0a", "install with nvcc and its default architectures"
    cuobjdump = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    command = [cuobjdump, "-lelf", "-lptx", _C.__file__]
    listing = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    for code in ("sm_80.cubin", "sm_90a.cubin", "sm_80.ptx"):
        assert code in listing


def failing(path: Path, message: str) -> Path:
    """A program that complains and fails."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(
        f'#!/bin/sh\necho "In file included from x.h:" >&2\necho "{message}" >&2\nexit 1\n'
    )
    path.chmod(0o755)
    return path


def check_refused(installed: subprocess.CompletedProcess, *texts: str) -> None:
    assert installed.returncode != 0, "a compiler that fails must not be taken for an absent one"
    for text in texts:
        assert text in installed.stdout, installed.stdout


def test_failing_cxx(environment, repository, tmp_path):
    cxx = failing(tmp_path / "c++", "rms_norm.cpp:1:1: error: out of coffee")
    installed = environment.install(repository, cwd=tmp_path, CXX=str(cxx), **NO_CUDA)
    words = "the compiler failed: rms_norm.cpp:1:1: error: out of coffee"
    check_refused(installed, words, "CXX=none without any compiled code")


def test_failing_nvcc(environment, repository, tmp_path):
    failing(tmp_path / "cuda/bin/nvcc", "nvcc fatal: no licence")
    settings = {"CUDA_HOME": str(tmp_path / "cuda")}
    built = environment.python("setup.py", "build_ext", cwd=repository, **settings)
    words = "nvcc --version failed: nvcc fatal: no licence"
    check_refused(built, words, "MISTRAL_KERNELS_CUDA=0 installs without CUDA")


@needs_nvcc
def test_unreadable_arch_list(environment, repository):
    settings = {"TORCH_CUDA_ARCH_LIST": "Ampere"}
    built = environment.python("setup.py", "build_ext", cwd=repository, **settings)
    check_refused(built, "TORCH_CUDA_ARCH_LIST: expected e.g. 8.0+PTX;9.0a, got 'Ampere'")
