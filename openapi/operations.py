"""Describes each operation of the HTTP contract: summary, Structs, headers, status codes."""

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

from service.adapters.dialects import (
    DynamoAnswer,
    DynamoList,
    DynamoLoad,
    SglangAnswer,
    SglangLoad,
    SglangUnload,
    VllmLoad,
    VllmUnload,
)
from service.adapters.queries import DeleteQuery, ImportQuery, PutQuery, WaitQuery
from service.adapters.routes import AdapterChange, AdapterLoad, AdapterSource, AdapterUnload
from service.adapters.schemas import Adapter, AdapterList
from service.dialects.lmi import LmiAnswer, LmiRequest
from service.dialects.sagemaker import ADAPTER_HEADER
from service.dialects.tokens import TokensAnswer, TokensRequest
from service.health import Version
from service.keys.scopes import SCOPES
from service.kv.control import Paused, PauseQuery, Sleeping, Status, WorldSize
from service.kv.schemas import HeldPrefix, KvCache, PrefixList, PrefixRequest
from service.openai.models import ModelCard, ModelList
from service.openai.schemas import (
    ChatChunk,
    ChatCompletion,
    ChatRequest,
    Completion,
    CompletionRequest,
    TokenizeRequest,
)
from service.openai.tokenize import Detokenized, DetokenizeRequest, Tokenized, TokenizerInfo
from service.options.in_force import ConfigInForce
from service.page.routes import Links
from service.responses.schemas import (
    EVENTS,
    DeletedResponse,
    ItemList,
    ItemsQuery,
    ModelResponse,
    ResponseQuery,
    ResponsesRequest,
)
from service.routing.routes import Routing

# The scopes of a key, by method and path, of which a call needs one
NEEDED = {(method, re.sub(r":\w+}", "}", path)): needed for (method, path), needed in SCOPES.items()}
JSON, TEXT, HTML = "application/json", "text/plain", "text/html"
STRING = {"type": "string"}
REFERENCE = "#/components/schemas/{name}"
BINARY = {"type": "string", "contentMediaType": "application/octet-stream"}
BUNDLE = {
    "multipart/form-data": {
        "type": "object",
        "required": ["adapter_config.json", "adapter_model.safetensors"],
        "properties": {
            "adapter_config.json": {"type": "string"},
            "adapter_model.safetensors": BINARY,
            "chat_template.jinja": {"type": "string", "description": "used in place of the base's"},
            "tokenizer_config.json": {"type": "string", "description": "its chat_template, if no chat_template.jinja"},
        },
    },
    "application/x-tar": BINARY,
    "application/gzip": BINARY,
    "application/vnd.safetensors": BINARY,
}


GENERATED = {
    "x-adapter-digest": "The digest of the adapter, or of the mix, that all prompts ran on.",
    "x-adapter-generation": "The generation of the adapter's name that all prompts ran on.",
    "x-adapter-digests": (
        "If the prompts ran on different adapters: the first 16 digits of each digest, `-` for the base. One value for "
        "each prompt, in order, separated by commas, at most 64."
    ),
    "x-queue-time-ms": "Milliseconds before the first step.",
    "x-cached-tokens": "Tokens of the prompts whose K/V were reused.",
    "x-time-to-first-token-ms": "Milliseconds from the request's arrival; absent from streams.",
    "x-alora-invocation": (
        "For aLoRA adapters only: `found` if its invocation was in the prompt, `appended` if it was appended, `base` "
        "if the base model ran instead, `-` for a prompt of another adapter. One value for each prompt, in order, "
        "separated by commas, at most 64."
    ),
    "x-alora-activation": (
        "For aLoRA adapters only: the index of the first token of the prompt that the adapter applies to. One value "
        "for each prompt, as in x-alora-invocation, `-` for one that ran on the base or has another adapter. Absent if "
        "all did."
    ),
}


class Operation(NamedTuple):
    """The description of one operation."""

    summary: str
    answers: dict[int, Any]  # by status: a Struct, a schema, or None for no body
    body: Any = None  # a Struct, or schemas by content type
    body_required: bool = True
    forms: Mapping[str, type] = {}  # instead of a body: the bodies that it can be, by the field that makes it so
    query: type | None = None  # a Struct whose fields are the parameters
    headers: tuple[str, ...] = ()  # of the request
    streams: tuple[type, ...] = ()  # the Structs that an event can be, if the answer can be a stream
    named_events: bool = False  # whether the events have the names of their types
    media: str = JSON  # content type of the answer
    texts: tuple[str, ...] = ()  # other content types that it may have, each a text
    answer_headers: Mapping[str, str] = {}  # descriptions by name


def word(field: str) -> dict[str, Any]:
    return {"type": "object", "required": [field], "properties": {field: {"type": "string"}}}


