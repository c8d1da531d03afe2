"""README's table of speed is what the committed results say; and what a report makes of results."""

import importlib
import json

import pytest
import torch

from benchmarks import peers, plots, report

LIMITS = {"read_gb_s": 31.0, "copy_gb_s": 20.0, "matmul_gflop_s": 200.0}
MACHINE = {
    "cpu": "a processor",
    "threads": 2,
    "instruction_set": "avx512",
    "torch": "2.13.0",
    "transformers": "5.23.0",
    "date": "2026-01-02",
    "commit": "abc1234",
    "command": "pytest benchmarks",
}


def row(op: str, case: str, median_us: float, **fields) -> dict:
    times = {"median_us": median_us, "limit": "read", "limit_fraction": 0.8}
    where = {"op": op, "case": case, "device": "cpu", "dtype": "float32", "backend": "cpu"}
    return where | times | {"peers": {}} | fields


def results(*rows: dict, device: str = "cpu") -> dict:
    machine = MACHINE | {"gpu": "a GPU" if device == "cuda" else None}
    return {"environment": machine, "limits": {device: LIMITS}, "rows": list(rows)}


def of_cpu(*rows: dict) -> str:
    return report.section({"cpu": results(*rows)})


def attention(exponent: float) -> list[dict]:
    """Rows at 2k to 16k tokens whose time and memory grow with that power."""
    return [
        row(
            "prefill_attention",
            f"small-{length}-w512",
            100.0 * (2**step) ** exponent,
            tokens=2048 * 2**step,
            peak_bytes=4096 * 2**step,
            peers={"sdpa in blocks": {"median_us": 400.0 * 2**step, "ratio": 4.0}},
        )
        for step, length in enumerate(report.LENGTHS)
    ]


def line(section: str, label: str) -> str:
    (found,) = (line for line in section.splitlines() if line.startswith(f"| {label}"))
    return found


@pytest.mark.parametrize(
    "document, made", [(report.README, report.section), (report.GROWTH, report.growth_section)]
)
def test_documents_show_the_committed_results(document, made):
    text, committed = document.read_text(), made(report.load(report.FOLDER))
    assert report.replace_section(text, committed) == text


@pytest.mark.parametrize(("device", "lines"), [("cpu", report.LINES), ("cuda", report.GPU_LINES)])
def test_every_line_is_a_case_and_a_peer_of_the_suite(device, lines, monkeypatch):
    for adapter in (peers.transformers, peers.varlen_attention):
        monkeypatch.setattr(adapter, "missing", lambda device: None)
    monkeypatch.setattr(peers.transformers_compiled, "SLOW_ON", ())
    monkeypatch.setattr(peers.sdpa, "window_mask", lambda *_: torch.ones(1, 1, dtype=torch.bool))
    for line in lines:
        module = importlib.import_module(f"benchmarks.bench_{line.op.removesuffix('_')}")
        shape = module.SHAPES[device][line.case]
        calls, _ = peers.calls_of(line.op, shape, torch.bfloat16, "cpu")
        assert line.peer in calls, line


def test_a_case_with_its_peer():
    peers = {"torch": {"median_us": 2460.0, "ratio": 2.0}}
    text = of_cpu(row("linear", "small-w13-1", 1230.0, peers=peers))
    assert line(text, "`linear`, 1 row").endswith(
        "| torch |  | 1.23 ms against 2.46 ms: 2.00x; 80 % of read | not measured |"
    )
    assert "a processor, 2 threads, avx512, torch 2.13.0, transformers 5.23.0" in text
    assert "commit abc1234" in text and "read 31.0 GB/s" in text


def test_a_missing_peer_is_said():
    lonely = results(row("model", "dense-180m-decode", 30e3, backend="auto", tokens=1))
    lonely["environment"] = MACHINE | {"transformers": None}
    text = report.section({"cpu": lonely})
    assert "30.0 ms, transformers not measured; 80 % of read" in line(text, "dense-180m: a token")
    assert "transformers not installed" in text


