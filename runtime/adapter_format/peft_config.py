"""Reads PEFT's `adapter_config.json`: keeps the fields that change the maths, refuses unsupported ones by name."""

import math
import re
from collections.abc import Iterable, Mapping
from typing import Any

import msgspec

from runtime.adapter_format.errors import InvalidAdapter, shown
from runtime.adapter_format.replacements import (
    Bias,
    check_kinds,
    feedforward_modules,
    saved_modules,
    token_indices,
    trained_bias,
)
from runtime.adapter_format.safetensors_header import exact_json_object
from runtime.adapter_format.target_modules import ATOM, TargetModules

MAX_CONFIG_BYTES = 1024 * 1024
MAX_PATTERN_KEYS = 1024  # EVA writes one per module, and the largest dense models have fewer
MAX_PATTERN_KEY_CHARACTERS = 200
MAX_QUANTIFIERS = 2  # in one key; a match is then cubic in a module name's length at worst
MAX_QUANTIFIED_KEYS = 32
MAX_SCALE = 10_000.0  # far more than any trained adapter's; an alpha of 1e30 is an attack or an accident
MAX_ALPHA = MAX_SCALE * 1000

LORA, IA3 = "LORA", "IA3"
PLAIN_INITS = ("gaussian", "eva", "orthogonal", "mica")
# PEFT writes these fields for plain LoRA too, with a value that means "off", so a field's presence means nothing
REFUSED_FIELDS = {
    "use_qalora": "QALoRA is not supported",
    "kasa_config": "KaSA is not supported",
    "monteclora_config": "MonteCLoRA is not supported",
    "arrow_config": "Arrow routing is not supported",
    "use_bdlora": "BD-LoRA is not supported",
    "velora_config": "VeLoRA is not supported",
    "megatron_config": "Megatron layers are not supported",
    "layer_replication": "changes the base's layers, which others share",
    "target_parameters": "adapters of bare parameters (MoE experts) are not supported",
}
MERGING_INITS = ("pissa", "olora", "corda", "lora_ga")  # PEFT converts them
# fmt: off
IGNORED_FIELDS = frozenset({
    "task_type", "auto_mapping", "peft_version", "revision", "inference_mode",
    "lora_dropout", "fan_in_fan_out", "megatron_core", "loftq_config", "eva_config",
    "corda_config", "lora_ga_config", "qalora_group_size", "runtime_config",
})
# fmt: on

# Name characters, `.`, anchors, alternatives, `\.`, `\d` and plain classes, each optionally with `*` or `+`; no groups
_SIMPLE_KEY = re.compile(rf"(?:{ATOM}[*+]?|[\^$|])+")


class PeftConfig(msgspec.Struct, frozen=True, kw_only=True):
    """The fields of PEFT's LoRA or IA³ configuration that decide the maths, under PEFT's names."""

    r: int = 0  # as the next, of LoRA
    lora_alpha: float = 0.0
    ia3: bool = False
    feedforward_modules: tuple[str, ...] | None = None  # of IA³: ends of names; None if a pattern chooses them
    use_rslora: bool = False
    rank_pattern: dict[str, int] = {}  # by a pattern of module names; the first match in order counts
    alpha_pattern: dict[str, float] = {}  # the same
    lora_bias: bool = False
    use_dora: bool = False
    bias: Bias = "none"
    modules_to_save: tuple[str, ...] = ()
    trainable_token_indices: dict[str, tuple[int, ...]] = {}  # by the end of a module's name
    alora_invocation_tokens: tuple[int, ...] | None = None
    target_modules: TargetModules
    layers_to_transform: tuple[int, ...] | None = None
    ensure_weight_tying: bool = False
    base_model_name_or_path: str | None = None
    warnings: tuple[str, ...] = ()

    def scales(self, modules: Iterable[str]) -> dict[str, tuple[int, float]]:
        """Return the rank and the scale of each module, by the first pattern key that matches it.

        Raises InvalidAdapter for a scale above MAX_SCALE.
        """
        ranks, alphas = _Pattern(self.rank_pattern), _Pattern(self.alpha_pattern)
        result = {}
        for module in modules:
            rank = ranks.value(module, self.r)
            alpha = alphas.value(module, self.lora_alpha)
            scale = alpha / (math.sqrt(rank) if self.use_rslora else rank)
            if not 0.0 < scale <= MAX_SCALE:
                raise InvalidAdapter("lora_alpha", f"scales {module} by {scale:g}, expected at most {MAX_SCALE:g}")
            result[module] = (rank, scale)
        return result


