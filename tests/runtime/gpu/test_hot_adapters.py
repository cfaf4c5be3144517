"""Hot adapters: their A below the weights, so that one product gives a projection's outputs and all shrinks."""

import pytest
import torch

from runtime.gpu.hot_adapters import HOT_ADAPTERS, HOT_RANK, HotAdapters, HotLinear
from runtime.messages import SamplingParams
from runtime.models.layers import Linear
from tests.runtime.adapters.peft_engine import INVOCATIONS, PeftOracle, engines
from tests.runtime.gpu.test_adapter_table import MODEL, Q, V, some, table
from tests.runtime.tiny_engine import prompt

GREEDY = SamplingParams(max_tokens=5, temperature=0.0, ignore_eos=True)
SITE = 0  # q, k and v of the first layer
LAYER = "model.layers.0.self_attn."


def linear(bias=False):
    site = MODEL.sites()[SITE]
    out = sum(part.out_features for part in site.parts)
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(out, site.in_features, generator=generator)
    return HotLinear(Linear(weight, torch.randn(out, generator=generator) if bias else None), len(site.parts))


class Places:
    """Hot adapters of one site, and an arena of theirs."""

    def __init__(self):
        self.linear, self.table = linear(), table(slots=2 * HOT_ADAPTERS + 2)
        self.hot = HotAdapters({SITE: self.linear, SITE + 1: Linear(torch.zeros(3, 3))}, len(self.table.rows), "cpu")
        self.layout = some(f"{LAYER}q_proj", f"{LAYER}v_proj")
        self.arena = torch.randn(self.layout.elements * 40, generator=torch.Generator().manual_seed(1))

    def row(self, name, layout=None):
        return self.table.row_of(name, layout or self.layout, 16 + (ord(name) - ord("a")) * self.layout.elements)

    def heat(self, names):
        """Two steps of some adapters: whether the second one has them all hot."""
        adapters = {name: self.row(name) for name in names}
        self.hot.heat(adapters, self.arena)
        return self.hot.heat(adapters, self.arena)

    def shrunk(self, name, x):
        """What lies at the columns of an adapter."""
        _, t = self.linear.with_shrinks(x)
        first = int(self.hot.by_slot[self.row(name).slot]) * self.linear.hot_ranks
        return t[:, 0, first : first + self.layout.sites[SITE].rank]

    def expected(self, name, x):
        site, row = self.layout.sites[SITE], self.row(name)
        a = self.arena[row.first + site.a.start :][: site.rank * site.in_features].view(site.rank, -1)
        return x @ a.t()


@pytest.mark.parametrize("bias", [False, True])
def test_the_base_has_its_plain_weight_and_rows_begin_aligned(bias):
    made, x = linear(bias), torch.randn(3, MODEL.sites()[SITE].in_features)
    y, t = made.with_shrinks(x)
    torch.testing.assert_close(y, made(x))
    assert t.shape == (3, 1, HOT_ADAPTERS * 3 * HOT_RANK)
    assert made.weight.shape == made.plain().shape == (made.out_features, made.in_features)


def test_the_products_of_each_hot_adapter_are_at_its_place_whoever_came_and_went():
    places, x = Places(), torch.randn(2, MODEL.sites()[SITE].in_features)
    names = [chr(ord("a") + index) for index in range(HOT_ADAPTERS + 3)]
    for first in range(4):
        for step in (names[first : first + 3], names[first : first + HOT_ADAPTERS], [names[first]]):
            assert places.heat(step)
            for name in step:
                torch.testing.assert_close(places.shrunk(name, x), places.expected(name, x))


def test_the_adapter_that_was_used_longest_ago_gives_up_its_place():
    places = Places()
    names = [chr(ord("a") + index) for index in range(HOT_ADAPTERS + 1)]
    for name in names[:-1]:
        assert places.heat([name])
    assert places.heat([names[0]])
    before = {name: int(places.hot.by_slot[places.row(name).slot]) for name in names[:-1]}
    assert sorted(before.values()) == list(range(HOT_ADAPTERS))
    assert places.heat([names[-1]])
    assert int(places.hot.by_slot[places.row(names[-1]).slot]) == before[names[1]]


