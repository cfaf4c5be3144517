"""Which part of a model each rank holds, where several processes compute it together.

What reads the hidden state is cut by its outputs: queries, keys and values by heads, gate and up by the width of the
MLP (each expert's by its own, so that ranks work alike whatever the router says), the head by the vocabulary. What adds
to the hidden state, o and down, is cut by its inputs, which are those outputs: the ranks' results add up to the whole
one. Where there are more ranks than K/V heads, several have the same one, with some of its queries. Embedding, norms
and routers are whole everywhere: an embedding that is cut would need another sum over all ranks, and an adapter's rows
of it too.

All parts have the same sizes, so that blocks and extents lie at the same places on every rank. Where the whole cannot
be divided evenly, the last parts end with zeros: a head of zeros adds nothing. That is one rule for heads, widths and
vocabularies, and no model is refused for its sizes. Widths are divided in whole groups of inputs that have one scale,
if the weights are quantised so.
"""

import math
from collections.abc import Iterator
from typing import NamedTuple

import msgspec

from runtime.models.config import DOWN, GATE_UP, OUT, QKV, SITES_PER_LAYER, ModelConfig
from runtime.models.stacked_experts import BIAS, BLOCKS, SCALES
from runtime.parallel.group import RankGroup
from runtime.quantization.mxfp4 import BLOCK

Shape = tuple[int, ...]
Index = tuple[slice, ...]


class Span(NamedTuple):
    """Neighbours in a dimension, from `start` to before `stop`, and behind them zeros up to `width`."""

    start: int
    stop: int
    width: int

    def times(self, size: int) -> "Span":
        """The same of units that have so many places each."""
        return Span(self.start * size, self.stop * size, self.width * size)

    def after(self, places: int) -> "Span":
        """The same behind so many other places."""
        return Span(self.start + places, self.stop + places, self.width)


class TensorCut(NamedTuple):
    """The part of a tensor that a rank has."""

    spans: tuple[Span, ...] | None = None  # one after another; None: the whole tensor
    dim: int = 0
    zeros: bool = False  # another rank has it, and here are zeros

    @property
    def is_whole(self) -> bool:
        return self.spans is None and not self.zeros

    def shape(self, whole: Shape) -> Shape:
        if self.spans is None:
            return whole
        return (*whole[: self.dim], sum(span.width for span in self.spans), *whole[self.dim + 1 :])

    def moves(self) -> Iterator[tuple[Index, Index]]:
        """Where each piece lies in the whole, and where in the part; what no piece fills is zero."""
        before, first = (slice(None),) * self.dim, 0
        for start, stop, width in () if self.spans is None or self.zeros else self.spans:
            if start < stop:
                yield (*before, slice(start, stop)), (*before, slice(first, first + stop - start))
            first += width


WHOLE = TensorCut()


class ModuleCut(NamedTuple):
    """How a projection is cut: by its outputs, by its inputs, or not at all."""

    outputs: tuple[Span, ...] | None = None
    inputs: Span | None = None
    step: int = 1  # of which the place is a multiple where any rank's inputs begin

    @property
    def weight(self) -> TensorCut:
        """Of what is (out, in)."""
        return self.by_input if self.inputs is not None else self.by_output

    @property
    def by_output(self) -> TensorCut:
        """Of what has the outputs first."""
        return TensorCut(self.outputs)

    @property
    def by_input(self) -> TensorCut:
        """Of what has the inputs last, and one dimension before them."""
        return WHOLE if self.inputs is None else TensorCut((self.inputs,), dim=1)

    def bias(self, rank: int) -> TensorCut:
        """Of what is added to the outputs, which is added once where the outputs of all ranks are added up."""
        return self.by_output if self.inputs is None else TensorCut(zeros=rank > 0)


