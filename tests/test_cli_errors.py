"""How the command line ends: one line and status 2 for bad input, quietly after Ctrl-C."""

import io
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import mistral_common
import pytest
import torch
from command_line import assert_refused, run_cli
from safetensors.torch import load_file, save_file

import mistral_kernels
from mistral_kernels.model import TINY_MIXTRAL

COMMAND = [sys.executable, "-m", "mistral_kernels.cli"]
ENDLESS = ["generate", "--prompt", "a", "--temperature", "30", "--max-tokens", "100000"]


@pytest.fixture
def folder(tmp_path) -> Path:
    """A copy of the embedded model that a test may spoil."""
    for name in ("params.json", "consolidated.safetensors", "tokenizer.model.v1"):
        shutil.copyfile(TINY_MIXTRAL / name, tmp_path / name)
    return tmp_path


@pytest.mark.parametrize(
    "arguments, parts",
    [
        (["nonsense"], ["nonsense"]),
        (["generate", "--nonsense"], ["--nonsense"]),
        (["generate", "--prompt", ""], ["--prompt", "prompt is empty"]),
        (["generate", "--prompt", "caf\udce9"], ["--prompt", "UTF-8"]),
        (["generate", "--prompt", "a", "--prompt-file", "b"], ["--prompt", "exclude"]),
        (["generate", "--prompt-file", "/nowhere/b"], ["/nowhere/b"]),
        (["generate", "--prompt", "a", "--json", "--stream"], ["--json", "--stream", "exclude"]),
        (["generate", "/nowhere", "--prompt", "a"], ["/nowhere: no such folder"]),
        (["generate", "--prompt", "a", "--dtype", "int8"], ["--dtype", "int8", "float32"]),
        (["generate", "--prompt", "a", "--device", "abacus"], ["--device", "abacus", "cuda"]),
        (["generate", "--prompt", "a", "--device", "meta"], ["--device", "meta", "cuda"]),
        (["generate", "--prompt", "a", "--device", "cuda:99"], ["--device", "cuda:99"]),
        (["generate", "--prompt", "a", "--backend", "magic"], ["backend", "magic", "reference"]),
        (["generate", "--prompt", "a", "--layout", "odd"], ["--layout", "odd", "native"]),
        (["generate", "--prompt", "a", "--layout", "huggingface"], ["config.json"]),
        (["generate", "--prompt", "a", "--max-tokens", "0"], ["--max-tokens", "1"]),
        (["generate", "--prompt", "a", "--max-tokens", "many"], ["--max-tokens"]),
        (["generate", "--prompt", "a", "--temperature", "nan"], ["temperature", "nan"]),
        (["generate", "--prompt", "a", "--temperature", "-1"], ["temperature", "-1"]),
        (["generate", "--prompt", "a", "--top-p", "0"], ["top_p", "0"]),
        (["generate", "--prompt", "a", "--top-p", "2"], ["top_p", "2"]),
        (["generate", "--prompt", "a", "--top-k", "0"], ["top_k", "0"]),
        (["generate", "--prompt", "a", "--chunk-size", "0"], ["chunk_size", "0"]),
        (["generate", "--prompt", "a", "--stop", ""], ["--stop must not hold an empty string"]),
        (["generate", "--prompt", "a", "--lora", "/nowhere"], ["/nowhere: no such file"]),
        (["generate", "--prompt", "a", "--lora-scaling", "2"], ["--lora-scaling", "0 --lora"]),
        (
            ["generate", "--prompt", "a", *["--lora", "b"] * 3, *["--lora-weight", "1"] * 2],
            ["--lora-weight: expected one value, or one for each of 3 --lora, got 2"],
        ),
        (["info", "extra"], ["extra"]),
        (["generate", "", "--prompt", "a"], ["folder must be a path", "got ''"]),
        (["chat", ""], ["folder must be a path", "got ''"]),
        (["verify", ""], ["folder must be a path", "got ''"]),
        (["chat", "/nowhere"], ["/nowhere: no such folder"]),
        (["chat", "--system", ""], ["--system", "empty"]),
        (["chat", "--system", "caf\udce9"], ["--system", "UTF-8"]),
        (["chat", "--system", "a", "--system-file", "b"], ["--system", "exclude"]),
        (["chat", "--context", "0"], ["context", "0"]),
        (["chat", "--temperature", "-1"], ["temperature", "-1"]),
        (["chat", "--top-p", "2"], ["top_p", "2"]),
    ],
)
def test_bad_options_are_one_line(arguments, parts):
    assert_refused(run_cli(*arguments), *parts)