def either(*structs: type) -> dict[str, Any]:
    return {"anyOf": [{"$ref": REFERENCE.format(name=struct.__name__)} for struct in structs]}


LMI_ANSWERS = {"type": "array", "items": {"$ref": REFERENCE.format(name=LmiAnswer.__name__)}}
OPERATIONS = {
    ("GET", "/adapters"): Operation("List the adapters.", {200: AdapterList}),
    ("POST", "/adapters"): Operation(
        "Import an adapter from an allowed source. With `wait` false the answer is 202 at once, and GET "
        "/adapters/{name} reports the progress. A name and a source in the query replace the body, as in SageMaker's.",
        {201: Adapter, 200: Adapter, 202: Adapter},
        body=AdapterSource,
        body_required=False,
        query=ImportQuery,
        headers=("If-Match", "If-None-Match"),
    ),
    ("PUT", "/adapters/{name}"): Operation(
        "Upload an adapter: a bundle as multipart or tar, or one safetensors file with the configuration in its "
        "metadata. 201 for a new name, 200 for an existing one.",
        {201: Adapter, 200: Adapter},
        body=BUNDLE,
        query=PutQuery,
        headers=("If-Match", "If-None-Match"),
    ),
    ("GET", "/adapters/{name}"): Operation("Get one adapter; the ETag is its digest.", {200: Adapter}),
    ("DELETE", "/adapters/{name}"): Operation(
        "Delete an adapter: new requests get 404 at once, running ones finish unless `force`; an import of it ends.",
        {204: None},
        query=DeleteQuery,
        headers=("If-Match",),
    ),
    ("PATCH", "/adapters/{name}"): Operation(
        "Pin an adapter to the device, or unpin it.", {200: Adapter}, body=AdapterChange, headers=("If-Match",)
    ),
    ("POST", "/adapters/{name}/load"): Operation(
        "Load an adapter to a tier of memory before a request needs it; with `wait` false the answer is 202 at once.",
        {200: Adapter, 202: Adapter},
        body=AdapterLoad,
        query=WaitQuery,
    ),
    ("POST", "/adapters/{name}/unload"): Operation(
        "Unload an adapter from a tier and the tiers above it; its name stays.", {200: Adapter}, body=AdapterUnload
    ),
    ("POST", "/v1/load_lora_adapter"): Operation(
        "Import an adapter by vLLM's API.", {200: {"type": "string"}}, body=VllmLoad, media=TEXT
    ),
    ("POST", "/v1/unload_lora_adapter"): Operation(
        "Delete an adapter by vLLM's API.", {200: {"type": "string"}}, body=VllmUnload, media=TEXT
    ),
    ("POST", "/load_lora_adapter"): Operation(
        "Import an adapter by SGLang's API, or by vLLM's.",
        {200: SglangAnswer, 400: SglangAnswer, 404: SglangAnswer},
        body=SglangLoad,
    ),
    ("POST", "/unload_lora_adapter"): Operation(
        "Delete an adapter by SGLang's API.", {200: SglangAnswer, 400: SglangAnswer}, body=SglangUnload
    ),
    ("GET", "/v1/loras"): Operation("List the adapters by Dynamo's API.", {200: DynamoList}),
    ("POST", "/v1/loras"): Operation("Import an adapter by Dynamo's API.", {200: DynamoAnswer}, body=DynamoLoad),
    ("DELETE", "/v1/loras/{name}"): Operation("Delete an adapter by Dynamo's API.", {200: DynamoAnswer}),
    ("POST", "/invocations"): Operation(
        "SageMaker's call: a chat if the body has `messages`, a completion if it has `prompt`, LMI's generation if it "
        "has `inputs`. `model` is optional.",
        {200: {"anyOf": [*either(ChatCompletion, Completion, LmiAnswer)["anyOf"], LMI_ANSWERS]}},
        forms={"messages": ChatRequest, "prompt": CompletionRequest, "inputs": LmiRequest},
        headers=(ADAPTER_HEADER,),
        streams=(ChatChunk, Completion),
        answer_headers=GENERATED,
    ),
    ("POST", "/inference/v1/generate"): Operation(
        "Complete token ids with token ids, by vLLM's API.",
        {200: TokensAnswer},
        body=TokensRequest,
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
        "Answer a conversation, formatted by the chat template of the model or of the adapter.",
        {200: ChatCompletion},
        body=ChatRequest,
        streams=(ChatChunk,),
        answer_headers=GENERATED,
    ),
    ("POST", "/v1/responses"): Operation(
        "Answer a conversation as OpenAI's Responses API does, from its items or going on from a stored response.",
        {200: ModelResponse},
        body=ResponsesRequest,
        streams=EVENTS,
        named_events=True,
        answer_headers=GENERATED,
    ),
    ("GET", "/v1/responses/{id}"): Operation(
        "Get a stored response; 404 once it has been forgotten.", {200: ModelResponse}, query=ResponseQuery
    ),
    ("DELETE", "/v1/responses/{id}"): Operation("Forget a stored response.", {200: DeletedResponse}),
    ("POST", "/v1/responses/{id}/cancel"): Operation("Always refused: no response runs in the background.", {}),
    ("GET", "/v1/responses/{id}/input_items"): Operation(
        "List the items of a stored response's own input.", {200: ItemList}, query=ItemsQuery
    ),
    ("POST", "/tokenize"): Operation(
        "Get the token ids of a prompt or of a chat.", {200: Tokenized}, body=TokenizeRequest
    ),
    ("GET", "/tokenizer_info"): Operation("What clients that tokenize themselves have to know.", {200: TokenizerInfo}),
    ("POST", "/detokenize"): Operation("Get the text of token ids.", {200: Detokenized}, body=DetokenizeRequest),
    ("GET", "/kv"): Operation("Get the state of the K/V cache, as a whole and by namespace.", {200: KvCache}),
    ("GET", "/kv/prefixes"): Operation("List the held prefixes.", {200: PrefixList}),
    ("POST", "/kv/prefixes"): Operation(
        "Compute a prefix and hold its K/V until its time limit or until it is deleted: 201; 409 if the limit of held "
        "blocks is reached. With `pin` false, only compute it: 200.",
        {201: HeldPrefix, 200: HeldPrefix},
        body=PrefixRequest,
    ),
    ("GET", "/kv/prefixes/{id}"): Operation("Get a held prefix; 404 after its end.", {200: HeldPrefix}),
    ("DELETE", "/kv/prefixes/{id}"): Operation("Release a held prefix.", {204: None}),
    ("DELETE", "/kv/namespaces/{namespace}"): Operation(
        "Drop the K/V of `base` or of an adapter, by digest or by name, and release its held prefixes.", {204: None}
    ),
    ("POST", "/pause"): Operation(
        "Stop computing between two steps, by vLLM's API; new requests queue until /resume.",
        {200: Status},
        query=PauseQuery,
    ),
    ("POST", "/resume"): Operation("Go on computing, by vLLM's API.", {200: Status}),
    ("GET", "/is_paused"): Operation("Report whether the engine is paused.", {200: Paused}),
    ("POST", "/reset_prefix_cache"): Operation(
        "Drop all cached K/V and all held prefixes, by vLLM's API.", {200: None}
    ),
    ("POST", "/sleep"): Operation("vLLM's call to free the memory of the weights: 501, with what to do instead.", {}),
    ("POST", "/wake_up"): Operation("vLLM's call to end a sleep; the engine never sleeps.", {200: None}),
    ("GET", "/is_sleeping"): Operation("Report that the engine is not asleep.", {200: Sleeping}),
    ("GET", "/get_world_size"): Operation("The number of devices that share the model.", {200: WorldSize}),
    ("GET", "/v1/models"): Operation("List the names that `model` accepts.", {200: ModelList}),
    ("GET", "/v1/models/{model}"): Operation("Get one model.", {200: ModelCard}),
    ("GET", "/health"): Operation("Report that the service is alive.", {200: word("status")}),
    ("GET", "/health/ready"): Operation("Report whether requests can be served; 503 if not.", {200: word("status")}),
    ("GET", "/ping"): Operation("The same, for SageMaker.", {200: word("status")}),
    ("GET", "/version"): Operation(
        "What runs: the server's version, and the kernels that the engine chose.", {200: Version}
    ),
    ("GET", "/config"): Operation(
        "The options in force and where each value comes from, without secrets; and what the engine decided.",
        {200: ConfigInForce},
    ),
    ("GET", "/metrics"): Operation("Metrics in Prometheus' format.", {200: {"type": "string"}}, media=TEXT),
    ("GET", "/routing"): Operation(
        "What a router in front of several servers has to know: where adapters are, load, room for K/V. It reads no "
        "file and waits for no step, and may be asked several times a second.",
        {200: Routing},
    ),
    ("GET", "/openapi.json"): Operation("This contract.", {200: {"type": "object"}}),
    ("GET", "/"): Operation(
        "The operators' page; links for a program that accepts JSON and no HTML.",
        {200: Links, 304: None},
        headers=("If-None-Match",),
        texts=(HTML,),
    ),
    ("GET", "/ui"): Operation("The operators' page.", {200: STRING, 304: None}, headers=("If-None-Match",), media=HTML),
    ("GET", "/ui/{version}/{file}"): Operation(
        "A file of the page.",
        {200: STRING, 304: None},
        headers=("If-None-Match",),
        media="text/javascript",
        texts=("text/css", "image/svg+xml"),
    ),
}
