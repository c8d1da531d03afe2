"""`mistral-kernels verify`: whole models pass, what is broken on purpose is noticed and placed."""

import itertools
import json
import math
from pathlib import Path

import pytest
import torch
from command_line import assert_refused, run_cli
from tiny_models import random_model, random_prompts

from mistral_kernels import Transformer, ops
from mistral_kernels.model import TINY_MIXTRAL
from mistral_kernels.ops import dispatch
from mistral_kernels.ops.dispatch import BoundOp
from mistral_kernels.tolerance import MAX_FLOOR, MAX_RATIO, MEAN_RATIO, error, fp32_limit
from mistral_kernels.verify import (
    DECODE_STEPS,
    Row,
    plan_steps,
    run_exact,
    run_whole,
    verify,
)

GOLDEN = Path(__file__).parent / "golden"
LAYERS = 4  # of the embedded model


def available_on(device: str) -> list[str]:
    """The backends that serve at least the norm there."""
    call = {"device_type": device, "dtype": torch.float32}
    served = {name: dispatch.prefer("rms_norm", backend=name, **call) for name in dispatch.BACKENDS}
    return [name for name in dispatch.BACKENDS if served[name] == name]


AVAILABLE = available_on("cpu")


def rows_of(folder: Path = TINY_MIXTRAL, *, device: str = "cpu", **options) -> dict[str, Row]:
    """The report's rows by backend."""
    return {row.backend: row for row in verify(folder, device=device, **options).rows}


@pytest.fixture
def break_decode(monkeypatch):
    """Returns a function that gives the decode attention of one layer a wrong window."""

    def apply(broken_layer: int, window: int) -> None:
        calls, call = itertools.count(), BoundOp.__call__
        schema = torch.ops.mistral_kernels.decode_attention.default._schema
        at = [argument.name for argument in schema.arguments].index("window")

        def wrong(op, *inputs):
            if op.name == "decode_attention" and next(calls) % LAYERS == broken_layer:
                inputs = (*inputs[:at], window, *inputs[at + 1 :])
            return call(op, *inputs)

        monkeypatch.setattr(BoundOp, "__call__", wrong)

    return apply


# Whole models


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_embedded_model_passes_on_every_backend_here(device):
    rows, available = rows_of(device=device), available_on(device)
    assert list(rows) == list(dispatch.BACKENDS)
    for backend in available:
        row = rows[backend]
        assert (row.result, row.limit, row.first_layer) == ("pass", fp32_limit(backend), None)
        assert 0 < row.error.mean < row.error.max <= row.limit.max
        assert backend in row.ops.values() and set(row.ops) <= set(ops.__all__)
    for backend in set(dispatch.BACKENDS) - set(available):
        row = rows[backend]
        assert (row.result, row.error, row.ops) == ("not available", None, None)
        assert row.reason


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_low_precision_is_judged_by_what_torch_makes_of_it(dtype):
    rows = rows_of(dtype=dtype)
    assert all(rows[backend].result == "pass" for backend in AVAILABLE)
    limits = {rows[backend].limit for backend in AVAILABLE}
    assert len(limits) == 1 and limits.pop().max > 100 * fp32_limit("cpu").max


def test_low_precision_limit_comes_from_the_run_without_a_cache():
    model = Transformer.from_folder(TINY_MIXTRAL, device="cpu", dtype=torch.bfloat16)
    report = verify(TINY_MIXTRAL, backend="reference", dtype=torch.bfloat16, device="cpu")
    generator = torch.Generator().manual_seed(0)
    prompts = [torch.randint(2048, (n,), generator=generator) for n in report.tokens]
    with torch.inference_mode():
        whole = run_whole(model, prompts)
        exact = run_exact(model, prompts, whole.routes)
    peer, limit = error(whole.logits, exact.logits), report.rows[0].limit
    assert limit.max == pytest.approx(MAX_RATIO * peer.max + MAX_FLOOR)
    assert limit.mean == pytest.approx(MEAN_RATIO * peer.mean)


@pytest.mark.parametrize("layout", ["mistral", "hf"])
@pytest.mark.parametrize("case", ["ministral_interleave", "mixtral_w8", "ministral3_yarn"])
def test_other_models_pass(case, layout):
    rows = rows_of(GOLDEN / case / layout)
    assert all(rows[backend].result == "pass" for backend in AVAILABLE)


@pytest.mark.parametrize("experts", [0, 4])
def test_exact_run_is_the_model_in_float64(experts):
    """One block at a time gives what the whole model in float64 gives, and changes no weight."""
    model = random_model(dtype=torch.bfloat16, experts=experts, top_k=min(experts, 2))
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    prompts = [torch.tensor(ids) for ids in random_prompts([9, 5])]
    exact = run_exact(model, prompts)
    assert exact.logits.dtype == torch.float64 and len(exact.outputs) == len(model.layers)
    for name, parameter in model.named_parameters():
        assert parameter.dtype == torch.bfloat16 and torch.equal(parameter, before[name])
    whole = model.double().forward(torch.cat(prompts), [9, 5])
    torch.testing.assert_close(exact.logits, whole, rtol=0, atol=1e-12)


# The schedule


