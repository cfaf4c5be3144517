"""Graphs of decode steps, with captures that call the function again: the padding and the choice of a graph."""

from itertools import pairwise

import pytest
import torch

from runtime.gpu import cuda_graphs
from runtime.gpu.cuda_graphs import MOST_RANKS, DecodeGraphs, sizes
from runtime.gpu.step_inputs import StepShape
from runtime.gpu.step_lora import DECODE_HEIGHT
from runtime.messages import Generate, SamplingParams
from tests.runtime.adapters.peft_engine import INVOCATIONS, PeftOracle, engines
from tests.runtime.gpu.eager_captures import EagerCaptures
from tests.runtime.tiny_engine import adapter_tensors, prompt

MOST = 5
TABLE_WIDTH = 8
LIMIT = 48  # tokens, three blocks
OPTIONS = {"max_running": MOST, "max_batch_tokens": 64, "max_model_len": LIMIT, "max_lora_rank": 16}
RANKS = 12  # at a site, of the widest adapter with a graph here: r4 on q, k and v
WIDE = {"peft_type": "LORA", "r": 8, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"], "bias": "none"}


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    with engines(PeftOracle(tmp_path_factory.mktemp("model"))) as start:
        yield start


@pytest.fixture(scope="module")
def reference(start):
    return start(kernels="torch", device="cpu", **OPTIONS)


@pytest.fixture(scope="module")
def graphed(start):
    """An engine with graphs, and its captures."""
    engine = start(kernels="triton", **OPTIONS)
    captures = EagerCaptures()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cuda_graphs, "MOST_RANKS", RANKS)
        engine.runner.graphs = engine.runner.decode_graphs(captures)
    return engine, captures


def graphs(most=MOST, lora_width=768, forward=None):
    called = []
    made = DecodeGraphs(
        forward or (lambda shape, width: called.append((shape, width))),
        lambda shape: None,
        most,
        TABLE_WIDTH,
        lora_width,
        lambda call: call,
    )
    return made, called


def shape(decodes, prefills=0, tiles=0, width=3, logits=None, logit_tiles=0):
    tokens = decodes + 5 * prefills
    return StepShape(
        tokens, decodes, prefills, width, decodes if logits is None else logits, tiles, logit_tiles, DECODE_HEIGHT
    )


@pytest.mark.parametrize(
    ("most", "expected"),
    [
        (1, [1]),
        (2, [1, 2]),
        (5, [1, 2, 4, 5]),
        (16, [1, 2, 4, 8, 16]),
        (17, [1, 2, 4, 8, 16, 17]),
        (24, [1, 2, 4, 8, 16, 24]),
        (25, [1, 2, 4, 8, 16, 24, 25]),
        (64, [1, 2, 4, 8, 16, 24, 32, 48, 64]),
        (100, [1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 100]),
    ],
)
def test_sizes_double_with_one_half_way_from_16_on_and_end_at_the_most(most, expected):
    assert list(sizes(most)) == expected


def test_no_size_from_16_on_is_padded_by_more_than_half():
    for most in range(1, 300):
        each = list(sizes(most))
        assert each == sorted(set(each))
        assert all(larger <= max(2 * smaller, smaller + 1) for smaller, larger in pairwise(each))
        assert all(larger <= 1.5 * smaller for smaller, larger in pairwise(each) if smaller >= 16)


@pytest.mark.parametrize("tiles", [0, 1])
def test_a_step_is_padded_to_the_smallest_graph_that_holds_it(tiles):
    made, _ = graphs()
    for decodes in range(1, MOST + 1):
        padded = made.padded(shape(decodes, tiles=tiles), width=12)
        size = next(size for size in sizes(MOST) if size >= decodes)
        rows = size if tiles else 0
        assert padded == StepShape(size, size, 0, TABLE_WIDTH, size, rows, 0, DECODE_HEIGHT)
        assert made.of(padded, 12) is not None


@pytest.mark.parametrize(
    ("step", "width"),
    [
        (shape(2, prefills=1), 0),
        (shape(0, prefills=1), 0),
        (shape(MOST + 1), 0),
        (shape(2, tiles=2), MOST_RANKS + 1),
        (shape(2, prefills=1, tiles=2), 12),
        (shape(2, tiles=2, logit_tiles=2), 12),
    ],
    ids=["prefill beside decodes", "prefill", "too many", "too wide", "prefill with adapters", "adapters of the head"],
)
def test_what_fits_no_graph_keeps_its_shape_and_has_none(step, width):
    made, _ = graphs()
    assert made.padded(step, width) == step
    assert made.of(step, width) is None


