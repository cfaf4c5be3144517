"""LoRA of the parameters of all experts of a layer is LoRA of each expert's modules; what PEFT has not is refused."""

import msgspec
import numpy as np
import pytest

from runtime.adapter_format.canonical import canonical_from_tensors, kv_is_base
from runtime.adapter_format.errors import InvalidAdapter
from runtime.models.experts import ExpertsConfig
from runtime.models.families import ExpertNames
from tests.runtime.adapter_format.adapter_files import MODEL

EXPERTS, RANK, INNER, HIDDEN = 3, 2, 32, 64  # gate and up together have as many outputs as inputs
NAMES = ExpertNames()
P = "base_model.model."
BOTH = {"peft_type": "LORA", "r": RANK, "lora_alpha": 4, "target_modules": []}
BOTH["target_parameters"] = ["experts.down_proj", "experts.gate_up_proj"]


def model_of(names=NAMES):
    experts = ExpertsConfig(
        count=EXPERTS, chosen=2, intermediate_size=INNER, shared_size=0, normalised=True, names=names, layers=(0, 1)
    )
    return msgspec.structs.replace(MODEL, experts=experts)


def by_parameter():
    """A and B of both parameters of both layers, as PEFT saves them."""
    random, tensors = np.random.default_rng(0), {}
    for layer in range(2):
        holder = f"{P}model.layers.{layer}.mlp.experts"
        for place, inputs, outputs in ((f"{holder}.base_layer", HIDDEN, 2 * INNER), (holder, INNER, HIDDEN)):
            a, b = (EXPERTS * RANK, inputs), (outputs, RANK * EXPERTS)
            tensors[f"{place}.lora_A.weight"] = random.standard_normal(a).astype(np.float32)
            tensors[f"{place}.lora_B.weight"] = random.standard_normal(b).astype(np.float32)
    return tensors


def by_module(tensors):
    """The same by the formula that PEFT documents: rank rows of A an expert, and of B every so many columns."""
    found = {}
    for layer in range(2):
        holder = f"{P}model.layers.{layer}.mlp.experts"
        gate_up, down = (
            {leaf: tensors[f"{place}.lora_{leaf}.weight"] for leaf in "AB"}
            for place in (f"{holder}.base_layer", holder)
        )
        for expert in range(EXPERTS):
            rows = slice(expert * RANK, (expert + 1) * RANK)
            gate, up = np.split(gate_up["B"][:, expert::EXPERTS], 2)
            for name, a, b in (
                ("gate_proj", gate_up["A"][rows], gate),
                ("up_proj", gate_up["A"][rows], up),
                ("down_proj", down["A"][rows], down["B"][:, expert::EXPERTS]),
            ):
                found[f"{holder}.{expert}.{name}.lora_A.weight"], found[f"{holder}.{expert}.{name}.lora_B.weight"] = (
                    a,
                    b,
                )
    return found


def swapped(tensors):
    """As PEFT before 0.19.1 has them, which took inputs for outputs."""
    found = {}
    for name, values in tensors.items():
        leaf = "A" if ".lora_A." in name else "B"
        by_rank = (
            values.reshape(EXPERTS, RANK, -1) if leaf == "A" else values.T.reshape(RANK, EXPERTS, -1).transpose(1, 0, 2)
        )
        other = (
            by_rank.transpose(2, 1, 0).reshape(-1, RANK * EXPERTS)
            if leaf == "A"
            else by_rank.reshape(EXPERTS * RANK, -1)
        )
        found[name.replace(f"lora_{leaf}", "lora_B" if leaf == "A" else "lora_A")] = np.ascontiguousarray(other)
    return found


def digest_of(tensors, config, model=None):
    return canonical_from_tensors(tensors, config, model or model_of(), max_rank=16)[0]


def test_it_is_the_same_adapter_as_lora_of_each_experts_modules():
    tensors = by_parameter()
    modules = BOTH | {"target_parameters": None, "target_modules": ["gate_proj", "up_proj", "down_proj"]}
    assert digest_of(tensors, BOTH) == digest_of(by_module(tensors), modules)


def test_what_an_older_peft_has_saved_is_the_same_adapter():
    """Where there are as many inputs as outputs, the version alone says which of A and B has which."""
    tensors = by_parameter()
    assert digest_of(swapped(tensors), BOTH | {"peft_version": "0.18.1"}) == digest_of(tensors, BOTH)
    assert digest_of(swapped(tensors), BOTH | {"peft_version": "0.19.1"}) != digest_of(tensors, BOTH)
    assert digest_of(tensors, BOTH | {"peft_version": "0.21.0"}) == digest_of(tensors, BOTH)


def test_one_parameter_alone_is_not_nested():
    tensors = by_parameter()
    down = {name: values for name, values in tensors.items() if ".base_layer." not in name}
    config = BOTH | {"target_parameters": ["experts.down_proj"]}
    modules = {name: values for name, values in by_module(tensors).items() if ".down_proj." in name}
    assert digest_of(down, config) == digest_of(
        modules, config | {"target_parameters": None, "target_modules": ["down_proj"]}
    )


