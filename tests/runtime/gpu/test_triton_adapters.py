"""Adapters on the Triton kernels: of all shapes, moving about in too little memory, replaced while they run."""

import re

import pytest
import torch

from runtime.messages import Generate, SamplingParams
from runtime.request import RequestRefused
from tests.runtime.adapter_format.adapter_files import canonical_bytes
from tests.runtime.adapters.peft_engine import LINEAR, PeftOracle, engines
from tests.runtime.tiny_engine import BLOCK_BYTES, prompt, run

OPTIONS = {"max_running": 4, "max_batch_tokens": 64, "max_lora_rank": 48}
ELEMENT_BYTES = 4


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    with engines(PeftOracle(tmp_path_factory.mktemp("model"))) as start_any:
        yield lambda **options: start_any(**{"kernels": "triton"} | OPTIONS | options)


@pytest.fixture(scope="module")
def reference(start):
    return start(kernels="torch", device="cpu", prefix_cache=False)


@pytest.fixture(scope="module")
def engine(start):
    return start()


def greedy(max_tokens):
    return SamplingParams(max_tokens=max_tokens, temperature=0.0, ignore_eos=True)


def adapter(engine, modules, ranks, *, bias=False, seed=0):
    """Random tensors of every module whose name ends in one of `modules`, of that one's rank, and their config."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for site in engine.runner.model.sites():
        for module, out in site.parts:
            end = module.rpartition(".")[2]
            if end not in modules:
                continue
            rank, name = ranks[end], f"base_model.model.{module}"
            a, b = ("lora_A.weight", "lora_B.weight")
            if end == "embed_tokens":
                a, b = ("lora_embedding_A", "lora_embedding_B")
            tensors[f"{name}.{a}"] = torch.randn(rank, site.in_features, generator=generator) * 0.4 / rank**0.5
            tensors[f"{name}.{b}"] = torch.randn(out, rank, generator=generator) * 0.4
            if bias:
                tensors[f"{name}.lora_B.bias"] = torch.randn(out, generator=generator) * 0.4
    config = {
        "peft_type": "LORA",
        "r": 4,
        "lora_alpha": 8,
        "target_modules": list(modules),
        "rank_pattern": {end: ranks[end] for end in modules},
        "lora_bias": bias,
        "bias": "none",
    }
    return tensors, config


def everywhere(modules, rank):
    return dict.fromkeys(modules, rank)


SHAPES = {
    "wider than a block, with bias": (LINEAR, everywhere(LINEAR, 40), True),
    "a rank for each module": (LINEAR, dict(zip(LINEAR, (1, 33, 2, 17, 3, 48, 5), strict=True)), False),
    "biases of some": (["k_proj", "up_proj"], {"k_proj": 3, "up_proj": 7}, True),
    "embedding and head": (["embed_tokens", "lm_head"], {"embed_tokens": 33, "lm_head": 20}, False),
    "one part of each site": (
        ["v_proj", "up_proj", "embed_tokens"],
        everywhere(["v_proj", "up_proj", "embed_tokens"], 9),
        False,
    ),
}


def on_both(engine, reference, *made):
    digest = engine.add_adapter(*made)
    assert reference.add_adapter(*made) == digest
    return digest


def ask(engine, prompts, digests, max_tokens=3):
    return [each.token_ids for each in engine.generate(prompts, greedy(max_tokens), digests)]


def test_adapters_of_all_shapes_side_by_side_give_the_references_tokens(engine, reference):
    digests = [
        on_both(engine, reference, *adapter(engine, modules, ranks, bias=bias, seed=seed))
        for seed, (modules, ranks, bias) in enumerate(SHAPES.values())
    ]
    prompts = [prompt(5 + seed, seed) for seed in range(len(digests))]
    expected = ask(reference, prompts, digests)
    assert ask(reference, prompts, None) != expected
    for name, ours, theirs in zip(SHAPES, ask(engine, prompts, digests), expected, strict=True):
        assert ours == theirs, name


@pytest.mark.parametrize("holds", [1, 2])
def test_an_adapter_that_comes_back_elsewhere_is_found_there(start, reference, holds):
    """Extents of three sizes in room for one or two of them: a row of the table is never of where it was before."""
    kinds = [["q_proj"], ["q_proj", "v_proj"], ["down_proj", "v_proj"], ["up_proj"]]
    made = [adapter(reference, modules, everywhere(modules, 4 + index)) for index, modules in enumerate(kinds)]
    sizes = [ELEMENT_BYTES * sum(tensor.numel() for tensor in tensors.values()) for tensors, _ in made]
    engine = start(adapter_bytes=holds * (max(sizes) + 1024))
    digests = [on_both(engine, reference, *each) for each in made]
    places = {digest: set() for digest in digests}
    prompts = [prompt(5, seed) for seed in range(11)]
    users = [digests[index] for index in (0, 1, 2, 3, 1, 0, 2, 0, 3, 1, 2)]
    for tokens, digest, expected in zip(prompts, users, ask(reference, prompts, users, max_tokens=2), strict=True):
        assert ask(engine, [tokens], digest, max_tokens=2) == [expected]
        places[digest].add(engine.adapters.device.first_element(digest))
    assert engine.adapters.device.evictions > 3
    assert holds == 1 or max(map(len, places.values())) > 1, "none has moved"
    assert ask(engine, prompts[:4], digests, max_tokens=2) == ask(reference, prompts[:4], digests, max_tokens=2)


def test_more_adapters_than_the_table_has_slots_take_turns(start, reference):
    engine = start(max_running=1)
    made = [adapter(reference, ["q_proj"], {"q_proj": 4}, seed=seed) for seed in range(5)]
    digests = [on_both(engine, reference, *each) for each in made]
    assert len(engine.runner._table.rows) < len(digests)
    for turn in range(2):
        prompts = [prompt(4, 10 * turn + seed) for seed in range(5)]
        assert ask(engine, prompts, digests, max_tokens=1) == ask(reference, prompts, digests, max_tokens=1)


def test_while_one_generation_runs_it_is_retired_and_the_next_takes_its_place(start, reference):
    modules = ["q_proj", "down_proj"]
    first, second = (adapter(reference, modules, everywhere(modules, 4), seed=seed) for seed in (1, 2))
    engine = start()
    old, new = on_both(engine, reference, *first), reference.add_adapter(*second)
    [expected_old], [expected_new] = (ask(reference, [prompt(9)], digest, max_tokens=6) for digest in (old, new))
    assert expected_old != expected_new
    engine.add_request(Generate(request_id="old", token_ids=prompt(9), params=greedy(6), adapter=old))
    while engine.requests["old"].num_generated < 2:
        engine.step()
    engine.retire_adapter(old)
    assert engine.add_adapter(*second) == new
    outputs = run(engine, Generate(request_id="new", token_ids=prompt(9), params=greedy(6), adapter=new))
    assert outputs["new"] == (expected_new, "length")
    tokens, reason = outputs["old"]
    assert (tokens, reason) == (expected_old[-len(tokens) :], "length")
    engine.step()
    assert engine.adapters.device.adapters == [new]
    assert engine.add_adapter(*first) == old
    assert ask(engine, [prompt(9)], old, max_tokens=6) == [expected_old]


@pytest.mark.parametrize("modules", [["q_proj"], ["v_proj", "q_proj", "k_proj"], LINEAR])
def test_a_file_from_where_larger_ranks_are_allowed_fails_its_load_by_the_module(start, reference, tmp_path, modules):
    tensors, config = adapter(reference, modules, everywhere(modules, 48) | {"q_proj": 49})
    arrays = {name: tensor.numpy() for name, tensor in tensors.items()}
    digest, content = canonical_bytes(arrays, config, reference.runner.model)
    (tmp_path / "adapter").write_bytes(content)
    reason = "q_proj: has rank 49, and max_lora_rank is 48; start the server with --max-lora-rank 49"
    engine = start()
    for each in (engine, reference):
        each.register_adapter(digest, tmp_path / "adapter")
        with pytest.raises(RequestRefused, match=re.escape(reason)):
            ask(each, [prompt(4), prompt(5)], [None, digest])
    assert ask(engine, [prompt(4)], None) == ask(reference, [prompt(4)], None)


@pytest.mark.parametrize("name", ["plain", "linears"])
def test_kv_that_were_evicted_to_host_memory_come_back(start, reference, name):
    engine = start(blocks=5, max_model_len=64, host_kv_bytes=40 * BLOCK_BYTES)
    tokens = prompt(36)

    def under(one):
        invocation_starts = [20 if name == "linears" else 0]
        return one.generate([tokens], greedy(2), one.digests[name], invocation_starts)[0]

    before = under(engine)
    for seed in range(2):
        engine.generate([prompt(60, 90 + seed)], greedy(1))
    after = under(engine)
    assert after.cached_tokens == len(tokens) - 1
    assert engine.stats().host_kv.loads > 1
    assert before.token_ids == after.token_ids == under(reference).token_ids
