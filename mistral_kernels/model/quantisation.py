"""How a checkpoint says that its weights are in few bits: `quantization_config`, `quantization`.

A configuration names a method and its numbers. What a weight really is, the headers of the files
tell (`low_bit_files`), and the two have to agree.

Sources: AwqConfig, GPTQConfig and FineGrainedFP8Config in transformers 5.23; QuantizeConfig in
gptqmodel 7.7; QuantizationConfig and QuantizationArgs in compressed-tensors 0.20; for
`qformat_weight` vLLM's transformers_utils/configs/mistral.py.
"""

from dataclasses import dataclass
from typing import Any

from mistral_kernels.model.json_fields import JsonFields

METHODS = ("awq", "gptq", "compressed-tensors", "fp8")
# How compressed-tensors stores 4 or 8 bits; the key of each in `low_bit_files.FORMATS`.
COMPRESSED_FORMATS = {
    "pack-quantized": "packed",
    "int-quantized": "plain",
    "float-quantized": "plain",
    "naive-quantized": "plain",
}


@dataclass(frozen=True)
class Quantisation:
    """How all low-bit weights of a checkpoint are stored.

    Args:
        method: as the configuration names it.
        storage: key of `low_bit_files.FORMATS`.
        bits: 4 or 8.
        floating: codes are FP8, else integers.
        group_size: columns that share a scale; None: all of a row, or of the matrix.
        block_rows: rows that share a scale besides; None: as the files have them.
        symmetric: there are no zero points.
        act_order: columns belong to groups out of order, and a tensor tells which.
        note: what of it has no effect here.
    """

    method: str
    storage: str
    bits: int = 8
    floating: bool = False
    group_size: int | None = None
    block_rows: int | None = None
    symmetric: bool = True
    act_order: bool = False
    note: str = ""

    def __str__(self) -> str:
        kind = "FP8" if self.floating else f"{self.bits} bits"
        groups = f"groups of {self.group_size}" if self.group_size else "a scale for each row"
        parts = [self.method, kind]
        if self.group_size or not self.floating:
            parts.append(groups)
        parts += ["zero points"] * (not self.symmetric) + ["act-order"] * self.act_order
        return ", ".join(parts)


def read_quantisation(fields: JsonFields) -> Quantisation | None:
    """Reads what a `config.json` or `params.json` says of quantised weights.

    Args:
        fields: the file's items, or those of the part that describes the text model.

    Returns:
        How the weights are stored, None if nothing is said.

    Raises:
        ValueError: the method is not supported, or a value is missing or malformed; the key is
            named.
    """
    found = [fields.section(key) for key in ("quantization_config", "quantization")]
    sections = [section for section in found if section]
    if not sections:
        return None
    if sections[1:]:
        raise ValueError(f"{sections[1].path}: there is a {sections[0].path} as well")
    (section,) = sections
    if "qformat_weight" in section:
        section.choice("qformat_weight", ("fp8_e4m3",))
        # NO_SCALES: nothing is stored for activations. They are not quantised here in either case.
        section.choice("qscheme_act", ("TENSOR", "NO_SCALES"), "TENSOR")
        return Quantisation("fp8", "plain", floating=True)
    readers = (_awq, _gptq, _compressed_tensors, _fp8)
    method = section.choice("quant_method", METHODS)
    section.refuse("rotation", "models that rotate what goes into w2 are not supported")
    return readers[METHODS.index(method)](section)


def find_quantisation(values: dict[str, Any]) -> Quantisation | None:
    """The same of all items of a file, whose text part may hold it; arguments are checked alike."""
    fields = JsonFields(values)
    parts = (fields, fields.section("text_config"))
    return next(filter(None, (read_quantisation(part) for part in parts if part)), None)


def _awq(section: JsonFields) -> Quantisation:
    bits = _bits(section, (4,))
    # Of the older form, "GEMM"; of gptqmodel's, "gemm". Other versions order the codes otherwise.
    key = "format" if "format" in section and "version" not in section else "version"
    section.choice(key, ("gemm", "GEMM"))
    section.refuse("desc_act", "awq has no act-order")
    # The files have zeros either way: gptqmodel says false where all of them are the middle.
    symmetric = not section.flag("zero_point", True)
    return Quantisation("awq", "awq", bits, group_size=_group_size(section), symmetric=symmetric)


def _gptq(section: JsonFields) -> Quantisation:
    bits = _bits(section, (4, 8))
    # Files without either key are older than v2.
    key = "checkpoint_format" if "checkpoint_format" in section else "format"
    stored = section.choice(key, ("gptq", "gptq_v2"), "gptq")
    section.choice("pack_dtype", ("int32",), "int32")
    return Quantisation(
        "gptq",
        stored,
        bits,
        group_size=_group_size(section),
        symmetric=section.flag("sym", True),
        act_order=section.flag("desc_act", False),
        note="activations" if section.get("activation", None) else "",
    )