def test_ranks_follow_patterns_of_parameter_names_and_routers_are_matrices():
    tensors = by_parameter()
    config = BOTH | {"r": 5, "rank_pattern": {"experts.down_proj": RANK, r"mlp\.experts\.gate_up_proj": RANK}}
    router = {"lora_A": np.ones((5, HIDDEN), np.float32), "lora_B": np.ones((EXPERTS, 5), np.float32)}
    tensors |= {f"{P}model.layers.1.mlp.gate.{name}.weight": values for name, values in router.items()}
    config["target_parameters"] = [*BOTH["target_parameters"], "layers.1.mlp.gate.weight"]
    renamed = ExpertNames("block_sparse_moe", "gate", "w1", "w3", "w2")
    for names, block, down in ((NAMES, "mlp", "down_proj"), (renamed, "block_sparse_moe", "w2")):
        _, file = canonical_from_tensors(tensors, config, model_of(names), max_rank=16)
        assert file.header.tensors[f"model.layers.1.{block}.gate.lora_A.weight"].shape == (5, HIDDEN)
        assert file.header.tensors[f"model.layers.0.{block}.experts.2.{down}.lora_A.weight"].shape == (RANK, INNER)
        assert file.config.scales[f"model.layers.0.{block}.experts.2.{down}"] == 4 / RANK


@pytest.mark.parametrize("names", [NAMES, ExpertNames("block_sparse_moe", "gate", "w1", "w3", "w2")])
def test_experts_of_the_last_layer_leave_keys_and_values_as_the_base_has_them(names):
    model = model_of(names)
    for layer, harmless in (("layers.1", True), ("layers.0", False)):
        tensors = {name: values for name, values in by_parameter().items() if layer in name}
        _, file = canonical_from_tensors(tensors, BOTH, model, max_rank=16)
        assert kv_is_base(file.header.tensors, model) == harmless


def test_a_name_that_selects_nothing_is_a_warning(caplog):
    tensors = {
        f"{P}model.layers.0.self_attn.q_proj.lora_{leaf}.weight": np.ones(
            (2, 64)[:: 1 if leaf == "A" else -1], np.float32
        )
        for leaf in "AB"
    }
    digest_of(tensors, BOTH | {"target_modules": ["q_proj"]}, MODEL)
    assert "selects no parameter of the base" in caplog.text


def test_parameters_without_tensors_are_a_warning_or_where_they_begin_at_random_refused(caplog):
    tensors = {name: values for name, values in by_parameter().items() if "layers.0" in name}
    digest_of(tensors, BOTH)
    assert "no tensors for 2 of the modules and parameters that are selected (model.layers.1.mlp.experts" in caplog.text
    with pytest.raises(InvalidAdapter, match="init_lora_weights fills at random"):
        digest_of(tensors, BOTH | {"init_lora_weights": False})


def test_more_tensors_than_a_header_may_name_are_refused(monkeypatch):
    monkeypatch.setattr("runtime.adapter_format.canonical.MAX_HEADER_BYTES", 4000)
    with pytest.raises(
        InvalidAdapter, match=r"weights: has 36 tensors, whose header takes \d+ bytes, expected at most"
    ):
        digest_of(by_parameter(), BOTH)


FIRST = f"{P}model.layers.0.mlp.experts.lora_A.weight"
REFUSED = {
    "a string": ({"target_parameters": "experts.down_proj"}, {}, "target_parameters: .* expected null or a list"),
    "the embedding": ({"target_parameters": ["embed_tokens.weight"]}, {}, "selects model.embed_tokens.weight"),
    "a norm": ({"target_parameters": ["input_layernorm.weight"]}, {}, "selects model.layers.0.input_layernorm.weight"),
    "biases of experts": (
        {"target_parameters": ["gate_up_proj_bias"]},
        {},
        r"selects model\.layers\.0\.mlp\.experts\.gate_up",
    ),
    "DoRA": ({"use_dora": True}, {}, "use_dora: is true beside target_parameters"),
    "lora_bias": ({"lora_bias": True}, {}, "lora_bias: is true beside target_parameters"),
    "an aLoRA": ({"alora_invocation_tokens": [3]}, {}, "alora_invocation_tokens: is set beside target_parameters"),
    "not selected": ({"target_parameters": ["experts.gate_up_proj"]}, {}, "experts"),
    "another rank": ({"r": 3}, {}, r"lora_A.weight: has shape \[6, 32\], expected \[9, 32\] for rank 3 of 3 experts"),
    "no B": ({}, {FIRST.replace("lora_A", "lora_B"): None}, r"has no lora_B beside it"),
    "infinite": ({}, {FIRST: np.full((6, INNER), np.inf, np.float32)}, r"experts\.0\.down_proj.*: has NaN or infinite"),
}


@pytest.mark.parametrize(("fields", "changes", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_what_peft_has_not_is_refused_by_name(fields, changes, message):
    tensors = {name: values for name, values in (by_parameter() | changes).items() if values is not None}
    with pytest.raises(InvalidAdapter, match=message):
        digest_of(tensors, BOTH | fields)
