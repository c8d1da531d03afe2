"""`mistral-kernels generate` and `info`: what they write and what their options do."""

import contextlib
import io
import json
import shutil
import sys

import pytest
import torch
from command_line import assert_refused, generate_json, run_cli
from safetensors.torch import load_file, save_file

import mistral_kernels
from mistral_kernels import ops
from mistral_kernels.cli import main
from mistral_kernels.model import TINY_MIXTRAL
from mistral_kernels.model.tokenizer import Tokenizer
from mistral_kernels.ops import dispatch

PROMPT = "whistle:"


@pytest.mark.parametrize("stream", ["--stream", "--no-stream"])
def test_greedy_writes_one_definition_and_stops(stream):
    status, out, err = run_cli("generate", "--prompt", PROMPT, stream, "--device", "cpu")
    assert (status, out) == (0, " a small pad worn by a hatchet.\n")
    assert "prompt: " in err and "decode: " in err and err.count("tokens/s") == 2


@pytest.mark.parametrize("stream, shown", [("--stream", False), ("--no-stream", True)])
def test_progress_shows_on_a_terminal_that_shows_no_text(stream, shown):
    command = ["generate", "--prompt", PROMPT, stream, "--device", "cpu"]
    on_terminal, elsewhere = run_cli(*command, terminal=True), run_cli(*command)
    assert on_terminal.out == elsewhere.out
    assert ("%" in on_terminal.err) == shown
    assert "%" not in elsewhere.err


def test_prompt_comes_from_option_file_or_stdin(tmp_path, monkeypatch):
    (tmp_path / "prompt.txt").write_text(f"{PROMPT}\n", encoding="utf-8")
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(f"{PROMPT}\r\n".encode())))
    by_stdin = generate_json()
    by_file = generate_json("--prompt-file", tmp_path / "prompt.txt")
    by_option = generate_json("--prompt", PROMPT)
    assert by_stdin["prompt"] == by_file["prompt"] == by_option["prompt"] == PROMPT
    assert by_stdin["tokens"] == by_file["tokens"] == by_option["tokens"]


def test_json_object():
    result = generate_json("--prompt", PROMPT)
    tokenizer = Tokenizer.from_folder(TINY_MIXTRAL)
    prompt = tokenizer.encode(PROMPT)
    assert set(result) == {"prompt", "text", "tokens", "logprobs", "finish_reason", "timings"}
    assert PROMPT + result["text"] == tokenizer.decode([*prompt, *result["tokens"]])
    assert len(result["tokens"]) == len(result["logprobs"])
    assert tokenizer.eos_id not in result["tokens"] and result["finish_reason"] == "stop"
    assert all(logprob <= 0 for logprob in result["logprobs"])
    timings = result["timings"]
    assert timings["prompt_tokens"] == len(prompt)
    assert timings["decode_tokens"] == len(result["tokens"]) - 1
    for phase in ("prompt", "decode"):
        rate = timings[f"{phase}_tokens"] / (timings[f"{phase}_ms"] / 1e3)
        assert timings[f"{phase}_tokens_per_s"] == pytest.approx(rate)


def test_max_tokens_cuts_the_same_text():
    whole = generate_json("--prompt", PROMPT)
    cut = generate_json("--prompt", PROMPT, "--max-tokens", 1)
    assert cut["tokens"] == whole["tokens"][:1] and cut["finish_reason"] == "length"
    assert cut["timings"]["decode_tokens_per_s"] is None


@pytest.mark.parametrize("stream", ["--stream", "--no-stream"])
def test_text_ends_before_a_stop(stream):
    stops = ["--stop", "nowhere", "--stop", "n by a"]
    ended = run_cli("generate", "--prompt", PROMPT, stream, "--device", "cpu", *stops)
    assert (ended.status, ended.out) == (0, " a small pad wor\n")


def test_a_stop_counts_as_such_at_the_last_token_too():
    stopped = generate_json("--prompt", PROMPT, "--stop", "pad worn")
    assert stopped["text"] == " a small " and stopped["finish_reason"] == "stop"
    tokens = stopped["tokens"]
    assert tokens == generate_json("--prompt", PROMPT)["tokens"][: len(tokens)]
    last = generate_json("--prompt", PROMPT, "--stop", "pad worn", "--max-tokens", len(tokens))
    assert last["text"] == " a small " and last["finish_reason"] == "stop"
    held = generate_json("--prompt", PROMPT, "--stop", " pad worn", "--max-tokens", len(tokens) - 1)
    assert held["text"].endswith(" pad") and held["finish_reason"] == "length"


def test_seed_repeats_a_sample():
    options = ["--prompt", PROMPT, "--temperature", 1.5, "--max-tokens", 20, "--seed"]
    first, again, other = (generate_json(*options, seed) for seed in (1, 1, 2))
    assert first["tokens"] == again["tokens"] != other["tokens"]


