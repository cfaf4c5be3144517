"""Matches each tensor of an untrusted adapter to a module of the model, or refuses the adapter."""

import re
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from runtime.adapter_format.base_tensors import BaseTensor, differs_by
from runtime.adapter_format.errors import (
    CONVERT,
    CORRECT,
    ITS_BASE,
    MERGE,
    SAVE_AGAIN,
    WITHOUT_COPIES,
    InvalidAdapter,
    shown,
)
from runtime.adapter_format.parameters import ParameterTensors
from runtime.adapter_format.peft_config import PeftConfig
from runtime.adapter_format.replacements import is_saved, tokens_of
from runtime.adapter_format.safetensors_header import FILE, GATHER, TensorEntry
from runtime.adapter_format.tensor_source import TensorSource
from runtime.adapter_format.weight_dtypes import INFINITY_BITS, largest_magnitude, value_of
from runtime.models.config import ModelConfig
from runtime.models.text_part import is_vision, source_names, text_name

LARGEST_FLOAT32 = float(np.finfo(np.float32).max)

EMBEDDING, HEAD = "embed_tokens", "lm_head"
LINEAR_LEAVES = ("lora_A.weight", "lora_B.weight", "lora_B.bias")
EMBEDDING_LEAVES = ("lora_embedding_A", "lora_embedding_B")
MAGNITUDE_LEAF = "lora_magnitude_vector"  # of DoRA
WEIGHT_LEAF, BIAS_LEAF, ROWS_LEAF = "weight", "bias", "token_rows"  # what replaces the base's; rows of the vocabulary
GAIN_LEAF = "gain"  # of IA³: scales the outputs, the bias included
BASE_LEAF = "base_layer.weight"
FUSED = ("qkv_proj", "gate_up_proj")

MAX_LISTED = 16  # names in a warning
TRAIN_AGAIN = "train it again, with a lower learning rate, or take an earlier checkpoint"

# PEFT saves the embeddings of the base beside an adapter of one of them, and whenever the vocabulary was resized
_COPY = re.compile(rf"(?:base_model\.model\.)?(?P<module>model\.{EMBEDDING}|{HEAD})(?:\.base_layer)?\.weight")
_NAME = re.compile(
    r"(?:base_model\.model\.)?(?P<module>[^.].*?)\."
    r"(?P<leaf>base_layer|lora_(?:A|B|embedding_A|embedding_B|magnitude_vector))(?:\.default)?(?P<kind>\.weight|\.bias)?",
    re.DOTALL,
)
# Tensors that replace the base's, under the names of modules_to_save, bias and trainable_token_indices
_REPLACES = re.compile(
    r"(?:base_model\.model\.)?(?P<module>[^.].*?)\.(?P<leaf>weight|(?:base_layer\.)?bias|ia3_l|"
    r"token_adapter\.trainable_tokens_delta)",
    re.DOTALL,
)


