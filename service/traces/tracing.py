"""Traces by OpenTelemetry: a span for each request and for its stages, sent to a collector."""

import asyncio
import logging
import time
from collections.abc import Collection
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit, urlunsplit

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from service.access import AccessRecord, client_of, record_of, template_of
from service.http import AnswerStatus, own_path
from service.traces.stages import Stage

if TYPE_CHECKING:
    from opentelemetry.sdk.trace.export import SpanExporter
    from opentelemetry.trace import Span

SERVICE = "rootstock"
PATH = "/v1/traces"  # of a collector, for traces over HTTP
EXPORT_SECONDS = 5.0  # for a collector to take a batch, or the last one before the service ends


class TracesMissing(RuntimeError):
    """OpenTelemetry is not installed; the message says how to install it."""


def otlp_exporter(endpoint: str) -> "SpanExporter":
    """An exporter to a collector, whose address may have the path for traces or not. Raises TracesMissing."""
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    except ImportError as error:
        install = "pip install opentelemetry-exporter-otlp-proto-http"  # which brings the SDK along
        raise TracesMissing(f"--otlp-endpoint needs OpenTelemetry ({error}): {install}, or leave it out") from None
    # Its warnings of each attempt show the address, which may have a token; that a batch failed is an error
    logging.getLogger(OTLPSpanExporter.__module__).setLevel(logging.ERROR)
    parts = urlsplit(endpoint)
    path = parts.path if parts.path.endswith(PATH) else parts.path.rstrip("/") + PATH
    return OTLPSpanExporter(endpoint=urlunsplit(parts._replace(path=path)), timeout=EXPORT_SECONDS)


class Traces:
    """Makes spans of requests and hands them to an exporter, in batches and on a thread.

    OpenTelemetry itself reads its variables: sampling, headers of the exporter, attributes of the resource.
    """

    def __init__(self, exporter: "SpanExporter") -> None:
        from opentelemetry.sdk.resources import SERVICE_NAME, Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        resource = Resource.create()
        if str(resource.attributes[SERVICE_NAME]).startswith("unknown_service"):  # its variable is not set
            resource = resource.merge(Resource({SERVICE_NAME: SERVICE}))
        self._provider = TracerProvider(resource=resource, shutdown_on_exit=False)
        self._provider.add_span_processor(BatchSpanProcessor(exporter))
        self._tracer = self._provider.get_tracer(SERVICE)
        self._propagator = TraceContextTextMapPropagator()

    def begin(self, scope: Scope) -> "Span":
        """The span of a request, below the one that its `traceparent` names."""
        from opentelemetry.trace import SpanKind

        context = self._propagator.extract(dict(Headers(scope=scope)))
        return self._tracer.start_span(scope["method"], context, SpanKind.SERVER)

    def end(self, span: "Span", scope: Scope, record: AccessRecord, status: int) -> None:
        """End the span of a request, with those of its stages."""
        from opentelemetry.trace import Status, StatusCode, set_span_in_context

        if not span.is_recording():
            return
        template = template_of(scope)
        span.update_name(f"{scope['method']} {template}" if template else scope["method"])
        for name, value in _attributes(scope, record, status, template).items():
            if value is not None:
                span.set_attribute(name, value)
        if status >= 500:
            span.set_status(Status(StatusCode.ERROR))
        context, to_epoch = set_span_in_context(span), time.time() - time.monotonic()
        for stage in record.stages or ():
            self._add(stage, context, to_epoch)
        span.end()

    async def close(self) -> None:
        """Send what is left, as far as the collector takes it in time."""
        await asyncio.to_thread(self._provider.force_flush, int(EXPORT_SECONDS * 1000))
        await asyncio.to_thread(self._provider.shutdown)

    def _add(self, stage: Stage, context: Any, to_epoch: float) -> None:
        began, ended = (int((at + to_epoch) * 1e9) for at in (stage.began, stage.ended))
        self._tracer.start_span(stage.name, context, attributes=stage.attributes, start_time=began).end(ended)


def _attributes(scope: Scope, record: AccessRecord, status: int, template: str | None) -> dict[str, Any]:
    """What a span says of a request, by the names of OpenTelemetry's conventions where there are any."""
    generated = None if record.prompt_tokens is None else record.generated_tokens
    return {
        "http.request.method": scope["method"],
        "http.route": template,
        "http.response.status_code": status,
        "client.address": client_of(scope),
        "gen_ai.request.model": None if record.model is None else record.model[:200],
        "gen_ai.response.id": record.id,
        "gen_ai.response.finish_reasons": None if record.finish is None else record.finish.split(","),
        "gen_ai.usage.input_tokens": record.prompt_tokens,
        "gen_ai.usage.output_tokens": generated,
        "rootstock.cached_tokens": None if record.prompt_tokens is None else record.cached_tokens,
        "rootstock.adapter": record.adapter,
        "rootstock.first_token_seconds": record.first_token_seconds,
        "rootstock.request_id": scope["state"]["request_id"],
    }


class TraceRequests:
    """Traces each request, except those to the paths that are asked for again and again."""

    def __init__(self, app: ASGIApp, traces: Traces, untraced: Collection[str]) -> None:
        self._app, self._traces, self._untraced = app, traces, untraced

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or own_path(scope) in self._untraced:
            await self._app(scope, receive, send)
            return
        span, record, answer = self._traces.begin(scope), record_of(scope), AnswerStatus(send)
        context = span.get_span_context()
        record.trace = f"{context.trace_id:032x}" if context.is_valid else None
        record.stages = [] if span.is_recording() else None
        try:
            await self._app(scope, receive, answer.send)
        finally:
            self._traces.end(span, scope, record, answer.status)
