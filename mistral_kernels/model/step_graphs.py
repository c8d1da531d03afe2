"""CUDA graphs of decode steps: whether a model's can be captured, their memory, and their life."""

from __future__ import annotations

import functools
import logging
import threading
from collections.abc import Callable, Collection, Mapping
from typing import TYPE_CHECKING

import torch

from mistral_kernels.model.backends import op_backends
from mistral_kernels.model.cache import KVCache
from mistral_kernels.model.config import ModelConfig
from mistral_kernels.model.module_state import ModuleState, others_take_part
from mistral_kernels.ops.checks import compute_dtype
from mistral_kernels.ops.dispatch import OPS

if TYPE_CHECKING:
    from mistral_kernels.model.transformer import Transformer

logger = logging.getLogger("mistral_kernels")

OF_PROMPTS = {"rope_", "store_kv_", "prefill_attention"}  # ops that no decode step calls
ONE_CAPTURE = threading.Lock()  # torch allows one at a time in a process
CUBLAS_BYTES = 32 << 20  # torch's workspace of cuBLAS for one stream, on Hopper; elsewhere 8 MB


def capture_refusal(model: Transformer, cache: KVCache) -> str | None:
    """Why the steps of a model on a cache cannot be captured in CUDA graphs; None if they can."""
    if not model.use_graphs:
        return "model.use_graphs is False"
    if model.device.type != "cuda":
        return f"a CUDA graph needs a GPU, but the model is on {model.device}"
    if others_take_part(model):
        return "a hook, a module or an op is the caller's own"
    how = {"device": model.device, "dtype": model.dtype, "backend": model.backend}
    serving = op_backends(model.config, **how, low_bit=model.low_bit)
    for layer in cache.layers:
        if layer.decode is not None:
            serving["decode_attention"].add(layer.decode.backend)
    waiting = waiting_ops(serving)
    return f"{', '.join(waiting)} waits for the GPU" if waiting else None


def waiting_ops(serving: Mapping[str, Collection[str]]) -> list[str]:
    """The ops of a decode step, among op -> backends, whose host waits for the device."""
    return [
        f"{op} on {backend}"
        for op in sorted(serving.keys() - OF_PROMPTS)
        for backend in sorted(serving[op])
        if OPS[op][backend].waits
    ]


def graph_bytes(config: ModelConfig, dtype: torch.dtype, rows: int) -> int:
    """About the bytes that captured steps with up to `rows` rows keep, whatever the cache holds.

    Of a layer those vectors of a row that live at once; of sampling with a temperature the logits
    and eight more such rows in float64; cuBLAS's workspace for the stream of the captures.
    """
    wide = (config.q_heads + 2 * config.kv_heads) * config.head_dim
    wide += 3 * max(config.top_k, 1) * config.ffn_dim
    row = (4 * config.hidden + wide) * dtype.itemsize
    row += config.vocab * (compute_dtype(dtype).itemsize + 8 * torch.float64.itemsize)
    return rows * row + CUBLAS_BYTES


class StepGraphs:
    """How one model's steps are launched on one cache.

    Attributes:
        refusal: why not as CUDA graphs, None if so.
    """

    def __init__(self, model: Transformer, cache: KVCache):
        self.refusal = capture_refusal(model, cache)
        self._model, self._choices = model, _choices(model)
        self._state = None
        if self.refusal is None:
            self._state = ModuleState(model)
            # All graphs take their memory from one pool: no two run at once, and what one keeps for
            # the next step lies outside.
            self._pool = torch.cuda.graph_pool_handle()
        elif model.device.type == "cuda":
            logger.info("decode steps are not captured in CUDA graphs: %s", self.refusal)

    def fit(self, model: Transformer) -> bool:
        """Whether it is the same model, with the same ops, and its weights lie where they did.

        Weights that were changed in place, as `load_lora` does, a graph reads as they are now.
        """
        same = model is self._model and _choices(model) == self._choices
        return same and (self._state is None or self._state.unchanged())

    def capture(self, compute: Callable[[], None]) -> CapturedGraph:
        stream = capture_stream(self._model.device, threading.get_ident())
        return CapturedGraph(compute, self._pool, stream)


@functools.cache
def capture_stream(device: torch.device, thread: int) -> torch.cuda.Stream:
    """The stream on which a thread captures all its steps, and on which nothing ever runs.

    The first capture brings in a workspace of cuBLAS, which torch keeps for good for each thread
    and stream: another stream for each cache would take more of them. A step that ran here would
    use this one while another thread replays a graph that does.
    """
    return torch.cuda.Stream(device)


def _choices(model: Transformer) -> list:
    return [model.use_graphs, *model.kernels.values()]


class CapturedGraph:
    """What a function launches, ready to be launched again. Capturing it computes nothing.

    The function must have run before in this thread: a capture can neither compile a kernel nor
    make cuBLAS's handle.
    """

    def __init__(self, compute: Callable[[], None], pool: tuple[int, int], stream):
        self._graph = torch.cuda.CUDAGraph()
        # thread_local: what other threads do on the GPU meanwhile is none of the graph's business.
        how = {"pool": pool, "stream": stream, "capture_error_mode": "thread_local"}
        # torch.cuda.graph leaves its stream current when a capture fails.
        with ONE_CAPTURE, torch.cuda.stream(stream), torch.cuda.graph(self._graph, **how):
            compute()

    def replay(self) -> None:
        self._graph.replay()
