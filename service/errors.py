"""Every error that a client can get: the exceptions, and the one table that gives each its HTTP answer."""

import errno
from collections.abc import Mapping
from types import MappingProxyType
from typing import Literal, NamedTuple

import msgspec

from runtime.adapter_format.errors import InvalidAdapter
from runtime.output.logs import cut
from storage.store import StoreError, StoreFull

ErrorType = Literal["invalid_request_error", "authentication_error", "rate_limit_error", "server_error"]
RETRY_SECONDS = 1  # sent as Retry-After with 429 and 503, unless the table says otherwise
MOST_MESSAGE, MOST_PARAM = 4000, 300  # characters: names of any length come from clients
NOT_OF_DISKS = (ConnectionError, TimeoutError)
NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


class RequestError(Exception):
    """A request that is refused, or that failed. It knows its reason; only `ANSWERS` knows HTTP."""

    def __init__(self, code: str, message: str, param: str | None = None, retry_seconds: int | None = None):
        super().__init__(message)
        self.code = code  # a key of ANSWERS
        self.message = message  # for a person: names the field, what is expected and the next step
        self.param = param  # the field, header or query parameter that is wrong
        self.retry_seconds = retry_seconds  # when to come again, where this error knows it better than the table


class EngineError(RequestError):
    """The engine refused a request, failed at it, died, or does not run."""


class Answer(NamedTuple):
    """How an error is answered over HTTP."""

    status: int
    code: str | None = None  # on the wire; None: the error's own code
    retry_seconds: int | None = None  # sent as Retry-After
    headers: Mapping[str, str] = MappingProxyType({})


ANSWERS: dict[str, Answer] = {
    # the request itself
    "not_found": Answer(404),
    "method_not_allowed": Answer(405),
    "bad_request": Answer(400),
    # keys
    "invalid_api_key": Answer(401, headers={"www-authenticate": "Bearer"}),
    "missing_scope": Answer(403),
    "name_outside_prefix": Answer(403),
    "requests_per_minute_exceeded": Answer(429),
    "tokens_per_minute_exceeded": Answer(429),
    "concurrent_requests_exceeded": Answer(429),
    "disk_quota_exceeded": Answer(403),  # no 507: the server has room, and nothing changes by itself
    "pinned_quota_exceeded": Answer(403),
    # bodies and fields
    "body_too_large": Answer(413),
    "too_many_values": Answer(413),
    "body_too_slow": Answer(408, headers={"connection": "close"}),
    "head_too_large": Answer(431),
    "head_too_slow": Answer(408),
    "invalid_json": Answer(400),
    "missing_field": Answer(400),
    "unknown_field": Answer(400),
    "invalid_field": Answer(400),
    "invalid_query": Answer(400),
    "invalid_header": Answer(400),
    "unsupported_parameter": Answer(400),
    "not_implemented": Answer(501),
    "internal_error": Answer(500, headers={"connection": "close"}),
    # prompts and models
    "empty_prompt": Answer(400),
    "invalid_chat": Answer(400),
    "invalid_grammar": Answer(400),
    "grammar_failed": Answer(400),
    "invalid_token_id": Answer(400),
    "too_many_sequences": Answer(400),
    "response_not_found": Answer(404),
    "previous_response_not_found": Answer(400),
    "context_length_exceeded": Answer(400),
    "model_not_found": Answer(404),
    "conflicting_adapters": Answer(400),
    "invalid_mix": Answer(400),
    "alora_not_applicable": Answer(400),
    "alora_invocation_missing": Answer(400),
    # adapters
    "invalid_name": Answer(400),
    "name_is_base_model": Answer(409),
    "lora_name_is_base_model": Answer(400, code="name_is_base_model"),  # as vLLM and SGLang answer
    "adapter_not_found": Answer(404),
    "adapter_exists": Answer(400),
    "precondition_failed": Answer(412),
    "adapter_is_durable": Answer(409),
    "adapter_is_shared": Answer(409),
    "adapter_changed": Answer(409),
    "generation_not_reached": Answer(412),
    "generation_unknown": Answer(503),
    # uploads and imports
    "invalid_adapter": Answer(422),
    "unsupported_media_type": Answer(
        415, headers={"Accept": "multipart/form-data, application/x-tar, application/gzip, application/vnd.safetensors"}
    ),
    "invalid_multipart": Answer(400),
    "invalid_archive": Answer(400),
    "duplicate_file": Answer(400),
    "missing_file": Answer(400),
    "too_many_uploads": Answer(503, retry_seconds=5),
    "import_in_progress": Answer(409),
    "import_cancelled": Answer(409),
    "unsupported_source": Answer(400),
    "unsupported_revision": Answer(400),
    "conflicting_revisions": Answer(400),
    "source_not_allowed": Answer(403),
    "source_not_found": Answer(404),
    "source_access_denied": Answer(403),
    "source_changed": Answer(409),
    "source_unavailable": Answer(503, retry_seconds=5),
    "source_broken": Answer(502, code="source_unavailable"),
    "storage_full": Answer(507),
    "storage_unavailable": Answer(503),
    # K/V
    "prefix_not_found": Answer(404),
    "namespace_not_found": Answer(404),
    # the engine, or the lack of one
    "engine_died": Answer(503),
    "engine_unavailable": Answer(503),
    "shutting_down": Answer(503, headers={"connection": "close"}),
    # the server, when it is full
    "too_many_connections": Answer(503),
    "too_many_bodies": Answer(503),
    "generation_paused": Answer(503),
    "adapter_deleted": Answer(404),
    "queue_full": Answer(429),
    "timeout": Answer(504),
    "prefixes_full": Answer(409),
    "prefix_dropped": Answer(409),
    "prefix_cache_off": Answer(409),
    "prefix_released": Answer(409),
    "pins_full": Answer(409),
    "adapter_in_use": Answer(409),
    "adapter_pinned": Answer(409),
    "load_cancelled": Answer(409),
    "superseded": Answer(409),
    "unknown_adapter": Answer(404),
    "adapter_failed": Answer(503),
    "non_finite_logits": Answer(422),
    "invalid_max_tokens": Answer(400),
    # what the engine refuses only if the service has a fault
    "invalid_invocation_start": Answer(500),
    "duplicate_request": Answer(500),
    "duplicate_prefix": Answer(500),
    "engine_error": Answer(500),
}
TYPES: dict[int, ErrorType] = {401: "authentication_error", 429: "rate_limit_error"}


