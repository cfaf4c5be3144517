"""Graphs of steps, with captures that call the function again: the padding and the choice of a graph."""

from itertools import pairwise

import pytest
import torch

from runtime.gpu import cuda_graphs
from runtime.gpu.cuda_graphs import FEW_DECODES, RANKS, StepGraphs, graph_shapes, sizes
from runtime.gpu.step_inputs import StepShape
from runtime.gpu.step_lora import DECODE_HEIGHT, PREFILL_HEIGHT
from runtime.messages import Generate, SamplingParams
from tests.runtime.adapters.peft_engine import INVOCATIONS, PeftOracle, engines
from tests.runtime.gpu import eager_captures
from tests.runtime.gpu.eager_captures import EagerCaptures
from tests.runtime.tiny_engine import adapter_tensors, prompt

MOST, TOKENS, LORA_RANKS = 100, 2048, 768
TABLE_WIDTH = 8
LIMIT = 48  # tokens, three blocks
OPTIONS = {"max_running": 5, "max_batch_tokens": 64, "max_model_len": LIMIT, "max_lora_rank": 16}
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
        patch.setattr(cuda_graphs, "RANKS", (12, 24))  # r4 on q, k and v, and r8
        patch.setattr(cuda_graphs, "PROMPT_TOKENS", (16, 32))
        patch.setattr(eager_captures, "WARM_UP_RUNS", 1)
        engine.runner.graphs = engine.runner.step_graphs(captures)
    return engine, captures


@pytest.fixture(scope="module")
def graphs():
    shapes = graph_shapes(MOST, TOKENS, TABLE_WIDTH, LORA_RANKS)
    return StepGraphs(lambda shape: None, lambda shape: None, shapes, lambda call: call)


def shape(decodes, prompts=(), tiles=0, ranks=None, **rest):
    """A step of decodes, and prompts of so many tokens."""
    height = PREFILL_HEIGHT if prompts else DECODE_HEIGHT
    ranks = 48 * (tiles > 0) if ranks is None else ranks
    requests = decodes + len(prompts)
    made = StepShape(decodes + sum(prompts), decodes, len(prompts), 3, requests, tiles, 0, height, ranks)
    return made._replace(**rest)


def holds(graph, step):
    """Whether a graph has room for each part of a step."""
    parts = ("decodes", "prompt_tokens", "prefills", "logits", "tiles", "ranks", "embedding", "width")
    return all(getattr(graph, part) >= getattr(step, part) for part in parts)


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


@pytest.mark.parametrize("prompts", [(), (2,), (64,), (2, 30), (300,), (2,) * 32, (500, 12)], ids=str)
@pytest.mark.parametrize("tiles", [0, 1])
def test_every_step_up_to_the_sizes_of_graphs_has_one_that_holds_it(graphs, prompts, tiles):
    for decodes in range(not prompts, MOST + 1 - len(prompts)):
        step = shape(decodes, prompts, tiles)
        padded = graphs.padded(step)
        assert graphs.of(padded) is not None
        assert holds(padded, step)
        assert (padded.tiles > 0, padded.prefills > 0) == (tiles > 0, bool(prompts))
        assert (padded.width, padded.height) == (TABLE_WIDTH, step.height)
        if not prompts:
            assert padded.decodes == next(size for size in sizes(MOST) if size >= decodes)
        else:
            assert padded.prompt_tokens == next(size for size in (64, 128, 256, 512) if size >= sum(prompts))
            assert padded.decodes == next(size for size in (0, FEW_DECODES, MOST) if size >= decodes)


@pytest.mark.parametrize(
    "step",
    [
        shape(MOST + 1),
        shape(2, (513,)),
        shape(0, (2,) * (MOST + 1)),
        shape(2, tiles=2, logit_tiles=2),
        shape(2, logits=MOST + 1),
    ],
    ids=["too many", "a long prompt", "too many prompts", "adapters of the head", "rows that score a prompt"],
)
def test_what_fits_no_graph_keeps_its_shape_and_has_none(graphs, step):
    assert graphs.padded(step) == step
    assert graphs.of(step) is None