def _fp8(section: JsonFields) -> Quantisation:
    section.choice("activation_scheme", ("static", "dynamic"), "dynamic")
    rows, columns = _block(section, "weight_block_size") or (None, None)
    return Quantisation("fp8", "plain", floating=True, group_size=columns, block_rows=rows)


def _compressed_tensors(section: JsonFields) -> Quantisation:
    # Early exports say frozen though what they hold is compressed; the headers tell.
    section.choice("quantization_status", ("compressed", "frozen"), "compressed")
    sparsity = section.section("sparsity_config")
    if sparsity and sparsity.get("format", "dense") != "dense":
        raise sparsity.error("format", "dense: sparse weights are not supported")
    section.refuse("transform_config", "transformed weights are not supported")
    groups = section.section("config_groups")
    if groups is None:
        raise ValueError(f"{section.name('config_groups')}: missing")
    schemes = {_compressed_group(section, groups, name): name for name in groups.values}
    if len(schemes) > 1:
        raise ValueError(f"{groups.path}: expected weights of one kind, got {len(schemes)} kinds")
    return next(iter(schemes))


def _compressed_group(section: JsonFields, groups: JsonFields, name: str) -> Quantisation:
    """One group of modules; several are the same but for the modules that they mean."""
    group = groups.section(name)
    weights = group.section("weights") if group else None
    if weights is None:
        raise ValueError(f"{groups.name(name)}.weights: missing")
    owner = group if group.get("format", None) is not None else section
    stored = owner.choice("format", COMPRESSED_FORMATS)
    floating = weights.choice("type", ("int", "float"), "int") == "float"
    if floating != (stored == "float-quantized") and stored != "naive-quantized":
        raise weights.error("type", f"{'int' if floating else 'float'} for {stored}")
    bits = _bits(weights, (8,) if floating else (4, 8), "num_bits")
    if weights.get("dynamic", False):
        raise weights.error("dynamic", "false")
    columns, rows = _compressed_strategy(weights)
    order = weights.get("actorder", None)
    act_order = order in ("group", "dynamic")
    if order not in (None, False, "weight", "static") and not act_order:
        raise weights.error("actorder", "weight, group or null")
    if act_order and (stored != "pack-quantized" or columns is None):
        raise weights.error("actorder", f"null or weight for {stored} without groups")
    symmetric = weights.flag("symmetric", True)
    if floating and not symmetric:
        raise weights.error("symmetric", "true for float weights")
    activations = any(group.get(key, None) for key in ("input_activations", "output_activations"))
    notes = ["activations"] * activations
    notes += ["keys and values"] * bool(section.get("kv_cache_scheme", None))
    return Quantisation(
        "compressed-tensors",
        COMPRESSED_FORMATS[stored],
        bits,
        floating,
        columns,
        rows,
        symmetric,
        act_order,
        " and ".join(notes),
    )


def _compressed_strategy(weights: JsonFields) -> tuple[int | None, int | None]:
    """Columns and rows that share a scale, None: all of a row; as the files have them."""
    size = weights.get("group_size", None)
    implied = "tensor" if size is None else "channel" if size == -1 else "group"
    strategy = weights.choice("strategy", ("tensor", "channel", "group", "block"), implied)
    if strategy != "group" and size not in (None, -1):
        raise weights.error("group_size", f"null for strategy {strategy}")
    if strategy != "block":
        weights.refuse("block_structure", f"strategy {strategy} has no blocks")
    if strategy == "group":
        return weights.integer("group_size"), None
    if strategy == "block":
        rows, columns = _block(weights, "block_structure", required=True)
        return columns, rows
    return None, None


def _block(section: JsonFields, key: str, *, required: bool = False) -> list[int] | None:
    """The two sizes of a block, rows and columns."""
    value: Any = section.get(key) if required else section.get(key, None)
    if value is None:
        return None
    if (
        not isinstance(value, list)
        or len(value) != 2
        or any(type(size) is not int or size < 1 for size in value)
    ):
        raise section.error(key, "two integers >= 1")
    return value


def _bits(section: JsonFields, allowed: tuple[int, ...], key: str = "bits") -> int:
    # AutoAWQ's own files say w_bit and q_group_size; those on the hub say bits and group_size.
    bits = section.get(key)
    if type(bits) is not int or bits not in allowed:
        raise section.error(key, " or ".join(map(str, allowed)))
    return bits


def _group_size(section: JsonFields) -> int | None:
    """Columns that share a scale; -1, all of a row, becomes None."""
    if section.get("group_size") == -1:
        return None
    return section.integer("group_size")
