"""What handlers check besides the constraints of the Structs, as JSON Schema: by Struct, and by its fields.

What depends on the model, on other fields' values or on what is stored is not here: an error's code says it.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, get_args

import msgspec

from openapi.operations import JSON
from service.adapters.queries import IF_MATCH
from service.catalog.record import MAX_NAME_CHARACTERS, NAME
from service.catalog.seen import GENERATION_HEADER, GENERATION_NUMBER
from service.dialects.tokens import UNBUILT as TOKENS_UNBUILT
from service.openai.chat import Chat
from service.openai.completions import TextCompletion
from service.openai.conversations import OWN_FIELDS
from service.openai.schemas import HARMLESS, ChatRequest, CompletionRequest
from service.responses.requests import UNBUILT
from service.responses.schemas import SentItem, SentMessage, SentReference

Schema = dict[str, Any]

ADAPTER_NAME: Schema = {"minLength": 1, "maxLength": MAX_NAME_CHARACTERS, "pattern": f"^{NAME}$"}
NO_SLASH: Schema = {"minLength": 1, "pattern": "^[^/]+$"}
HEADERS: dict[str, Schema] = {
    "If-Match": {"pattern": f"^{IF_MATCH}$", "description": "`*`, or digests in double quotes, separated by commas"},
    "If-None-Match": {"enum": ["*"], "description": "refuse to replace an adapter"},
    GENERATION_HEADER: {
        "pattern": f"^{GENERATION_NUMBER}$",
        "description": "the least generation of the adapter that the client accepts; an upload's answer has its number",
    },
}


def one_of(*fields: str) -> Schema:
    """Exactly one of some fields is there and not null."""
    return {"oneOf": [given(field) for field in fields]}


def given(field: str) -> Schema:
    return {"required": [field], "properties": {field: {"not": {"type": "null"}}}}


def calling() -> Schema:
    return {"required": ["tool_calls"], "properties": {"tool_calls": {"type": "array", "minItems": 1}}}


def only(*values: Any) -> Schema:
    """Nothing but what asks for nothing."""
    return {"enum": [None, *map(msgspec.to_builtins, values)], "description": "other values are refused"}


def unbuilt(kind: type[msgspec.Struct], built: Sequence[str]) -> Mapping[str, Schema]:
    """The fields of a body that are refused unless they ask for nothing."""
    fields = (field for field in HARMLESS if field in kind.__struct_fields__ and field not in built)
    return {field: only(*HARMLESS[field]) for field in fields}


def listed(item: str) -> Schema:
    return {"type": "array", "items": {"type": item}}


def item(kind: type[msgspec.Struct]) -> Schema:
    return {"$ref": f"#/components/schemas/{kind.__name__}"}


def message_without_type() -> Schema:
    """An item of a response's input that says no type is a message."""
    schema = msgspec.json.schema_components([SentMessage], ref_template="#/components/schemas/{name}")[1]["SentMessage"]
    properties = {name: field for name, field in schema["properties"].items() if name != "type"}
    required = [name for name in schema["required"] if name != "type"]
    return {**schema, "properties": {**properties, "type": {"enum": [None, ""]}}, "required": required}


ITEMS = [item(kind) for kind in get_args(SentItem) if kind is not SentReference]
INPUT: Schema = {
    "anyOf": [
        {"type": "string"},
        {"type": "array", "minItems": 1, "items": {"anyOf": [*ITEMS, message_without_type()]}},
    ]
}
# msgspec cannot tell lists of one kind from mixed ones
PROMPT: Schema = {
    "anyOf": [
        {"type": "string"},
        listed("string"),
        listed("integer"),
        {"type": "array", "items": listed("integer")},
    ]
}
TEMPLATE: Mapping[str, Schema] = {
    "chat_template_kwargs": {"propertyNames": {"not": {"enum": sorted(OWN_FIELDS - {"reasoning_effort"})}}}
}
# A message is continued, or another one begins
ENDING: Schema = {
    "not": {
        "required": ["continue_final_message", "add_generation_prompt"],
        "properties": {"continue_final_message": {"const": True}, "add_generation_prompt": {"const": True}},
    }
}
GENERATION: Mapping[str, Schema] = {
    "truncate_prompt_tokens": {"not": {"const": 0}},
    "logit_bias": {"propertyNames": {"pattern": "^[0-9]+$"}},
    "allowed_token_ids": {"minItems": 1},
}
FORMS = ("json", "json_object", "regex", "choice", "grammar", "structural_tag")
FIELDS: Mapping[str, Mapping[str, Schema]] = {
    "AdapterSource": {"name": ADAPTER_NAME},
    "ImportQuery": {"name": ADAPTER_NAME},
    "VllmLoad": {"lora_name": ADAPTER_NAME},
    "SglangLoad": {"lora_name": ADAPTER_NAME},
    "DynamoLoad": {"lora_name": ADAPTER_NAME},
    "ChatRequest": {**unbuilt(ChatRequest, Chat.built), **GENERATION, **TEMPLATE},
    "CompletionRequest": {"prompt": PROMPT, **unbuilt(CompletionRequest, TextCompletion.built), **GENERATION},
    "Message": {"function_call": only(*HARMLESS["function_call"])},
    "ResponsesRequest": {
        **GENERATION,
        **TEMPLATE,
        "input": INPUT,
        **{field: only(*refused.harmless) for field, refused in UNBUILT.items()},
        "guided_whitespace_pattern": only(*HARMLESS["guided_whitespace_pattern"]),
        "use_beam_search": only(*HARMLESS["use_beam_search"]),
        "truncation": only("disabled"),
    },
    "SentCall": {"arguments": {"contentMediaType": JSON, "contentSchema": {"type": "object"}}},
    "TextOptions": {"verbosity": only("medium")},
    "TokenizeRequest": {"truncate_prompt_tokens": GENERATION["truncate_prompt_tokens"], **TEMPLATE},
    "TokensRequest": {field: only(*refused.harmless) for field, refused in TOKENS_UNBUILT.items()},
    "LmiRequest": {"stream": only(False), "adapters": {"maxItems": 1, "minItems": 1}},
    "PauseQuery": {"mode": {"enum": ["abort", "keep"]}, "wait_for_inflight_requests": {"enum": [False]}},
    "ResponseQuery": {"stream": {"enum": [False]}},
}
WHOLE: Mapping[str, Schema] = {
    "PrefixRequest": one_of("messages", "prompt"),
    "TokenizeRequest": {**one_of("messages", "prompt"), **ENDING},
    "ChatRequest": ENDING,
    "Message": {"anyOf": [given("content"), given("refusal"), calling()]},
    "StructuredOutputs": {"anyOf": [given(form) for form in FORMS]},
}


def checked(name: str, schema: Schema) -> Schema:
    """A Struct's schema with what its handlers check besides."""
    fields = {field: {**schema["properties"][field], **more} for field, more in FIELDS.get(name, {}).items()}
    properties = {"properties": {**schema["properties"], **fields}} if fields else {}
    return {**schema, **properties, **WHOLE.get(name, {})}


def without_model(name: str, schema: Schema, others: Iterable[str]) -> Schema:
    """A generation's schema where `model` may be left out, and where the fields that make it another one are absent."""
    required = [field for field in schema["required"] if field != "model"]
    absent = {"allOf": [{"not": {"anyOf": [{"required": [field]} for field in others]}}]}
    return {**schema, "title": name, "required": required, **absent}
