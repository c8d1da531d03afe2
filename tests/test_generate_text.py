"""Generation on text: prompts as strings, where they end, stop strings, and whose tokenizer."""

import re
import subprocess
import sys

import pytest
import torch
from checkpoints import tiny_config, write_native
from tiny_models import random_model
from trained_tokenizers import SHIPPED, TINY, write_tekken

from mistral_kernels import Transformer, generate, stream
from mistral_kernels.model import TINY_MIXTRAL
from mistral_kernels.model.stop_text import StopText
from mistral_kernels.model.tokenizer import TextStream, Tokenizer

TEXTS = ["whistle:", "a bell or a gong made of metal", ""]


@pytest.fixture(scope="module")
def model() -> Transformer:
    return Transformer.from_folder(
        TINY_MIXTRAL, device="cpu", dtype=torch.float32, max_batch_size=3
    )


def new_text(model: Transformer, tokens: list[int]) -> str:
    text = TextStream(model.tokenizer, continued=True)
    return "".join([*map(text.push, tokens), text.finish()])


def test_texts_are_continued_as_their_ids_are(model):
    ids = [model.tokenizer.encode(text) for text in TEXTS]
    options = {"max_tokens": 12, "temperature": 0.8, "seed": 3, "eos_id": model.tokenizer.eos_id}
    expected = generate(ids, model, **options)
    assert generate(TEXTS, model, **options) == expected
    assert generate([TEXTS[0], ids[1], TEXTS[2]], model, **options) == expected
    for i, text in enumerate(TEXTS):
        alone, _ = generate([text], model, **options | {"seed": 3 + i})
        assert alone == expected[0][i : i + 1]


def test_a_text_ends_at_end_of_text_and_ids_do_not(model):
    ids = model.tokenizer.encode("whistle:")
    (ended, endless), _ = generate(["whistle:", ids], model, max_tokens=20)
    assert new_text(model, ended) == " a small pad worn by a hatchet."
    assert len(endless) == 20 and endless[: len(ended) + 1] == [*ended, model.tokenizer.eos_id]
    (as_text, as_ids), _ = generate(["whistle:", ids], model, max_tokens=20, eos_id=ended[3])
    assert as_text == as_ids == ended[:3]


def test_a_text_in_a_cache_begins_only_an_empty_place(model):
    cache = model.new_cache(2, 40)
    continued = model.tokenizer.encode("bell:")
    generate([continued, [1]], model, max_tokens=0, cache=cache)
    assert cache.lengths == [len(continued), 1]
    cache.reset(1)
    got = generate(["a small", "a small"], model, max_tokens=4, cache=cache)
    more = model.tokenizer.encode("a small", bos=False)
    whole = [continued + more, [model.tokenizer.bos_id, *more]]
    expected = generate(whole, model, max_tokens=4, eos_id=model.tokenizer.eos_id)
    assert got[0] == expected[0]
    for scores, right in zip(got[1], expected[1], strict=True):
        assert scores == pytest.approx(right, abs=1e-4)
    with pytest.raises(
        ValueError, match=re.escape("encoded_prompts[0] must hold at least one token")
    ):
        generate(["", "a"], model, max_tokens=1, cache=cache)


@pytest.mark.parametrize(
    "stop", [".", " worn", "all p", "rn by a hat", "et.", ["x", "pad", " pad"], ("hatchet.", "a s")]
)
def test_a_sequence_ends_with_the_token_that_completes_a_stop(model, stop):
    whole = generate(["whistle:"], model, max_tokens=20)
    (tokens,), (logprobs,) = generate(["whistle:"], model, max_tokens=20, stop=stop)
    stops = [stop] if isinstance(stop, str) else stop
    ends = [n for n in range(13) if any(s in new_text(model, whole[0][0][:n]) for s in stops)]
    assert tokens == whole[0][0][: ends[0]] and len(logprobs) == ends[0]
    text = StopText(stop)
    shown = text.push(new_text(model, tokens))
    assert text.stopped and not any(each in shown for each in stops)
    assert [
        token for _, token, _ in stream(["whistle:"], model, max_tokens=20, stop=stop)
    ] == tokens


def test_stop_ends_one_sequence_only_and_ignores_prompts(model):
    whole, _ = generate(["whistle:", "bell:"], model, max_tokens=20)
    tokens, _ = generate(["whistle:", "bell:"], model, max_tokens=20, stop="hatchet")
    assert "hatchet" not in new_text(model, whole[1]) and tokens[1] == whole[1]
    assert new_text(model, tokens[0]) == " a small pad worn by a hatchet"
    assert generate(["whistle:", "bell:"], model, max_tokens=20, stop=["whistle", ":"])[0] == whole


