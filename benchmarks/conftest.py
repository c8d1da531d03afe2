"""Which benchmarks run, and what becomes of their rows.

A module names its op as `OP` and its `SHAPES`: "tiny" or a device -> case -> a named tuple; it may
name cases as `QUICK`. Each of its tests runs once for every device here, shape, dtype and backend.
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from benchmarks import run_folder
from benchmarks.peers import calls_of, peers_of, wanted_peers
from benchmarks.timing import MIN_ROUNDS, QUICK_ROUNDS, measure, summary
from mistral_kernels.machine_limits import STREAM_BYTES, Limits, machine_limits
from mistral_kernels.ops import dispatch
from mistral_kernels.ops.checks import is_int

DTYPES = {"cpu": (torch.float32, torch.bfloat16), "cuda": (torch.bfloat16,)}
DEVICES = ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",)
ARGUMENTS = ("device", "case", "shape", "dtype", "backend")
ROW = pytest.StashKey[dict[str, Any]]()  # of the test that runs
MISSING = pytest.StashKey[dict[str, str]]()  # peers, as noted in --rows
PEERS = pytest.StashKey[set[str]]()  # names of the test's contestants that are no work of ours
MEASURED = pytest.StashKey[list[list]]()  # identities of the rows that --rows holds


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("mistral_kernels")
    group.addoption(
        "--sizes",
        choices=("tiny", "short", "full"),
        default="short",
        help="tiny: only to see that every benchmark runs; short: what `make bench` runs, long"
        " prompts through some layers of the model; full: through all of them",
    )
    group.addoption("--quick", action="store_true", help="fewer cases and rounds")
    group.addoption("--device", choices=DEVICES, help="measure there only")
    group.addoption("--peers", default="all", help="names with commas between, all or none")
    group.addoption("--rows", type=Path, help="folder of a run that `benchmarks.run` began")


def pytest_configure(config: pytest.Config) -> None:
    folder = config.getoption("rows")
    lines = run_folder.lines(folder) if folder else []
    config.stash[MISSING] = {}
    config.stash[MEASURED] = [line["id"] for line in lines if "row" in line]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    module, option = metafunc.module, metafunc.config.getoption
    devices = [option("device")] if option("device") else DEVICES
    cases = [
        pytest.param(
            *(device, case, shape, dtype, backend),
            id="-".join((device, case, dtype_name(dtype), backend)),
        )
        for device in devices
        for case, shape in shapes_of(module, device, option("sizes"), option("quick")).items()
        for dtype in DTYPES[device]
        for backend in contestants(module.OP, device, dtype, shape)
    ]
    metafunc.parametrize(ARGUMENTS, cases)


def shapes_of(module: ModuleType, device: str, sizes: str, quick: bool) -> dict[str, tuple]:
    """Return the cases of a module that run: with `quick` those it names, else its first."""
    shapes = module.SHAPES["tiny" if sizes == "tiny" else device]
    if not quick or sizes == "tiny":
        return shapes
    names = getattr(module, "QUICK", list(shapes)[:1])
    return {case: shape for case, shape in shapes.items() if case in names}


def contestants(op: str, device: str, dtype: torch.dtype, shape: tuple) -> list[str]:
    """Return the backends that can serve `op` on such a shape here; the reference only where it is
    alone."""
    if op not in dispatch.OPS:  # the model, which lets each of its ops choose
        return ["auto"]
    capability = torch.cuda.get_device_capability() if device == "cuda" else None
    facts = tuple((k, v) for k, v in shape._asdict().items() if is_int(v))
    call = {"device_type": device, "dtype": dtype, "capability": capability, "facts": facts}
    served = [
        name for name in dispatch.backends(op) if dispatch.prefer(op, backend=name, **call) == name
    ]
    return [name for name in served if name != "reference"] or served


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


@pytest.fixture
def identity(request, device, case, shape, dtype, backend) -> tuple[dict[str, Any], list[Any]]:
    """What a row says of its case, and that by which a run knows it; skips what it has."""
    where = {"op": request.module.OP, "case": case, "device": device, "backend": backend}
    where |= {"dtype": dtype_name(dtype)}
    name = run_folder.identity(where, shape._asdict())
    if name in request.config.stash[MEASURED]:
        pytest.skip("measured already")
    return where, name


@pytest.fixture
def peers(request, identity, device, case, shape, dtype) -> dict[str, Callable]:
    """Name -> the call of a peer of this benchmark's op; of the model, what makes its engine.

    Notes those that cannot run here, or not this case.
    """
    op, wanted = request.module.OP, wanted_peers(request.config.getoption("peers"))
    _, absent = peers_of(op, device, wanted)
    calls, reasons = calls_of(op, shape, dtype, device, wanted)
    missing = {
        name if name in absent else f"{name}, {op} {case}": reason
        for name, reason in reasons.items()
    }
    note_missing(request.config, missing)
    request.node.stash[PEERS] = set(calls)
    return calls


def note_missing(config: pytest.Config, missing: dict[str, str]) -> None:
    """With --rows: note peers that cannot run, each once, and why."""
    folder, noted = config.getoption("rows"), config.stash[MISSING]
    new = {name: reason for name, reason in missing.items() if name not in noted}
    noted |= new
    if folder and new:
        run_folder.append(folder, {"missing": new})


@pytest.fixture
def bench(request, benchmark, identity, device, case, shape) -> Callable:
    """`bench(call, make_inputs, work, peers, **how)` times as `timing.measure` does and returns the
    row that is kept, to which the benchmark may add columns.

    With --rows a peer that fails in its first call is noted and its columns are missing; by hand,
    where nothing is kept, it fails the test.
    """
    option, (where, name) = request.config.getoption, identity

    def run(call, make_inputs, work, peers, **how) -> dict[str, Any]:
        row = where | shape._asdict()
        fewest = QUICK_ROUNDS if option("quick") else MIN_ROUNDS
        how["may_fail"] = request.node.stash.get(PEERS, ()) if option("rows") else ()
        samples, failed = measure(benchmark, call, make_inputs, peers, fewest=fewest, **how)
        reasons = {f"{peer}, {where['op']} {case}": why for peer, why in failed.items()}
        note_missing(request.config, reasons)
        if samples:
            row |= summary(samples, work, limits_of(option("rows"), device, option("sizes")))
            request.node.stash[ROW] = {"id": name, "row": row}
        return row

    torch.manual_seed(0)
    return run


def limits_of(folder: Path | None, device: str, sizes: str) -> Limits:
    """Return the limits of the run, which measured them once; by hand, measure them."""
    if folder:
        return Limits(**run_folder.choices(folder)["limits"][device])
    return machine_limits(device, 1 << 20 if sizes == "tiny" else STREAM_BYTES[device])


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Iterator:
    """With --rows: note the row of a benchmark that passed with all its columns, or why not."""
    report = yield
    folder = item.config.getoption("rows")
    if folder and report.failed:
        lines = report.longreprtext.splitlines()
        reason = next((line for line in reversed(lines) if line.startswith("E ")), lines[-1])
        reason = reason.removeprefix("E ").strip()
        run_folder.append(folder, {"failed": item.nodeid, "reason": reason})
    elif folder and report.when == "call" and ROW in item.stash:
        run_folder.append(folder, item.stash[ROW])
    return report
