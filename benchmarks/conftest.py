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
from benchmarks.peers import peers_of
from benchmarks.timing import MIN_ROUNDS, QUICK_ROUNDS, measure, summary
from mistral_kernels.machine_limits import STREAM_BYTES, Limits, machine_limits
from mistral_kernels.ops import dispatch
from mistral_kernels.ops.checks import is_int

DTYPES = {"cpu": (torch.float32, torch.bfloat16), "cuda": (torch.bfloat16,)}
DEVICES = ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",)
ARGUMENTS = ("device", "case", "shape", "dtype", "backend")
ROW = pytest.StashKey[dict[str, Any]]()  # of the test that runs
MISSING = pytest.StashKey[dict[str, str]]()  # peers, as noted in --rows
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
def wanted_peers(request, device) -> set[str] | None:
    """Names of the peers that were asked for, None for all; notes those that cannot run here."""
    text = request.config.getoption("peers")
    wanted = None if text == "all" else set(text.split(",")) - {"none"}
    _, missing = peers_of(request.module.OP, device, wanted)
    folder = request.config.getoption("rows")
    noted = request.config.stash[MISSING]
    if folder and not missing.items() <= noted.items():
        noted |= missing
        run_folder.append(folder, {"missing": missing})
    return wanted


@pytest.fixture
def bench(request, benchmark, wanted_peers, device, case, shape, dtype, backend) -> Callable:
    """`bench(call, make_inputs, work, peers, **how)` times as `timing.measure` does and returns the
    row that is kept, to which the benchmark may add columns."""
    option = request.config.getoption
    where = {"op": request.module.OP, "case": case, "device": device, "backend": backend}
    where |= {"dtype": dtype_name(dtype)}
    identity = run_folder.identity(where, shape._asdict())
    if identity in request.config.stash[MEASURED]:
        pytest.skip("measured already")
    # A benchmark's own contestants, such as ours without a window, are not anyone's to leave out.
    unwanted = set()
    if wanted_peers is not None:
        unwanted = peers_of(where["op"], device, None)[0].keys() - wanted_peers

    def run(call, make_inputs, work, peers, **how) -> dict[str, Any]:
        row = where | shape._asdict()
        peers = {name: peer for name, peer in peers.items() if name not in unwanted}
        fewest = QUICK_ROUNDS if option("quick") else MIN_ROUNDS
        samples = measure(benchmark, call, make_inputs, peers, fewest=fewest, **how)
        if samples:
            row |= summary(samples, work, limits_of(option("rows"), device, option("sizes")))
            request.node.stash[ROW] = {"id": identity, "row": row}
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
        run_folder.append(folder, {"failed": item.nodeid, "reason": reason.lstrip("E ")})
    elif folder and report.when == "call" and ROW in item.stash:
        run_folder.append(folder, item.stash[ROW])
    return report