def test_the_token_that_completes_a_stop_is_not_fed(model):
    cache = model.new_cache(1, 40)
    (tokens,), _ = generate(["whistle:"], model, max_tokens=20, stop="pad", cache=cache)
    assert cache.lengths == [len(model.tokenizer.encode("whistle:")) + len(tokens) - 1]


@pytest.fixture(scope="module", params=["sentencepiece", "tekken"])
def scripted(request, tmp_path_factory) -> tuple[Transformer, Tokenizer]:
    """A model with the vocabulary of a tokenizer, one of each library."""
    tekken = request.param == "tekken"
    path = write_tekken(tmp_path_factory.mktemp("stop") / "tekken.json") if tekken else TINY
    tokenizer = Tokenizer(path)
    model = random_model(vocab=tokenizer.vocab)
    model.tokenizer = tokenizer
    return model, tokenizer


@pytest.mark.parametrize("stop", ["🙂", "ï", "ve 🙂\n", "🙂\n\nN", "naïve 🙂\n\nNext"])
def test_stops_of_several_bytes_and_tokens(monkeypatch, scripted, stop):
    (model, tokenizer), text = scripted, "so naïve 🙂\n\nNext one"
    script = tokenizer.encode(text, bos=False)

    def forward(input_ids, seqlens, cache, *, last_only):
        """Logits that make greedy drawing follow the script."""
        cache.advance(seqlens)
        drawn = cache.lengths[0] - 1
        return torch.nn.functional.one_hot(
            torch.tensor([script[drawn]]), num_classes=tokenizer.vocab
        ).double()

    monkeypatch.setattr(model, "forward", forward)
    (tokens,), _ = generate([[1]], model, max_tokens=len(script), stop=[stop, "not there"])
    assert tokens == script[: len(tokens)] and len(tokens) < len(script)
    assert stop in new_text(model, tokens) and stop not in new_text(model, tokens[:-1])


# The model's tokenizer


def test_the_tokenizer_is_read_at_first_use_and_can_be_set():
    model = Transformer.from_folder(TINY_MIXTRAL, device="cpu")
    first = model.tokenizer
    assert first is model.tokenizer and first.path == TINY
    model.tokenizer = other = Tokenizer(first.path)
    assert model.tokenizer is other
    with pytest.raises(ValueError, match="32000 tokens do not fit a model of vocab 2048"):
        model.tokenizer = Tokenizer(SHIPPED / "tokenizer.model.v1")
    with pytest.raises(TypeError, match="Transformer: tokenizer must be a Tokenizer, got str"):
        model.tokenizer = str(first.path)
    assert model.tokenizer is other


def test_what_no_tokenizer_means(tmp_path):
    with pytest.raises(ValueError, match="comes from no folder.*; set model.tokenizer"):
        random_model().tokenizer  # noqa: B018
    write_native(tmp_path, tiny_config())
    model = Transformer.from_folder(tmp_path, device="cpu")
    with pytest.raises(ValueError, match="no tokenizer .*tekken.json.*; or set model.tokenizer"):
        generate(["a"], model, max_tokens=1)
    assert len(generate([[1]], model, max_tokens=1)[0][0]) == 1
    (tmp_path / "tokenizer.model.v1").symlink_to(SHIPPED / "tokenizer.model.v1")
    with pytest.raises(
        ValueError, match="prompts.1.*: 32000 tokens do not fit a model of vocab 32"
    ):
        generate([[1], "a"], model, max_tokens=1)


def test_half_a_character_is_refused(model):
    with pytest.raises(
        ValueError, match=re.escape("encoded_prompts[1]: encode: text: not Unicode text")
    ):
        generate(["a", "caf\udce9"], model, max_tokens=1)


def test_ids_alone_load_no_tokenizer():
    code = (
        "import sys, mistral_kernels.ops\n"
        "from mistral_kernels import Transformer, generate\n"
        "from mistral_kernels.model import TINY_MIXTRAL\n"
        "model = Transformer.from_folder(TINY_MIXTRAL, device='cpu')\n"
        "generate([[1, 2]], model, max_tokens=2)\n"
        "assert 'mistral_common' not in sys.modules\n"
        "generate(['a'], model, max_tokens=1)\n"
        "assert 'mistral_common' in sys.modules\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
