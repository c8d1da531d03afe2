"""The embedded model: the held-out figure of its README, and that what ships with it is whole."""

from pathlib import Path

import pytest
import torch

from mistral_kernels import Transformer
from mistral_kernels.model import TINY_MIXTRAL
from mistral_kernels.model.tokenizer import Tokenizer

HELD_OUT = Path(__file__).parent / "data" / "heldout.txt"
NATS, TOKENS = 2.91766, 25_400  # as the README says
LINES_A_BATCH = 50


@pytest.fixture(scope="module")
def held_out() -> list[list[int]]:
    """Each held-out line as bos + text + eos."""
    tokenizer = Tokenizer.from_folder(TINY_MIXTRAL)
    lines = HELD_OUT.read_text(encoding="utf-8").splitlines()
    return [[*tokenizer.encode(line), tokenizer.eos_id] for line in lines]


def nats_a_token(model: Transformer, texts: list[list[int]]) -> float:
    """Mean negative log-likelihood of every token after bos, each text on its own."""
    total = torch.zeros((), dtype=torch.float64)
    for start in range(0, len(texts), LINES_A_BATCH):
        batch = texts[start : start + LINES_A_BATCH]
        inputs = torch.tensor([token for ids in batch for token in ids[:-1]])
        targets = torch.tensor([token for ids in batch for token in ids[1:]])
        logits = model.forward(inputs, [len(ids) - 1 for ids in batch])
        total += torch.nn.functional.cross_entropy(logits.double(), targets, reduction="sum")
    return total.item() / sum(len(ids) - 1 for ids in texts)


def test_held_out_text_has_the_published_likelihood(held_out):
    assert sum(len(ids) - 1 for ids in held_out) == TOKENS
    model = Transformer.from_folder(TINY_MIXTRAL, dtype=torch.float32, device="cpu")
    with torch.inference_mode():
        assert nats_a_token(model, held_out) == pytest.approx(NATS, abs=2e-4)


def test_the_readme_states_these_figures():
    readme = (TINY_MIXTRAL / "README.md").read_text(encoding="utf-8")
    assert f"{NATS} nats" in readme and f"{TOKENS:,} tokens" in readme


def test_its_licence_ships_with_it():
    assert "WordNet" in (TINY_MIXTRAL / "LICENSE.wordnet").read_text(encoding="utf-8")
