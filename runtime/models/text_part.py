"""Names of the text part of a vision-language checkpoint, and of adapters for one, as a text model has them.

transformers has written such models in two ways: `language_model.model.layers.0` and `model.language_model.layers.0`.
"""

import re
from collections.abc import Iterable, Mapping

_TEXT = re.compile(r"(?:model\.language_model|language_model\.model)\.|language_model\.(?=lm_head)")
_OTHER = re.compile(r"(?:model\.)?(?:visual|vision_tower|vision_model|multi_modal_projector)\.")


def text_name(name: str) -> str:
    """Return the name of a tensor or module in a text model; that of a text model is its own."""
    match = _TEXT.match(name)
    if match is None:
        return name
    rest = name[match.end() :]
    return rest if rest.startswith("lm_head") else f"model.{rest}"


def source_names(modules: Iterable[str], known: Mapping[str, str]) -> dict[str, str]:
    """Return what a source calls each module of a text model, given how it calls some of them."""
    names = ((own, module.removeprefix("model.")) for module, own in known.items() if module.startswith("model."))
    prefix = next((own.removesuffix(rest) for own, rest in names), "model.")
    head = "language_model.lm_head" if prefix.startswith("language_model.") else "lm_head"
    return {
        module: known.get(module) or (head if module == "lm_head" else prefix + module.removeprefix("model."))
        for module in modules
    }


def is_vision(name: str) -> bool:
    """Return whether a tensor or module belongs to the part that sees images."""
    return _OTHER.match(name) is not None
