"""What the compilers make of every kernel: `python -m benchmarks.codegen`, no GPU needed.

Compiles each Triton kernel with its shipped tile configurations (`codegen_cases` beside
`tile_config`) and each .cu file (its comments: compilers.py) for ARCHS, and prints

- registers, shared memory, stack, spills, the instructions that matter, blocks that fit on a
  multiprocessor, and how much these have on its way from memory at most;
- bytes and operations of the headline shapes, and how long a GPU takes for them at least.

Exits with 1 for a spill, too much shared memory, an instruction that is due but missing, a wait
behind every wgmma, or a kernel that is missing from the table.
"""

import argparse
import json
import os
import sys
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from itertools import product
from multiprocessing import get_context
from pathlib import Path

from rich.console import Console
from rich.table import Table

from benchmarks import compilers
from benchmarks.environment import environment
from benchmarks.machine_code import ARCHS, INSTRUCTIONS, Row
from benchmarks.roofline import GPUS, Prediction, cuda_predictions, triton_predictions

WIDTH = 190
BATCH = 5  # Triton files a job: the listing of each job costs half a second to start
Job = tuple[list[str], str, list[str], str]  # files, arch, kernels, one of SCOPES; .cu: all of it
SCOPES = {
    "all": lambda cases: cases,
    "common": lambda cases: [case for case in cases if not case.get("rare")],
    # The last of each kernel: of a GEMM, that with the most rows.
    "headline": lambda cases: {case["kernel"]: case for case in cases if case.get("work")}.values(),
}


def compile_files(job: Job) -> list[Row]:
    """The rows of a job; runs in a process of its own, to which no kernel can be sent.

    A .cu file is compiled whole, and is the only one of its job.
    """
    files, arch, kernels, scope = job
    if files[0].endswith(".cu"):
        return compilers.compile_cuda(compilers.find_nvcc(), Path(files[0]), arch)
    modules = (compilers.triton_module(file) for file in files)
    cases = [case for m in modules for case in m.codegen_cases(compilers.capability(arch))]
    cases = list(SCOPES[scope]([case for case in cases if case["kernel"].__name__ in kernels]))
    return compilers.compile_triton(cases, arch)


def compile_all(jobs: list[Job]) -> list[Row]:
    """The rows of all jobs, in their order; one process a core."""
    # A forked process would inherit the locks of torch's threads, but not the threads.
    with ProcessPoolExecutor(os.cpu_count(), mp_context=get_context("spawn")) as pool:
        return [row for rows in pool.map(compile_files, jobs) for row in rows]


def code_table(rows: list[Row]) -> Table:
    """Cases with their architectures below each other; a 0 is left out, and so is a name again."""
    table = Table("language", "kernel", "case", "arch", box=None)
    for name in ("registers", "shared", "stack", "spills", *INSTRUCTIONS, "blocks", "in flight"):
        table.add_column(name.replace("_", " "), justify="right")
    table.add_column("problem", style="red")
    cases = {}
    for row in rows:
        cases.setdefault((row.language, row.kernel, row.case), []).append(row)
    before = None
    for names, versions in cases.items():
        shown = ["", "", names[2]] if names[:2] == before else names
        for row in versions:
            numbers = [row.registers, row.shared, row.stack, row.spills, *row.counts.values()]
            numbers += [row.blocks, f"{row.bytes_in_flight >> 10} KB"]
            cells = [str(number or "") for number in numbers]
            table.add_row(*shown, row.arch, *cells, "; ".join(row.problems()))
            shown = [""] * 3
        before = names[:2]
    return table


def prediction_table(predictions: list[Prediction]) -> Table:
    table = Table("language", "kernel", "shape", box=None)
    for name in ("MB", "GFLOP", *(f"{gpu}, us" for gpu in GPUS)):
        table.add_column(name, justify="right")
    table.add_column("bound by")
    for row in predictions:
        numbers = [row.bytes / 1e6, row.flops / 1e9, *map(row.time_us, GPUS)]
        cells = (f"{x:,.0f}" if x >= 1000 else f"{x:.3g}" for x in numbers)
        table.add_row(row.language, row.kernel, row.shape, *cells, row.bound_by())
    return table


