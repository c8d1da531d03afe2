"""Exponents are fitted, and the page on headlines and growth says what was measured."""

import json
import random

import pytest
import torch

from benchmarks import bench_headlines, bench_scaling, growth
from benchmarks.bench_model import config_of
from mistral_kernels.model.cache import KVCache
from mistral_kernels.model.step_work import step_work


def scaling(cases: str, size: str, power: float, sizes=(1, 2, 4, 8), **fields) -> list[dict]:
    """Rows whose time grows with that power of a size."""
    where = {"op": "scaling", "device": "cpu", "dtype": "float32"}
    return [
        where | {"case": f"{cases}{n}", size: n, "median_us": 2e3 * n**power} | fields
        for n in sizes
    ]


def line(text: str, label: str) -> str:
    (found,) = (line for line in text.splitlines() if line.startswith(f"| {label}"))
    return found


def test_an_exact_power_is_found():
    fit = growth.exponent([(1, 5), (2, 20), (4, 80), (4, 80)])
    assert fit.exponent == pytest.approx(2) and fit.error == pytest.approx(0, abs=1e-7)
    assert str(growth.exponent([(1, 5), (2, 5), (4, 5)])) == "0.00 +- 0.00"


def test_the_error_of_a_noisy_fit_is_that_of_its_slope():
    """Of many fits to y = x^0.7 with noise, the exponents scatter as much as each fit says."""
    draws, sizes = random.Random(0), [2**i for i in range(8)]
    fits = [
        growth.exponent([(x, x**0.7 * draws.lognormvariate(0, 0.1)) for x in sizes])
        for _ in range(400)
    ]
    mean = sum(fit.exponent for fit in fits) / len(fits)
    scatter = (sum((fit.exponent - mean) ** 2 for fit in fits) / len(fits)) ** 0.5
    said = (sum(fit.error**2 for fit in fits) / len(fits)) ** 0.5
    assert mean == pytest.approx(0.7, abs=0.01)
    assert said == pytest.approx(scatter, rel=0.1)


@pytest.mark.parametrize("points", [[], [(1, 1), (2, 2)], [(3, 1), (3, 2), (3, 3)]])
def test_too_few_points_are_refused(points):
    with pytest.raises(ValueError, match="expected 3 points or more"):
        growth.exponent(points)


def test_growth_with_and_without_rows():
    rows = scaling("prefill-tokens-", "tokens", 1.04, memory_bytes=2**21)
    rows += scaling("decode-batch-", "batch", 0.5)
    rows += scaling("prefill-batch-", "batch", 4)
    text = growth.section({"rows": rows[::-1]})  # in any order
    assert line(text, "prefill over tokens").endswith(
        "| 1 to 8 | 2 to 17.4 ms | tokens^(1.04 +- 0.00), wanted 1 +- 0.1"
        " | 2 to 2 MiB, tokens^(0.00 +- 0.00) |"
    )
    assert line(text, "a decode step over batch").endswith(
        "| 2 to 5.66 ms | batch^(0.50 +- 0.00) | not measured |"
    )
    assert "| 2 to 8190 ms |" in line(text, "prefill over batch")
    assert line(text, "a decode step over tokens").endswith("|  | not measured |  |  |")


def test_growth_that_must_hold_is_flagged(tmp_path, capsys):
    good = scaling("prefill-tokens-", "tokens", 1.09) + scaling("decode-tokens-", "context", -0.09)
    bad = scaling("prefill-tokens-", "tokens", 1.0) + scaling("decode-tokens-", "context", 0.11)
    path = tmp_path / "results.json"
    for rows, failures in ((good, 0), (bad, 1)):
        assert len(growth.missed({"rows": rows})) == failures
        assert growth.section({"rows": rows}).count("**missed**") == failures
        path.write_text(json.dumps({"rows": rows}))
        assert growth.main([str(path)]) == failures
    assert "context^0.11 +- 0.00, expected 0.0 +- 0.1" in capsys.readouterr().out


def test_a_file_that_holds_no_results(tmp_path, capsys):
    path = tmp_path / "results.json"
    for arguments, text in (([], "file"), ([path], "No such file"), ([path], "Expecting value")):
        if text == "Expecting value":
            path.write_text("cut")
        with pytest.raises(SystemExit, match="2"):
            growth.main(list(map(str, arguments)))
        assert text in capsys.readouterr().err
    path.write_text('{"rows": []}')
    assert growth.main([str(path)]) == 0
    assert growth.MISSING in capsys.readouterr().out


def test_headlines_with_and_without_rows():
    where = {"op": "headlines", "device": "cpu", "dtype": "bfloat16"}
    row = where | {"case": "cache-32k", "published": 1 / 8, "ours": 0.125, "source": "a paper"}
    text = growth.section({"rows": [row]})
    assert line(text, "cache of 32k").endswith("| 0.125 | not measured | 0.125 | a paper |")
    assert line(text, "Mixtral 8x7B").endswith("|  | not measured | not measured |  |")


def test_section_shows_what_the_benchmarks_write():
    for device in ("cpu", "cuda"):
        assert bench_headlines.SHAPES[device].keys() == growth.HEADLINES.keys()
        scales = bench_scaling.SHAPES[device]
        for series in growth.SERIES:
            cases = [shape for name, shape in scales.items() if name.startswith(series.cases)]
            sizes = [getattr(shape, series.size) for shape in cases]
            assert len(sizes) >= growth.FEWEST_POINTS and sizes == sorted(set(sizes))


@pytest.mark.parametrize(
    "series", [series for series in growth.SERIES if series.wanted is not None]
)
def test_work_grows_as_its_time_must(series):
    shapes = [
        shape
        for name, shape in bench_scaling.SHAPES["cpu"].items()
        if name.startswith(series.cases)
    ]
    flops, moved, kept = [], [], []
    for shape in shapes:
        config, size = config_of(shape), getattr(shape, series.size)
        fed = {"context": shape.context, "tokens": shape.tokens}
        work = step_work(config, dtype=torch.float32, **fed)
        longest = shape.context + shape.tokens
        cache = KVCache(config, 1, longest, device=torch.device("cpu"), dtype=torch.float32)
        flops.append((size, work.flops))
        moved.append((size, work.bytes))
        kept.append((size, cache.nbytes))
    assert not series.missed_by(growth.exponent(flops))
    assert growth.exponent(moved).exponent == pytest.approx(0, abs=1e-9), "weights and one window"
    assert growth.exponent(kept).exponent == pytest.approx(0, abs=1e-9)
