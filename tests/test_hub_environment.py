"""The hub in a process of its own: huggingface_hub reads its variables as it is imported."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from hub_server import NAME, running_hub, write_snapshot

from mistral_kernels.model import TINY_MIXTRAL

FILES = ("params.json", "consolidated.safetensors", "tokenizer.model.v1")
TEXT = " a small pad worn by a hatchet.\n"


def generate(tmp_path: Path, **variables: str) -> subprocess.CompletedProcess:
    """Run the command line on NAME, with no variable of the hub but these."""
    arguments = ["generate", NAME, "--prompt", "whistle:", "--device", "cpu"]
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "HUGGINGFACE_"))}
    return subprocess.run(
        [sys.executable, "-m", "mistral_kernels.cli", *arguments],
        env=kept | {"NO_PROXY": "127.0.0.1", "HF_HUB_DISABLE_TELEMETRY": "1"} | variables,
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )


@pytest.fixture(autouse=True)
def own_package(monkeypatch):
    """The processes run elsewhere, and find the package that this one has."""
    monkeypatch.setenv("PYTHONPATH", str(TINY_MIXTRAL.parents[1]))


@pytest.fixture
def model() -> dict[str, bytes]:
    return {name: (TINY_MIXTRAL / name).read_bytes() for name in FILES}


def test_offline_by_a_made_up_cache(tmp_path, model):
    offline = {"HF_HUB_OFFLINE": "1", "HF_ENDPOINT": "http://127.0.0.1:9"}
    snapshot = write_snapshot(tmp_path / "home" / "hub", model)
    done = generate(tmp_path, HF_HOME=str(tmp_path / "home"), **offline)
    assert (done.returncode, done.stdout) == (0, TEXT), done.stderr

    (snapshot / "consolidated.safetensors").unlink()
    done = generate(tmp_path, HF_HUB_CACHE=str(tmp_path / "home" / "hub"), **offline)
    assert (done.returncode, done.stdout) == (2, "") and done.stderr.count("\n") == 1
    for part in (NAME, str(snapshot), "lack consolidated.safetensors", "HF_HUB_OFFLINE is set"):
        assert part in done.stderr


def test_a_download_shows_progress(tmp_path, model):
    with running_hub() as hub:
        hub.models[NAME] = model | {"consolidated.00.pth": b"pickle"}
        # The variable makes huggingface_hub show its bars where stderr is no terminal.
        done = generate(
            tmp_path, HF_ENDPOINT=hub.address, TQDM_POSITION="-1", HF_HOME=str(tmp_path / "home")
        )
    assert (done.returncode, done.stdout) == (0, TEXT), done.stderr
    assert "100%" in done.stderr and hub.sent() == set(FILES)
