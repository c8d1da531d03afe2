"""Faults planted in the other shipped CUDA kernels fail the tests that those kernels pass.

`test_decode_attention_faults.py` has those of the one kernel whose blocks talk to each other.
"""

from collections.abc import Callable
from types import ModuleType
from typing import NamedTuple

import pytest
import test_expert_mlp_emulated as expert_mlp
import test_expert_mlp_low_bit_emulated as expert_mlp_low_bit
import test_linear_low_bit_emulated as linear_low_bit
import test_rms_norm_emulated as rms_norm
import test_rope_emulated as rope
import test_route_experts_emulated as route_experts
import test_silu_mul_emulated as silu_mul
import test_store_kv_emulated as store_kv
import torch
from emulator.host_build import CSRC, build_core, load, missing
from emulator.orders import ORDERS, ordered
from emulator.planted_faults import Fault, plant
from low_bit_cases import KINDS

pytestmark = pytest.mark.skipif(missing() is not None, reason=str(missing()))
CUDA = CSRC / "cuda"
ROWS = CUDA / "low_bit_rows.cuh"
BF16 = torch.bfloat16
BARRIER = "  __syncthreads();\n"
WIDE_EXPERT = expert_mlp.SIZES[-2]  # k of several turns of all warps


class Planted(NamedTuple):
    tests: ModuleType
    fault: Fault
    noticed_by: Callable[[], None]  # in one of the orders


FAULTS = [
    Planted(
        rms_norm,
        Fault("barrier removed", {BARRIER: ""}, CUDA / "reduce.cuh"),
        lambda: rms_norm.test_rms_norm(3, 4096, BF16),
    ),
    Planted(
        rope,
        Fault("index off by one", {": pair + kGroup;": ": pair + kGroup - 1;"}),
        lambda: rope.test_every_head_dim(64, BF16, False),
    ),
    Planted(
        rope,
        Fault("mask missing", {"if (position >= 0) {": "{"}),
        lambda: rope.test_every_head_dim(64, BF16, True),
    ),
    Planted(
        store_kv,
        Fault("index off by one", {"cu_seqlens[i + 1] <= token": "cu_seqlens[i + 1] < token"}),
        lambda: store_kv.test_sequences_around_a_warp(33),
    ),
    Planted(
        store_kv,
        Fault(
            "mask missing",
            {" || token < args.cu_seqlens[sequence + 1] - int64_t{capacity}": ""},
        ),
        lambda: store_kv.test_store_kv(store_kv.CHUNKS[9], "head-major"),
    ),
    Planted(
        route_experts,
        Fault("index off by one", {"rank < last": "rank <= last"}),
        lambda: route_experts.test_route_experts(5, 8, 8, BF16),
    ),
    Planted(
        route_experts,
        Fault("mask missing", {"positions[token] < 0": "false"}),
        lambda: route_experts.test_idle_rows(8, 2, BF16),
    ),
    Planted(
        silu_mul,
        Fault("mask missing", {"if (i < count) to[i]": "to[i]"}, CUDA / "vector.cuh"),
        lambda: silu_mul.test_rows_around_a_vector_and_a_block(9, BF16),
    ),
    Planted(
        expert_mlp,
        Fault("barrier removed", {"no barrier\n  }\n" + BARRIER: "no barrier\n  }\n"}),
        lambda: expert_mlp.test_sizes(WIDE_EXPERT, BF16),
    ),
    Planted(
        expert_mlp,
        Fault("chunk of another warp", {"rows.advance(shares * kChunk)": "rows.advance(kChunk)"}),
        lambda: expert_mlp.test_sizes(WIDE_EXPERT, BF16),
    ),
    Planted(
        expert_mlp,
        Fault(
            "expert of another slot",
            {"ids[token * top_k + slot]": "ids[token * top_k + top_k - 1 - slot]"},
            CUDA / "expert_sums.cuh",
        ),
        lambda: expert_mlp.test_sizes(expert_mlp.SIZES[3], BF16),
    ),
    Planted(
        linear_low_bit,
        Fault("wait for too few", {"wait_copies<kRingSteps - 1>": "wait_copies<kRingSteps>"}, ROWS),
        lambda: linear_low_bit.test_kinds(KINDS["int8-row"], BF16),
    ),
    Planted(
        linear_low_bit,
        Fault("scale of another group", {"{(k + unit) / group": "{k / group"}, ROWS),
        lambda: linear_low_bit.test_kinds(KINDS["int4-g32"], BF16),
    ),
    Planted(
        linear_low_bit,
        Fault("zero of another group", {"own.zero[0], lane": "own.zero[0], 0"}, ROWS),
        lambda: linear_low_bit.test_kinds(KINDS["int4-g32-act-order"], BF16),
    ),
    Planted(
        linear_low_bit,
        Fault("mask missing", {"k + i * Layout::kChunk < size_, x[i]": "true, x[i]"}, ROWS),
        lambda: linear_low_bit.test_sizes((2, 96, 16), KINDS["int4-g32"], BF16),
    ),
    Planted(
        expert_mlp_low_bit,
        Fault("barrier removed", {"no barrier\n  }\n" + BARRIER: "no barrier\n  }\n"}),
        lambda: expert_mlp_low_bit.test_kinds("int8-g128"),
    ),
    Planted(
        expert_mlp_low_bit,
        Fault("perm of another expert", {"w2.perm + int64_t{expert} * ffn_dim": "w2.perm"}),
        lambda: expert_mlp_low_bit.test_kinds("int4-g32-act-order"),
    ),
]


@pytest.mark.parametrize(
    ("tests", "fault", "noticed_by"),
    FAULTS,
    ids=[f"{tests.__name__[5:-9]}-{fault.name}" for tests, fault, _ in FAULTS],
)
def test_notices(tests, fault, noticed_by, monkeypatch):
    source = CUDA / f"{tests.__name__.removeprefix('test_').removesuffix('_emulated')}.cu"
    core = load("_C", build_core(planted=plant(source, fault)))
    monkeypatch.setattr(tests, "emulated_core", lambda: core)
    with pytest.raises(AssertionError):
        for order in ORDERS:
            with ordered(core.__file__, order):
                noticed_by()
