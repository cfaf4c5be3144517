"""The statistics behind the tables, and the pieces that benchmarks are made of, without a server."""

import json
import struct
from collections import Counter

import pytest

from loadtests import alora_first_token, bench, kv_overflow, tiers
from loadtests.adapter_client import CallFailed, Metrics
from loadtests.adapter_copy import buffers, memory_bytes
from loadtests.completion_stream import Timing, cached_tokens
from loadtests.conversation import Call, hit_rate, prefilled
from loadtests.interference import Stretch, rows_table
from loadtests.random_adapter import adapter_file, number_file, tensor_shapes
from loadtests.report import change, medians, percentile, table, verdict
from loadtests.server_process import Model
from tests.loadtests.commands import SHAPE, cells

SCRAPE = """\
# HELP rootstock_adapter_load_seconds Of one adapter, by stage.
rootstock_adapter_load_seconds_count{stage="copy"} 3.0
rootstock_adapter_load_seconds_sum{stage="copy"} 0.5
rootstock_tier_bytes_used{tier="device"} 1.5e+06
vllm:lora_adapter_loaded{adapter_name="a",level="gpu",pinned="false",rank="16"} 1.0
rootstock_steps_total 12.0
"""


@pytest.mark.parametrize(
    ("values", "share", "expected"),
    [([5.0], 0.99, 5), ([4, 1, 3, 2], 0.5, 2), (range(1, 101), 0.99, 99), (range(1, 201), 0.99, 198), ([1, 2], 1.0, 2)],
)
def test_a_percentile_is_the_smallest_value_with_that_share_below_or_at_it(values, share, expected) -> None:
    assert percentile(list(values), share) == expected


def test_medians_are_taken_figure_by_figure_over_the_rounds() -> None:
    assert medians([[1, 30], [3, 10], [2, 20]]) == [2, 20]


def test_a_change_shows_its_sign_and_a_verdict_its_word() -> None:
    assert [change(1.1, 1.0), change(0.9, 1.0), change(2.0, 2.0)] == ["+10.0 %", "-10.0 %", "+0.0 %"]
    assert [verdict("61%", met=True), verdict("59%", met=False)] == ["61% (met)", "59% (missed)"]


def test_a_table_is_markdown() -> None:
    assert table(["a", "b"], [["1", "2"]]) == "| a | b |\n| --- | --- |\n| 1 | 2 |"


def test_metrics_are_found_by_all_their_labels() -> None:
    metrics = Metrics(SCRAPE)
    assert metrics.tier("bytes_used") == 1_500_000
    assert metrics.value("rootstock_steps_total") == 12
    labels = {"rank": "16", "pinned": "false", "level": "gpu", "adapter_name": "a"}
    assert metrics.value("vllm:lora_adapter_loaded", **labels) == 1
    with pytest.raises(CallFailed, match="rootstock_tier_bytes_used"):
        metrics.tier("bytes_used", "disk")


def test_the_stages_of_loads_are_differences_and_those_that_did_not_happen_are_left_out() -> None:
    later = SCRAPE.replace("} 3.0", "} 5.0").replace("} 0.5", "} 0.75")
    later += (
        'rootstock_adapter_load_seconds_count{stage="pack"} 1.0\nrootstock_adapter_load_seconds_sum{stage="pack"} 2.0\n'
    )
    assert Metrics(later).load_stages(Metrics(SCRAPE)) == {"copy": (0.25, 2), "pack": (2.0, 1)}


def test_interference_is_the_median_of_the_rounds_percentiles_beside_nothing() -> None:
    def rounds(slow: float) -> dict:
        quiet, loads, puts = [0.010] * 98 + [0.020] * 2, [0.010] * 98 + [slow] * 2, [0.010] * 100
        return {"none": Stretch(quiet, []), "load": Stretch(loads, [0.1]), "put": Stretch(puts, [0.2, 0.2])}

    _, nothing, loads, puts = cells(rows_table([rounds(0.021), rounds(0.023), rounds(0.9)]))
    assert nothing[:3] == ["nothing", "10.0", "20.0"]
    assert loads[1:7] == ["10.0", "23.0", "+0.0 %", "+15.0 % (missed)", "1", "100"]
    assert puts[4:] == ["-50.0 % (met)", "2", "200", "300"]


def test_an_adapter_file_has_its_configuration_every_tensor_and_a_number() -> None:
    file = adapter_file(SHAPE, 1, 4)
    [length] = struct.unpack("<Q", file[:8])
    header = json.loads(file[8 : 8 + length])
    assert json.loads(header["__metadata__"]["adapter_config"])["r"] == 4
    assert {name: tuple(value["shape"]) for name, value in header.items() if name != "__metadata__"} == tensor_shapes(
        SHAPE, 4
    )
    numbered = set()
    for count in range(300):
        number_file(file, count)
        numbered.add(bytes(file))
    assert len(numbered) == 300
    assert len({len(one) for one in numbered}) == 1


