"""Guard bands keep a tensor's form, and notice what is written where nothing may be."""

import pytest
import torch
from emulator.guard_bands import GuardBands

WIDE = torch.randn(4, 12).half()


@pytest.mark.parametrize(
    "tensor",
    [
        WIDE,
        WIDE[:, 3:8],
        WIDE.T,
        WIDE[1, 5],
        WIDE[:0],
        WIDE[:, :1].expand(4, 3),
        torch.arange(5, dtype=torch.int32),
        torch.zeros(2, 3).to(torch.float8_e4m3fn),
    ],
    ids=lambda tensor: f"{tensor.dtype}-{tuple(tensor.shape)}-{tensor.stride()}",
)
def test_a_copy_has_the_values_strides_and_alignment(tensor):
    with GuardBands() as guard:
        copy = guard(tensor)
        assert copy.data_ptr() != tensor.data_ptr() or tensor.numel() == 0
        assert copy.stride() == tensor.stride() and copy.dtype == tensor.dtype
        assert (copy.data_ptr() - tensor.data_ptr()) % 64 == 0 or tensor.numel() == 0
        assert torch.equal(copy.float(), tensor.float())


def test_none_stays_none():
    assert GuardBands()(None) is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int32, torch.int8])
def test_an_output_may_be_written_and_holds_what_nobody_wrote(dtype):
    with GuardBands() as guard:
        out = guard.output((2, 3), dtype)
        assert out.is_contiguous()
        assert out.isnan().all() if dtype.is_floating_point else (out > 100).all()
        out.zero_()


def test_what_a_call_makes_is_an_output():
    with pytest.raises(AssertionError, match="written behind it"):
        with GuardBands() as guard:
            made = guard(WIDE).new_empty(2, 3, dtype=torch.float32)
            assert made.shape == WIDE.new_empty((2, 3)).shape and made.isnan().all()
            torch.as_strided(made, (1,), (1,), made.storage_offset() + 6).fill_(0.1)
    assert WIDE.new_empty(5).storage_offset() == 0, "outside of the block torch makes them"


@pytest.mark.parametrize(
    ("index", "where"), [(-1, "before"), (8, "behind"), (2, "inside"), (0, "inside")]
)
def test_notices_writes(index, where):
    with pytest.raises(AssertionError, match=f"written {where} it, first {4 * index}"):
        with GuardBands() as guard:
            given = torch.zeros(2, 4)[:, :2]
            whole = guard(given, mutated=index == 2)  # the gap between its rows is not its own
            begin = whole.storage_offset() + index
            torch.as_strided(whole, (1,), (1,), begin).fill_(0.1)


def test_an_error_inside_is_not_hidden():
    with pytest.raises(ZeroDivisionError), GuardBands() as guard:
        guard(torch.zeros(1)).fill_(1.0)
        raise ZeroDivisionError