def test_an_adapter_too_wide_has_no_graph_even_where_its_step_has_the_shape_of_one():
    made, _ = graphs()
    step = shape(2, tiles=2, width=TABLE_WIDTH)
    assert made.of(step, MOST_RANKS) is not None
    assert made.padded(step, MOST_RANKS + 1) == step
    assert made.of(step, MOST_RANKS + 1) is None


@pytest.mark.parametrize(("lora_width", "width"), [(48, 48), (768, MOST_RANKS)])
def test_graphs_have_programs_for_as_many_ranks_as_an_adapter_may_have_up_to_a_bound(lora_width, width):
    made, called = graphs(lora_width=lora_width)
    for decodes in (1, 3, MOST):
        for tiles in (0, 1):
            padded = made.padded(shape(decodes, tiles=tiles), width)
            made.of(padded, width)()
            assert called[-1] == (padded, width), "each graph is of its own shape"


def test_captures_write_no_kv(graphed):
    engine, captures = graphed
    assert captures.captured == 2 * len(list(sizes(MOST)))
    assert all(not layer[:16].any() for layer in engine.runner.kv.layers)


def run(engine, names, seed):
    params = SamplingParams(max_tokens=3, temperature=0.0, ignore_eos=True)
    digests = [engine.digests[name] for name in names]
    prompts = [prompt(9 + index, seed + index) for index in range(len(names))]
    invocation_starts = [
        0 if INVOCATIONS.get(name) is None else len(tokens) - 2 for name, tokens in zip(names, prompts, strict=True)
    ]
    return [each.token_ids for each in engine.generate(prompts, params, digests, invocation_starts)]


@pytest.mark.parametrize("count", range(1, MOST + 1))
@pytest.mark.parametrize("names", [[None] * MOST, ["linears", None, "plain", "linears", "head"]], ids=["base", "mixed"])
def test_padded_batches_give_the_tokens_of_those_that_are_not(reference, graphed, names, count):
    engine, captures = graphed
    before = captures.replays.total()
    assert run(engine, names[:count], seed=count) == run(reference, names[:count], seed=count)
    replayed = captures.replays.total() - before
    assert replayed >= 2 or "head" in names[:count], "its decode steps, but for those with an adapter of the head"


def test_adapters_wider_than_the_graphs_run_without_one_to_the_end_of_the_table(reference, graphed):
    """A step of as many requests as a graph has, the longest as long as tables go, has that graph's shape."""
    engine, captures = graphed
    tensors = {
        name: torch.cat([tensor, tensor.flip(0, 1)], 0 if "lora_A" in name else 1)
        for name, tensor in adapter_tensors(scale=0.5).items()
    }
    digest = engine.add_adapter(tensors, WIDE)
    assert reference.add_adapter(tensors, WIDE) == digest
    params = SamplingParams(max_tokens=4, temperature=0.0, ignore_eos=True)
    before = captures.replays.total()
    got, expected = (each.generate([prompt(LIMIT - 5)], params, digest)[0] for each in (engine, reference))
    assert got.token_ids == expected.token_ids
    assert captures.replays.total() == before


def test_padding_writes_no_kv(graphed):
    engine, _ = graphed
    params = SamplingParams(max_tokens=5, temperature=0.0, ignore_eos=True)
    for index, name in enumerate([None, "plain", "plain"]):
        tokens, digest = prompt(14 + index, 50 + index), engine.digests[name]
        engine.add_request(Generate(request_id=f"{index}", token_ids=tokens, params=params, adapter=digest))
    while any(request.num_generated == 0 for request in engine.requests.values()):
        engine.step()
    layers = engine.runner.kv.layers
    for _ in range(2):
        before = [layer.clone() for layer in layers]
        places = [(request.blocks, request.computed) for request in engine.requests.values()]
        engine.step()
        written = {blocks[place // 16] * 16 + place % 16 for blocks, place in places}
        for old, new in zip(before, layers, strict=True):
            changed = (old != new).flatten(1).any(1).nonzero().flatten().tolist()
            assert set(changed) == written
            assert not new[:16].any(), "block 0 stays zero"
    engine.fail_all("test_over", "")


def test_a_warm_up_of_prompts_writes_no_kv(graphed):
    engine, _ = graphed
    runner = engine.runner
    before = [layer.clone() for layer in runner.kv.layers]
    runner.warm_up()
    assert all(torch.equal(old, new) for old, new in zip(before, runner.kv.layers, strict=True))
