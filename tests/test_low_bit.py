"""Converters: each format's tensors become the layout, bit for bit what its own package makes."""

from pathlib import Path

import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from low_bit_folders import KINDS, Codes, Kind
from safetensors.torch import save_file
from tolerance import assert_same
from torch import Tensor

from mistral_kernels.model import stored_low_bit
from mistral_kernels.model.checkpoint_files import open_at_need, open_tensors, read_headers
from mistral_kernels.model.json_fields import JsonFields
from mistral_kernels.model.quantisation import read_quantisation
from mistral_kernels.model.stored_low_bit import StoredLowBit, take_low_bit
from mistral_kernels.model.weights import UNUSED_SCALES
from mistral_kernels.ops.low_bit import LowBit

KEY = "layers.0.attention.wo.weight"
SHAPE = (80, 96)
# compressed-tensors 0.20 reads act-order no more; the others say what they are to it, too.
COMPRESSED = {
    name: kind
    for name, kind in KINDS.items()
    if "config_groups" in kind.section and not kind.act_order
}


def taken(folder: Path, tensors: dict[str, Tensor], kind: Kind) -> StoredLowBit:
    """A matrix of these tensors, written to a file and found there."""
    path = folder / "model.safetensors"
    owner = KEY.removesuffix("weight")
    keyed = {owner + name: tensor.contiguous() for name, tensor in tensors.items()}
    save_file({k: t for k, t in keyed.items() if not UNUSED_SCALES.fullmatch(k)}, path)
    found = read_headers([path])
    quantisation = read_quantisation(JsonFields({"quantization": kind.section}))
    shape = tuple(tensors.get("weight_shape", torch.tensor(SHAPE)).tolist())
    with open_at_need() as read:
        stored = take_low_bit(found, KEY, shape, quantisation, read)
    assert not found, "every tensor has a use"
    return stored


def loaded(stored: StoredLowBit) -> LowBit:
    """The matrix in the layout, where every byte was another before."""
    target = stored.form.empty(stored.shape, "cpu")
    for tensor in target:
        if tensor is not None:
            tensor.view(torch.uint8).fill_(0xFF)
    with open_tensors(stored.path) as read:
        stored.copy_to(target, read)
    return target


def random_codes(kind: Kind) -> Codes:
    """Codes of a random matrix; zeros, where there are some, of every value that they can have."""
    codes = kind.round(torch.randn(SHAPE), torch.randperm(SHAPE[1]))
    zeros = torch.randint(2**kind.bits, codes.zeros.shape)
    return codes if kind.symmetric else codes._replace(zeros=zeros)


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_against_the_formula(tmp_path: Path, kind: Kind, monkeypatch: pytest.MonkeyPatch) -> None:
    codes = random_codes(kind)
    stored = taken(tmp_path, kind.tensors(codes), kind)
    for chunk in (1, 24 * SHAPE[1], 10**6):
        monkeypatch.setattr(stored_low_bit, "CHUNK", chunk)
        low = loaded(stored)
        assert_same(low.dequantise(torch.float64), codes.exact(), f"{chunk}")
        wide = torch.full(SHAPE, torch.nan, dtype=torch.float64)
        with open_tensors(stored.path) as read:
            stored.copy_to(wide, read)
        assert_same(wide, codes.exact(), f"{chunk}")
    assert low.scales.dtype == kind.scales and low.bits == kind.bits
    assert (low.zeros is None) == kind.symmetric and (low.perm is None) == (not kind.act_order)


@pytest.mark.parametrize("kind", COMPRESSED.values(), ids=COMPRESSED)
def test_against_compressed_tensors(tmp_path: Path, kind: Kind) -> None:
    weights = kind.section["config_groups"]["group_0"]["weights"]
    scheme = QuantizationScheme(targets=["Linear"], weights=QuantizationArgs(**weights))
    compressor = BaseCompressor.get_value_from_registry(kind.section["format"])
    tensors = kind.tensors(random_codes(kind))
    peer = compressor.decompress(dict(tensors), scheme)["weight"]
    assert_same(loaded(taken(tmp_path, tensors, kind)).dequantise(peer.dtype), peer, "weight")


@pytest.mark.parametrize("name", ["packed", "packed-zeros", "packed-8-bits-rows"])
def test_what_compressed_tensors_writes(tmp_path: Path, name: str) -> None:
    """Of a number of rows that fills no word of zero points."""
    kind, shape = KINDS[name], (75, 96)
    weights = kind.section["config_groups"]["group_0"]["weights"]
    scheme = QuantizationScheme(targets=["Linear"], weights=QuantizationArgs(**weights))
    compressor = BaseCompressor.get_value_from_registry(kind.section["format"])
    groups = (shape[0], shape[1] // (kind.size or shape[1]))
    half = 2 ** (kind.bits - 1)
    zeros = torch.randint(-half, half, groups, dtype=torch.int8)
    state = {
        "weight": torch.randn(shape, dtype=kind.scales),
        "weight_scale": torch.rand(groups).to(kind.scales) / half,
        "weight_zero_point": zeros * (not kind.symmetric),
    }
    tensors = compressor.compress(state, scheme)
    peer = compressor.decompress(dict(tensors), scheme)["weight"]
    assert_same(loaded(taken(tmp_path, tensors, kind)).dequantise(peer.dtype), peer, "weight")