def test_prompts_that_are_no_text(tmp_path, monkeypatch):
    (tmp_path / "prompt.txt").write_bytes(b"caf\xe9")
    by_file = run_cli("generate", "--prompt-file", tmp_path / "prompt.txt")
    assert_refused(by_file, "prompt.txt", "UTF-8")
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"\xff\n")))
    assert_refused(run_cli("generate"), "stdin", "UTF-8")
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"\n")))
    assert_refused(run_cli("generate"), "stdin", "prompt is empty")
    assert_refused(run_cli("generate", "--prompt-file", tmp_path), str(tmp_path))


def test_folder_without_a_tokenizer(folder):
    (folder / "tokenizer.model.v1").unlink()
    ended = run_cli("generate", folder, "--prompt", "a")
    assert_refused(ended, str(folder), "tekken.json", "token ids")


def test_tokenizer_that_does_not_fit(folder):
    shutil.copyfile(
        Path(mistral_common.__file__).parent / "data" / "tokenizer.model.v1",
        folder / "tokenizer.model.v1",
    )
    assert_refused(run_cli("generate", folder, "--prompt", "a"), "32000", "2048")


@pytest.mark.parametrize(
    ("option", "value"), [("--temperature", "-1"), ("--top-p", "2"), ("--backend", "magic")]
)
def test_options_are_refused_before_weights_are_read(folder, option, value):
    (folder / "consolidated.safetensors").unlink()
    named = option.removeprefix("--").replace("-", "_")
    for command in ("generate", "chat"):
        given = ["--prompt", "a"] if command == "generate" else []
        assert_refused(run_cli(command, folder, *given, option, value), named, value)


def test_truncated_checkpoint(folder):
    with (folder / "consolidated.safetensors").open("r+b") as file:
        file.truncate(1_000_000)
    assert_refused(run_cli("generate", folder, "--prompt", "a"), "consolidated.safetensors")


def test_weights_that_are_not_finite(folder):
    weights = load_file(folder / "consolidated.safetensors")
    weights["norm.weight"].fill_(torch.nan)
    save_file(weights, folder / "consolidated.safetensors")
    assert_refused(run_cli("generate", folder, "--prompt", "a"), "not finite")


def test_config_that_is_no_json(folder):
    (folder / "params.json").write_text("{", encoding="utf-8")
    assert_refused(run_cli("generate", folder, "--prompt", "a"), "params.json")


def test_version_and_help_do_not_load_torch():
    code = (
        "import sys\nfrom mistral_kernels.cli import main\n"
        "try:\n    main()\nexcept SystemExit as ended:\n"
        "    sys.exit(ended.code or 'torch' in sys.modules)"
    )
    for arguments, part in (
        (["--version"], mistral_kernels.__version__),
        (["--help"], "verify"),
        ([], "info"),
    ):
        command = [sys.executable, "-c", code, *arguments]
        done = subprocess.run(command, capture_output=True, text=True)
        assert (done.returncode, done.stderr) == (0, "") and part in done.stdout


@pytest.mark.parametrize("arguments", [["generate"], ENDLESS])
def test_control_c_ends_quietly(arguments):
    """Once while it waits for the prompt, once while it writes."""
    with subprocess.Popen(
        [*COMMAND, *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        # A suite started in the background inherits an ignored SIGINT.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    ) as process:
        if arguments is ENDLESS:
            assert process.stdout.read(1)
        else:
            with pytest.raises(subprocess.TimeoutExpired):
                process.wait(timeout=3)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=60)
    assert process.returncode == 130 and b"Traceback" not in err


def test_closed_pipe_ends_quietly():
    with subprocess.Popen(
        [*COMMAND, *ENDLESS], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        assert process.stdout.read(1)
        process.stdout.close()
        err = process.stderr.read()
        process.wait(timeout=60)
    assert process.returncode != 0 and err == b""
