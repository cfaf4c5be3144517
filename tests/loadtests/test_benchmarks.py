"""Each benchmark measures what it says, run as a user runs it on a tiny random model."""

import re
from pathlib import Path

import httpx
import pytest

from loadtests.bench.__main__ import BENCHMARKS, options
from loadtests.bench.structured import FORMS
from tests.loadtests.commands import bench, number, run


def test_throughput_has_a_row_for_every_load_and_its_conditions(server: str, tiny_model: Path) -> None:
    small = ["--requests", "1", "--prompt-words", "5", "--max-tokens", "4", "--concurrency", "1", "2"]
    peer = ["--peer", server, "--peer-models", f"{tiny_model.name},bench-a,bench-b,bench-c,bench-d"]
    [([_, *rows], stated)] = bench(tiny_model, "throughput", "--url", server, *small, *peer)
    loads = [(concurrency, model) for concurrency in "12" for model in ("base", "one adapter", "four adapters mixed")]
    assert [tuple(row[:2]) for row in rows] == loads
    assert [row[3] for row in rows if row[1] == "base"] == ["100%", "100%"]
    assert all(number(row[2]) > 0 for row in rows)
    assert all(number(cell) >= 0 for row in rows for cell in row[2:])  # tiny models answer in no time
    for word in ("cores", "bfloat16", "5 random words", "4 new tokens", "torch"):
        assert word in stated


def test_throughput_of_the_base_alone_asks_no_server_for_an_adapter(server: str, tiny_model: Path) -> None:
    small = ["--requests", "1", "--prompt-words", "5", "--max-tokens", "4", "--concurrency", "1", "--adapters", "0"]
    peer = ["--peer", server, "--peer-models", f"{tiny_model.name},none,none,none,none"]
    [([_, *rows], stated)] = bench(tiny_model, "throughput", "--url", server, *small, *peer)
    assert [row[1] for row in rows] == ["base"]
    assert "Adapters: none." in stated


def test_copy_compares_each_size_with_a_memcpy_of_as_many_bytes(tiny_model: Path) -> None:
    [([_, small, large], stated)] = bench(tiny_model, "copy", "--ranks", "16", "300", "--rounds", "3")
    assert [small[0], large[0]] == ["16", "300"]
    assert 300 / 16 * 0.8 < number(large[1]) / number(small[1]) < 300 / 16 * 1.25
    assert all(number(cell) > 0 for row in (small, large) for cell in row[1:])
    assert number(large[2]) < number(large[7])
    assert "3 of each size" in stated


def test_interference_measures_streams_with_nothing_with_loads_and_with_uploads(server: str, tiny_model: Path) -> None:
    short = ["--seconds", "0.6", "--rounds", "1", "--pause", "0.05", "--adapters", "2", "--streams", "2"]
    [([_, *rows], stated)] = bench(tiny_model, "interference", "--url", server, *short)
    assert [row[0] for row in rows] == ["nothing", "unload, load", "ephemeral PUT"]
    assert all(number(row[1]) <= number(row[2]) > 0 for row in rows)
    assert all(number(row[5]) >= 1 and number(row[6]) > 0 for row in rows[1:])
    assert "0.05 s between" in stated


def test_tiers_compares_a_device_tier_that_evicts_with_one_that_does_not(tiny_model: Path) -> None:
    few = ["--adapters", "6", "--resident", "2", "--at-a-time", "2", "--requests", "12", "--rounds", "1"]
    [([_, whole, part], stated)] = bench(tiny_model, "tiers", *few, "--prompt-words", "5", "--max-tokens", "4")
    assert [whole[0], part[0]] == ["all 6", "2 of 6"]
    assert [number(cell) for cell in whole[6:]] == [0, 0]
    assert number(part[7]) >= 1
    assert number(part[3]) <= number(part[4]) <= number(part[5])
    assert "12 requests a round, 2 at a time" in stated


def test_s3_sets_a_cold_load_against_one_bare_transfer(tiny_model: Path) -> None:
    [([_, *rows], stated)] = bench(tiny_model, "s3", "--adapters", "2", "--ranks", "4", "64")
    assert [row[0] for row in rows] == ["4", "64"]
    assert all(number(row[2]) > 0 and number(row[3]) > number(row[5]) > 0 for row in rows)
    assert "moto" in stated


