"""What the HTTP contract says of each call beyond its route: words, Structs, headers, status codes."""

from typing import Any, NamedTuple

from service.adapters import Adapter, AdapterList, AdapterSource, DeleteQuery, PutQuery
from service.schemas import ChatCompletion, ChatRequest, Completion, CompletionRequest, ModelCard, ModelList

JSON, TEXT = "application/json", "text/plain"
OPEN = frozenset({"/health", "/health/ready", "/ping", "/metrics"})  # answered without an API key
BINARY = {"type": "string", "contentMediaType": "application/octet-stream"}
BUNDLE = {
    "multipart/form-data": {
        "type": "object",
        "required": ["adapter_config.json", "adapter_model.safetensors"],
        "properties": {"adapter_config.json": {"type": "string"}, "adapter_model.safetensors": BINARY},
    },
    "application/x-tar": BINARY,
    "application/vnd.safetensors": BINARY,
}


class Operation(NamedTuple):
    """One call. `body` is a Struct or schemas by content type; `answers` has a Struct, a schema or None by status."""

    summary: str
    answers: dict[int, Any]
    body: Any = None
    query: type | None = None
    headers: tuple[str, ...] = ()
    streams: str | None = None
    media: str = JSON


def word(field: str) -> dict[str, Any]:
    return {"type": "object", "required": [field], "properties": {field: {"type": "string"}}}


OPERATIONS = {
    ("GET", "/adapters"): Operation("List the adapters.", {200: AdapterList}),
    ("POST", "/adapters"): Operation(
        "Take an adapter in from where the server finds it; `file://` under an allowed root.",
        {201: Adapter, 200: Adapter},
        body=AdapterSource,
        headers=("If-Match", "If-None-Match"),
    ),
    ("PUT", "/adapters/{name}"): Operation(
        "Upload an adapter: a bundle as multipart or tar, or one safetensors file with the configuration in its "
        "metadata. 201 for a new name, 200 when it replaces or repeats.",
        {201: Adapter, 200: Adapter},
        body=BUNDLE,
        query=PutQuery,
        headers=("If-Match", "If-None-Match"),
    ),
    ("GET", "/adapters/{name}"): Operation("Look at one adapter; the ETag is its digest.", {200: Adapter}),
    ("DELETE", "/adapters/{name}"): Operation(
        "Take an adapter away: new requests get 404 at once, running ones finish unless `force`.",
        {204: None},
        query=DeleteQuery,
        headers=("If-Match",),
    ),
    ("POST", "/v1/completions"): Operation(
        "Complete a prompt: text, texts or token ids.",
        {200: Completion},
        body=CompletionRequest,
        streams="Completion",
    ),
    ("POST", "/v1/chat/completions"): Operation(
        "Answer a conversation, laid out by the model's own chat template.",
        {200: ChatCompletion},
        body=ChatRequest,
        streams="ChatChunk",
    ),
    ("GET", "/v1/models"): Operation("List what may be named as `model`.", {200: ModelList}),
    ("GET", "/v1/models/{model}"): Operation("Look at one of them.", {200: ModelCard}),
    ("GET", "/health"): Operation("Whether the service answers.", {200: word("status")}),
    ("GET", "/health/ready"): Operation("Whether requests would be served now; 503 if not.", {200: word("status")}),
    ("GET", "/ping"): Operation("The same, under the name that SageMaker asks for.", {200: word("status")}),
    ("GET", "/version"): Operation("The server's version.", {200: word("version")}),
    ("GET", "/metrics"): Operation("Metrics in Prometheus' format.", {200: {"type": "string"}}, media=TEXT),
    ("GET", "/openapi.json"): Operation("This contract.", {200: {"type": "object"}}),
}