@pytest.mark.parametrize("windows", [[1], [8, None], [64], [256, 4096], [257], [4096], [None]])
def test_steps_take_every_path(windows):
    steps, wrapped = plan_steps(windows)
    shortest = min((w for w in windows if w), default=math.inf)
    assert wrapped == (shortest if shortest <= 256 else None)
    assert (0 in steps[0]) and steps[-DECODE_STEPS:] == [(1, 1)] * DECODE_STEPS
    assert any(1 in counts and max(counts) > 1 for counts in steps), "a step mixes both kinds"
    for counts in zip(*steps, strict=True):
        assert sum(n > 1 for n in counts) >= 2, "a chunk is attended with keys of the ring"
        if wrapped:
            ring = -(-wrapped // 16) * 16
            assert max(counts) > wrapped and sum(counts[:-DECODE_STEPS]) > ring
        assert sum(counts) < 1000, "a big model should not take minutes"


# What is broken on purpose


@pytest.mark.parametrize("layer", range(LAYERS))
def test_a_wrong_window_fails_and_names_the_layer(break_decode, layer):
    break_decode(layer, window=63)
    rows = rows_of()
    for backend in AVAILABLE:
        assert (rows[backend].result, rows[backend].first_layer) == ("fail", str(layer))
        assert rows[backend].error.max > rows[backend].limit.max


def test_a_wrong_window_fails_in_low_precision(break_decode):
    break_decode(1, window=8)
    rows = rows_of(dtype=torch.bfloat16)
    for backend in AVAILABLE:
        assert (rows[backend].result, rows[backend].first_layer) == ("fail", "1")


@pytest.mark.parametrize("layer", range(LAYERS))
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_wrong_expert_fails_in_low_precision(monkeypatch, dtype, layer):
    """Nothing but one token's choice is wrong: not the weights, not what the experts compute."""
    calls, call = itertools.count(), BoundOp.__call__

    def wrong(op, *inputs):
        if op.name != "route_experts" or next(calls) % LAYERS != layer:
            return call(op, *inputs)
        logits, top_k, _ = inputs
        expert_ids = call(op, *inputs)[1].clone()
        expert_ids[-1] = logits[-1].argsort()[:top_k]
        return logits.gather(1, expert_ids.long()).float().softmax(-1), expert_ids

    monkeypatch.setattr(BoundOp, "__call__", wrong)
    rows = rows_of(dtype=dtype)
    for backend in AVAILABLE:
        row = rows[backend]
        assert (row.result, row.first_layer) == ("fail", str(layer))
        assert row.error.within(row.limit), "only the choice tells"


def test_a_wrong_weight_fails_in_its_layer(monkeypatch):
    def spoil_after(*arguments):
        exact, model = run_exact(*arguments), arguments[0]
        model.layers[2].feed_forward.w2[0].mul_(1.01)
        return exact

    monkeypatch.setattr("mistral_kernels.verify.run_exact", spoil_after)
    rows = rows_of()
    for backend in AVAILABLE:
        assert (rows[backend].result, rows[backend].first_layer) == ("fail", "2")


@pytest.mark.parametrize("gap, found", [(1e-3, 1e-3), (math.nan, math.inf)])
def test_a_wrong_head_fails_at_the_output(monkeypatch, gap, found):
    run = Transformer.run
    monkeypatch.setattr(Transformer, "run", lambda *args, **how: run(*args, **how) + gap)
    row = rows_of(backend="reference")["reference"]
    assert (row.result, row.first_layer) == ("fail", "output")
    assert row.error.max == pytest.approx(found, rel=0.1)


# The command


def test_command_passes_and_tells_who_served():
    ended = run_cli("verify", "--device", "cpu")
    assert ended.status == 0 and ended.err == ""
    for part in (*dispatch.BACKENDS, *ops.__all__[:2], "pass", "5.0e-05", "window 64 wraps"):
        assert part in ended.out
    for backend in set(dispatch.BACKENDS) - set(AVAILABLE):
        assert "not available" in ended.out
        assert (dispatch.unavailable(backend) or "no op of this model") in ended.out


def test_command_fails_with_status_1(break_decode):
    break_decode(2, window=63)
    ended = run_cli("verify", "--device", "cpu", "--json")
    assert ended.status == 1
    row = json.loads(ended.out)["rows"][0]
    assert (row["backend"], row["result"], row["first_layer"]) == ("reference", "fail", "2")
    assert row["error"]["max"] > row["limit"]["max"] == fp32_limit("reference").max


def test_json_report_is_strict_json(monkeypatch):
    run = Transformer.run
    monkeypatch.setattr(Transformer, "run", lambda *args, **how: run(*args, **how) * math.nan)
    ended = run_cli("verify", "--device", "cpu", "--json", "--backend", "reference")

    def refuse(constant: str):
        raise AssertionError(f"{constant} is not JSON")

    report = json.loads(ended.out, parse_constant=refuse)
    assert ended.status == 1 and report["rows"][0]["error"] == {"max": None, "mean": None}
    assert {"folder", "device", "dtype", "tokens", "steps", "wrapped_window"} < set(report)


@pytest.mark.parametrize(
    "arguments, parts",
    [
        (["--backend", "magic"], ["magic", "reference"]),
        (["--dtype", "float64"], ["--dtype", "float64", "float32"]),
        (["/nowhere"], ["/nowhere"]),
        (["--backend", "cuda", "--device", "cpu"], ["--backend cuda", "not available"]),
    ],
)
def test_command_refuses(arguments, parts):
    assert_refused(run_cli("verify", *arguments), *parts)
