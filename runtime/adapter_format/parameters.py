"""LoRA of bare parameters (`target_parameters`): PEFT's A and B of all experts of a layer, as those of each one.

A is (experts · rank, in), expert after expert. B is (out, rank · experts), in which the same rank of all experts lies
side by side. The two parameters of a layer's experts are one module's, so their tensors are told apart by nesting: the
first one's are within the `base_layer` of the second one's. Before 0.19.1 PEFT took the inputs of an (experts, out, in)
parameter for its outputs; A and B have each other's place in its files.
"""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from runtime.adapter_format.errors import ITS_BASE, MERGE, SAVE_AGAIN, InvalidAdapter, shown
from runtime.adapter_format.peft_config import PeftConfig
from runtime.adapter_format.safetensors_header import ITEM_BYTES, TensorEntry
from runtime.adapter_format.tensor_source import CHUNK_BYTES, TensorSource
from runtime.adapter_format.weight_dtypes import HELD
from runtime.models.config import ModelConfig

KEPT = 4  # tensors at once: those of a layer, whose pieces are read one after another
LEAVES = {f"{leaf}{adapter}.weight": leaf for leaf in "AB" for adapter in ("", ".default")}


class _Stack(NamedTuple):
    """One parameter of all experts of a layer."""

    key: str  # as PEFT names it
    modules: list[tuple[str, ...]]  # by expert, those that it is in this model
    inputs: int
    outputs: int  # of all of an expert's modules together


class _Pair(NamedTuple):
    """What a parameter's A and B are called in the source."""

    inputs: str  # the one with the inputs
    outputs: str
    rank: int
    swapped: bool  # the one with the inputs is called B


class _Piece(NamedTuple):
    """A tensor of one module."""

    pair: _Pair
    leaf: str  # A or B
    expert: int
    outputs: slice  # of the expert's


