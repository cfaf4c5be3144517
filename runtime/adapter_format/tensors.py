"""Matches each tensor of an untrusted adapter to a module of the model, or refuses the adapter."""

import re
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from runtime.adapter_format.base_tensors import BaseTensor, differs_by
from runtime.adapter_format.errors import CONVERT, CORRECT, ITS_BASE, MERGE, SAVE_AGAIN, InvalidAdapter, shown
from runtime.adapter_format.peft_config import PeftConfig
from runtime.adapter_format.safetensors_header import FILE, GATHER, TensorEntry
from runtime.adapter_format.tensor_source import TensorSource
from runtime.adapter_format.weight_dtypes import INFINITY_BITS, largest_magnitude, value_of
from runtime.models.config import ModelConfig
from runtime.models.text_part import is_vision, source_names, text_name

LARGEST_FLOAT32 = float(np.finfo(np.float32).max)

EMBEDDING, HEAD = "embed_tokens", "lm_head"
LINEAR_LEAVES = ("lora_A.weight", "lora_B.weight", "lora_B.bias")
EMBEDDING_LEAVES = ("lora_embedding_A", "lora_embedding_B")
BASE_LEAF = "base_layer.weight"
FUSED = ("qkv_proj", "gate_up_proj")

MAX_LISTED = 16  # names in a warning
TRAIN_AGAIN = "train it again, with a lower learning rate, or take an earlier checkpoint"
WITHOUT_COPIES = "save it with save_pretrained(..., save_embedding_layers=False)"

# PEFT saves the embeddings of the base beside an adapter of one of them, and whenever the vocabulary was resized
_COPY = re.compile(rf"(?:base_model\.model\.)?(?P<module>model\.{EMBEDDING}|{HEAD})(?:\.base_layer)?\.weight")
_NAME = re.compile(
    r"(?:base_model\.model\.)?(?P<module>[^.].*?)\."
    r"(?P<leaf>base_layer|lora_(?:A|B|embedding_A|embedding_B|magnitude_vector))(?:\.default)?(?P<kind>\.weight|\.bias)?",
    re.DOTALL,
)


