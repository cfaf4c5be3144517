"""Which errors each operation can give, by their codes in `service.errors.ANSWERS`.

Tests hold every error that a test meets against it, and every code to be one of an operation.
"""

from collections.abc import Iterable
from http import HTTPStatus

from openapi.operations import NEEDED, OPERATIONS
from service.errors import ANSWERS

Key = tuple[str, str]  # a method and a path


def _codes(*texts: str) -> frozenset[str]:
    return frozenset(code for text in texts for code in text.split())


# Of every operation
DOOR = _codes("bad_request head_too_large head_too_slow too_many_connections shutting_down internal_error")
# Of every one that needs a key
KEY = _codes(
    "invalid_api_key missing_scope",
    "requests_per_minute_exceeded tokens_per_minute_exceeded concurrent_requests_exceeded",
)
# Of every operation with a JSON body
BODY = _codes(
    "body_too_large body_too_slow too_many_bodies too_many_values",
    "invalid_json missing_field unknown_field invalid_field",
)
QUERY = _codes("invalid_query")
CONDITION = _codes("invalid_header precondition_failed")
STORE = _codes("storage_full storage_unavailable")
# Of every one that names an adapter, which may be read from the store
LOOKED_UP = STORE | _codes("invalid_header generation_not_reached generation_unknown")
ENGINE = _codes("engine_unavailable engine_died engine_error")

# Adapters
KNOWN_ADAPTER = QUERY | LOOKED_UP | _codes("adapter_not_found import_in_progress")
TIER = ENGINE | _codes("adapter_failed adapter_in_use adapter_pinned load_cancelled unknown_adapter")
PIN = ENGINE | _codes("pins_full superseded unknown_adapter adapter_failed adapter_changed pinned_quota_exceeded")
PUBLISHED = (
    PIN
    | STORE
    | CONDITION
    | _codes(
        "invalid_name name_is_base_model invalid_adapter alora_not_applicable adapter_is_durable adapter_not_found",
        "name_outside_prefix disk_quota_exceeded",
        "missing_file duplicate_file body_too_large too_many_uploads import_in_progress",
        "load_cancelled",
    )
)
UPLOADED = _codes("unsupported_media_type invalid_multipart invalid_archive body_too_slow")
IMPORTED = _codes(
    "import_cancelled unsupported_source unsupported_revision conflicting_revisions source_not_allowed",
    "source_not_found source_access_denied source_changed source_unavailable source_broken",
)
DELETED = LOOKED_UP | _codes("adapter_not_found adapter_is_shared adapter_changed")
OTHERS_LOAD = PUBLISHED | IMPORTED | _codes("adapter_exists lora_name_is_base_model")  # in other servers' words

# Generations
PROMPT = LOOKED_UP | _codes(
    "model_not_found adapter_failed unsupported_parameter empty_prompt invalid_chat invalid_token_id",
    "context_length_exceeded too_many_sequences alora_not_applicable alora_invocation_missing",
)
COMPUTED = ENGINE | _codes(
    "queue_full timeout generation_paused adapter_deleted unknown_adapter non_finite_logits",
    "invalid_max_tokens invalid_invocation_start duplicate_request",
)
GENERATED = (
    PROMPT
    | COMPUTED
    | STORE
    | _codes("conflicting_adapters invalid_mix invalid_grammar grammar_failed adapter_not_found load_cancelled")
)
HELD = (
    PROMPT
    | COMPUTED
    | QUERY
    | _codes("prefixes_full prefix_dropped prefix_cache_off prefix_released duplicate_prefix prefix_not_found")
)
RESPONSE = _codes("response_not_found")

