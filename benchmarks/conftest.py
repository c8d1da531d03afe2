"""Which benchmarks run, and what becomes of their rows.

A module names its op as `OP` and its `SHAPES`: "tiny" or a device -> case -> a named tuple. Each of
its tests runs once for every device here, shape, dtype and backend.
"""

import functools
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import report
from benchmarks.environment import environment
from benchmarks.timing import measure, summary
from mistral_kernels.machine_limits import STREAM_BYTES, machine_limits
from mistral_kernels.ops import dispatch
from mistral_kernels.ops.checks import is_int

DTYPES = {"cpu": (torch.float32, torch.bfloat16), "cuda": (torch.bfloat16,)}
DEVICES = ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",)
ARGUMENTS = ("device", "case", "shape", "dtype", "backend")
RESULTS = pytest.StashKey[dict[str, Any]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("mistral_kernels")
    group.addoption(
        "--sizes",
        choices=("tiny", "short", "full"),
        default="short",
        help="tiny: only to see that every benchmark runs; short: what `make bench` runs, long"
        " prompts through some layers of the model; full: through all of them",
    )
    group.addoption("--out", type=Path, help="write the results to this JSON file")


def pytest_configure(config: pytest.Config) -> None:
    config.stash[RESULTS] = {"environment": environment(), "limits": {}, "rows": []}


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    module = metafunc.module
    tiny = metafunc.config.getoption("sizes") == "tiny"
    cases = [
        pytest.param(
            *(device, case, shape, dtype, backend),
            id="-".join((device, case, dtype_name(dtype), backend)),
        )
        for device in DEVICES
        for case, shape in module.SHAPES["tiny" if tiny else device].items()
        for dtype in DTYPES[device]
        for backend in contestants(module.OP, device, dtype, shape)
    ]
    metafunc.parametrize(ARGUMENTS, cases)


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
def bench(request, benchmark, device, case, shape, dtype, backend):
    """`bench(call, make_inputs, work, peers, **how)` times as `timing.measure` does and returns the
    row that is kept, to which the benchmark may add columns."""
    results = request.config.stash[RESULTS]

    def run(call, make_inputs, work, peers, **how) -> dict[str, Any]:
        row = {"op": request.module.OP, "case": case, "device": device, "backend": backend}
        row |= {"dtype": dtype_name(dtype), **shape._asdict()}
        samples = measure(benchmark, call, make_inputs, peers, **how)
        if samples:
            tiny = request.config.getoption("sizes") == "tiny"
            limits = machine_limits(device, 1 << 20 if tiny else STREAM_BYTES[device])
            results["limits"][device] = limits._asdict()
            row |= summary(samples, work, limits)
            results["rows"].append(row)
        return row

    torch.manual_seed(0)
    return run


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, exitstatus: int) -> None:
    """With --out: show the rows as README does, and write them if every benchmark ran."""
    config = terminalreporter.config
    results, out = config.stash[RESULTS], config.getoption("out")
    if out and results["rows"] and exitstatus == pytest.ExitCode.OK:
        terminalreporter.write_line(report.section(results))
        write(results, out)


def write(results: dict[str, Any], out: Path) -> None:
    """Write results as JSON, one row a line, so that a new run differs by lines."""
    dump = functools.partial(json.dumps, ensure_ascii=False)
    rows = ",\n".join(f"  {dump(row)}" for row in results["rows"])
    parts = [f' "{name}": {dump(results[name])}' for name in ("environment", "limits")]
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text("{\n" + ",\n".join([*parts, f' "rows": [\n{rows}\n ]']) + "\n}\n")
