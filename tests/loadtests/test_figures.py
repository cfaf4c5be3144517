"""The arithmetic behind the published figures, without a server."""

import pytest

from loadtests.adapter_client import CallFailed, Metrics
from loadtests.bench import __main__ as bench
from loadtests.bench import alora_first_token, kv_overflow, tiers
from loadtests.bench.interference import Stretch, rows_table
from loadtests.bench.report import percentile
from loadtests.completion_stream import Timing
from loadtests.conversation import Call, hit_rate, prefilled
from tests.loadtests.commands import SHAPE, cells

SCRAPE = """\
# HELP rootstock_adapter_load_seconds Of one adapter, by stage.
rootstock_adapter_load_seconds_count{stage="copy"} 3.0
rootstock_adapter_load_seconds_sum{stage="copy"} 0.5
rootstock_tier_bytes_used{tier="device"} 1.5e+06
"""


@pytest.mark.parametrize(
    ("values", "share", "expected"),
    [([5.0], 0.99, 5), ([4, 1, 3, 2], 0.5, 2), (range(1, 101), 0.99, 99), (range(1, 201), 0.99, 198), ([1, 2], 1.0, 2)],
)
def test_a_percentile_is_the_smallest_value_with_that_share_below_or_at_it(values, share, expected) -> None:
    assert percentile(list(values), share) == expected


def test_the_stages_of_loads_are_differences_between_scrapes_and_a_missing_sample_is_an_error() -> None:
    before = Metrics(SCRAPE)
    after = Metrics(
        SCRAPE.replace("} 3.0", "} 5.0").replace("} 0.5", "} 0.75")
        + 'rootstock_adapter_load_seconds_count{stage="pack"} 1.0\n'
        + 'rootstock_adapter_load_seconds_sum{stage="pack"} 2.0\n'
    )
    assert after.load_stages(before) == {"copy": (0.25, 2), "pack": (2.0, 1)}
    assert before.tier("bytes_used") == 1_500_000
    with pytest.raises(CallFailed, match="rootstock_tier_bytes_used"):
        before.tier("bytes_used", "disk")


def test_interference_is_the_median_of_the_rounds_percentiles_compared_with_nothing() -> None:
    def rounds(slow: float) -> dict:
        quiet, loads, puts = [0.010] * 98 + [0.020] * 2, [0.010] * 98 + [slow] * 2, [0.010] * 100
        return {"none": Stretch(quiet, []), "load": Stretch(loads, [0.1]), "put": Stretch(puts, [0.2, 0.2])}

    _, nothing, loads, puts = cells(rows_table([rounds(0.021), rounds(0.023), rounds(0.9)]))
    assert nothing[:3] == ["nothing", "10.0", "20.0"]
    assert loads[1:7] == ["10.0", "23.0", "+0.0 %", "+15.0 % (missed)", "1", "100"]
    assert puts[4:] == ["-50.0 % (met)", "2", "200", "300"]


def test_the_hit_rate_is_of_tokens_and_not_of_calls() -> None:
    calls = [Call(300, 300, 0.1, ""), Call(100, 0, 0.1, "")]
    assert (hit_rate(calls), prefilled(calls)) == (0.75, 100)


def test_the_gain_of_an_alora_is_that_of_the_medians_and_its_goal_that_of_the_suffix_alone() -> None:
    rounds = [
        (Timing(slow, [], 1, 1050), Timing(fast, [], 1, tokens))
        for slow, fast, tokens in [(2.0, 0.125, 50), (3.0, 0.2, 50), (9.0, 0.1, 1050)]
    ]
    config = {**SHAPE, "vocab_size": 100}
    reused = alora_first_token.row(config, 1000, 50, rounds)
    assert reused[:6] == ["1000", "3000.0", "125.0", "24.0×", "1050", "50"]
    assert reused[7:] == ["21.0×", "114% (met)"]
    computed_again = alora_first_token.row(config, 1000, 50, [(rounds[0][0], rounds[0][0])])
    assert computed_again[3:6] == ["1.0×", "1050", "1050"]
    assert computed_again[7:] == ["21.0×", "5% (missed)"]


def test_multiplications_are_those_of_the_weights_of_causal_attention_and_of_one_tokens_logits() -> None:
    config = {**SHAPE, "vocab_size": 100}
    weights = 2 * (64 * 64 * 2 + 64 * 32 * 2 + 3 * 64 * 128)
    attention = 2 * (2 * 64) * (4 + 5 + 6)  # two layers, each token with itself and those before it, for K and for V
    assert alora_first_token.multiplications(config, 3, 6) == 3 * weights + attention + 64 * 100


def test_the_tokens_of_a_conversation_are_never_an_invocation_and_differ_by_seed() -> None:
    tokens = alora_first_token.vocabulary(100)
    assert not set(tokens.invocation) & set(tokens.ordinary)
    assert tokens.some(20, "a") == tokens.some(20, "a") != tokens.some(20, "b")


def test_overflow_shows_medians_of_the_rounds_and_the_first_tokens_of_all_their_checks() -> None:
    def played(cached: int, seconds: float) -> kv_overflow.Round:
        check = Call(100, cached, seconds / 10, "")
        return kv_overflow.Round([Call(100, 0, 9.0, ""), check], [check], seconds)

    rounds = [played(100, 1.0), played(0, 2.0), played(80, 3.0)]
    assert kv_overflow.row("it", 7, "on", rounds, "1 / 2") == [
        *("it", "7", "on", "40.0%", "80.0%", "120", "2.0", "200 / 300", "1 / 2")
    ]
    needed = kv_overflow.WorkingSet(100, 130, 1000.5)
    assert [needed.bytes_for(share) for share in (0.5, 1, 2)] == [51_026, 101_051, 201_101]  # one block for the server


def test_both_servers_get_the_same_requests_and_the_first_adapter_gets_the_most() -> None:
    chosen = bench.with_defaults(bench.options(["tiers", "--requests", "400"]), tiers.DEFAULTS)
    names = [f"bench-{number}" for number in range(chosen.adapters)]
    jobs = tiers.jobs(chosen, names, 1)
    assert jobs == tiers.jobs(chosen, names, 1)
    assert jobs != tiers.jobs(chosen, names, 2)
    first = [name for name, _ in jobs].count("bench-0")
    assert 400 * 0.15 < first < 400 * 0.28  # 1 / (1 + 1/2 + … + 1/64) = 0.21
    assert len({prompt for _, prompt in jobs}) == 400