class _Pattern:
    """A rank_pattern or an alpha_pattern: by PEFT's rule, the first key that matches a module has its value."""

    def __init__(self, values: Mapping[str, Any]) -> None:
        self._keys = [(re.compile(rf"(.*\.)?({key})$"), value) for key, value in values.items()]

    def value(self, module: str, default: Any) -> Any:
        return next((value for key, value in self._keys if key.match(module)), default)


def parse_peft_config(config: bytes | Mapping[str, Any], *, max_rank: int, vocab_size: int) -> PeftConfig:
    """Read an adapter's configuration from the file's bytes or from a mapping.

    Raises InvalidAdapter, naming the field, for a configuration that cannot be applied exactly.
    """
    if isinstance(config, bytes):
        if len(config) > MAX_CONFIG_BYTES:
            raise InvalidAdapter("adapter_config", f"has {len(config)} bytes, expected at most {MAX_CONFIG_BYTES}")
        config = exact_json_object(config, "adapter_config")
    _refuse_by_name(config)
    if config.get("peft_type") == IA3:
        return PeftConfig(
            ia3=True,
            feedforward_modules=feedforward_modules(config.get("feedforward_modules")),
            modules_to_save=saved_modules(config.get("modules_to_save")),
            target_modules=TargetModules(config),
            base_model_name_or_path=_base_model(config.get("base_model_name_or_path")),
            warnings=_unknown(config),
        )
    peft = PeftConfig(
        r=_rank("r", config.get("r"), max_rank),
        lora_alpha=_alpha("lora_alpha", config.get("lora_alpha")),
        use_rslora=_flag(config, "use_rslora"),
        rank_pattern={k: _rank(f"rank_pattern[{k}]", v, max_rank) for k, v in _keys(config, "rank_pattern")},
        alpha_pattern={k: _alpha(f"alpha_pattern[{k}]", v) for k, v in _keys(config, "alpha_pattern")},
        lora_bias=_flag(config, "lora_bias"),
        use_dora=_flag(config, "use_dora"),
        bias=trained_bias(config.get("bias")),
        modules_to_save=saved_modules(config.get("modules_to_save")),
        trainable_token_indices=token_indices(config.get("trainable_token_indices"), vocab_size),
        alora_invocation_tokens=_invocation_tokens(config.get("alora_invocation_tokens"), vocab_size),
        target_modules=TargetModules(config),
        layers_to_transform=_layers(config),
        ensure_weight_tying=_flag(config, "ensure_weight_tying"),
        base_model_name_or_path=_base_model(config.get("base_model_name_or_path")),
        warnings=_unknown(config),
    )
    check_kinds(
        alora=peft.alora_invocation_tokens is not None,
        dora=peft.use_dora,
        lora_bias=peft.lora_bias,
        bias=peft.bias,
        saved=bool(peft.modules_to_save),
        tokens=bool(peft.trainable_token_indices),
    )
    return peft


def _refuse_by_name(config: Mapping[str, Any]) -> None:
    kind = config.get("peft_type")
    if kind not in (None, LORA, IA3):
        raise InvalidAdapter("peft_type", f"is {shown(kind)}, expected {LORA} or {IA3}; train another adapter as LoRA")
    for name, reason in REFUSED_FIELDS.items():
        if config.get(name):
            raise InvalidAdapter(name, f"is {shown(config[name])}: {reason}")
    if config.get("invocation_string") is not None:
        raise InvalidAdapter(
            "invocation_string",
            "is the old aLoRA format; convert it: alora_invocation_tokens = tokenize(invocation_string)[1:]",
        )
    init = config.get("init_lora_weights")
    if isinstance(init, str) and init.lower().startswith("loftq"):
        reason = (
            "was trained on a base that LoftQ had changed: merge the two with merge_and_unload, and serve that base"
        )
        raise InvalidAdapter("init_lora_weights", f"is {shown(init)}: the adapter {reason}")
    if isinstance(init, str) and init.lower().startswith(MERGING_INITS):
        reason = "which changes the base; save the adapter as plain LoRA with PEFT"
        call = (
            "model.save_pretrained(directory, path_initial_model_for_weight_conversion=<the adapter before training>)"
        )
        raise InvalidAdapter("init_lora_weights", f"is {shown(init)}, {reason}: {call}")
    if init is not None and not isinstance(init, bool) and not (isinstance(init, str) and init.lower() in PLAIN_INITS):
        raise InvalidAdapter(
            "init_lora_weights", f"is {shown(init)}, expected a boolean or one of {', '.join(PLAIN_INITS)}"
        )