def as_json(rows: list[Row], predictions: list[Prediction]) -> str:
    """Both tables with what made them."""
    derived = ("blocks", "bytes_in_flight")
    codes = [asdict(row) | {name: getattr(row, name) for name in derived} for row in rows]
    works = [row._asdict() | {f"{gpu}_us": row.time_us(gpu) for gpu in GPUS} for row in predictions]
    made_by = environment() | {"nvcc": compilers.nvcc_version()}
    return json.dumps({"environment": made_by, "rows": codes, "predictions": works}, indent=1)


def find_jobs(
    archs: list[str], only: list[str], headline: list[str], scope: str = "all"
) -> tuple[list[Job], set[tuple[str, str]], list[Prediction]]:
    """What to compile, (language, kernel) that must come of it, and what is predicted of them.

    Args:
        archs: those of ARCHS to compile for.
        only: names of kernels, or of files without their ending; empty: all there are.
        headline: those of ARCHS to compile one headline shape of each Triton kernel for, unless
            `archs` has it, too.
        scope: which of Triton's cases to compile for `archs`, one of SCOPES.
    """
    jobs, declared, predictions, stems = [], set(), [], []
    for stem, module in compilers.triton_modules().items():
        kernels = compilers.triton_kernels(module)
        wanted = kernels if not only or stem in only else kernels & set(only)
        declared |= {("Triton", kernel) for kernel in wanted}
        predictions += [row for row in triton_predictions(module) if row.kernel in wanted]
        stems += [stem] if wanted else []
    names = sorted(kernel for _, kernel in declared)
    scopes = dict.fromkeys((*archs, *headline), "headline") | dict.fromkeys(archs, scope)
    for first, (arch, scope_there) in product(range(0, len(stems), BATCH), scopes.items()):
        jobs.append((stems[first : first + BATCH], arch, names, scope_there))
    nvcc = compilers.find_nvcc()
    for path in compilers.cuda_files() if nvcc else []:
        kernels = compilers.cuda_kernels(path)
        if kernels and (not only or path.stem in only or kernels & set(only)):
            declared |= {("CUDA", kernel) for kernel in kernels}
            predictions += cuda_predictions(path)
            known = compilers.nvcc_archs(nvcc)
            jobs += [([str(path)], arch, [], scope) for arch in archs if arch in known]
    return jobs, declared, predictions


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser("benchmarks.codegen", description=__doc__.split("\n")[0])
    parser.add_argument("--archs", nargs="+", choices=ARCHS, default=list(ARCHS), metavar="ARCH")
    parser.add_argument(
        "--headline", nargs="+", choices=ARCHS, default=[], metavar="ARCH",
        help="compile a headline shape of each Triton kernel for these, too",
    )  # fmt: skip
    parser.add_argument(
        "--kernel", nargs="+", default=[], help="names of kernels or of their files"
    )
    parser.add_argument("--common", action="store_true", help="leave out cases marked as rare")
    parser.add_argument("--json", type=Path, help="write the tables to this file, too")
    options = parser.parse_args(argv)
    jobs, declared, predictions = find_jobs(
        options.archs, options.kernel, options.headline, "common" if options.common else "all"
    )
    if not declared:
        parser.error(f"--kernel: no kernel and no file is named {' or '.join(options.kernel)}")

    rows = compile_all(jobs)
    console = Console(width=WIDTH)
    console.print(code_table(rows))
    console.print()
    console.print(prediction_table(predictions))
    if options.json:
        options.json.write_text(as_json(rows, predictions))
    if not compilers.find_nvcc():
        print("nvcc was not found: the .cu files are not in the table")
    left_out = sorted(declared - {(row.language, row.kernel) for row in rows})
    for language, kernel in left_out:
        print(f"{kernel} ({language}): not in the table")
    return 1 if left_out or any(row.problems() for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
