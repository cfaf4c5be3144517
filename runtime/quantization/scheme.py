"""What a checkpoint's `quantization_config` says, and which of it this engine reads.

Only weights are taken as quantised. Activations and K/V stay in the engine's own dtypes, whatever the configuration
says of them; that is more exact than what it asks for, and the log says it.
"""

from typing import Any, NoReturn

import msgspec

METHODS = ("awq", "bitsandbytes", "compressed-tensors", "fbgemm_fp8", "fp8", "gptq")
PACKED_FORMATS = ("pack-quantized", "int-quantized", "float-quantized", "naive-quantized", "mixed-precision", "dense")
PACKED_BITS = (2, 4, 8)  # of which a word of 32 bits holds a whole number
NF4_GROUP = 64  # of bitsandbytes; its files say whether it is


class UnsupportedQuantization(ValueError):
    """The message names the field, its value and what is supported."""


class Scheme(msgspec.Struct, frozen=True, kw_only=True):
    """How the tensors of quantised modules are to be read; which modules they are, the files say."""

    method: str  # one of METHODS
    bits: int | None = None  # of awq and gptq; other formats say it by their shapes
    group: int = -1  # inputs with one scale; -1: all, or the configuration does not say
    block: tuple[int, int] | None = None  # outputs and inputs with one scale, of 8-bit floats; None: not in blocks
    stored_zeros_less_one: bool = False  # gptq's first format holds each zero point minus 1
    notes: tuple[str, ...] = ()  # what is not computed as the configuration says

    @property
    def together(self) -> int:
        """Neighbouring inputs with one scale, as far as the configuration says."""
        return self.group if self.block is None else self.block[1]


def read_scheme(config: dict[str, Any]) -> Scheme:
    """Raises UnsupportedQuantization."""
    method = config.get("quant_method")
    if method == "awq":
        return _awq(config)
    if method == "gptq":
        return _gptq(config)
    if method == "fp8":
        return _fp8(config)
    if method == "fbgemm_fp8":
        return Scheme(method=method, notes=(_activations("dynamic"),))
    if method == "bitsandbytes":
        return _bitsandbytes(config)
    if method == "compressed-tensors":
        return _compressed_tensors(config)
    _refuse("quant_method", method, ", ".join(METHODS))


def _awq(config: dict[str, Any]) -> Scheme:
    _choose(config, "bits", 4, (4,))
    _choose(config, "version", "gemm", ("gemm",))
    return Scheme(method="awq", bits=4, group=_group(config))


def _gptq(config: dict[str, Any]) -> Scheme:
    bits = _choose(config, "bits", 4, PACKED_BITS)
    form = _choose(config, "checkpoint_format", "gptq", ("gptq", "gptq_v2"))
    overrides = [pattern for pattern in config.get("dynamic") or {} if not pattern.startswith("-:")]
    if overrides:
        _refuse("dynamic", overrides, "none, or patterns of modules that are left out (-:)")
    return Scheme(method="gptq", bits=bits, group=_group(config), stored_zeros_less_one=form == "gptq")


def _fp8(config: dict[str, Any]) -> Scheme:
    _choose(config, "fmt", "e4m3", ("e4m3", "float8_e4m3fn"))
    scheme = config.get("activation_scheme", "dynamic")
    return Scheme(method="fp8", block=_block(config, "weight_block_size"), notes=(_activations(scheme),))


def _bitsandbytes(config: dict[str, Any]) -> Scheme:
    if not config.get("load_in_4bit") and not config.get("load_in_8bit"):
        _refuse("load_in_4bit", config.get("load_in_4bit"), "true, or load_in_8bit true")
    notes = (_activations("LLM.int8"),) if config.get("load_in_8bit") else ()
    return Scheme(method="bitsandbytes", group=NF4_GROUP if config.get("load_in_4bit") else -1, notes=notes)


def _compressed_tensors(config: dict[str, Any]) -> Scheme:
    _choose(config, "format", "dense", PACKED_FORMATS)
    _choose(config.get("sparsity_config") or {}, "format", "dense", ("dense",), "sparsity_config.")
    if config.get("transform_config"):
        _refuse("transform_config", config["transform_config"], "null: weights that were not rotated")
    notes, blocks, sizes = [], set(), set()
    for name, group in (config.get("config_groups") or {}).items():
        where = f"config_groups.{name}."
        _choose(group, "format", None, (None, *PACKED_FORMATS), where)
        weights = group.get("weights") or {}
        kind = _choose(weights, "type", "int", ("int", "float"), f"{where}weights.")
        widths = PACKED_BITS if kind == "int" else (8,)
        _choose(weights, "num_bits", 8, widths, f"{where}weights.")
        blocks.add(_block(weights, "block_structure", f"{where}weights."))
        sizes.add(_group({"group_size": weights.get("group_size") or -1}, f"{where}weights."))
        for field in ("input_activations", "output_activations"):
            if group.get(field):
                notes.append(_activations(f"{group[field].get('num_bits')} bits", f"{where}{field}"))
    if config.get("kv_cache_scheme"):
        notes.append("kv_cache_scheme is not followed: K/V stay in the engine's dtype")
    blocks.discard(None)
    if len(blocks) > 1:
        _refuse("config_groups", sorted(blocks), "blocks of one shape")  # type: ignore[type-var]
    return Scheme(
        method="compressed-tensors",
        group=sizes.pop() if len(sizes) == 1 else -1,
        block=blocks.pop() if blocks else None,
        notes=tuple(notes),
    )


def _group(config: dict[str, Any], where: str = "") -> int:
    group = config.get("group_size", 128)
    if not isinstance(group, int) or (group < 1 and group != -1):
        _refuse(where + "group_size", group, "a positive number, or -1 for one scale a column")
    return group


def _block(config: dict[str, Any], field: str, where: str = "") -> tuple[int, int] | None:
    block = config.get(field)
    if block is None:
        return None
    if not isinstance(block, list) or len(block) != 2 or not all(isinstance(size, int) and size > 0 for size in block):
        _refuse(where + field, block, "null, or two positive numbers")
    return block[0], block[1]


def _activations(how: str, field: str = "activations") -> str:
    return f"{field} ({how}) are not quantised: only the weights are"


def _choose(config: dict[str, Any], field: str, default: Any, supported: tuple[Any, ...], where: str = "") -> Any:
    value = config.get(field, default)
    if isinstance(value, str):
        value = value.lower()
    if value not in supported:
        _refuse(where + field, value, ", ".join(str(one) for one in supported if one is not None))
    return value


def _refuse(field: str, value: object, supported: str) -> NoReturn:
    raise UnsupportedQuantization(
        f"quantization_config: {field} is {value!r}, which is not supported; supported: {supported}. A checkpoint in "
        "16 bits can be quantised while it is loaded (--quantization)"
    )