# What each can give besides DOOR, and BODY and QUERY where it has one
ERRORS: dict[Key, frozenset[str]] = {
    ("GET", "/adapters"): QUERY,
    ("POST", "/adapters"): PUBLISHED | IMPORTED | BODY,
    ("PUT", "/adapters/{name}"): PUBLISHED | UPLOADED,
    ("GET", "/adapters/{name}"): QUERY | LOOKED_UP | _codes("adapter_not_found"),
    ("DELETE", "/adapters/{name}"): DELETED | CONDITION,
    ("PATCH", "/adapters/{name}"): KNOWN_ADAPTER | CONDITION | PIN,
    ("POST", "/adapters/{name}/load"): KNOWN_ADAPTER | TIER | PIN,
    ("POST", "/adapters/{name}/unload"): KNOWN_ADAPTER | TIER,
    ("POST", "/v1/load_lora_adapter"): OTHERS_LOAD,
    ("POST", "/v1/unload_lora_adapter"): DELETED,
    ("POST", "/load_lora_adapter"): OTHERS_LOAD,
    ("POST", "/unload_lora_adapter"): DELETED,
    ("POST", "/v1/loras"): OTHERS_LOAD,
    ("DELETE", "/v1/loras/{name}"): DELETED,
    ("POST", "/invocations"): GENERATED,
    ("POST", "/inference/v1/generate"): GENERATED,
    ("POST", "/v1/completions"): GENERATED,
    ("POST", "/v1/chat/completions"): GENERATED,
    ("POST", "/v1/responses"): GENERATED | _codes("previous_response_not_found"),
    ("GET", "/v1/responses/{id}"): RESPONSE | _codes("unsupported_parameter"),
    ("DELETE", "/v1/responses/{id}"): RESPONSE,
    ("POST", "/v1/responses/{id}/cancel"): RESPONSE | _codes("unsupported_parameter"),
    ("GET", "/v1/responses/{id}/input_items"): RESPONSE,
    ("POST", "/tokenize"): PROMPT,
    ("POST", "/detokenize"): LOOKED_UP | _codes("model_not_found adapter_failed invalid_token_id"),
    ("GET", "/kv"): QUERY | ENGINE,
    ("GET", "/kv/prefixes"): QUERY,
    ("POST", "/kv/prefixes"): HELD,
    ("GET", "/kv/prefixes/{id}"): QUERY | _codes("prefix_not_found"),
    ("DELETE", "/kv/prefixes/{id}"): QUERY | _codes("prefix_not_found"),
    ("DELETE", "/kv/namespaces/{namespace}"): QUERY | ENGINE | STORE | _codes("namespace_not_found"),
    ("POST", "/pause"): ENGINE | _codes("unsupported_parameter"),
    ("POST", "/resume"): ENGINE,
    ("POST", "/reset_prefix_cache"): ENGINE,
    ("POST", "/sleep"): _codes("not_implemented"),
    ("GET", "/v1/models/{model}"): LOOKED_UP | _codes("model_not_found"),
    ("GET", "/health/ready"): _codes("engine_unavailable"),
    ("GET", "/ping"): _codes("engine_unavailable"),
    ("GET", "/openapi.json"): _codes("not_found"),
    ("GET", "/routing"): QUERY,
    ("GET", "/ui/{version}/{file}"): _codes("not_found invalid_api_key"),
}
# They have no operation: a path, or a method, that is not served
NO_OPERATION = _codes("not_found method_not_allowed")


def errors_of(key: Key) -> frozenset[str]:
    """The codes, as keys of `ANSWERS`, that an operation can give."""
    operation = OPERATIONS[key]
    of_body = isinstance(operation.body, type) or operation.forms
    own = (
        ERRORS.get(key, frozenset()) | (BODY if of_body else frozenset()) | (QUERY if operation.query else frozenset())
    )
    return own | DOOR | (KEY if NEEDED[key] else frozenset())


def shown_code(code: str) -> str:
    """A code as it is on the wire."""
    return ANSWERS[code].code or code


def by_status(codes: Iterable[str]) -> dict[int, list[str]]:
    """The codes on the wire by their status."""
    found: dict[int, set[str]] = {}
    for code in codes:
        found.setdefault(ANSWERS[code].status, set()).add(shown_code(code))
    return {status: sorted(found[status]) for status in sorted(found)}


def description(status: int, codes: Iterable[str]) -> str:
    return f"{HTTPStatus(status).phrase}. `code` is {' or '.join(codes)}."