def _rank(field: str, value: object, max_rank: int) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise InvalidAdapter(field, f"is {shown(value)}, expected a positive integer")
    if value > max_rank:
        raise InvalidAdapter(field, f"is rank {shown(value)}, expected at most {max_rank}")
    return value


def _alpha(field: str, value: object) -> float:
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise InvalidAdapter(field, f"is {shown(value)}, expected a positive number")
    if not 0 < value <= MAX_ALPHA:
        raise InvalidAdapter(field, f"is {shown(value)}, expected a positive number of sane size")
    return float(value)


def _flag(config: Mapping[str, Any], field: str) -> bool:
    value = config.get(field)
    if value is not None and not isinstance(value, bool):
        raise InvalidAdapter(field, f"is {shown(value)}, expected true or false")
    return bool(value)


def _keys(config: Mapping[str, Any], field: str) -> Iterable[tuple[str, Any]]:
    """Return the items of a pattern; each key is checked to be a regular expression of bounded cost."""
    value = config.get(field)
    if value is None:
        return ()
    if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
        raise InvalidAdapter(field, f"is {shown(value)}, expected an object of module name patterns")
    if len(value) > MAX_PATTERN_KEYS:
        raise InvalidAdapter(field, f"has {len(value)} keys, expected at most {MAX_PATTERN_KEYS}")
    for key in value:
        _check_key(field, key)
    if sum("*" in key or "+" in key for key in value) > MAX_QUANTIFIED_KEYS:
        raise InvalidAdapter(field, f"has over {MAX_QUANTIFIED_KEYS} keys with * or +, expected module names")
    return value.items()


def _check_key(field: str, key: str) -> None:
    if len(key) > MAX_PATTERN_KEY_CHARACTERS or not _SIMPLE_KEY.fullmatch(key):
        raise InvalidAdapter(
            field, f"has the key {shown(key)!r}, expected a module name with no more than . ^ $ | \\. \\d [0-9] * +"
        )
    if key.count("*") + key.count("+") > MAX_QUANTIFIERS:
        raise InvalidAdapter(field, f"has the key {shown(key)!r}, expected at most {MAX_QUANTIFIERS} of * and +")
    try:
        re.compile(key)
    except re.error as error:
        raise InvalidAdapter(field, f"has the key {shown(key)!r}, which is not a pattern: {error}") from None


def _invocation_tokens(value: object, vocab_size: int) -> tuple[int, ...] | None:
    field = "alora_invocation_tokens"
    if value is None:
        return None
    if not isinstance(value, list | tuple) or not value:
        raise InvalidAdapter(field, f"is {shown(value)}, expected null or a non-empty list of token ids")
    for token in value:
        if not isinstance(token, int) or isinstance(token, bool) or not 0 <= token < vocab_size:
            raise InvalidAdapter(field, f"has {shown(token)}, expected token ids from 0 to {vocab_size - 1}")
    return tuple(value)


def _layers(config: Mapping[str, Any]) -> tuple[int, ...] | None:
    value = config.get("layers_to_transform")
    layers = [value] if isinstance(value, int) and not isinstance(value, bool) else value
    if layers is None or layers == []:
        return None
    if not isinstance(layers, list | tuple) or not all(isinstance(n, int) and not isinstance(n, bool) for n in layers):
        raise InvalidAdapter("layers_to_transform", f"is {shown(value)}, expected layer indices")
    return tuple(layers)


def _base_model(value: object) -> str | None:
    if value is not None and not isinstance(value, str):
        raise InvalidAdapter("base_model_name_or_path", f"is {shown(value)}, expected a string or null")
    return value or None


def _unknown(config: Mapping[str, Any]) -> tuple[str, ...]:
    """Return a warning for each unknown field that is set: it is ignored, as PEFT ignores it."""
    known = IGNORED_FIELDS | REFUSED_FIELDS.keys() | set(PeftConfig.__struct_fields__)
    known |= {
        "peft_type",
        "init_ia3_weights",
        "init_lora_weights",
        "invocation_string",
        "exclude_modules",
        "layers_pattern",
    }
    names = [name for name, value in config.items() if name not in known and value]
    return tuple(f"{shown(name)}: unknown field, ignored" for name in sorted(names))