class ErrorDetail(msgspec.Struct, frozen=True, kw_only=True):
    message: str
    type: ErrorType
    param: str | None  # the field, header or query parameter that the error is about
    code: str  # a stable snake_case word


class Error(msgspec.Struct, frozen=True, kw_only=True):
    """The body of every error."""

    error: ErrorDetail


def answer_of(error: RequestError) -> Answer:
    """The HTTP answer of an error; its headers are complete."""
    found = ANSWERS[error.code]
    seconds = error.retry_seconds or found.retry_seconds or (RETRY_SECONDS if found.status in (429, 503) else None)
    return found if seconds is None else found._replace(headers={**found.headers, "retry-after": str(seconds)})


def error_body(error: RequestError) -> Error:
    found = ANSWERS[error.code]
    kind = TYPES.get(found.status, "invalid_request_error" if found.status < 500 else "server_error")
    code = found.code or error.code
    message, param = cut(error.message, MOST_MESSAGE), error.param and cut(error.param, MOST_PARAM)
    return Error(error=ErrorDetail(message=message, type=kind, param=param, code=code))


def request_error(error: Exception) -> RequestError | None:
    """The error that an exception of another room is to a client; None for a fault of ours."""
    if isinstance(error, RequestError):
        return error
    if isinstance(error, InvalidAdapter):
        return RequestError("invalid_adapter", str(error), error.field)
    if isinstance(error, StoreFull) or (isinstance(error, OSError) and error.errno in NO_ROOM):
        return RequestError("storage_full", "there is no room left to keep adapters")
    if isinstance(error, RecursionError):  # a schema or a message inside a body, met after it was decoded
        return RequestError("invalid_json", "the body is nested too deeply")
    of_a_disk = isinstance(error, OSError) and error.errno is not None and not isinstance(error, NOT_OF_DISKS)
    if isinstance(error, StoreError) or of_a_disk:
        return RequestError("storage_unavailable", "the adapter store does not work; the server's log says why")
    return None
