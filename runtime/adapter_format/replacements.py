"""What a PEFT configuration selects besides modules: biases, whole modules, rows of the vocabulary, parameters."""

from collections.abc import Mapping
from typing import Any, Literal, get_args

from runtime.adapter_format.errors import InvalidAdapter, shown

Bias = Literal["none", "lora_only", "all"]
MAX_TOKENS = 1 << 16  # of one module; the canonical file's header holds their ids


def trained_bias(value: object) -> Bias:
    """Read `bias`: whose biases of the base the adapter replaces, of none, of adapted or of all modules."""
    for known in get_args(Bias):
        if value == known:
            found: Bias = known
            return found
    if value is None:
        return "none"
    raise InvalidAdapter("bias", f"is {shown(value)}, expected one of {', '.join(get_args(Bias))}")


def saved_modules(value: object) -> tuple[str, ...]:
    """Read `modules_to_save`: ends of the names of modules that the adapter has whole."""
    if value is None:
        return ()
    if not isinstance(value, list | tuple) or not all(isinstance(name, str) and name for name in value):
        raise InvalidAdapter("modules_to_save", f"is {shown(value)}, expected null or a list of module names")
    return tuple(value)


def target_parameters(value: object) -> tuple[str, ...]:
    """Read `target_parameters`: ends of the names of parameters that have A and B although no module has them."""
    if value is None:
        return ()
    if not isinstance(value, list | tuple | set) or not all(isinstance(name, str) and name for name in value):
        raise InvalidAdapter("target_parameters", f"is {shown(value)}, expected null or a list of parameter names")
    return tuple(sorted(value))


def feedforward_modules(value: object) -> tuple[str, ...] | None:
    """Read `feedforward_modules` of IA³: ends of the names of modules whose input is scaled; None for a pattern."""
    if isinstance(value, str):
        return None
    if value is None:
        return ()
    if not isinstance(value, list | tuple | set) or not all(isinstance(name, str) and name for name in value):
        raise InvalidAdapter("feedforward_modules", f"is {shown(value)}, expected a list of module names")
    return tuple(value)


def token_indices(value: object, vocab_size: int) -> dict[str, tuple[int, ...]]:
    """Read `trainable_token_indices`: the rows that the adapter replaces, by the end of a module's name."""
    field = "trainable_token_indices"
    if value is None:
        return {}
    by_module: Mapping[Any, Any] = value if isinstance(value, Mapping) else {"embed_tokens": value}
    for name, ids in by_module.items():
        if not isinstance(name, str) or not name or not isinstance(ids, list | tuple) or not ids:
            raise InvalidAdapter(field, f"is {shown(value)}, expected token ids, or an object of them by module name")
        if len(ids) > MAX_TOKENS:
            raise InvalidAdapter(field, f"has {len(ids)} token ids for {shown(name)}, expected at most {MAX_TOKENS}")
        for token in ids:
            if not isinstance(token, int) or isinstance(token, bool) or not 0 <= token < vocab_size:
                raise InvalidAdapter(field, f"has {shown(token)}, expected token ids from 0 to {vocab_size - 1}")
        if len(set(ids)) < len(ids):
            raise InvalidAdapter(field, f"names a token twice for {shown(name)}, expected each once")
    return {name: tuple(ids) for name, ids in by_module.items()}


def is_saved(module: str, names: tuple[str, ...]) -> bool:
    """Whether `modules_to_save` selects a module, or one that holds it: PEFT compares the ends of whole names."""
    parts = module.split(".")
    holders = [".".join(parts[:count]) for count in range(1, len(parts) + 1)]
    return any(holder.endswith(names) for holder in holders) if names else False


def tokens_of(module: str, indices: Mapping[str, tuple[int, ...]]) -> tuple[int, ...] | None:
    """The rows that the adapter replaces in a module by its own tensor; None for none."""
    return next((ids for name, ids in indices.items() if module.endswith(name)), None)


def check_kinds(*, alora: bool, dora: bool, lora_bias: bool, bias: Bias, saved: bool, tokens: bool) -> None:
    """Refuse what PEFT does not combine, and aLoRAs that change what the base computes before their invocation."""
    if dora and lora_bias:
        raise InvalidAdapter("lora_bias", "is true beside use_dora: PEFT has no such adapter")
    refused = {
        "use_dora": dora,
        "bias": bias != "none",
        "modules_to_save": saved,
        "trainable_token_indices": tokens,
    }
    for field, is_set in refused.items():
        if alora and is_set:
            reason = "is set beside alora_invocation_tokens: it would change the tokens before the invocation too"
            raise InvalidAdapter(field, reason, "train the aLoRA without it")
