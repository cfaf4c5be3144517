"""Matches each tensor of an untrusted adapter to a module of the model, or refuses the adapter."""

import re
from collections.abc import Iterator, Mapping

import numpy as np

from runtime.adapter_format.base_tensors import BaseTensor, StoredTensor
from runtime.adapter_format.errors import InvalidAdapter, shown
from runtime.adapter_format.peft_config import PeftConfig
from runtime.adapter_format.replacements import is_saved, tokens_of
from runtime.adapter_format.safetensors_header import FILE, TensorEntry
from runtime.adapter_format.tensor_source import TensorSource
from runtime.adapter_format.weight_dtypes import HELD, INFINITY_BITS, largest_magnitude, value_of, widened
from runtime.models.config import ModelConfig

LARGEST_FLOAT32 = float(np.finfo(np.float32).max)

EMBEDDING, HEAD = "embed_tokens", "lm_head"
LINEAR_LEAVES = ("lora_A.weight", "lora_B.weight", "lora_B.bias")
EMBEDDING_LEAVES = ("lora_embedding_A", "lora_embedding_B")
MAGNITUDE_LEAF = "lora_magnitude_vector"  # of DoRA
WEIGHT_LEAF, BIAS_LEAF, ROWS_LEAF = "weight", "bias", "token_rows"  # what replaces the base's; rows of the vocabulary
GAIN_LEAF = "gain"  # of IA³: scales the outputs, the bias included
BASE_LEAF = "base_layer.weight"
FUSED = ("qkv_proj", "gate_up_proj")

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
    token_indices: dict[str, tuple[int, ...]]  # the rows that are replaced, of the embedding and the head

    def __init__(
        self, source: TensorSource, config: PeftConfig, model: ModelConfig, base_tensor: BaseTensor | None
    ) -> None:
        self._source = source
        self._model = model
        self._config = config
        self._shapes = {
            part.module: (site.in_features, part.out_features) for site in model.sites() for part in site.parts
        }
        self._norms, self._biased = set(model.norms()), model.biased()
        self._names: dict[str, str] = {}  # by canonical name, the name in the source
        copies = self._normalise(source.tensors)
        modules = sorted({module_of(name) for name in self.tensors if ".lora_" in name})
        if config.ia3:
            self._check_gains()
        elif not modules:
            raise InvalidAdapter(FILE, "adapts no module of the model, expected at least one lora_A and lora_B")
        resolved = config.scales(modules)
        self.ranks = {module: rank for module, (rank, _) in resolved.items()}
        self.scales = {module: scale for module, (_, scale) in resolved.items()}
        for module in modules:
            self._check_module(module, config)
        self._check_config(config)
        self._check_replaced_modules()
        self._check_biases()
        self._check_token_rows()
        for own_name, entry in copies.items():
            self._check_base_copy(own_name, entry, base_tensor)

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
                raise InvalidAdapter(own_name, "has NaN or infinite values, expected finite weights")
            if scale > 1.0 and value_of(largest, entry.dtype) * scale > LARGEST_FLOAT32:
                raise InvalidAdapter(own_name, f"overflows float32 when scaled by {scale:g}")
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
        match = _NAME.fullmatch(own_name)
        if match is None:
            raise InvalidAdapter(own_name, _foreign_name(own_name))
        module, leaf = match["module"], match["leaf"] + (match["kind"] or "")
        short = module.rpartition(".")[2]
        if match["leaf"] == MAGNITUDE_LEAF and not self._config.use_dora:
            raise InvalidAdapter(own_name, "is left over: use_dora is false")
        if short in FUSED and module not in self._shapes:
            raise InvalidAdapter(own_name, f"adapts the fused {short}, which no supported base has")
        if module not in self._shapes:
            raise InvalidAdapter(own_name, f"adapts {shown(module)}, which is not a projection of the base")
        allowed = EMBEDDING_LEAVES if short == EMBEDDING else LINEAR_LEAVES
        if self._config.use_dora:
            leaf = leaf.removesuffix(".weight") if match["leaf"] == MAGNITUDE_LEAF else leaf
            allowed = (*allowed, MAGNITUDE_LEAF)
        if short in (EMBEDDING, HEAD):
            allowed = (*allowed, BASE_LEAF)
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
        if config.use_dora:
            expected[f"{module}.{MAGNITUDE_LEAF}"] = (outputs,)
        for name, shape in expected.items():
            if name not in self.tensors:
                raise InvalidAdapter(name, f"is missing, expected shape {list(shape)}")
            if self.tensors[name].shape != shape:
                own, got = self._names[name], list(self.tensors[name].shape)
                raise InvalidAdapter(own, f"has shape {got}, expected {list(shape)} for rank {rank}")
        bias = f"{module}.lora_B.bias"
        if bias in self.tensors and bias not in expected:
            raise InvalidAdapter(self._names[bias], "is left over: lora_bias is false")

    def _check_config(self, config: PeftConfig) -> None:
        """Refuse tensors that PEFT would ignore or would apply differently."""
        ends = {module.rpartition(".")[2] for module in self.scales}
        firsts = {module_of(name): name for name in reversed(self.tensors) if ".lora_" in name}
        for module in self.scales:
            own = self._names[firsts[module]]
            if not config.target_modules.names(module):
                raise InvalidAdapter(own, "is left over: target_modules does not name its module, or it is excluded")
            layer = re.match(r"model\.layers\.(\d+)\.", module)
            layers = config.layers_to_transform
            if layers is not None and (layer is None or int(layer[1]) not in layers):
                raise InvalidAdapter(own, "is left over: layers_to_transform does not name its layer")
        if config.ensure_weight_tying and ends & {EMBEDDING, HEAD}:
            raise InvalidAdapter("ensure_weight_tying", "is true: tied adapters of the embedding are not supported")
        if config.lora_bias and EMBEDDING in ends:
            raise InvalidAdapter("lora_bias", f"is true: PEFT has none for {EMBEDDING}")
        if config.alora_invocation_tokens is not None and EMBEDDING in ends:
            raise InvalidAdapter("alora_invocation_tokens", f"is set: an aLoRA cannot adapt {EMBEDDING}")

    def _replacing_name(self, own_name: str) -> str | None:
        """The canonical name of a tensor that replaces one of the base; None if the configuration has no such one."""
        match, config = _REPLACES.fullmatch(own_name), self._config
        if match is None:
            return None
        module, leaf = match["module"], match["leaf"].removeprefix("base_layer.")
        if leaf == "ia3_l":
            return f"{self._scaled_module(own_name, module)}.{GAIN_LEAF}"
        if leaf not in (WEIGHT_LEAF, BIAS_LEAF):
            return f"{module}.{ROWS_LEAF}"
        if leaf == BIAS_LEAF and config.bias != "none" and module in self._biased:
            return f"{module}.{BIAS_LEAF}"
        if not self._is_saved(module) or ".lora_" in own_name or ".base_layer." in own_name:
            return None
        if module not in self._shapes and module not in self._norms:
            reason = f"replaces {shown(module)}: modules_to_save may name projections, embed_tokens, lm_head and norms"
            raise InvalidAdapter(own_name, f"{reason} of the hidden state")
        if leaf == BIAS_LEAF and module not in self._biased:
            raise InvalidAdapter(own_name, f"is left over: the base's {module} has no bias")
        return f"{module}.{leaf}"

    def _scaled_module(self, own_name: str, module: str) -> str:
        """The module whose outputs a vector of IA³ scales; those of up_proj are a factor of down_proj's input."""
        config, short = self._config, module.rpartition(".")[2]
        if not config.ia3 or not config.target_modules.names(module):
            raise InvalidAdapter(
                own_name, "is left over: target_modules of an IA3 configuration does not name its module"
            )
        if module not in self._shapes or short in (EMBEDDING, HEAD):
            raise InvalidAdapter(own_name, f"scales {shown(module)}, which is not a projection of a layer of the base")
        inputs, outputs = self._shapes[module]
        shape, by_name = self._source.tensors[own_name].shape, config.feedforward_modules
        of_input = module.endswith(by_name) if by_name else by_name is None and shape[:1] == (1,)
        expected = (1, inputs) if of_input else (outputs, 1)
        if shape != expected:
            raise InvalidAdapter(own_name, f"has shape {list(shape)}, expected {list(expected)}")
        if of_input and short != "down_proj":
            reason = "which only a down_proj may have here: train it without feedforward_modules"
            raise InvalidAdapter("feedforward_modules", f"scales the input of {module}, {reason}")
        return f"{module.removesuffix(short)}up_proj" if of_input else module

    def _check_gains(self) -> None:
        """Refuse IA³ without vectors, with vectors for saved modules, or with tensors of LoRA."""
        gains = [name for name in self.tensors if name.endswith(f".{GAIN_LEAF}")]
        if not gains:
            raise InvalidAdapter(FILE, "adapts no module of the model, expected at least one ia3_l")
        for name in gains:
            if self._is_saved(module_of(name)):
                raise InvalidAdapter("modules_to_save", f"names {module_of(name)}, which has ia3_l too")
        for name in self.tensors:
            if ".lora_" in name:
                raise InvalidAdapter(self._names[name], "is left over: peft_type is IA3")

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
            why = f"modules_to_save names {module}"
            if module.endswith((EMBEDDING, HEAD)):
                why += "; a vocabulary cannot grow, so train new tokens as trainable_token_indices of unused ones"
            self._check_shape(f"{module}.{WEIGHT_LEAF}", shape, why, "modules_to_save")
            if module in self._biased:
                self._check_shape(
                    f"{module}.{BIAS_LEAF}", (outputs,), "modules_to_save has it whole", "modules_to_save"
                )
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
                self._check_shape(name, (self._shapes[module][1],), f"bias is {bias}; set it to none if it was lost")
                within = self._names[name].endswith(f".base_layer.{BIAS_LEAF}")
                if within != adapted:
                    place = "in" if adapted else "without"
                    raise InvalidAdapter(self._names[name], f"is left over: PEFT has this bias {place} a base_layer")
            elif name in self.tensors:
                raise InvalidAdapter(self._names[name], f"is left over: bias is lora_only, and {module} has no LoRA")

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
                raise InvalidAdapter(
                    field, f"replaces rows of {module}, which is adapted too: PEFT does not combine them"
                )
        for name in self.tensors:
            module, _, leaf = name.rpartition(".")
            if leaf == ROWS_LEAF and (module not in found or (follows and module == HEAD)):
                raise InvalidAdapter(self._names[name], f"is left over: {field} does not name its module")
        self.token_indices = found

    def _check_shape(self, name: str, shape: tuple[int, ...], why: str, field: str | None = None) -> None:
        """Refuse a tensor that is missing, by `field` if it is given, or that has another shape."""
        if name not in self.tensors:
            raise InvalidAdapter(field or name, f"lacks {name} of shape {list(shape)}: {why}")
        if self.tensors[name].shape != shape:
            got = list(self.tensors[name].shape)
            raise InvalidAdapter(self._names[name], f"has shape {got}, expected {list(shape)}: {why}")

    def _check_base_copy(self, own_name: str, entry: TensorEntry, base_tensor: BaseTensor | None) -> None:
        """Refuse a copy that differs from the base's tensor: applying it would change the base.

        PEFT saves such copies of an embedding beside its adapter.
        """
        module = self._canonical_name(own_name).removesuffix(f".{BASE_LEAF}")
        if module not in self.scales:
            raise InvalidAdapter(own_name, f"is left over: {module} has no lora_A and lora_B")
        tied = self._model.tie_embeddings and module == HEAD
        name = f"model.{EMBEDDING}.weight" if tied else f"{module}.weight"
        if base_tensor is None:
            raise InvalidAdapter(own_name, "repeats the base's weight, and the base is not at hand to compare")
        base = base_tensor(name)
        equal = entry.shape == base.shape and self._equal_values(own_name, base)
        if not equal:
            raise InvalidAdapter(own_name, f"differs from the base's {name}, which an adapter cannot replace")

    def _equal_values(self, own_name: str, base: StoredTensor) -> bool:
        """Compare chunk by chunk in float32, which holds the values of every dtype exactly."""
        stored = np.frombuffer(base.data, HELD[base.dtype])
        dtype, done = self._source.tensors[own_name].dtype, 0
        for chunk in self._source.chunks(own_name):
            values = widened(np.frombuffer(chunk, HELD[dtype]), dtype)
            if not np.array_equal(values, widened(stored[done : done + len(values)], base.dtype)):
                return False
            done += len(values)
        return True


def _foreign_name(name: str) -> str:
    if "lora_down" in name or "lora_up" in name or name.startswith("lora_unet"):
        return "is a kohya or diffusers name, expected PEFT's <module>.lora_A.weight"
    if name.endswith((".lora_a", ".lora_b")):
        return "is an mlx name, expected PEFT's <module>.lora_A.weight"
    return "is not a tensor of plain LoRA, and an adapter cannot replace or add weights of the base"