class AdapterTensors:
    """An adapter's tensors under canonical names.

    Raises InvalidAdapter unless every tensor of the source has a module, and the expected shape and rank, in the
    model, and at least one module is adapted. Before `finite_chunks` no data is read, except copies of the base's
    tensors.
    """

    tensors: dict[str, TensorEntry]  # by canonical name, sorted
    ranks: dict[str, int]  # by module
    scales: dict[str, float]  # by module
    warnings: list[str]

    def __init__(
        self, source: TensorSource, config: PeftConfig, model: ModelConfig, base_tensor: BaseTensor | None
    ) -> None:
        self._source = source
        self._model = model
        self._shapes = {
            part.module: (site.in_features, part.out_features) for site in model.sites() for part in site.parts
        }
        self.warnings = []
        self._names: dict[str, str] = {}  # by canonical name, the name in the source
        self._modules: dict[str, str] = {}  # by module, what the source calls it: patterns are made for those names
        if not source.tensors:
            raise InvalidAdapter(FILE, "has no tensors", GATHER)
        copies = self._normalise(source.tensors)
        modules = sorted({name.partition(".lora_")[0] for name in self.tensors})
        if not modules:
            raise InvalidAdapter(
                FILE, "adapts no module of the model, expected at least one lora_A and lora_B", SAVE_AGAIN
            )
        resolved = config.scales([self._modules[module] for module in modules])
        self.ranks = {module: resolved[self._modules[module]][0] for module in modules}
        self.scales = {module: resolved[self._modules[module]][1] for module in modules}
        for module in modules:
            self._check_module(module, config)
        self._check_config(config)
        for own_name, entry in copies.items():
            self._check_base_copy(own_name, entry, base_tensor)

    def finite_chunks(self, name: str) -> Iterator[memoryview]:
        """Yield a tensor's bytes and scan them.

        Raises InvalidAdapter at the first NaN or infinity, or for a value that overflows float32 when it is scaled.
        """
        entry, own_name = self.tensors[name], self._names[name]
        scale = 1.0 if "lora_A" in name or "embedding_A" in name else self.scales[name.partition(".lora_")[0]]
        for chunk in self._source.chunks(own_name):
            largest = largest_magnitude(chunk, entry.dtype)
            if largest >= INFINITY_BITS[entry.dtype]:
                raise InvalidAdapter(own_name, "has NaN or infinite values, expected finite weights", TRAIN_AGAIN)
            if scale > 1.0 and value_of(largest, entry.dtype) * scale > LARGEST_FLOAT32:
                raise InvalidAdapter(own_name, f"overflows float32 when scaled by {scale:g}", TRAIN_AGAIN)
            yield chunk

    def _normalise(self, tensors: Mapping[str, TensorEntry]) -> dict[str, TensorEntry]:
        """Fill `tensors` and `_names`; return the copies of the base's tensors under their names in the source."""
        found: dict[str, TensorEntry] = {}
        copies: dict[str, TensorEntry] = {}
        for own_name, entry in tensors.items():
            name = self._canonical_name(own_name)
            if name in self._names:
                raise InvalidAdapter(own_name, f"is the same tensor as {self._names[name]}, expected one of them")
            self._names[name] = own_name
            if name.endswith(BASE_LEAF):
                copies[own_name] = entry
            else:
                found[name] = entry
        self.tensors = dict(sorted(found.items()))
        return copies

    def _canonical_name(self, own_name: str) -> str:
        if (copy := _COPY.fullmatch(own_name)) is not None:
            return f"{copy['module']}.{BASE_LEAF}"
        match = _NAME.fullmatch(own_name)
        if match is None:
            raise InvalidAdapter(own_name, *_foreign_name(own_name))
        module, leaf = text_name(match["module"]), match["leaf"] + (match["kind"] or "")
        if self._modules.setdefault(module, match["module"]) != match["module"]:
            what = f"is of the module that other tensors call {shown(self._modules[module])}"
            raise InvalidAdapter(own_name, what, SAVE_AGAIN)
        short = module.rpartition(".")[2]
        if match["leaf"] == "lora_magnitude_vector":
            raise InvalidAdapter(own_name, "belongs to DoRA, which is not supported yet", MERGE)
        if is_vision(module):
            expected = "target_modules that name the text part only"
            raise InvalidAdapter(own_name, f"adapts the part that sees images, expected {expected}", TRAIN_AGAIN)
        if short in FUSED and module not in self._shapes:
            raise InvalidAdapter(own_name, f"adapts the fused {short}, and this base has its parts apart", ITS_BASE)
        if module not in self._shapes:
            step = CONVERT if "language_model" in module or "_module." in module else ITS_BASE
            raise InvalidAdapter(own_name, f"adapts {shown(module)}, which is not a projection of the base", step)
        allowed = EMBEDDING_LEAVES if short == EMBEDDING else LINEAR_LEAVES
        if leaf not in allowed:
            raise InvalidAdapter(own_name, f"is left over: {module} takes {', '.join(allowed)}")
        return f"{module}.{leaf}"

    def _check_module(self, module: str, config: PeftConfig) -> None:
        inputs, outputs = self._shapes[module]
        rank = self.ranks[module]
        embedding = module.endswith(EMBEDDING)
        a, b = EMBEDDING_LEAVES if embedding else LINEAR_LEAVES[:2]
        expected: dict[str, tuple[int, ...]] = {f"{module}.{a}": (rank, inputs), f"{module}.{b}": (outputs, rank)}
        if config.lora_bias and not embedding:
            expected[f"{module}.lora_B.bias"] = (outputs,)
        for name, shape in expected.items():
            if name not in self.tensors:
                raise InvalidAdapter(name, f"is missing, expected shape {list(shape)}")
            if self.tensors[name].shape != shape:
                own, got = self._names[name], list(self.tensors[name].shape)
                raise InvalidAdapter(own, f"has shape {got}, expected {list(shape)} for rank {rank}", ITS_BASE)
        bias = f"{module}.lora_B.bias"
        if bias in self.tensors and bias not in expected:
            raise InvalidAdapter(
                self._names[bias], "is left over: lora_bias is false", "set lora_bias as it was trained"
            )

    def _check_config(self, config: PeftConfig) -> None:
        """Refuse tensors that PEFT would ignore or would apply differently."""
        ends = {module.rpartition(".")[2] for module in self.scales}
        firsts = {name.partition(".lora_")[0]: name for name in reversed(self.tensors)}
        names = source_names(self._shapes, self._modules)
        selected = config.target_modules.among(tuple(names.values()))
        targeted = {module for module, name in names.items() if name in selected}
        for module in self.scales:
            if module not in targeted:
                own, fields = self._names[firsts[module]], "target_modules, exclude_modules and layers_to_transform"
                raise InvalidAdapter(own, f"is left over: {fields} do not select its module", CORRECT)
        self._check_complete([module for module in self._shapes if module in targeted - self.scales.keys()], config)
        if config.ensure_weight_tying and ends & {EMBEDDING, HEAD}:
            raise InvalidAdapter(
                "ensure_weight_tying", "is true: tied adapters of the embedding are not supported", MERGE
            )
        if config.lora_bias and EMBEDDING in ends:
            raise InvalidAdapter("lora_bias", f"is true: PEFT has none for {EMBEDDING}", MERGE)
        if config.alora_invocation_tokens is not None and EMBEDDING in ends:
            raise InvalidAdapter("alora_invocation_tokens", f"is set: an aLoRA cannot adapt {EMBEDDING}", MERGE)

    def _check_complete(self, lacking: Sequence[str], config: PeftConfig) -> None:
        """Warn of modules without tensors, which PEFT gives the values of its initialisation."""
        if not lacking:
            return
        names = ", ".join(lacking[:MAX_LISTED]) + ("" if len(lacking) <= MAX_LISTED else ", …")
        what = f"no tensors for {len(lacking)} of the modules that target_modules selects ({names})"
        if not config.starts_at_zero:
            how = "save all of the adapter, or select only the modules that it has"
            raise InvalidAdapter(FILE, f"has {what}, which init_lora_weights fills at random", how)
        self.warnings.append(f"{FILE}: {what}; they stay as the base has them")

    def _check_base_copy(self, own_name: str, entry: TensorEntry, base_tensor: BaseTensor | None) -> None:
        """Refuse a copy that differs from the base's tensor by more than its dtype: PEFT would change the base."""
        module = self._canonical_name(own_name).removesuffix(f".{BASE_LEAF}")
        tied = self._model.tie_embeddings and module == HEAD
        name = f"model.{EMBEDDING}.weight" if tied else f"{module}.weight"
        if base_tensor is None:
            what = "repeats the base's weight, and the base is not at hand to compare"
            raise InvalidAdapter(own_name, what, WITHOUT_COPIES)
        base = base_tensor(name)
        if entry.shape != base.shape:
            what = f"has shape {list(entry.shape)}, the base's {name} has {list(base.shape)}"
            resized = "an adapter cannot resize the vocabulary"
            raise InvalidAdapter(own_name, f"{what}: {resized}", f"{WITHOUT_COPIES} if it uses no added token")
        difference = differs_by(self._source.chunks(own_name), entry.dtype, base)
        if difference is None:
            what = f"differs from the base's {name}, which an adapter cannot replace"
            raise InvalidAdapter(own_name, what, f"{WITHOUT_COPIES} if it was not trained")
        if difference:
            what = f"is the base's {name} rounded to {entry.dtype}, by up to {difference:.3g}"
            self.warnings.append(f"{shown(own_name)}: {what}; the base's own is used")


def _foreign_name(name: str) -> tuple[str, str]:
    """What a tensor is that has no place in an adapter, and what to do."""
    if "lora_down" in name or "lora_up" in name or name.startswith("lora_unet"):
        return (
            "is a kohya or diffusers name, expected PEFT's <module>.lora_A.weight",
            "train a language model with PEFT",
        )
    if name.endswith((".lora_a", ".lora_b")):
        return "is an mlx name, expected PEFT's <module>.lora_A.weight", CONVERT
    return "is not a tensor of plain LoRA, and an adapter cannot replace or add weights of the base", MERGE
