"""Reads PEFT's `adapter_config.json`: keeps the fields that change the maths, refuses unsupported ones by name."""

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import msgspec

from runtime.adapter_format.errors import CONVERT, MERGE, InvalidAdapter, shown
from runtime.adapter_format.patterns import Question, answers
from runtime.adapter_format.replacements import (
    Bias,
    check_kinds,
    feedforward_modules,
    saved_modules,
    target_parameters,
    token_indices,
    trained_bias,
)
from runtime.adapter_format.safetensors_header import exact_json_object
from runtime.adapter_format.target_modules import TargetModules

MAX_CONFIG_BYTES = 1024 * 1024
MAX_PATTERN_KEYS = 1024  # EVA writes one per module, and the largest dense models have fewer
MAX_SCALE = 10_000.0  # far more than any trained adapter's; an alpha of 1e30 is an attack or an accident
MAX_ALPHA = MAX_SCALE * 1000

LORA, IA3 = "LORA", "IA3"
PLAIN_INITS = ("gaussian", "eva", "orthogonal", "mica")
ZERO_INITS = (None, True, "gaussian", "eva", "mica")  # B·A begins at zero
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
}
# PEFT's own conversion writes the difference from the base as it was before the initialisation
BY_PEFT = "convert it with PEFT: save_pretrained(..., path_initial_model_for_weight_conversion=INITIAL_ADAPTER)"
BY_LOFTQ = "serve the base that LoftQ wrote beside it, and set init_lora_weights to true"
CORRECTED = (0, 19, 1)  # the version of PEFT since which A reads the inputs of experts' parameters
MERGING_INITS = ("pissa", "olora", "corda", "loftq", "lora_ga")
# fmt: off
IGNORED_FIELDS = frozenset({
    "task_type", "auto_mapping", "peft_version", "revision", "inference_mode",
    "lora_dropout", "fan_in_fan_out", "megatron_core", "loftq_config", "eva_config",
    "corda_config", "lora_ga_config", "qalora_group_size", "runtime_config",
})
# fmt: on


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
    target_parameters: tuple[str, ...] = ()  # ends of the names of bare parameters, such as those of all experts
    swaps_experts: bool = False  # whether the PEFT that wrote it took the inputs of such parameters for the outputs
    ensure_weight_tying: bool = False
    starts_at_zero: bool = True  # what PEFT gives a module whose tensors are not in the file
    base_model_name_or_path: str | None = None
    base_class: str | None = None  # of the base, which PEFT writes if the configuration has no task_type
    warnings: tuple[str, ...] = ()

    def scales(self, modules: Sequence[str]) -> dict[str, tuple[int, float]]:
        """Return the rank and the scale of each module, by the first pattern key that matches it (`get_pattern_key`).

        Raises InvalidAdapter for a scale above MAX_SCALE, and for a pattern.
        """
        questions = (
            Question("rank_pattern", tuple(self.rank_pattern), r"(.*\.)?(", ")$"),
            Question("alpha_pattern", tuple(self.alpha_pattern), r"(.*\.)?(", ")$"),
        )
        ranks, alphas = tuple(self.rank_pattern.values()), tuple(self.alpha_pattern.values())
        result = {}
        for module, rank_key, alpha_key in zip(modules, *answers(questions, tuple(modules)), strict=True):
            rank = self.r if rank_key is None else ranks[rank_key[0]]
            alpha = self.lora_alpha if alpha_key is None else alphas[alpha_key[0]]
            scale = alpha / (math.sqrt(rank) if self.use_rslora else rank)
            if not 0.0 < scale <= MAX_SCALE:
                raise InvalidAdapter("lora_alpha", f"scales {module} by {scale:g}, expected at most {MAX_SCALE:g}")
            result[module] = (rank, scale)
        return result


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
            starts_at_zero=config.get("init_ia3_weights") is not False,
            base_model_name_or_path=_base_model(config.get("base_model_name_or_path")),
            base_class=_base_class(config.get("auto_mapping")),
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
        target_parameters=target_parameters(config.get("target_parameters")),
        swaps_experts=_is_before(config.get("peft_version"), CORRECTED),
        ensure_weight_tying=_flag(config, "ensure_weight_tying"),
        starts_at_zero=_starts_at_zero(config.get("init_lora_weights")),
        base_model_name_or_path=_base_model(config.get("base_model_name_or_path")),
        base_class=_base_class(config.get("auto_mapping")),
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
        raise InvalidAdapter("peft_type", f"is {shown(kind)}, expected {LORA} or {IA3}", MERGE)
    for name, reason in REFUSED_FIELDS.items():
        if config.get(name):
            raise InvalidAdapter(name, f"is {shown(config[name])}: {reason}", MERGE)
    if config.get("invocation_string") is not None:
        raise InvalidAdapter(
            "invocation_string",
            "is the old aLoRA format, alora_invocation_tokens = tokenize(invocation_string)[1:] in the new one",
            f"{CONVERT} --tokenizer DIRECTORY",
        )
    init = config.get("init_lora_weights")
    if isinstance(init, str) and init.lower().startswith(MERGING_INITS):
        raise InvalidAdapter(
            "init_lora_weights",
            f"is {shown(init)}, which changes the base",
            BY_LOFTQ if init.lower().startswith("loftq") else BY_PEFT,
        )
    if init is not None and not isinstance(init, bool) and not (isinstance(init, str) and init.lower() in PLAIN_INITS):
        raise InvalidAdapter(
            "init_lora_weights", f"is {shown(init)}, expected a boolean or one of {', '.join(PLAIN_INITS)}"
        )


