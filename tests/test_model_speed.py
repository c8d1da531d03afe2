"""Measuring a model: what counts as a step, and that nothing ends early."""

import pytest
from tiny_models import random_model

from mistral_kernels import model_speed
from mistral_kernels.machine_limits import Limits
from mistral_kernels.model import recorded_steps
from mistral_kernels.model.step_work import step_work
from mistral_kernels.model_speed import Load, measure_speed, steps_of
from mistral_kernels.ops.recorded_calls import RecordedCalls

LIMITS = Limits(read_gb_s=10.0, copy_gb_s=5.0, matmul_gflop_s=100.0)


class Clock:
    """Stands still but for the model: 100 s to read a prompt, 7 s a token, 50 s every fourth."""

    def __init__(self):
        self.now = 0.0

    def perf_counter(self) -> float:
        return self.now

    def stream(self, prompts, model, *, max_tokens, cache):
        for step in range(max_tokens):
            self.now += 100 if step == 0 else 50 if step % 4 == 0 else 7
            for sequence, _ in enumerate(prompts):
                yield sequence, 0, 0.0


def test_figures_follow_from_the_arrival_of_tokens(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(model_speed, "stream", clock.stream)
    monkeypatch.setattr(model_speed, "time", clock)
    model = random_model()
    facts = measure_speed(model, Load(batch=3, prompt=5, new=6), LIMITS, repeats=2)
    assert facts["time_to_first_token_ms"] == 100_000
    assert facts["inter_token_ms"] == {"median": 7000, "p99": 50_000}
    assert facts["prefill"]["tokens_per_s"] == 3 * 5 / 100
    assert (facts["decode"]["tokens"], facts["decode"]["seconds"]) == (3 * 5, 4 * 7 + 50)
    # Five steps that begin with 5 .. 9 tokens: the middle one stands for all.
    work = step_work(model.config, dtype=model.dtype, context=7, batch=3)
    assert facts["decode"]["bandwidth_fraction"] == pytest.approx(5 * work.bytes / 10e9 / 78)
    assert facts["decode"]["matmul_fraction"] == pytest.approx(5 * work.flops / 100e9 / 78)


@pytest.mark.parametrize("new", [2, 10])
def test_every_run_draws_all_its_tokens(new):
    model, load = random_model(), Load(batch=2, prompt=3, new=new)
    rounds = []
    facts = measure_speed(model, load, LIMITS, repeats=3, advance=lambda: rounds.append(1))
    assert len(rounds) == steps_of(load, 3) == min(8, new) + 3 * new
    assert facts["decode"]["tokens"] == 2 * (new - 1)


def test_timed_runs_record_nothing(monkeypatch):
    recordings = []

    class Counted(RecordedCalls):
        def __init__(self, function):
            recordings.append(len(rounds))
            super().__init__(function)

    monkeypatch.setattr(recorded_steps, "RecordedCalls", Counted)
    model, load, rounds = random_model(backend="cpu"), Load(batch=2, prompt=3, new=4), []
    measure_speed(model, load, LIMITS, repeats=2, advance=lambda: rounds.append(1))
    assert recordings == [1]  # after the first tokens of the first run
