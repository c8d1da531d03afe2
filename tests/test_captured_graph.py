"""Capturing a graph, with torch's part played: one at a time, and what a failed one leaves."""

import contextlib
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from mistral_kernels.model.step_graphs import CapturedGraph

POOL = (0, 1)


class Cuda:
    """As much of torch.cuda as a capture asks for, with its rule of one capture at a time."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.current, self.captures, self.fails = "default", 0, False
        self._busy = threading.Lock()
        for name in ("stream", "graph"):
            monkeypatch.setattr(torch.cuda, name, getattr(self, name))
        monkeypatch.setattr(torch.cuda, "CUDAGraph", object)

    @contextlib.contextmanager
    def stream(self, stream):
        before, self.current = self.current, stream
        try:
            yield
        finally:
            self.current = before

    @contextlib.contextmanager
    def graph(self, graph, *, pool, stream, capture_error_mode):
        assert self._busy.acquire(blocking=False), "another capture is under way"
        assert (pool, capture_error_mode) == (POOL, "thread_local")
        self.current, self.captures = stream, self.captures + 1
        try:
            yield
        finally:
            self._busy.release()
        if self.fails:  # torch's capture_end raises before its stream is put back
            raise RuntimeError("operation not permitted when stream is capturing")
        self.current = "default"


def test_threads_capture_one_after_another(monkeypatch):
    cuda, inside = Cuda(monkeypatch), threading.Event()

    def slow() -> None:
        inside.set()
        assert not threading.Event().wait(0.05)  # the other thread has that long to break in

    def second() -> None:
        assert inside.wait(10)
        CapturedGraph(lambda: None, POOL, "b")

    with ThreadPoolExecutor(2) as pool:
        for done in [pool.submit(CapturedGraph, slow, POOL, "a"), pool.submit(second)]:
            done.result()
    assert cuda.captures == 2


def test_a_failed_capture_leaves_no_trace(monkeypatch):
    cuda = Cuda(monkeypatch)
    cuda.fails = True
    with pytest.raises(RuntimeError, match="not permitted"):
        CapturedGraph(lambda: None, POOL, "side")
    assert cuda.current == "default"
    cuda.fails = False
    CapturedGraph(lambda: None, POOL, "side")
    assert cuda.captures == 2
