"""What the HTTP contract says of each call beyond its route: words, Structs, headers, status codes."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from service.adapters.dialects import SglangAnswer, SglangLoad, SglangUnload, VllmLoad, VllmUnload
from service.adapters.queries import DeleteQuery, PutQuery, WaitQuery
from service.adapters.resource import Adapter, AdapterList
from service.adapters.routes import AdapterChange, AdapterLoad, AdapterSource, AdapterUnload
from service.kv.resource import HeldPrefix, KvCache, PrefixList, PrefixRequest
from service.openai.sagemaker import ADAPTER_HEADER
from service.openai.schemas import (
    ChatChunk,
    ChatCompletion,
    ChatRequest,
    Completion,
    CompletionRequest,
    ModelCard,
    ModelList,
)

JSON, TEXT = "application/json", "text/plain"
OPEN = frozenset({"/health", "/health/ready", "/ping", "/metrics"})  # answered without an API key
REFERENCE = "#/components/schemas/{name}"
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


GENERATED = {
    "x-adapter-digest": "The adapter that `model` meant.",
    "x-queue-time-ms": "Milliseconds before the first step.",
    "x-cached-tokens": "Tokens of the prompts whose K/V were reused.",
    "x-time-to-first-token-ms": "Milliseconds from the request's arrival; not of a stream.",
    "x-alora-invocation": (
        "To an aLoRA adapter only: whether its invocation was found in the prompt, was appended to it, or the base ran "
        "instead: `found`, `appended` or `base`. Of several prompts one each, in order and separated by commas, at "
        "most 64."
    ),
    "x-alora-activation": (
        "To an aLoRA adapter only: the index of the first token of the prompt that the adapter applies to; of several "
        "prompts as x-alora-invocation, with - for one that ran on the base. Left out where all did."
    ),
}


class Operation(NamedTuple):
    """One call. `body` is a Struct or schemas by content type; `answers` has a Struct, a schema or None by status."""

    summary: str
    answers: dict[int, Any]
    body: Any = None
    query: type | None = None
    headers: tuple[str, ...] = ()
    streams: tuple[type, ...] = ()  # what each server-sent event may be, if `stream` asks for events
    media: str = JSON
    answer_headers: Mapping[str, str] = {}


def word(field: str) -> dict[str, Any]:
    return {"type": "object", "required": [field], "properties": {field: {"type": "string"}}}


def either(*structs: type) -> dict[str, Any]:
    return {"anyOf": [{"$ref": REFERENCE.format(name=struct.__name__)} for struct in structs]}


OPERATIONS = {
    ("GET", "/adapters"): Operation("List the adapters.", {200: AdapterList}),
    ("POST", "/adapters"): Operation(
        "Import an adapter from an allowed source. With `wait` false the answer comes at once, 202, and GET "
        "/adapters/{name} tells how far it has come.",
        {201: Adapter, 200: Adapter, 202: Adapter},
        body=AdapterSource,
        query=WaitQuery,
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
        "Take an adapter away: new requests get 404 at once, running ones finish unless `force`; an import of it ends.",
        {204: None},
        query=DeleteQuery,
        headers=("If-Match",),
    ),
    ("PATCH", "/adapters/{name}"): Operation(
        "Pin an adapter to the device, or unpin it.", {200: Adapter}, body=AdapterChange, headers=("If-Match",)
    ),
    ("POST", "/adapters/{name}/load"): Operation(
        "Bring an adapter into a tier of memory before it is asked for; with `wait` false 202 at once.",
        {200: Adapter, 202: Adapter},
        body=AdapterLoad,
        query=WaitQuery,
    ),
    ("POST", "/adapters/{name}/unload"): Operation(
        "Give an adapter's memory back, in a tier and above it; its name stays.", {200: Adapter}, body=AdapterUnload
    ),
    ("POST", "/v1/load_lora_adapter"): Operation(
        "Import an adapter, as vLLM words it.", {200: {"type": "string"}}, body=VllmLoad, media=TEXT
    ),
    ("POST", "/v1/unload_lora_adapter"): Operation(
        "Take an adapter away, as vLLM words it.", {200: {"type": "string"}}, body=VllmUnload, media=TEXT
    ),
    ("POST", "/load_lora_adapter"): Operation(
        "Import an adapter, as SGLang words it.", {200: SglangAnswer, 400: SglangAnswer}, body=SglangLoad
    ),
    ("POST", "/unload_lora_adapter"): Operation(
        "Take an adapter away, as SGLang words it.", {200: SglangAnswer, 400: SglangAnswer}, body=SglangUnload
    ),
    ("POST", "/invocations"): Operation(
        "A chat or a completion, by which of `messages` and `prompt` there is, as SageMaker calls it; `model` may be "
        "left out.",
        {200: either(ChatCompletion, Completion)},
        body={JSON: either(ChatRequest, CompletionRequest)},
        headers=(ADAPTER_HEADER,),
        streams=(ChatChunk, Completion),
        answer_headers=GENERATED,
    ),
    ("POST", "/v1/completions"): Operation(
        "Complete a prompt: text, texts or token ids.",
        {200: Completion},
        body=CompletionRequest,
        streams=(Completion,),
        answer_headers=GENERATED,
    ),
    ("POST", "/v1/chat/completions"): Operation(
        "Answer a conversation, laid out by the model's own chat template.",
        {200: ChatCompletion},
        body=ChatRequest,
        streams=(ChatChunk,),
        answer_headers=GENERATED,
    ),
    ("GET", "/kv"): Operation("Look at the KV cache, as a whole and by namespace.", {200: KvCache}),
    ("GET", "/kv/prefixes"): Operation("List the prefixes that are held.", {200: PrefixList}),
    ("POST", "/kv/prefixes"): Operation(
        "Compute a prefix and hold its K/V until a time is over or it is deleted: 201; 409 when the blocks that may be "
        "held are. With `pin` false compute it only: 200.",
        {201: HeldPrefix, 200: HeldPrefix},
        body=PrefixRequest,
    ),
    ("GET", "/kv/prefixes/{id}"): Operation("Look at a prefix; 404 once it is held no longer.", {200: HeldPrefix}),
    ("DELETE", "/kv/prefixes/{id}"): Operation("Hold a prefix no longer.", {204: None}),
    ("DELETE", "/kv/namespaces/{namespace}"): Operation(
        "Drop the K/V of `base` or of an adapter, by digest or by name, and end the prefixes held of it.", {204: None}
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