def test_adapters_of_a_high_rank_or_too_many_are_left_as_they_are():
    places = Places()
    wide = some(Q, V, f"{LAYER}q_proj", rank=3 * HOT_RANK + 1)
    for _ in range(3):
        assert not places.hot.heat({"w": table(width=200).row_of("w", wide, 16)}, places.arena)
    assert not places.heat([chr(ord("a") + index) for index in range(HOT_ADAPTERS + 1)])
    assert not HotAdapters({SITE: Linear(torch.zeros(3, 3))}, 4, "cpu")


def test_an_adapter_is_copied_in_its_second_step_in_a_row_and_stays_while_its_place_is_its_own():
    places = Places()
    a, b = ({name: places.row(name)} for name in "ab")
    assert not places.hot.heat(a, places.arena)
    assert not places.hot.heat(b, places.arena)
    assert not places.hot.heat(a, places.arena)
    assert places.hot.heat(a, places.arena)
    assert not places.hot.heat(a | b, places.arena)
    assert places.hot.heat(a | b, places.arena)
    assert places.hot.heat(a, places.arena)


def test_adapters_of_every_step_are_looked_at_once(monkeypatch):
    """A model has hundreds of sites, and a step is laid out in less than a millisecond."""
    looked_at = []
    fits = HotAdapters._fits
    monkeypatch.setattr(HotAdapters, "_fits", lambda *args: looked_at.append(args[1].slot) or fits(*args))
    places = Places()
    wide = {"w": table(width=200).row_of("w", some(Q, V, f"{LAYER}q_proj", rank=3 * HOT_RANK + 1), 16)}
    few = {name: places.row(name) for name in "abc"}
    assert [places.hot.heat(few | wide, places.arena) for _ in range(5)] == [False] * 5
    assert len(looked_at) == 4
    assert [places.hot.heat(few, places.arena) for _ in range(5)] == [True] * 5
    assert len(looked_at) == 4


@pytest.fixture(scope="module")
def oracle(tmp_path_factory):
    return PeftOracle(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def start(oracle):
    with engines(oracle) as start:
        yield start


def test_steps_under_hot_adapters_shrink_nothing_by_themselves_and_agree_with_peft(start, oracle, monkeypatch):
    engine = start(kernels="triton", max_running=6, max_batch_tokens=64)
    names = ["plain", None, "linears", "attention", "last_layer", "plain"]
    prompts = [[*prompt(9 + index, index), *(INVOCATIONS.get(name) or ())] for index, name in enumerate(names)]
    digests = [engine.digests[name] for name in names]
    engine.generate(prompts, GREEDY, digests)
    assert engine.runner.prepared.shape.hot
    monkeypatch.setattr("runtime.gpu.step_lora.shrink", lambda *arguments: pytest.fail("a shrink was launched"))
    outputs = engine.generate(prompts, GREEDY, digests)
    for name, tokens, output in zip(names, prompts, outputs, strict=True):
        assert oracle.agrees(name, tokens, output.token_ids), name


def test_an_adapter_of_the_head_beside_hot_ones_is_shrunk_as_ever(start, oracle):
    engine = start(kernels="triton", max_running=6, max_batch_tokens=64)
    for names in (["plain", "head"], ["plain"], ["head"]):
        prompts = [[*prompt(9 + index, index), *(INVOCATIONS.get(name) or ())] for index, name in enumerate(names)]
        outputs = engine.generate(prompts, GREEDY, [engine.digests[name] for name in names])
        assert engine.runner.prepared.shape.hot == ("head" not in names)
        for name, tokens, output in zip(names, prompts, outputs, strict=True):
            assert oracle.agrees(name, tokens, output.token_ids), name
