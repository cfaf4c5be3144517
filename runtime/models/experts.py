"""The routed experts that some layers have in place of one MLP."""

import msgspec

from runtime.models.config_file import ConfigFile, refuse
from runtime.models.families import ExpertNames
from runtime.models.sites import Part, Site

SWIGLU_ALPHA = 1.702
SITES_PER_EXPERT = 2  # gate_up, down
SITES_PER_SHARED = 3  # gate_up, down, gate; the last has no part if there is none


class ExpertsConfig(msgspec.Struct, frozen=True, kw_only=True):
    """The experts of a model; those of a layer may be stacked in the checkpoint, and a shared one lie beside them."""

    count: int  # of each layer
    chosen: int  # for each token
    intermediate_size: int
    shared_size: int  # the width of the shared expert; 0: there is none
    normalised: bool  # whether the weights of those chosen add up to 1
    limit: float = 0.0  # to which gates and ups are clamped, and then they are GPT-OSS's; 0: they are not
    mxfp4: bool = False  # whether the checkpoint holds their weights in blocks of 32 numbers with one scale
    names: ExpertNames
    layers: tuple[int, ...]

    def router(self, layer: int) -> Part:
        return Part(f"model.layers.{layer}.{self.names.block}.{self.names.router}", self.count)

    def modules(self, layer: int) -> list[tuple[str, ...]]:
        """Return the gate, the up and the down of each expert of a layer."""
        names, block = self.names, f"model.layers.{layer}.{self.names.block}.experts"
        return [
            tuple(f"{block}.{expert}.{name}" for name in (names.gate, names.up, names.down))
            for expert in range(self.count)
        ]

    def peft_holder(self, layer: int) -> str:
        """Return the module whose parameters are all experts of a layer, as PEFT has them of transformers."""
        return f"model.layers.{layer}.{self.names.holder}"

    def peft_router(self, layer: int) -> str:
        """Return the module whose `weight` is the router, as PEFT has it of transformers."""
        return f"model.layers.{layer}.{self.names.parameter_router}"

    def never_linear(self) -> set[str]:
        """Return the modules that transformers has always had as parameters, so that PEFT finds no modules there."""
        stacked = self.names.stacked is not None
        found = {module for layer in self.layers if stacked for each in self.modules(layer) for module in each}
        return found if self.names.linear_router else found | {self.router(layer).module for layer in self.layers}

    @property
    def alternates(self) -> bool:
        """Whether the parameters of experts are (experts, in, out), and gates and ups take turns in them."""
        return self.names.stacked is not None and self.names.stacked.alternating

    @property
    def site_count(self) -> int:
        shared = SITES_PER_SHARED if self.shared_size else 0
        return (SITES_PER_EXPERT * self.count + shared) * len(self.layers)

    def site(self, layer: int, expert: int) -> int:
        """Return the place of an expert's first site in `sites`."""
        return SITES_PER_EXPERT * (self.layers.index(layer) * self.count + expert)

    def shared_site(self, layer: int) -> int:
        """Return the place of the first site of a layer's shared expert in `sites`."""
        return self._first_shared + SITES_PER_SHARED * self.layers.index(layer)

    def fused_width(self, site: int) -> int | None:
        """Return the width of the gate, and of up, at a place in `sites` where one module is both, else None."""
        shared, place = self.names.shared, site - self._first_shared
        if shared is None or len(shared.gate_up) > 1 or place % SITES_PER_SHARED:
            return None
        return self.shared_size if 0 <= place < SITES_PER_SHARED * len(self.layers) and self.shared_size else None

    def sites(self, hidden: int) -> list[Site]:
        """Return the sites of experts: two for each of each layer, then three for the shared one of each layer."""
        inner, sites = self.intermediate_size, []
        for layer in self.layers:
            for gate, up, down in self.modules(layer):
                sites += [Site(hidden, (Part(gate, inner), Part(up, inner))), Site(inner, (Part(down, hidden),))]
        for layer in self.layers if self.shared_size else ():
            sites += self._shared_sites(f"model.layers.{layer}", hidden)
        return sites

    def _shared_sites(self, prefix: str, hidden: int) -> list[Site]:
        names = self.names.shared
        assert names is not None
        width = 2 * self.shared_size // len(names.gate_up)
        gate = () if names.gate is None else (Part(f"{prefix}.{names.gate}", 1),)
        return [
            Site(hidden, tuple(Part(f"{prefix}.{name}", width) for name in names.gate_up)),
            Site(self.shared_size, (Part(f"{prefix}.{names.down}", hidden),)),
            Site(hidden, gate),
        ]

    @property
    def _first_shared(self) -> int:
        return SITES_PER_EXPERT * self.count * len(self.layers)


def experts_config(file: ConfigFile, names: ExpertNames) -> ExpertsConfig | None:
    """Read what `config.json` says of experts; None if no layer has any. Raises UnsupportedModel."""
    count, chosen = file.num_experts or 0, file.num_experts_per_tok or 0
    if chosen > count:
        refuse("num_experts_per_tok", chosen, f"at most num_experts ({count})")
    if names.clamped and file.swiglu_alpha != SWIGLU_ALPHA:
        refuse("swiglu_alpha", file.swiglu_alpha, str(SWIGLU_ALPHA))
    step, dense = file.decoder_sparse_step, file.mlp_only_layers or ()
    layers = tuple(layer for layer in range(step - 1, file.num_hidden_layers, step) if layer not in dense)
    config = ExpertsConfig(
        count=count,
        chosen=chosen,
        intermediate_size=file.moe_intermediate_size or file.intermediate_size,
        shared_size=(file.shared_expert_intermediate_size or 0) if names.shared else 0,
        normalised=file.norm_topk_prob,
        limit=(file.swiglu_limit or 0.0) if names.clamped else 0.0,
        mxfp4=names.clamped and file.is_mxfp4,
        layers=layers,
        names=names,
    )
    return config if layers else None