def _is_before(version: object, other: tuple[int, ...]) -> bool:
    """Whether a version of PEFT is known and older."""
    numbers = re.match(r"(\d+)\.(\d+)(?:\.(\d+))?", version) if isinstance(version, str) else None
    return numbers is not None and tuple(int(number or 0) for number in numbers.groups()) < other


def _starts_at_zero(init: object) -> bool:
    return (init.lower() if isinstance(init, str) else init) in ZERO_INITS


def _rank(field: str, value: object, max_rank: int) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise InvalidAdapter(field, f"is {shown(value)}, expected a positive integer")
    if value > max_rank:
        raise InvalidAdapter(
            field,
            f"is rank {shown(value)}, expected at most {max_rank}",
            f"start the server with --max-lora-rank {shown(value)}",
        )
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
    """Return the items of a pattern, by regular expressions that nobody has looked at yet."""
    value = config.get(field)
    if value is None:
        return ()
    if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
        raise InvalidAdapter(field, f"is {shown(value)}, expected an object of module name patterns")
    if len(value) > MAX_PATTERN_KEYS:
        raise InvalidAdapter(field, f"has {len(value)} keys, expected at most {MAX_PATTERN_KEYS}")
    return value.items()


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


def _base_model(value: object) -> str | None:
    if value is not None and not isinstance(value, str):
        raise InvalidAdapter("base_model_name_or_path", f"is {shown(value)}, expected a string or null")
    return value or None


def _base_class(mapping: object) -> str | None:
    claimed = mapping.get("base_model_class") if isinstance(mapping, Mapping) else None
    return claimed if isinstance(claimed, str) else None


def _unknown(config: Mapping[str, Any]) -> tuple[str, ...]:
    """Return a warning for each unknown field that is set: it is ignored, as PEFT ignores it."""
    known = IGNORED_FIELDS | REFUSED_FIELDS.keys() | set(PeftConfig.__struct_fields__)
    known |= {"peft_type", "init_ia3_weights", "init_lora_weights", "invocation_string", "exclude_modules"}
    known |= {"layers_pattern", "layers_to_transform"}
    names = [name for name, value in config.items() if name not in known and value]
    return tuple(f"{shown(name)}: unknown field, ignored" for name in sorted(names))
