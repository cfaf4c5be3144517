"""Traces: the spans of a request and its stages, as a collector on loopback gets them over OTLP."""

import json
import logging
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from runtime.messages import Tokens
from service.__main__ import main
from service.traces.stages import SequenceStages, Stage
from tests.service.adapters.adapter_bundles import bundle, multipart
from tests.service.live_server import LiveServer, fake_settings, live_server, wait_until

TRACE, PARENT = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
REQUEST = {"model": "traced", "prompt": [[5, 6, 7]], "max_tokens": 4}


class Collector:
    """Takes traces as an OpenTelemetry collector does; `spans` are all that have come."""

    def __init__(self) -> None:
        self.spans: list[Any] = []
        self.resources: list[dict[str, str]] = []

    def take(self, body: bytes) -> None:
        from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

        for resource in ExportTraceServiceRequest.FromString(body).resource_spans:
            self.resources.append({each.key: each.value.string_value for each in resource.resource.attributes})
            self.spans += [span for scope in resource.scope_spans for span in scope.spans]


@contextmanager
def collector() -> Iterator[tuple[str, Collector]]:
    taken = Collector()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["content-length"]))
            if self.path == "/v1/traces":
                taken.take(body)
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}", taken
        server.shutdown()


@pytest.fixture(scope="module")
def traced(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Collector:
    """What a collector has got of some requests, once the service has ended."""
    pytest.importorskip("opentelemetry.exporter.otlp.proto.http", reason="OpenTelemetry is not installed")
    with collector() as (endpoint, taken):
        settings = fake_settings(tiny_model, tmp_path_factory.mktemp("data"), otlp_endpoint=endpoint)
        with live_server(settings) as live:
            live.client.put("/adapters/traced?preload=false", files=multipart(*bundle()))
            headers = {"traceparent": f"00-{TRACE}-{PARENT}-01", "x-request-id": "mine-1"}
            assert live.client.post("/v1/completions", json=REQUEST, headers=headers).status_code == 200
            live.client.post("/v1/completions", json=REQUEST | {"model": "nobody"}, headers={"traceparent": "no such"})
            unsampled = {"traceparent": f"00-{TRACE}-{PARENT}-00"}
            live.client.post("/v1/completions", json=REQUEST, headers=unsampled)
            live.client.get("/health")
    return taken


def attributes(span: Any) -> dict[str, Any]:
    return {each.key: getattr(each.value, each.value.WhichOneof("value")) for each in span.attributes}


def test_a_request_is_a_span_below_the_clients_with_what_the_log_says(traced: Collector) -> None:
    [root] = [span for span in traced.spans if span.trace_id.hex() == TRACE and span.parent_span_id.hex() == PARENT]
    assert root.name == "POST /v1/completions"
    said = attributes(root)
    assert said["http.route"] == "/v1/completions"
    assert said["http.response.status_code"] == 200
    assert (said["gen_ai.usage.input_tokens"], said["gen_ai.usage.output_tokens"]) == (3, 4)
    assert said["rootstock.request_id"] == "mine-1"
    assert len(said["rootstock.adapter"]) == 64


def test_its_stages_are_spans_in_their_order_inside_it(traced: Collector) -> None:
    [root] = [span for span in traced.spans if span.parent_span_id.hex() == PARENT]
    children = sorted(
        (s for s in traced.spans if s.parent_span_id == root.span_id), key=lambda s: s.start_time_unix_nano
    )
    names = [span.name for span in children]
    assert set(names) == {"tokenize", "queue", "prefill", "decode", "adapter.read", "adapter.pack", "adapter.copy"}
    main_stages = [span for span in children if not span.name.startswith("adapter.")]
    assert [span.name for span in main_stages] == ["tokenize", "queue", "prefill", "decode"]
    slack = 1_000_000  # ns; wall and monotonic clocks are read one after the other
    for before, after in pairwise(main_stages[1:]):
        assert abs(after.start_time_unix_nano - before.end_time_unix_nano) <= slack
    assert all(span.end_time_unix_nano >= span.start_time_unix_nano for span in children)
    assert children[0].start_time_unix_nano >= root.start_time_unix_nano - slack
    assert main_stages[-1].end_time_unix_nano <= root.end_time_unix_nano + slack


def test_requests_that_are_refused_or_not_sampled_and_health_checks(traced: Collector) -> None:
    roots = [span for span in traced.spans if span.name.startswith(("POST", "GET", "PUT"))]
    assert sorted(span.name for span in roots) == ["POST /v1/completions"] * 2 + ["PUT /adapters/{name}"]
    [refused] = [span for span in roots if attributes(span)["http.response.status_code"] == 404]
    assert not refused.parent_span_id
    assert {resource["service.name"] for resource in traced.resources} == {"rootstock"}


def test_the_log_names_the_trace(tiny_model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    pytest.importorskip("opentelemetry.exporter.otlp.proto.http", reason="OpenTelemetry is not installed")
    caplog.set_level(logging.INFO, "service.access")
    with collector() as (endpoint, _), live_server(fake_settings(tiny_model, tmp_path, otlp_endpoint=endpoint)) as live:
        live.client.get("/version", headers={"traceparent": f"00-{TRACE}-{PARENT}-01"})
        wait_until(lambda: any(record.name == "service.access" for record in list(caplog.records)))
    [record] = [record for record in caplog.records if record.name == "service.access"]
    assert record.fields["trace"] == TRACE


def test_traces_that_are_asked_for_without_their_library_are_refused_with_what_to_install(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "opentelemetry.exporter.otlp.proto.http.trace_exporter", None)
    argv = ["--model", str(tiny_model), "--port", "0"]
    with pytest.raises(SystemExit) as end:
        main(argv, {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:4318"})
    assert end.value.code == 2
    assert "pip install opentelemetry-exporter-otlp-proto-http, or leave it out" in capsys.readouterr().err


def test_nothing_is_noted_where_nobody_asks_for_traces(server: LiveServer) -> None:
    assert server.app.state.traces is None
    assert not any("Trace" in repr(middleware) for middleware in server.app.user_middleware)


def test_a_sequence_waits_for_the_part_of_a_load_that_comes_after_it() -> None:
    stages: list[Stage] = []
    sequence = SequenceStages(stages, 0, sent=10.0)
    first = Tokens(request_id="a", token_ids=[1], cached_tokens=2, queue_seconds=3.0, started_at=13.0, computed_at=14.0)
    sequence.started(first, {"fetch": (1.0, 9.0), "read": (9.5, 11.0), "pack": (11.0, 12.0), "copy": (12.5, 13.0)})
    sequence.ended(20.0, tokens=5)
    found = [(stage.name, stage.began, stage.ended) for stage in stages]
    assert found == [
        ("adapter.read", 10.0, 11.0),
        ("adapter.pack", 11.0, 12.0),
        ("adapter.copy", 12.5, 13.0),
        ("queue", 10.0, 13.0),
        ("prefill", 13.0, 14.0),
        ("decode", 14.0, 20.0),
    ]
    assert json.dumps([dict(stage.attributes) for stage in stages])