@pytest.mark.parametrize("option", [["--top-k", 1], ["--top-p", 1e-6]])
def test_sampling_from_one_token_is_greedy(option):
    sample = generate_json("--prompt", PROMPT, "--temperature", 2, "--seed", 3, *option)
    assert sample["tokens"] == generate_json("--prompt", PROMPT)["tokens"]


@pytest.mark.parametrize("chunk_size", [1, 7, 64])
def test_chunk_size_does_not_change_greedy_text(chunk_size):
    prompt = "bell: a hollow device made of metal that makes a ringing sound when struck. " * 4
    options = ["--dtype", "float32", "--max-tokens", 24, "--prompt", f"{prompt}{PROMPT}"]
    chunked = generate_json(*options, "--chunk-size", chunk_size)
    assert chunked["tokens"] == generate_json(*options)["tokens"]


@pytest.mark.parametrize(
    "option", [["--backend", "reference"], ["--dtype", "float32"], ["--layout", "native"]]
)
def test_options_that_keep_the_text(option):
    assert generate_json("--prompt", PROMPT, *option)["text"] == " a small pad worn by a hatchet."


def test_lora_changes_the_model_by_its_scaling(tmp_path):
    weights = load_file(TINY_MIXTRAL / "consolidated.safetensors")
    name = "layers.0.attention.wo"
    rows, columns = weights[f"{name}.weight"].shape
    adapter = {
        f"{name}.lora_A.weight": torch.ones(2, columns, dtype=torch.bfloat16),
        f"{name}.lora_B.weight": torch.ones(rows, 2, dtype=torch.bfloat16),
    }
    save_file(adapter, tmp_path / "lora.safetensors")
    plain = generate_json("--prompt", PROMPT)
    options = ["--prompt", PROMPT, "--lora", tmp_path, "--lora-scaling"]
    assert generate_json(*options, 0.0)["logprobs"] == plain["logprobs"]
    changed = generate_json(*options, 2.0)["logprobs"]
    assert changed != plain["logprobs"]
    assert generate_json("--prompt", PROMPT, "--lora", tmp_path)["logprobs"] == changed
    copy = tmp_path / "copy" / "lora.safetensors"
    copy.parent.mkdir()
    save_file(adapter, copy)
    both = [*options[:-1], "--lora", copy, "--lora-scaling", 1.0]
    assert generate_json(*both)["logprobs"] == changed  # 1 + 1
    each = [*both, "--lora-scaling", 4.0, "--lora-weight", 2.0, "--lora-weight", 0.0]
    assert generate_json(*each)["logprobs"] == changed  # 1 * 2 + 4 * 0


def test_pickles_are_read_if_allowed(tmp_path, monkeypatch):
    for name in ("params.json", "tokenizer.model.v1"):
        shutil.copyfile(TINY_MIXTRAL / name, tmp_path / name)
    weights = load_file(TINY_MIXTRAL / "consolidated.safetensors")
    torch.save(weights, tmp_path / "consolidated.00.pth")
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO()))
    for command in (["generate", "--prompt", PROMPT], ["chat"], ["verify"]):
        options = [*command, tmp_path, "--device", "cpu"]
        assert_refused(run_cli(*options), "consolidated.00.pth", "--allow-pickle")
        assert run_cli(*options, "--allow-pickle").status == 0


def test_text_that_stdout_cannot_encode_is_escaped():
    command = ["generate", "--prompt", PROMPT, "--temperature", "30", "--seed", "1"]
    command += ["--max-tokens", "20", "--device", "cpu"]
    out = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    with contextlib.redirect_stdout(out), pytest.raises(SystemExit) as ended:
        main(command)
    text = run_cli(*command).out
    assert ended.value.code is None and not text.isascii()
    assert out.buffer.getvalue() == text.encode("ascii", "backslashreplace")


# info and the process


def test_info_json():
    status, out, _ = run_cli("info", "--json")
    facts = json.loads(out)
    assert status == 0
    assert facts["versions"]["mistral_kernels"] == mistral_kernels.__version__
    assert facts["versions"]["torch"] == torch.__version__
    assert set(facts["ops"]) == set(ops.__all__)
    if facts["built"]:
        runnable = dispatch.native_extension().instruction_sets()
        assert facts["instruction_set"] == runnable[-1] in facts["built"]["instruction_sets"]
    else:
        assert facts["instruction_set"] is None
    for backend in dispatch.BACKENDS:
        assert facts["backends"][backend] == dispatch.unavailable(backend)
    for served in facts["ops"].values():
        assert served["cpu"] in ("reference", "cpu")
        assert ("cuda" in served) == torch.cuda.is_available()


def test_info_table():
    status, out, _ = run_cli("info")
    assert status == 0
    for part in (torch.__version__, *ops.__all__, *dispatch.BACKENDS):
        assert part in out
    for backend in dispatch.BACKENDS:
        assert (dispatch.unavailable(backend) or "available") in out
    core = dispatch.native_extension()
    if not isinstance(core, ImportError):
        assert ", ".join(core.build_info()["instruction_sets"]) in out
