"""The series under vLLM's names, by which boards and autoscalers that were made for vLLM know a server."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from runtime.messages import Tokens
from service.metrics import Metrics, SequenceTimes
from tests.service.adapters.adapter_bundles import bundle, multipart
from tests.service.live_server import LiveServer, fake_settings, live_server, wait_until
from tests.service.test_metrics import Samples, samples, value

LABELS = {"model_name": "tiny", "engine": "0"}
# By request: type, name and labels beside those of all. From vLLM's documentation of its metrics.
GAUGES = ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc")
COUNTERS = ("prompt_tokens", "generation_tokens", "prefix_cache_queries", "prefix_cache_hits", "num_preemptions")
SECONDS = ("e2e_request_latency", "request_queue_time", "request_prefill_time", "request_decode_time")
SECONDS += ("request_inference_time", "time_to_first_token")
GAPS = ("inter_token_latency_seconds", "time_per_output_token_seconds")
LENGTHS = ("request_prompt_tokens", "request_generation_tokens", "request_max_num_generation_tokens")


@pytest.fixture
def fresh(tiny_model: Path, tmp_path: Path) -> Iterator[LiveServer]:
    with live_server(fake_settings(tiny_model, tmp_path)) as live:
        yield live


def read(live: LiveServer) -> Samples:
    return samples(live.client.get("/metrics").text)


def test_every_series_is_there_before_the_first_request(fresh: LiveServer) -> None:
    found = read(fresh)
    for name in (*GAUGES, *(f"{counter}_total" for counter in COUNTERS)):
        assert found[f"vllm:{name}"] == [(LABELS, 0.0)], name
    for name in (*(f"{spent}_seconds" for spent in SECONDS), *GAPS, *LENGTHS):
        assert found[f"vllm:{name}_count"] == found[f"vllm:{name}_sum"] == [(LABELS, 0.0)], name
    ends = {labels["finished_reason"]: value for labels, value in found["vllm:request_success_total"]}
    assert ends == {"stop": 0, "length": 0, "abort": 0, "error": 0}


def test_sequences_are_counted_under_the_bases_name_whatever_adapter_they_ran_on(fresh: LiveServer) -> None:
    assert fresh.client.put("/adapters/poet", files=multipart(*bundle())).status_code == 201
    answers = [
        fresh.complete("hello world", max_tokens=5),
        fresh.post("/v1/completions", model="poet", prompt="hello", max_tokens=3, n=2),
        fresh.complete("hello world", max_tokens=9, stop="wo"),
    ]
    usages: list[dict[str, Any]] = [answer.json()["usage"] for answer in answers]
    found = read(fresh)
    ends = {labels["finished_reason"]: value for labels, value in found["vllm:request_success_total"]}
    assert ends == {"stop": 1, "length": 3, "abort": 0, "error": 0}
    generated = [usage["completion_tokens"] for usage in usages]
    assert generated[:2] == [5, 6]
    for name in SECONDS:
        assert value(found, f"vllm:{name}_seconds_count", **LABELS) == 4, name
    for name in GAPS:
        assert value(found, f"vllm:{name}_count", **LABELS) == sum(generated) - 4
    assert value(found, "vllm:request_generation_tokens_sum", **LABELS) == sum(generated)
    assert value(found, "vllm:request_generation_tokens_bucket", le="2.0") == (generated[2] <= 2)
    prompts = [usage["prompt_tokens"] for usage in usages]
    assert value(found, "vllm:request_prompt_tokens_sum", **LABELS) == sum(prompts) + prompts[1]  # of two choices
    assert value(found, "vllm:request_max_num_generation_tokens_sum", **LABELS) == 5 + 3 + generated[2]
    assert value(found, "vllm:generation_tokens_total", **LABELS) >= sum(generated)
    ours = sum(value for _, value in found["rootstock_generated_tokens_total"])
    assert ours == sum(generated)
    assert {labels["model_name"] for labels, _ in found["vllm:time_to_first_token_seconds_sum"]} == {"tiny"}
    assert len(found["rootstock_time_to_first_token_seconds_sum"]) == 2


def test_the_prefix_caches_counters_are_those_of_our_own_series(fresh: LiveServer) -> None:
    for _ in range(2):
        fresh.complete("hello world " * 20, max_tokens=1)
    found = read(fresh)
    for theirs, ours in (("queries", "query"), ("hits", "hit")):
        counted = sum(value for _, value in found[f"rootstock_prefix_cache_{ours}_tokens_total"])
        assert value(found, f"vllm:prefix_cache_{theirs}_total", **LABELS) == counted > 0
    assert value(found, "vllm:prompt_tokens_total", **LABELS) == value(found, "vllm:prefix_cache_queries_total")


def test_who_goes_away_is_an_abort_and_what_the_engine_refuses_an_error(fresh: LiveServer) -> None:
    def ended(reason: str) -> float:
        return value(read(fresh), "vllm:request_success_total", finished_reason=reason)

    body = {"model": "tiny", "prompt": "hello", "max_tokens": 50, "stream": True, "cache_salt": "hold"}
    with fresh.client.stream("POST", "/v1/completions", json=body) as stream:
        next(stream.iter_lines())
    wait_until(lambda: ended("abort") == 1)
    assert fresh.complete("hello", cache_salt="refuse queue_full").status_code >= 400
    assert ended("error") == 1


def test_the_times_of_a_sequence_add_up(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [10.0]
    monkeypatch.setattr("service.metrics.time.perf_counter", lambda: now[0])
    metrics = Metrics("tiny")
    times = SequenceTimes(metrics.vllm, 9.0)
    times.sent()
    for at, token, queued in ((12.5, 1, 0.5), (13.0, 2, None), (15.0, 3, None)):
        now[0] = at
        times.got(Tokens(request_id="a", token_ids=[token], queue_seconds=queued))
    now[0] = 15.5
    times.ended(7, "stop")
    found = samples(metrics.render().decode())
    sums = {"time_to_first_token": 3.5, "inter_token_latency": 2.5, "time_per_output_token": 2.5}
    sums |= {"request_queue_time": 0.5, "request_prefill_time": 2.0, "request_decode_time": 2.5}
    sums |= {"request_inference_time": 4.5, "e2e_request_latency": 6.5}
    for name, spent in sums.items():
        assert value(found, f"vllm:{name}_seconds_sum", **LABELS) == spent, name