def test_an_alora_file_differs_from_the_plain_one_in_its_configuration_alone() -> None:
    def parts(file: bytearray) -> tuple[dict, bytes]:
        [length] = struct.unpack("<Q", file[:8])
        config = json.loads(file[8 : 8 + length])["__metadata__"]["adapter_config"]
        return json.loads(config), bytes(file[8 + length :])

    plain, weights = parts(adapter_file(SHAPE, 1, 4))
    activated, same_weights = parts(adapter_file(SHAPE, 1, 4, [5, 6]))
    assert activated == {**plain, "alora_invocation_tokens": [5, 6]}
    assert weights == same_weights


def test_cached_tokens_are_none_where_the_server_does_not_say() -> None:
    assert cached_tokens({"prompt_tokens_details": {"cached_tokens": 7}}) == 7
    for usage in ({}, {"prompt_tokens_details": None}, {"prompt_tokens_details": {"cached_tokens": None}}):
        assert cached_tokens(usage) == 0


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


def test_a_share_of_the_working_set_has_room_for_a_block_that_the_server_keeps() -> None:
    needed = kv_overflow.WorkingSet(100, 130, 1000.5)
    assert [needed.bytes_for(share) for share in (0.5, 1, 2)] == [51_026, 101_051, 201_101]


def test_overflow_shows_medians_of_the_rounds_and_the_waits_of_all_their_checks() -> None:
    def played(cached: int, seconds: float) -> kv_overflow.Round:
        check = Call(100, cached, seconds / 10, "")
        return kv_overflow.Round([Call(100, 0, 9.0, ""), check], [check], seconds)

    rounds = [played(100, 1.0), played(0, 2.0), played(80, 3.0)]
    assert kv_overflow.row("it", 7, "on", rounds, "1 / 2") == [
        *("it", "7", "on", "40.0%", "80.0%", "120", "2.0", "200 / 300", "1 / 2")
    ]
    assert len(kv_overflow.not_built("it", 7)) == 9


def test_the_buffers_of_a_memcpy_are_of_the_size_asked_for_and_are_copied() -> None:
    for huge in (False, True):
        pair = buffers(100_001, huge=huge)
        assert pair.copy_seconds() > 0
        assert pair.target.size == 100_001
        assert (pair.target == 1).all()


def test_room_for_an_adapter_is_reckoned_from_its_weights(tmp_path) -> None:
    weights = sum(rows * columns for rows, columns in tensor_shapes(SHAPE, 8).values())
    assert memory_bytes(Model(tmp_path, SHAPE), 8) > 4 * weights


def test_both_servers_get_the_same_requests_and_the_first_adapter_gets_the_most() -> None:
    chosen = bench.with_defaults(bench.options(["tiers", "--requests", "400"]), tiers.DEFAULTS)
    names = [f"bench-{number}" for number in range(chosen.adapters)]
    jobs = tiers.jobs(chosen, names, 1)
    assert jobs == tiers.jobs(chosen, names, 1)
    assert jobs != tiers.jobs(chosen, names, 2)
    counts = Counter(model for model, _ in jobs)
    assert counts["bench-0"] == max(counts.values())
    assert 400 * 0.15 < counts["bench-0"] < 400 * 0.28  # 1 / (1 + 1/2 + … + 1/64) = 0.21
    assert len({prompt for _, prompt in jobs}) == 400


def test_options_left_out_are_those_of_the_benchmark() -> None:
    chosen = bench.options(["copy", "--rounds", "2"])
    filled = bench.with_defaults(chosen, {"rounds": 9, "ranks": [8]})
    assert (filled.rounds, filled.ranks) == (2, [8])


def test_no_name_is_every_benchmark_and_with_a_url_those_that_need_no_server_of_their_own() -> None:
    assert bench.options([]).names == list(bench.BENCHMARKS)
    assert bench.options(["--url", "http://host"]).names == ["throughput", "interference", "alora"]


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["nothing"], "no benchmark 'nothing'"),
        (["tiers", "--url", "http://host"], "tiers starts servers of its own"),
        (["--peer", "http://host", "--peer-models", "a,b"], "five names"),
    ],
)
def test_options_that_make_no_sense_are_refused(argv, words, capsys) -> None:
    with pytest.raises(SystemExit):
        bench.options(argv)
    assert words in capsys.readouterr().err