class ParameterTensors:
    """A source in which tensors of bare parameters are those of modules.

    Raises InvalidAdapter for a parameter that no projection of a layer is, and for tensors that do not fit one.
    """

    keys: dict[str, str]  # by module, the parameter that its tensors are of
    lacking: list[str]  # parameters that are selected, and of which the source has nothing

    def __init__(self, source: TensorSource, config: PeftConfig, model: ModelConfig) -> None:
        self._source, self._config, self._model = source, config, model
        self.keys, self.lacking = {}, []
        self._found: dict[tuple[str, str], str] = {}  # by module, with its nesting, and leaf
        self._renamed: dict[str, str] = {}  # the name in the source of what is no piece
        self._pieces: dict[str, _Piece] = {}
        self._experts: dict[str, np.ndarray] = {}  # by the name in the source: expert by expert, as modules have them
        self.tensors = dict(source.tensors)
        if config.target_parameters:
            self._check_selected()
            for name in source.tensors:
                module, _, leaf = name.removeprefix("base_model.model.").rpartition(".lora_")
                self._found[module, LEAVES.get(leaf, leaf)] = name
            self._take_matrices()
            self._take_stacks()

    @property
    def warnings(self) -> list[str]:
        names = self._config.target_parameters
        unknown = names and not self.keys and not self.lacking
        return [f"target_parameters: {shown(list(names))} selects no parameter of the base"] if unknown else []

    def chunks(self, name: str) -> Iterator[memoryview]:
        if name not in self._pieces:
            yield from self._source.chunks(self._renamed.get(name, name))
            return
        data = np.ascontiguousarray(self._content(self._pieces[name])).reshape(-1).view(np.uint8).data
        for start in range(0, len(data), CHUNK_BYTES):
            yield data[start : start + CHUNK_BYTES]

    def _selects(self, key: str) -> bool:
        return any(key == name or key.endswith(f".{name}") for name in self._config.target_parameters)

    def _check_selected(self) -> None:
        model, field = self._model, "target_parameters"
        others = [f"{name}.weight" for name in ("model.embed_tokens", "lm_head", *model.norm_modules())]
        others += [f"{stack.key}_bias" for stacks in self._stacks() for stack in stacks]
        for key in filter(self._selects, others):
            raise InvalidAdapter(field, f"selects {key}, expected weights of projections of layers", MERGE)
        for other in ("use_dora", "lora_bias"):
            if getattr(self._config, other):
                raise InvalidAdapter(other, f"is true beside {field}: PEFT has no such adapter")
        if self._config.alora_invocation_tokens is not None:
            raise InvalidAdapter("alora_invocation_tokens", f"is set beside {field}: PEFT has no such adapter")

    def _take_matrices(self) -> None:
        """Take the tensors of modules whose weight is selected; PEFT may call a router otherwise."""
        experts = self._model.experts
        routers = {} if experts is None else {experts.router(n).module: experts.peft_router(n) for n in experts.layers}
        stacked = set() if experts is None else {name for n in experts.layers for name in sum(experts.modules(n), ())}
        for module in (part.module for site in self._model.sites() for part in site.parts):
            theirs = routers.get(module, module)
            if module in stacked or not self._selects(f"{theirs}.weight"):
                continue
            names = {leaf: self._found.get((theirs, leaf)) for leaf in "AB"}
            if names["A"] is None and names["B"] is None:
                self.lacking.append(f"{theirs}.weight")
                continue
            self.keys[module] = f"{theirs}.weight"
            for leaf, name in names.items():
                if name is not None:
                    entry, new = self.tensors.pop(name), f"{module}.lora_{leaf}.weight"
                    self.tensors[new], self._renamed[new] = entry, name

    def _stacks(self) -> list[list[_Stack]]:
        """The parameters of each layer's experts, in the order in which PEFT wraps them."""
        experts, hidden = self._model.experts, self._model.hidden_size
        if experts is None:
            return []
        found = []
        for layer in experts.layers:
            holder, inner, modules = experts.peft_holder(layer), experts.intermediate_size, experts.modules(layer)
            gate_up = _Stack(f"{holder}.gate_up_proj", [each[:2] for each in modules], hidden, 2 * inner)
            found.append([gate_up, _Stack(f"{holder}.down_proj", [each[2:] for each in modules], inner, hidden)])
        return found

    def _take_stacks(self) -> None:
        selected = [[stack for stack in stacks if self._selects(stack.key)] for stacks in self._stacks()]
        scales = self._config.scales([stack.key for stacks in selected for stack in stacks])
        for stacks in selected:
            for depth, stack in enumerate(reversed(stacks)):
                place = stack.key.rpartition(".")[0] + ".base_layer" * depth
                a, b = (self._found.get((place, leaf)) for leaf in "AB")
                if a is None and b is None:
                    self.lacking.append(stack.key)
                elif a is None or b is None:
                    what = f"has no lora_{'A' if a is None else 'B'} beside it"
                    raise InvalidAdapter(a or b or "", f"{what}, expected both of {stack.key}", SAVE_AGAIN)
                else:
                    self._take_stack(stack, self._pair(stack, a, b, scales[stack.key][0]))

    def _take_stack(self, stack: _Stack, pair: _Pair) -> None:
        per_expert, experts = len(stack.modules[0]), self._model.experts
        width, alternating = stack.outputs // per_expert, experts is not None and experts.alternates and per_expert > 1
        dtypes = {"A": self.tensors.pop(pair.inputs).dtype, "B": self.tensors.pop(pair.outputs).dtype}
        shapes = {"A": (pair.rank, stack.inputs), "B": (width, pair.rank)}
        for expert, modules in enumerate(stack.modules):
            for place, module in enumerate(modules):
                outputs = slice(place, None, per_expert) if alternating else slice(place * width, (place + 1) * width)
                self.keys[module] = stack.key
                for leaf, shape in shapes.items():
                    name, size = f"{module}.lora_{leaf}.weight", ITEM_BYTES[dtypes[leaf]] * shape[0] * shape[1]
                    self.tensors[name] = TensorEntry(dtypes[leaf], shape, 0, size)
                    self._pieces[name] = _Piece(pair, leaf, expert, outputs)

    def _pair(self, stack: _Stack, a: str, b: str, rank: int) -> _Pair:
        """Check the shapes of A and B, which say which of them has the inputs, unless there are as many outputs."""
        shapes, count = [self.tensors[name].shape for name in (a, b)], len(stack.modules)
        plain = [(rank * count, stack.inputs), (stack.outputs, rank * count)]
        swapped = [(rank * count, stack.outputs), (stack.inputs, rank * count)]
        may_swap = self._model.experts is not None and not self._model.experts.alternates
        if may_swap and shapes == swapped and (shapes != plain or self._config.swaps_experts):
            return _Pair(inputs=b, outputs=a, rank=rank, swapped=True)
        for name, shape, expected in zip((a, b), shapes, plain, strict=True):
            if shape != expected:
                what = f"has shape {list(shape)}, expected {list(expected)}"
                raise InvalidAdapter(name, f"{what} for rank {rank} of {count} experts of {stack.key}", ITS_BASE)
        return _Pair(inputs=a, outputs=b, rank=rank, swapped=False)

    def _content(self, piece: _Piece) -> np.ndarray:
        of_expert: np.ndarray = self._of_experts(piece.pair, piece.leaf)[piece.expert]
        return of_expert if piece.leaf == "A" else of_expert[piece.outputs]

    def _of_experts(self, pair: _Pair, leaf: str) -> np.ndarray:
        """A as (experts, rank, in) or B as (experts, out, rank)."""
        name = pair.inputs if leaf == "A" else pair.outputs
        if name not in self._experts:
            if len(self._experts) == KEPT:
                del self._experts[next(iter(self._experts))]
            whole = self._whole(name)
            if (leaf == "A") != pair.swapped:  # (experts · rank, width)
                by_rank = whole.reshape(-1, pair.rank, whole.shape[1])
            else:  # (width, rank · experts)
                by_rank = whole.reshape(whole.shape[0], pair.rank, -1).transpose(2, 1, 0)
            self._experts[name] = np.ascontiguousarray(by_rank if leaf == "A" else by_rank.transpose(0, 2, 1))
        return self._experts[name]

    def _whole(self, name: str) -> np.ndarray:
        dtype, shape, start, stop = self._source.tensors[name]
        memory, end = np.empty(stop - start, np.uint8), 0
        for chunk in self._source.chunks(name):
            begin, end = end, end + len(chunk)
            memory[begin:end] = chunk
        return memory.view(HELD[dtype]).reshape(shape)