def module_of(name: str) -> str:
    """Return the module of a tensor of a canonical file."""
    module, lora, _ = name.partition(".lora_")
    return module if lora else name.rpartition(".")[0]


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
    token_indices: dict[str, tuple[int, ...]]  # the rows that are replaced, of the embedding and the head

    def __init__(
        self, source: TensorSource, config: PeftConfig, model: ModelConfig, base_tensor: BaseTensor | None
    ) -> None:
        self._source = source = ParameterTensors(source, config, model)
        self._model = model
        self._config = config
        self._shapes = {
            part.module: (site.in_features, part.out_features) for site in model.sites() for part in site.parts
        }
        self.warnings = source.warnings
        self._norms, self._biased = set(model.norm_modules()), model.biased()
        self._names: dict[str, str] = {}  # by canonical name, the name in the source
        self._modules: dict[str, str] = {}  # by module, what the source calls it: patterns are made for those names
        self._vectors: dict[str, str] = {}  # of IA³, by the module that a vector belongs to, its name in the source
        if not source.tensors:
            raise InvalidAdapter(FILE, "has no tensors", GATHER)
        copies = self._normalise(source.tensors)
        modules = sorted({module_of(name) for name in self.tensors if ".lora_" in name})
        if config.ia3:
            self._check_gains()
        elif not modules:
            raise InvalidAdapter(
                FILE, "adapts no module of the model, expected at least one lora_A and lora_B", SAVE_AGAIN
            )
        own = {module: source.keys.get(module, self._modules[module]) for module in modules}
        resolved = config.scales(list(own.values()))
        self.ranks = {module: resolved[name][0] for module, name in own.items()}
        self.scales = {module: resolved[name][1] for module, name in own.items()}
        for module in modules:
            self._check_module(module, config)
        self._check_config(config)
        self._check_replaced_modules()
        self._check_biases()
        self._check_token_rows()
        for own_name, entry in copies.items():
            self._check_base_copy(own_name, entry, base_tensor)

    @property
    def own_names(self) -> Mapping[str, str]:
        """The names of the tensors in their source, by their names here."""
        return {name: self._names[name] for name in self.tensors}

    def finite_chunks(self, name: str) -> Iterator[memoryview]:
        """Yield a tensor's bytes and scan them.

        Raises InvalidAdapter at the first NaN or infinity, or for a value that overflows float32 when it is scaled.
        """
        entry, own_name = self.tensors[name], self._names[name]
        scaled = ".lora_B" in name or ".lora_embedding_B" in name
        scale = self.scales[module_of(name)] if scaled else 1.0
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
        if replacing := self._replacing_name(own_name):
            return replacing
        if (copy := _COPY.fullmatch(own_name)) is not None:
            return f"{copy['module']}.{BASE_LEAF}"
        match = _NAME.fullmatch(own_name)
        if match is None:
            raise InvalidAdapter(own_name, *_foreign_name(own_name))
        module, leaf = self._module(own_name, match["module"]), match["leaf"] + (match["kind"] or "")
        short = module.rpartition(".")[2]
        if match["leaf"] == MAGNITUDE_LEAF and not self._config.use_dora:
            raise InvalidAdapter(own_name, "is left over: use_dora is false", "set use_dora as it was trained")
        if is_vision(module):
            expected = "target_modules that name the text part only"
            raise InvalidAdapter(own_name, f"adapts the part that sees images, expected {expected}", TRAIN_AGAIN)
        if short in FUSED and module not in self._shapes:
            raise InvalidAdapter(own_name, f"adapts the fused {short}, and this base has its parts apart", ITS_BASE)
        if module.removesuffix(".base_layer").endswith(".experts"):
            what = "adapts a parameter of all experts, expected one that target_parameters selects and this base has"
            raise InvalidAdapter(own_name, what, ITS_BASE)
        if module not in self._shapes:
            step = CONVERT if "language_model" in module or "_module." in module else ITS_BASE
            raise InvalidAdapter(own_name, f"adapts {shown(module)}, which is not a projection of the base", step)
        allowed = EMBEDDING_LEAVES if short == EMBEDDING else LINEAR_LEAVES
        if self._config.use_dora:
            leaf = leaf.removesuffix(".weight") if match["leaf"] == MAGNITUDE_LEAF else leaf
            allowed = (*allowed, MAGNITUDE_LEAF)
        if leaf not in allowed:
            raise InvalidAdapter(own_name, f"is left over: {module} takes {', '.join(allowed)}")
        return f"{module}.{leaf}"

    def _module(self, own_name: str, named: str) -> str:
        """The module that a source names; remembers what the source calls it."""
        module = text_name(named)
        if self._modules.setdefault(module, named) != named:
            what = f"is of the module that other tensors call {shown(self._modules[module])}"
            raise InvalidAdapter(own_name, what, SAVE_AGAIN)
        return module

    def _check_module(self, module: str, config: PeftConfig) -> None:
        inputs, outputs = self._shapes[module]
        rank = self.ranks[module]
        embedding = module.endswith(EMBEDDING)
        a, b = EMBEDDING_LEAVES if embedding else LINEAR_LEAVES[:2]
        expected: dict[str, tuple[int, ...]] = {f"{module}.{a}": (rank, inputs), f"{module}.{b}": (outputs, rank)}
        if config.lora_bias and not embedding:
            expected[f"{module}.lora_B.bias"] = (outputs,)
        if config.use_dora:
            expected[f"{module}.{MAGNITUDE_LEAF}"] = (outputs,)
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
        firsts = {module_of(name): name for name in reversed(self.tensors) if ".lora_" in name}
        adapted = {module: self._names[firsts[module]] for module in self.scales} | self._vectors
        names = source_names(self._shapes, self._modules)
        selected = config.target_modules.among(tuple(names.values()))
        targeted = {module for module, name in names.items() if name in selected} | self._source.keys.keys()
        for module, own in adapted.items():
            if module not in targeted:
                fields = "target_modules, exclude_modules and layers_to_transform"
                raise InvalidAdapter(own, f"is left over: {fields} do not select its module", CORRECT)
        lacking = targeted - adapted.keys()
        lacking -= set() if self._model.experts is None else self._model.experts.never_linear()
        missing = [each for each in self._shapes if each in lacking and not self._is_saved(each)]
        self._check_complete([*missing, *self._source.lacking], config)
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
        what = f"no tensors for {len(lacking)} of the modules and parameters that are selected ({names})"
        if not config.starts_at_zero:
            how = "save all of the adapter, or select only the modules that it has"
            raise InvalidAdapter(FILE, f"has {what}, which init_lora_weights fills at random", how)
        self.warnings.append(f"{FILE}: {what}; they stay as the base has them")

    def _replacing_name(self, own_name: str) -> str | None:
        """The canonical name of a tensor that replaces one of the base; None if the configuration has no such one."""
        match, config = _REPLACES.fullmatch(own_name), self._config
        if match is None:
            return None
        module, leaf = text_name(match["module"]), match["leaf"].removeprefix("base_layer.")
        if leaf == "ia3_l":
            return f"{self._scaled_module(own_name, self._module(own_name, match['module']))}.{GAIN_LEAF}"
        if leaf not in (WEIGHT_LEAF, BIAS_LEAF):
            return f"{module}.{ROWS_LEAF}"
        if leaf == BIAS_LEAF and config.bias != "none" and module in self._biased:
            return f"{self._module(own_name, match['module'])}.{BIAS_LEAF}"
        if not self._is_saved(module) or ".lora_" in own_name or ".base_layer." in own_name:
            return None
        if module not in self._shapes and module not in self._norms:
            reason = f"replaces {shown(module)}: modules_to_save may name projections, embed_tokens, lm_head and norms"
            raise InvalidAdapter(own_name, f"{reason} of the hidden state", MERGE)
        if leaf == BIAS_LEAF and module not in self._biased:
            raise InvalidAdapter(own_name, f"is left over: the base's {module} has no bias", ITS_BASE)
        return f"{self._module(own_name, match['module'])}.{leaf}"

    def _scaled_module(self, own_name: str, module: str) -> str:
        """The module whose outputs a vector of IA³ scales; those of up_proj are a factor of down_proj's input."""
        config, short = self._config, module.rpartition(".")[2]
        if not config.ia3:
            raise InvalidAdapter(own_name, "is left over: peft_type is not IA3", "set peft_type as it was trained")
        if module not in self._shapes or short in (EMBEDDING, HEAD):
            what = f"scales {shown(module)}, which is not a projection of a layer of the base"
            raise InvalidAdapter(own_name, what, ITS_BASE)
        self._vectors[module] = own_name
        inputs, outputs = self._shapes[module]
        shape, by_name = self._source.tensors[own_name].shape, config.feedforward_modules
        of_input = module.endswith(by_name) if by_name else by_name is None and shape[:1] == (1,)
        expected = (1, inputs) if of_input else (outputs, 1)
        if shape != expected:
            raise InvalidAdapter(own_name, f"has shape {list(shape)}, expected {list(expected)}", ITS_BASE)
        up = f"{module.removesuffix(short)}up_proj"
        if of_input and (short != "down_proj" or up not in self._shapes):
            reason = "which only a down_proj beside an up_proj may have here"
            raise InvalidAdapter(
                "feedforward_modules", f"scales the input of {module}, {reason}", "train it without feedforward_modules"
            )
        return up if of_input else module

    def _check_gains(self) -> None:
        """Refuse IA³ without vectors, with vectors for saved modules, or with tensors of LoRA."""
        gains = [name for name in self.tensors if name.endswith(f".{GAIN_LEAF}")]
        if not gains:
            raise InvalidAdapter(FILE, "adapts no module of the model, expected at least one ia3_l", SAVE_AGAIN)
        for name in gains:
            if self._is_saved(module_of(name)):
                raise InvalidAdapter("modules_to_save", f"names {module_of(name)}, which has ia3_l too")
        for name in self.tensors:
            if ".lora_" in name:
                step = "set peft_type as it was trained"
                raise InvalidAdapter(self._names[name], "is left over: peft_type is IA3", step)

    def _is_saved(self, module: str) -> bool:
        """Whether the adapter has a module whole; with `ensure_weight_tying` a tied head goes with the embedding."""
        names, tied = self._config.modules_to_save, self._config.ensure_weight_tying and self._model.tie_embeddings
        return is_saved(module, names) or (tied and module == HEAD and is_saved(f"model.{EMBEDDING}", names))

    def _check_replaced_modules(self) -> None:
        """Refuse modules of `modules_to_save` that the file lacks, or that have LoRA too."""
        hidden = self._model.hidden_size
        for module in (*self._shapes, *self._norms):
            if not self._is_saved(module):
                continue
            inputs, outputs = self._shapes.get(module, (0, hidden))
            shape = (outputs,) if module in self._norms else (outputs, inputs)
            shape = (inputs, outputs) if module.endswith(EMBEDDING) else shape
            why, step = f"modules_to_save names {module}", ITS_BASE
            if module.endswith((EMBEDDING, HEAD)):
                why += ", and a vocabulary cannot grow"
                step = "train new tokens as trainable_token_indices of unused ones"
            self._check_shape(f"{module}.{WEIGHT_LEAF}", shape, why, "modules_to_save", step)
            if module in self._biased:
                why = "modules_to_save has it whole"
                self._check_shape(f"{module}.{BIAS_LEAF}", (outputs,), why, "modules_to_save")
            if module in self.scales:
                raise InvalidAdapter("modules_to_save", f"names {module}, which has lora_A and lora_B too")

    def _check_biases(self) -> None:
        """Refuse trained biases that PEFT would not save or would not read; all that it saves must be there."""
        bias = self._config.bias
        for module in sorted(self._biased):
            name, adapted = f"{module}.{BIAS_LEAF}", module in self.scales
            if self._is_saved(module) or bias == "none":
                continue
            if adapted or bias == "all":
                self._check_shape(name, (self._shapes[module][1],), f"bias is {bias}")
                within = self._names[name].endswith(f".base_layer.{BIAS_LEAF}")
                if within != adapted:
                    place = "in" if adapted else "without"
                    raise InvalidAdapter(self._names[name], f"is left over: PEFT has this bias {place} a base_layer")
            elif name in self.tensors:
                what = f"is left over: bias is lora_only, and {module} has no LoRA"
                raise InvalidAdapter(self._names[name], what, "set bias as it was trained")

    def _check_token_rows(self) -> None:
        """Match the rows of `trainable_token_indices` to the embedding and the head; fill `token_indices`."""
        field, indices = "trainable_token_indices", self._config.trainable_token_indices
        embedding = f"model.{EMBEDDING}"
        found = {module: ids for module in (embedding, HEAD) if (ids := tokens_of(module, indices)) is not None}
        if len(found) < len(indices):
            raise InvalidAdapter(field, f"names {shown(sorted(indices))}, expected {EMBEDDING} or {HEAD}, each once")
        # PEFT keeps a tied head equal to the embedding, and has a tensor for it only if its tokens are others
        follows = (
            self._model.tie_embeddings and embedding in found and found.get(HEAD, found[embedding]) == found[embedding]
        )
        for module, ids in found.items():
            if not (follows and module == HEAD):
                shape = len(ids), self._model.hidden_size
                self._check_shape(f"{module}.{ROWS_LEAF}", shape, f"{field} has {len(ids)} tokens", field)
        if follows:
            found[HEAD] = found[embedding]
        for module in found:
            if module in self.scales or f"{module}.{WEIGHT_LEAF}" in self.tensors:
                what = f"replaces rows of {module}, which is adapted too: PEFT does not combine them"
                raise InvalidAdapter(field, what, "train it again with one of the two")
        for name in self.tensors:
            module, _, leaf = name.rpartition(".")
            if leaf == ROWS_LEAF and (module not in found or (follows and module == HEAD)):
                raise InvalidAdapter(self._names[name], f"is left over: {field} does not name its module", CORRECT)
        self.token_indices = found

    def _check_shape(
        self, name: str, shape: tuple[int, ...], why: str, field: str | None = None, step: str = ITS_BASE
    ) -> None:
        """Refuse a tensor that is missing, by `field` if it is given, or that has another shape."""
        if name not in self.tensors:
            raise InvalidAdapter(field or name, f"lacks {name} of shape {list(shape)}: {why}", SAVE_AGAIN)
        if self.tensors[name].shape != shape:
            got = list(self.tensors[name].shape)
            raise InvalidAdapter(self._names[name], f"has shape {got}, expected {list(shape)}: {why}", step)

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
