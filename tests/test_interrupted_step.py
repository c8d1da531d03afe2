"""A step that Ctrl-C interrupts between two layers: the cache counts nothing of it.

Some layers have then stored its keys and others have not. Fed again, the same positions are written
again; only a ring that has lost keys which the next token must see cannot go on.
"""

import pytest
import torch
from tiny_models import feed, random_model, random_prompts

from mistral_kernels import generate


@pytest.fixture(scope="module")
def model():
    return random_model(windows=(5, None))


@pytest.fixture
def interrupt(monkeypatch, model):
    """Makes a layer of `model` be interrupted at its n-th call, once."""

    def arm(layer: int, calls: int) -> None:
        block = model.layers[layer]
        forward = block.forward

        def interrupted(*args, **kwargs):
            nonlocal calls
            calls -= 1
            out = forward(*args, **kwargs)
            if calls == 0:
                raise KeyboardInterrupt
            return out

        monkeypatch.setattr(block, "forward", interrupted)

    return arm


@pytest.mark.parametrize("layer", [0, 1])
@pytest.mark.parametrize("step", [1, 2, 4])
def test_an_interrupted_step_counts_for_nothing(model, interrupt, layer, step):
    """Chunks of 6, then tokens: step 2 is a chunk, step 4 a token."""
    (prompt,), cache = random_prompts([17]), model.new_cache(1, 64, lookahead=5)
    drawn = []
    interrupt(layer, step)
    with pytest.raises(KeyboardInterrupt):
        generate(
            [prompt],
            model,
            max_tokens=9,
            chunk_size=6,
            cache=cache,
            on_token=lambda sequence, token, logprob: drawn.append(token),
        )
    held = {1: 0, 2: 6, 4: 17}[step]
    assert cache.lengths == [held] and len(drawn) == (step == 4)
    rest, scores = generate(
        [(prompt + drawn)[held:]], model, max_tokens=9 - len(drawn), chunk_size=6, cache=cache
    )
    whole, right = generate([prompt], model, max_tokens=9)
    assert drawn + rest[0] == whole[0]
    assert scores[0] == pytest.approx(right[0][len(drawn) :], abs=1e-10)


def test_a_place_that_an_interrupted_step_spoilt_is_refused_until_emptied(model, interrupt):
    cache = model.new_cache(2, 64, page_size=1)  # the windowed ring has 5 slots
    prompts = random_prompts([9, 5])
    feed(model, cache, prompts, [3, 3])
    interrupt(0, 1)
    with pytest.raises(KeyboardInterrupt):
        feed(model, cache, prompts, [6, 2])
    assert cache.lengths == [3, 3]
    message = (
        r"generate: cache: sequence 0 was interrupted .* empty its place with cache.reset\(0\)"
    )
    with pytest.raises(ValueError, match=message):
        generate([[1], [2]], model, max_tokens=1, cache=cache)
    # The other place lost nothing, and the first is as good as new once emptied.
    expected = [feed(model, None, [row], [len(row)])[0] for row in prompts]
    torch.testing.assert_close(feed(model, cache, prompts, [0, 2])[1], expected[1][3:])
    cache.reset(0)
    torch.testing.assert_close(feed(model, cache, prompts, [9, 0])[0], expected[0])


def test_an_interrupted_first_step_spoils_nothing(model, interrupt):
    cache = model.new_cache(1, 64, page_size=1)
    (prompt,) = random_prompts([20])
    interrupt(1, 1)
    with pytest.raises(KeyboardInterrupt):
        feed(model, cache, [prompt], [20])
    expected = feed(model, None, [prompt], [20])[0]
    for seqlens in ([2], [1], [9], [8]):
        before = cache.lengths[0]
        got = feed(model, cache, [prompt], seqlens)[0]
        torch.testing.assert_close(got, expected[before : before + seqlens[0]])
