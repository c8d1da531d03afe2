"""The form of the repository: one op is one row, imports run one way, files stay short."""

import ast
import subprocess
import sys
from itertools import chain
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "mistral_kernels"
# Files of ops/ that are no op: the policy and what several ops share.
SHARED = {"__init__", "dispatch", "checks", "ring", "masked_attention", "low_bit", "recorded_calls"}
SHARED |= {"watched"}
OPS = sorted(path.stem for path in (PACKAGE / "ops").glob("*.py") if path.stem not in SHARED)
# Files of kernels/ that are no op: what several kernels share, or the steps of one op.
SHARED_KERNELS = {
    "attention_combine",
    "attention_gradient_tiles",
    "attention_tiles",
    "cache_elements",
    "expert_combine",
    "expert_down",
    "expert_matrix_backward",
    "expert_plan",
    "expert_rows_backward",
    "expert_steps",
    "expert_tiles",
    "expert_up",
    "key_splits",
    "low_bit_codes",
    "low_bit_product",
    "matrix_product",
    "processor",
    "rounded_sum",
    "sum_parts",
}
CODE = ("cpp", "cu", "cuh", "h")
LIBRARY = ("kernels", "mistral_kernels/ops", "mistral_kernels/model")
# A module of the package imports none of a higher rank. Names of mistral_kernels/__init__.py rank
# with the model, which they show.
RANKS = {"_C": 0, "kernels": 0, "tolerance": 0, "ops": 1, "model": 2, "integrations": 3}
RANKS |= dict.fromkeys(("cli", "chat", "verify", "routing", "info", "tables"), 3)
RANKS |= dict.fromkeys(("checkpoint_info", "free_memory"), 3)
RANKS |= dict.fromkeys(("options", "option_groups", "lora_options"), 3)
RANKS |= dict.fromkeys(("text_input", "continuation", "rates", "evaluation"), 3)
RANKS |= dict.fromkeys(("environment", "machine_limits", "peak_memory", "whole_file"), 3)
RANKS |= dict.fromkeys(("bench", "bench_options", "bench_subject", "model_speed"), 3)


def sources(folder: str, *endings: str) -> list[Path]:
    """Return the files of a folder of the repository, links to folders not followed."""
    return sorted(path for end in endings for path in (ROOT / folder).rglob(f"*.{end}"))


def imported(path: Path) -> set[str]:
    """Return the full names of the modules, and of names from modules, that a file imports."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = "." * node.level + (node.module or "")
            found |= {f"{base}.{alias.name}" for alias in node.names}
    return found


def rank(module: str) -> int | None:
    """Return the rank of a module of this package, None for any other module."""
    package, _, rest = module.partition(".")
    if package != "mistral_kernels":
        return None
    return RANKS.get(rest.split(".")[0], RANKS["model"])


def test_there_are_ops():
    assert {"rms_norm", "rope", "store_kv", "prefill_attention", "decode_attention"} <= set(OPS)
    assert {"route_experts", "expert_mlp", "silu_mul", "linear"} <= set(OPS)


@pytest.mark.parametrize("op", OPS)
def test_every_op_has_a_test_and_a_benchmark(op):
    assert (ROOT / "tests" / f"test_{op}.py").is_file()
    assert (ROOT / "benchmarks" / f"bench_{op}.py").is_file()


def test_every_benchmark_has_its_op():
    names = {path.stem.removeprefix("bench_") for path in (ROOT / "benchmarks").glob("bench_*.py")}
    whole_models = {"model", "loading", "transformers", "low_bit", "headlines", "scaling"}
    assert names - whole_models <= {*OPS, "add_rms_norm"}  # which shares the file of rms_norm


def test_nothing_in_kernels_or_csrc_is_without_its_op():
    # An op's backward is an op of its own, and may have a file of its own.
    known = {*OPS, *(f"{op}_backward" for op in OPS), *SHARED_KERNELS}
    assert {path.stem for path in sources("kernels", "py")} <= known
    assert {path.stem for path in sources("csrc/cpu", "cpp")} <= set(OPS)
    kernels = [path for path in sources("csrc/cuda", "cu") if "__global__" in path.read_text()]
    assert {path.stem for path in kernels} <= set(OPS)


def test_kernels_is_a_symlink_and_no_package():
    # With an __init__.py it would shadow Hugging Face's package of that name.
    assert not (ROOT / "kernels" / "__init__.py").exists()
    link = PACKAGE / "kernels"
    assert link.is_symlink() and link.readlink() == Path("../kernels")


def test_every_module_has_its_rank():
    assert {path.stem for path in PACKAGE.glob("*.py")} - {"__init__"} <= set(RANKS)
    assert {path.parent.name for path in PACKAGE.glob("*/*.py")} <= set(RANKS)


@pytest.mark.parametrize("folder", ["mistral_kernels", "kernels"])
def test_imports_run_one_way(folder):
    for path in sources(folder, "py"):
        parts = path.relative_to(ROOT).with_suffix("").parts
        own = "kernels" if folder == "kernels" else parts[1]
        for module in imported(path) if own != "__init__" else ():
            assert not module.startswith("."), f"{path} imports {module}: relative"
            other = rank(module)
            assert other is None or other <= RANKS[own], f"{path} imports {module}"


@pytest.mark.parametrize("op", OPS)
def test_an_op_reaches_its_own_kernels_only(op):
    reached = {
        module.removeprefix("mistral_kernels.kernels.").split(".")[0]
        for module in imported(PACKAGE / "ops" / f"{op}.py")
        if module.startswith("mistral_kernels.kernels.")
    }
    assert reached <= {op, f"{op}_backward"}


def test_kernels_know_only_tensors_of_numbers():
    shared = tuple(f"mistral_kernels.kernels.{name}." for name in SHARED_KERNELS)
    for path in sources("kernels", "py"):
        modules = (module for module in imported(path) if not module.startswith(shared))
        outside = {module.split(".")[0] for module in modules} - {"triton", "torch"}
        assert outside <= set(sys.stdlib_module_names), f"{path} imports {outside}"


def test_csrc_knows_no_torch():
    files = sources("csrc", *CODE)
    assert files
    for path in files:
        text = path.read_text()
        assert "#include <torch" not in text and "#include <ATen" not in text, path
        assert "pybind11" not in text or path.name == "bindings.cpp", path


@pytest.mark.parametrize("folder", ["mistral_kernels", "kernels", "csrc", "tests", "benchmarks"])
def test_files_are_short_and_named_after_what_they_hold(folder):
    found = sources(folder, "py", *CODE)
    assert found
    for path in found:
        name = path.relative_to(ROOT)
        assert path.read_text().count("\n") <= 400, f"{name} is too long"
        vague = {"utils", "common", "misc", "helpers", "v2", "legacy"} & set(path.stem.split("_"))
        assert not vague, f"{name} says nothing"
        # The emulator's headers stand in for those that kernels include, at the same depth.
        assert len(name.parts) <= 3 or "emulator" in name.parts, f"{name} lies too deep"


def test_importing_the_ops_is_light():
    code = (
        "import sys, mistral_kernels.ops;"
        "print([name for name in ('triton', 'transformers', 'safetensors', 'rich', 'typer')"
        " if name in sys.modules])"
    )
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert shown.stdout.strip() == "[]"


def test_the_library_never_prints():
    for path in chain.from_iterable(sources(folder, "py") for folder in LIBRARY):
        calls = (
            node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)
        )
        assert "print" not in {getattr(call.func, "id", None) for call in calls}, path
