"""`mistral-kernels ppl`: a published figure, a plain loop over windows, and what it refuses."""

import json
import math
from pathlib import Path

import pytest
import torch
from command_line import assert_refused, run_cli
from tiny_models import random_model, random_prompts

from mistral_kernels.model import perplexity as module
from mistral_kernels.model.perplexity import Stretch, perplexity, stretches

HELD_OUT = Path(__file__).parent / "data" / "heldout.txt"


def test_the_embedded_model_on_its_held_out_lines():
    options = ("--text", HELD_OUT, "--lines", "--dtype", "float32", "--device", "cpu", "--json")
    ended = run_cli("ppl", *options)
    assert ended.status == 0 and ended.err == ""
    facts = json.loads(ended.out)
    assert abs(facts["nats_per_token"] - 2.91766) < 1e-5  # its README's figure, to the last digit
    assert abs(facts["perplexity"] - 18.498) < 1e-3
    assert (facts["tokens"], facts["texts"], facts["context"]) == (25_400, 1000, None)
    assert facts["tokens_per_s"] > 0 and facts["dtype"] == "float32"


def test_a_table_of_one_text(tmp_path):
    (tmp_path / "text").write_text("whistle: a small pad worn by a hatchet.\n")
    ended = run_cli("ppl", "--text", tmp_path / "text", "--device", "cpu")
    assert ended.status == 0 and ended.err == ""
    assert "perplexity" in ended.out and "all that the windows show" in ended.out


def losses_one_by_one(model, text: list[int], context: int | None) -> list[float]:
    """-log p of each token but the first, from a whole forward pass for each of them."""
    found, begin = [], 0
    for i in range(1, len(text)):
        if context and i - begin >= context:
            begin += context // 2
        seen = text[begin:i]
        logits = model.forward(torch.tensor(seen), [len(seen)])[-1]
        found.append(-torch.log_softmax(logits, -1)[text[i]].item())
    return found


@pytest.mark.parametrize("windows", [(4, 4), (None, 4)])
@pytest.mark.parametrize("context", [None, 6, 7, 100])
def test_every_token_is_predicted_from_what_it_may_see(monkeypatch, windows, context):
    """Texts shorter and longer than a chunk, a window and a stretch, in one call."""
    monkeypatch.setattr(module, "CHUNK_TOKENS", range(5, 6))
    model = random_model(windows=windows)
    texts = random_prompts([2, 1, 3, 23, 0, 5, 6, 7, 12])
    expected = [loss for text in texts for loss in losses_one_by_one(model, text, context)]
    advanced = []
    found = perplexity(model, texts, context=context, advance=advanced.append)
    assert found.tokens == len(expected) == sum(advanced)
    assert math.isclose(found.nats, sum(expected), rel_tol=1e-9)


@pytest.mark.parametrize("context", [2, 3, 8])
@pytest.mark.parametrize("length", [2, 8, 9, 31])
def test_stretches_predict_each_token_once_with_half_a_context_before_it(length, context):
    predicted = []
    for tokens, first in stretches(list(range(length)), context):
        assert len(tokens) <= context and tokens == list(range(tokens[0], tokens[-1] + 1))
        assert tokens[0] == 0 or first >= context - max(1, context // 2)
        predicted += tokens[first:]
    assert predicted == list(range(1, length))
    assert list(stretches([5, 6, 7], None)) == [Stretch([5, 6, 7], 1)]


def test_what_is_refused(tmp_path):
    (tmp_path / "empty").write_text(" \n")
    (tmp_path / "latin").write_bytes(b"caf\xe9")
    (tmp_path / "text").write_text("a text")
    for arguments, parts in (
        ([], ["--text"]),
        (["--text", "/nowhere/b"], ["/nowhere/b"]),
        (["--text", tmp_path / "empty"], [str(tmp_path / "empty"), "is empty"]),
        (["--text", tmp_path / "latin"], [str(tmp_path / "latin"), "not UTF-8"]),
        (["--text", tmp_path / "text", "--context", "1"], ["context", ">= 2", "1"]),
        (["/nowhere", "--text", tmp_path / "text"], ["/nowhere: no such folder"]),
    ):
        assert_refused(run_cli("ppl", *arguments), *parts)


def test_nothing_to_predict_and_no_numbers():
    model = random_model()
    with pytest.raises(ValueError, match="nothing to predict in texts of fewer than two"):
        perplexity(model, [[1], []])
    model.norm.fill_(torch.nan)
    with pytest.raises(RuntimeError, match="logits are not finite"):
        perplexity(model, [[1, 2, 3]])
