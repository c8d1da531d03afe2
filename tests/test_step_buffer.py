"""What a decode step is fed is copied in when it is news, and only then."""

import pytest
import torch
from tiny_models import random_model

from mistral_kernels.model import decode_step
from mistral_kernels.model.decode_step import Fed, decode
from mistral_kernels.model.sampling import Sampling

GREEDY, SAMPLED = Sampling(0.0, None, 1.0), Sampling(1.0, None, 1.0)


@pytest.mark.parametrize("padded", [False, True])
def test_nothing_is_copied_in_while_nothing_changes(padded, monkeypatch):
    if padded:  # eight rows for five sequences, three of them idle, of nine places
        monkeypatch.setattr(decode_step, "step_rows", lambda n, batch, _: 8)
    model = random_model(dtype=torch.float32)
    copies = []
    feed = decode_step.StepBuffer.feed

    def counting(self, rows) -> None:
        copies.append(rows != self._held)
        feed(self, rows)

    monkeypatch.setattr(decode_step.StepBuffer, "feed", counting)
    for sampling, copied in ((GREEDY, [True, False, False]), (SAMPLED, [True] * 3)):  # the draws
        cache, tokens = model.new_cache(9, 60), [3] * 5
        for turn in range(3):
            draw = 0.1 * turn * sampling.temperature
            fed = [Fed(at, token, draw) for at, token in enumerate(tokens)]
            tokens, _ = decode(model, cache, fed, sampling)
        assert copies == copied
        copies.clear()