def test_programs_that_have_nothing_to_do_are_few_whatever_the_adapters(graphs):
    """Tiles times ranks, beside those of the step."""
    cold = [(1, 1, 48), (100, 20, 48), (100, 100, 48), (64, 64, 48), (32, 2, 192), (2, 2, 768)]
    hot = [(1, 1, 48), (8, 1, 48), (8, 8, 48), (32, 2, 48), (100, 7, 48), (100, 8, 48), (100, 14, 48)]
    for decodes, tiles, ranks in cold + hot:
        step = shape(decodes, tiles=tiles, ranks=ranks, hot=(decodes, tiles, ranks) in hot)
        padded = graphs.padded(step)
        assert padded.tiles * padded.ranks <= 4 * tiles * ranks, step
    for prompts in [(64,), (500,), (100, 100)]:
        step = shape(8, prompts, tiles=sum(prompts) // 64 + 3)
        assert graphs.padded(step).tiles <= step.tiles + 10


@pytest.mark.parametrize("lora_ranks", [3, 48, 150, 192, 768])
def test_adapters_of_every_rank_have_graphs(lora_ranks):
    made = StepGraphs(
        lambda shape: None, lambda shape: None, graph_shapes(8, 256, TABLE_WIDTH, lora_ranks), lambda call: call
    )
    for ranks in {1, min(49, lora_ranks), lora_ranks}:
        for step in (shape(8, tiles=8, ranks=ranks), shape(1, (9,), tiles=2, ranks=ranks)):
            least = min(width for width in (*RANKS, lora_ranks) if width >= ranks)
            assert made.padded(step).ranks == min(least, lora_ranks)
            assert not made.padded(step).embedding
            embedded = made.padded(step._replace(embedding=True))
            assert embedded.embedding
            assert made.of(embedded) is not None


def test_a_step_of_hot_adapters_fits_the_graphs_of_others_and_not_the_other_way_round(graphs):
    hot, cold = shape(8, tiles=1, hot=True), shape(8, tiles=1)
    assert graphs.padded(hot).hot
    assert not graphs.padded(cold).hot
    wide = graphs.padded(hot._replace(ranks=RANKS[0] + 1))
    assert not wide.hot
    assert graphs.of(wide) is not None


def test_shapes_are_few():
    assert len(list(graph_shapes(64, 2048, TABLE_WIDTH, 768))) < 150
    each = list(graph_shapes(MOST, TOKENS, TABLE_WIDTH, LORA_RANKS))
    assert len(each) == len(set(each))


@pytest.mark.parametrize("most_tokens", [5, 64, 65, 300])
def test_graphs_of_prompts_reach_as_far_as_a_step_does(most_tokens):
    tokens = {each.prompt_tokens for each in graph_shapes(5, most_tokens, TABLE_WIDTH, 48)}
    assert max(tokens) == most_tokens


def test_captures_write_no_kv(graphed):
    engine, captures = graphed
    assert captures.captured > 2 * len(list(sizes(5)))
    assert all(not layer[:16].any() for layer in engine.runner.kv.layers)


def run(engine, names, seed):
    params = SamplingParams(max_tokens=3, temperature=0.0, ignore_eos=True)
    digests = [engine.digests[name] for name in names]
    prompts = [prompt(9 + index, seed + index) for index in range(len(names))]
    invocation_starts = [
        0 if INVOCATIONS.get(name) is None else len(tokens) - 2 for name, tokens in zip(names, prompts, strict=True)
    ]
    return [each.token_ids for each in engine.generate(prompts, params, digests, invocation_starts)]


@pytest.mark.parametrize("count", range(1, 6))
@pytest.mark.parametrize("names", [[None] * 5, ["linears", None, "plain", "linears", "head"]], ids=["base", "mixed"])
def test_padded_batches_give_the_tokens_of_those_that_are_not(reference, graphed, names, count):
    engine, captures = graphed
    before = captures.replays.total()
    assert run(engine, names[:count], seed=count) == run(reference, names[:count], seed=count)
    replayed = captures.replays.total() - before
    tokens = sum(9 + index for index in range(count))
    steps = 3 if tokens <= 32 else 2  # a prompt may be too long for the graphs here
    assert replayed >= steps or "head" in names[:count], "all its steps, but for those with an adapter of the head"


@pytest.mark.parametrize("names", [[None] * 3, ["linears", "plain", None]], ids=["base", "mixed"])
def test_prompts_beside_decodes_replay_graphs_and_give_the_same_tokens(reference, graphed, names):
    """Requests come one after the other, with prompts of several sizes."""
    engine, captures = graphed
    before, outputs = captures.replays.total(), []
    kinds = set()
    for each in (engine, reference):
        each.drop_namespace(None)
        found = {}
        for index, name in enumerate(names):
            params = SamplingParams(max_tokens=9, temperature=0.0, ignore_eos=True)
            tokens, digest = prompt(5 + 9 * index, 200 + index), each.digests[name]
            each.add_request(Generate(request_id=f"{index}", token_ids=tokens, params=params, adapter=digest))
            for _ in range(2):
                take(each.step(), found)
                if each is engine:
                    kinds.add((engine.runner.prepared.shape.decodes > 0, engine.runner.prepared.shape.prefills > 0))
        while each.busy:
            take(each.step(), found)
        outputs.append(found)
    assert outputs[0] == outputs[1]
    assert (True, True) in kinds
    assert captures.replays.total() - before >= engine_steps(outputs[0])


def take(events, found):
    for event in events:
        found.setdefault(event.request_id, []).extend(event.token_ids)


def engine_steps(found):
    """The fewest steps that tell so many tokens."""
    return max(map(len, found.values()))


def test_an_adapter_wider_than_most_replays_a_graph_too(reference, graphed):
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
    assert captures.replays.total() >= before + 3


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