def test_alora_sets_an_adapter_after_a_conversation_beside_itself_as_plain_lora(server: str, tiny_model: Path) -> None:
    short = ["--lengths", "64", "200", "--suffix", "20", "--rounds", "2"]
    [([_, *rows], stated)] = bench(tiny_model, "alora", "--url", server, *short)
    assert [row[0] for row in rows] == ["64", "200"]
    assert [[*row[4:6], row[7]] for row in rows] == [["84", "20", "4.2×"], ["220", "20", "11.0×"]]
    assert all(number(cell) > 0 for row in rows for cell in row[1:4])
    assert "an invocation of 4 tokens" in stated
    assert httpx.get(f"{server}/adapters/bench-activated").status_code == 404


def test_overflow_plays_the_pipeline_on_less_kv_than_its_working_set(tiny_model: Path) -> None:
    few = ["--conversations", "3", "--turns", "2", "--notes", "30", "--prompt-words", "8", "--max-tokens", "4"]
    small = ["--rounds", "1", "--adapters", "2", "--check-tokens", "2", "--ample-kv-bytes", "32000000"]
    [([_, everything, half, host], stated)] = bench(tiny_model, "overflow", *few, *small, "--shares", "0.5")
    assert [row[0] for row in (everything, half, host)] == ["everything", *["0.5 × working set"] * 2]
    assert [everything[2], half[2]] == ["off", "off"]
    assert host[2] in ("on", "not built")
    assert number(everything[1]) > 2 * number(half[1])
    assert number(half[3]) < number(everything[3])
    assert number(half[5]) > number(everything[5])
    assert all(number(row[6]) > 0 for row in (everything, half))
    assert "3 conversations of 2 turns" in stated


def test_structured_sets_each_form_beside_the_same_request_without_it(server: str, tiny_model: Path) -> None:
    short = ["--rounds", "2", "--max-tokens", "12", "--prompt-words", "5", "--at-once", "1", "3"]
    [([_, *rows], stated)] = bench(tiny_model, "structured", "--url", server, *short)
    forms = [(form, at_once) for form in ("regex", "JSON schema", "forced tool call") for at_once in "13"]
    assert [tuple(row[:2]) for row in rows] == forms
    assert all(number(row[2]) > 0 and number(row[3]) > 0 for row in rows)
    for row in rows:
        assert row[4].endswith("(met)" if number(row[4]) <= 5 else "(missed)")
    assert "12 tokens each" in stated


def test_a_constraint_of_the_benchmark_holds_and_what_runs_beside_it_is_free(server: str) -> None:
    asked = {"model": "tiny", "max_tokens": 40, "min_tokens": 40, "temperature": 0}
    texts = {}
    for name, form in FORMS.items():
        for kind, fields in (("free", form.free), ("constrained", form.constrained)):
            prompt = (
                {"prompt": "river"} if "chat" not in form.path else {"messages": [{"role": "user", "content": "a"}]}
            )
            response = httpx.post(f"{server}{form.path}", json={**asked, **prompt, **fields}, timeout=60)
            choice = response.raise_for_status().json()["choices"][0]
            assert choice["finish_reason"] == "length"
            message = choice.get("message", {})
            texts[name, kind] = (
                choice.get("text") or message["content"] or message["tool_calls"][0]["function"]["arguments"]
            )
    words = "([a-z]{1,9}[ ,.])*[a-z]{0,9}"
    assert re.fullmatch(words, texts["regex", "constrained"])
    assert texts["JSON schema", "constrained"].lstrip().startswith("[")
    assert texts["forced tool call", "constrained"].lstrip().startswith("{")
    assert not re.fullmatch(words, texts["regex", "free"])
    assert texts["JSON schema", "free"] == texts["regex", "free"]


def test_a_benchmark_says_why_it_cannot_measure(tiny_model: Path, server: str) -> None:
    too_long = ["--model", str(tiny_model), "--max-tokens", "1000000"]
    result = run("-m", "loadtests.bench", "throughput", "--url", server, *too_long)
    assert result.returncode == 1
    assert result.stderr.splitlines()[-1].startswith("failed: ")
    assert "Traceback" not in result.stderr


def test_no_name_is_every_benchmark_and_with_a_url_those_that_need_no_server_of_their_own() -> None:
    assert options([]).names == list(BENCHMARKS)
    assert options(["--url", "http://host"]).names == ["throughput", "interference", "alora", "structured"]


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["nothing"], "no benchmark 'nothing'"),
        (["tiers", "--url", "http://host"], "tiers starts its own servers"),
        (["--peer", "http://host", "--peer-models", "a,b"], "five names"),
    ],
)
def test_options_that_make_no_sense_are_refused(
    argv: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        options(argv)
    assert words in capsys.readouterr().err