def test_where_a_peer_is_faster():
    ratios = {"torch": 0.5, "sdpa": 0.98}
    times = {name: {"median_us": 1e3 * ratio, "ratio": ratio} for name, ratio in ratios.items()}
    text = report.growth_section({"cpu": results(row("silu_mul", "7b-1", 1e3, peers=times))})
    slower = "| silu_mul, cpu | 7b-1 | float32 | 1.00 ms | torch: 500 us | 0.50 |"
    assert slower in text.splitlines() and "sdpa" not in text
    alone = results(row("silu_mul", "7b-1", 1e3))
    assert "a peer is faster" not in report.growth_section({"cpu": alone})


def test_the_reference_and_fewer_layers_are_said():
    fields = {"backend": "auto", "tokens": 2048, "layers": 1}
    rows = (
        row("model", "dense-180m-prefill-2048", 5e5, **fields),
        row("linear", "small-w13-1", 1e3, backend="reference"),
    )
    text = of_cpu(*rows)
    assert "500 ms (1 layer)," in line(text, "dense-180m, prompt of 2048")
    assert "1.00 ms (reference)," in line(text, "`linear`, 1 row")


def test_growth_is_fitted():
    text = of_cpu(*attention(1.5))
    assert "tokens^1.50" in text and "scratch) as tokens^1.00" in text
    assert "tokens^" not in of_cpu(*attention(1.5)[:3])


def test_nothing_measured(tmp_path):
    text = report.section(report.load(tmp_path))
    assert text.count(report.MISSING) == 2 * len(report.LINES) + 1
    assert text.endswith("GPU: not measured.")


def test_a_gpu_has_a_column_of_its_own(tmp_path):
    fields = {"device": "cuda", "dtype": "bfloat16"}
    peers = {"grouped_mm": {"median_us": 400.0, "ratio": 2.5}}
    rows = (
        row("expert_mlp", "8x7b-1", 160.0, peers=peers, backend="cuda", **fields),
        row("expert_mlp", "8x7b-1", 180.0, peers=peers, backend="triton", **fields),
    )
    (tmp_path / "h200").mkdir()
    written = json.dumps(results(*rows, device="cuda"))
    (tmp_path / "h200" / "results.json").write_text(written)
    text = report.section(report.load(tmp_path))
    assert "| case | against | a GPU |" in text and "Medians on a GPU, torch 2.13.0" in text
    assert line(text, "`expert_mlp`, 8x7B, tokens 1 ").endswith(
        "| grouped_mm | 160 us against 400 us: 2.50x; 80 % of read |"
    )
    assert line(text, "`expert_mlp`, 8x7B, tokens 4096").endswith("| not measured |")


def test_the_section_is_replaced_between_its_markers():
    readme = f"a\n{report.BEGIN}\nold\n{report.END}\nb\n"
    assert report.replace_section(readme, "new") == readme.replace("old", "new")
    for broken in ("a", readme * 2, f"{report.END}{report.BEGIN}"):
        with pytest.raises(ValueError, match="each once and in this order"):
            report.replace_section(broken, "new")


@pytest.mark.parametrize(
    ("us", "shown"),
    [(0.5, "0.500 us"), (9.994, "9.99 us"), (123.4, "123 us"), (1234, "1.23 ms"), (2e6, "2.00 s")],
)
def test_durations(us, shown):
    assert report.duration(us) == shown


def test_plots_are_drawn_and_come_out_the_same(tmp_path):
    assert plots.draw_all(results(), tmp_path) == []
    rates = {"gb_s": 10.0, "gflop_s": 50.0}
    decode = row("model", "dense-180m-decode", 30e3, backend="auto", tokens=1, **rates)
    decode["peers"] = {"transformers": {"median_us": 60e3, "ratio": 2.0}}
    rows = [r | rates for r in attention(1.0)]
    paths = plots.draw_all(results(*rows, decode), tmp_path)
    assert [path.stem for path in paths] == ["attention", "roofline", "model"]
    first = [path.read_bytes() for path in paths]
    assert all(data.startswith(b"\x89PNG") and len(data) < 90_000 for data in first)
    assert [p.read_bytes() for p in plots.draw_all(results(*rows, decode), tmp_path)] == first