class Shard:
    """One rank's part of a model; all of it, if there is one rank."""

    def __init__(self, whole: ModelConfig, group: RankGroup) -> None:
        self.whole, self.group = whole, group
        self.model = whole  # of the part
        self.modules: dict[str, ModuleCut] = {}  # by name; those that are cut
        self._tensors: dict[str, TensorCut] = {}  # by name; those of no such module
        self._sites = whole.sites()
        if group.size > 1:
            self._cut()

    def module(self, name: str) -> ModuleCut:
        return self.modules.get(name, ModuleCut())

    def tensor(self, name: str) -> TensorCut:
        """The part of a tensor of an unquantised checkpoint."""
        module, _, leaf = name.rpartition(".")
        own = self._tensors.get(name)
        if own is not None:
            return own
        return self.module(module).bias(self.group.rank) if leaf == "bias" else self.module(module).weight

    @property
    def head(self) -> Span:
        """The tokens whose logits this rank computes.

        The last place is no token's: it stands for rows of an adapter that are other ranks'.
        """
        span = self._share(self.whole.vocab_size)
        return span._replace(width=span.width + 1)

    @property
    def widths(self) -> tuple[int, int]:
        """The numbers in the queries and in the keys of all ranks, without those of zeros."""
        copies = max(self.group.size // self.whole.num_kv_heads, 1)
        return self.whole.num_heads * self.whole.head_dim, self.whole.num_kv_heads * copies * self.whole.head_dim

    @property
    def padding(self) -> str:
        """What the ranks have more of than the model, so that all have the same; empty if they have not."""
        whole, part, size = self.whole, self.model, self.group.size
        copies = max(size // whole.num_kv_heads, 1)
        counts = {
            "query heads": (whole.num_heads, size * part.num_heads),
            "K/V heads": (whole.num_kv_heads * copies, size * part.num_kv_heads),
            "intermediate_size": (whole.intermediate_size, size * part.intermediate_size),
        }
        return ", ".join(f"{held} {name} for {needed}" for name, (needed, held) in counts.items() if held > needed)

    def _share(self, total: int, unit: int = 1) -> Span:
        """This rank's share, of the same width on each rank and a multiple of `unit`."""
        width = -(-total // (unit * self.group.size)) * unit
        start = min(self.group.rank * width, total)
        return Span(start, min(start + width, total), width)

    def _share_in_groups(self, total: int) -> Span:
        """This rank's share, which begins between groups of inputs that have one scale: so they are cut quantised."""
        scheme = self.whole.quantization
        group = 1 if scheme is None else scheme.together
        return self._share(total, group if 0 < group < total else 1)

    def _heads(self) -> tuple[Span, Span, int]:
        """This rank's query heads and K/V heads, and the number of which any rank's first query head is a multiple."""
        heads, kv_heads, size = self.whole.num_heads, self.whole.num_kv_heads, self.group.size
        of_each = heads // kv_heads
        if size <= kv_heads:
            kv = self._share(kv_heads)
            return kv.times(of_each), kv, kv.width * of_each
        copies = size // kv_heads  # ranks that have the same K/V head
        head, place = divmod(self.group.rank, copies)
        width = -(-of_each // copies)
        first, last = (min(each * width, of_each) for each in (place, place + 1))
        step = math.gcd(width, of_each)
        if head >= kv_heads:  # more ranks than can have a head
            return Span(heads, heads, width), Span(kv_heads, kv_heads, 1), step
        return Span(first, last, width).after(head * of_each), Span(head, head + 1, 1), step

    def _cut(self) -> None:
        whole = self.whole
        (q, kv, step), inner, head = self._heads(), self._share_in_groups(whole.intermediate_size), self.head
        experts = whole.experts
        if experts is not None:
            width = experts.intermediate_size
            routed = self._share(width, BLOCK) if experts.mxfp4 else self._share_in_groups(width)
            shared = self._share_in_groups(experts.shared_size)
            experts = msgspec.structs.replace(experts, intermediate_size=routed.width, shared_size=shared.width)
            self._cut_experts(routed, shared)
        self.model = msgspec.structs.replace(
            whole,
            num_heads=q.width,
            num_kv_heads=kv.width,
            intermediate_size=inner.width,
            head_outputs=head.width,
            experts=experts,
        )
        self.modules["lm_head"] = ModuleCut(outputs=(head,))
        for layer in range(whole.num_layers):
            self._cut_attention(layer, q, kv, step)
            if not whole.has_experts(layer):
                self._cut_mlp(layer * SITES_PER_LAYER + GATE_UP, inner, whole.intermediate_size)

    def _cut_attention(self, layer: int, q: Span, kv: Span, step: int) -> None:
        whole, size = self.whole, self.whole.head_dim
        k = kv.times(size).after(whole.num_heads * size)
        spans = (q.times(size), k, k.after(whole.num_kv_heads * size))
        self._cut_outputs(layer * SITES_PER_LAYER + QKV, spans)
        [out] = self._sites[layer * SITES_PER_LAYER + OUT].parts
        self.modules[out.module] = ModuleCut(inputs=q.times(size), step=step * size)
        attention = f"model.layers.{layer}.self_attn"
        if whole.sinks:
            self._tensors[f"{attention}.sinks"] = TensorCut((q,))
        if whole.qk_norm == "projections":
            self._tensors[f"{attention}.q_norm.weight"] = TensorCut((q.times(size),))
            self._tensors[f"{attention}.k_norm.weight"] = TensorCut((kv.times(size),))

    def _cut_mlp(self, site: int, inner: Span, width: int) -> None:
        self._cut_outputs(site, (inner, inner.after(width)))
        [down] = self._sites[site + DOWN - GATE_UP].parts
        self.modules[down.module] = ModuleCut(inputs=inner, step=inner.width)

    def _cut_outputs(self, site: int, spans: tuple[Span, ...]) -> None:
        """Cut a site, whose projections are one module or several; `spans` are of the outputs of all."""
        parts, first = self._sites[site].parts, 0
        for part in parts:
            own = spans if len(parts) == 1 else spans[:1]
            spans = spans[len(own) :]
            self.modules[part.module] = ModuleCut(outputs=tuple(span.after(-first) for span in own))
            first += part.out_features

    def _cut_experts(self, routed: Span, shared: Span) -> None:
        whole = self.whole
        experts = whole.experts
        assert experts is not None
        for layer in experts.layers:
            for expert in range(experts.count):
                self._cut_mlp(whole.expert_site(layer, expert), routed, experts.intermediate_size)
            if experts.shared_size:
                self._cut_mlp(whole.shared_site(layer), shared, experts.shared_size)
            if experts.names.stacked is not None:
                self._cut_stacks(layer, routed)

    def _cut_stacks(self, layer: int, inner: Span) -> None:
        """Cut the tensors that hold a projection of all experts; see `stacked_experts.stacked_shapes`."""
        experts = self.whole.experts
        assert experts is not None
        assert experts.names.stacked is not None
        stacked, alternating = experts.names.stacked, experts.alternates
        gate_up, down = (
            f"model.layers.{layer}.{experts.names.block}.{name}" for name in (stacked.gate_up, stacked.down)
        )
        both = (inner.times(2),) if alternating else (inner, inner.after(experts.intermediate_size))
        inputs_first = alternating and not experts.mxfp4
        cuts = {gate_up: TensorCut(both, 2 if inputs_first else 1), down: TensorCut((inner,), 1 if inputs_first else 2)}
        if experts.mxfp4:
            start, stop, width = inner
            blocks = Span(start // BLOCK, stop // BLOCK, width // BLOCK)
            for packed in (BLOCKS, SCALES):
                self._tensors[gate_up + packed] = cuts[gate_up]
                self._tensors[down + packed] = TensorCut((blocks,), 2)
        self._tensors |= cuts
        self._tensors[gate_up + BIAS] = TensorCut(both, 1)
        self._tensors[down + BIAS] = TensorCut(zeros=self.group.rank > 0)
