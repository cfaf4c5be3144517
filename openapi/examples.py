"""An example of every operation's body, by method and path; one of several is for another form of it.

Tests hold them valid by the contract, and have the service answer each.
"""

from collections.abc import Mapping
from typing import Any

from openapi.operations import JSON

BASE, ADAPTER = "smollm2-135m-instruct", "team/poet"
CONVERSATION = [{"role": "user", "content": "Name three trees."}]
WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather in a city.",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}
CONFIGURATION = (
    '{"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 8, "lora_alpha": 16, "target_modules": ["q_proj"]}'
)
IMPORT = {"name": ADAPTER, "src": "hf://org/poet", "preload": True}
LOAD = {"lora_name": ADAPTER, "lora_path": "hf://org/poet"}

Examples = Mapping[str, Any]  # by what each shows
# Files are not JSON: their examples say what the parts hold
FORM = {"a bundle": {"adapter_config.json": CONFIGURATION, "adapter_model.safetensors": "(the file's bytes)"}}

EXAMPLES: dict[tuple[str, str], Examples] = {
    ("POST", "/adapters"): {
        "an import": IMPORT,
        "from S3, kept in memory only": {"name": ADAPTER, "src": "s3://bucket/poet", "ephemeral": True},
    },
    ("PUT", "/adapters/{name}"): FORM,
    ("PATCH", "/adapters/{name}"): {"a pin": {"pinned": True}},
    ("POST", "/adapters/{name}/load"): {
        "to the device": {"tier": "device"},
        "with a pin": {"tier": "host", "pin": True},
    },
    ("POST", "/adapters/{name}/unload"): {"from the device": {"tier": "device"}},
    ("POST", "/v1/load_lora_adapter"): {"an import": {**LOAD, "load_inplace": True}},
    ("POST", "/v1/unload_lora_adapter"): {"a deletion": {"lora_name": ADAPTER}},
    ("POST", "/load_lora_adapter"): {"an import": {**LOAD, "pinned": True}},
    ("POST", "/unload_lora_adapter"): {"a deletion": {"lora_name": ADAPTER}},
    ("POST", "/v1/loras"): {"an import": {"lora_name": ADAPTER, "source": {"uri": "hf://org/poet"}}},
    ("POST", "/invocations"): {
        "a chat": {"messages": CONVERSATION, "max_tokens": 16},
        "a completion": {"prompt": "The oak is", "max_tokens": 8},
        "a generation of LMI": {"inputs": "The oak is", "parameters": {"max_new_tokens": 8, "details": True}},
    },
    ("POST", "/inference/v1/generate"): {
        "token ids": {"token_ids": [3, 4, 5], "sampling_params": {"max_tokens": 4, "temperature": 0}}
    },
    ("POST", "/v1/completions"): {
        "a text": {"model": BASE, "prompt": "The oak is", "max_tokens": 8, "temperature": 0},
        "several prompts with log-probabilities": {
            "model": BASE,
            "prompt": ["The oak is", "The elm is"],
            "max_tokens": 4,
            "logprobs": 2,
        },
        "a word of a list": {"model": BASE, "prompt": "Yes or no?", "structured_outputs": {"choice": ["yes", "no"]}},
    },
    ("POST", "/v1/chat/completions"): {
        "a chat": {"model": BASE, "messages": CONVERSATION, "max_tokens": 16},
        "a stream": {
            "model": BASE,
            "messages": CONVERSATION,
            "max_tokens": 16,
            "stream": True,
            "stream_options": {"include_usage": True},
        },
        "JSON by a schema": {
            "model": BASE,
            "messages": CONVERSATION,
            "max_tokens": 16,
            "response_format": {
                "type": "json_schema",
                "json_schema": {
                    "name": "trees",
                    "schema": {
                        "type": "object",
                        "properties": {"trees": {"type": "array", "items": {"type": "string"}}},
                    },
                },
            },
        },
        "a function": {
            "model": BASE,
            "messages": CONVERSATION,
            "max_tokens": 16,
            "tools": [WEATHER],
            "tool_choice": "auto",
        },
    },
    ("POST", "/v1/responses"): {
        "a text": {"model": BASE, "input": "Name three trees.", "max_output_tokens": 16},
        "a conversation": {
            "model": BASE,
            "instructions": "Be brief.",
            "input": [{"type": "message", "role": "user", "content": "Name three trees."}],
            "max_output_tokens": 16,
            "store": False,
        },
    },
    ("POST", "/tokenize"): {
        "a prompt": {"prompt": "The oak is", "return_token_strs": True},
        "a chat": {"messages": CONVERSATION},
    },
    ("POST", "/detokenize"): {"token ids": {"tokens": [3, 4, 5]}},
    ("POST", "/kv/prefixes"): {
        "a prompt": {"model": BASE, "prompt": "The oak is", "ttl_seconds": 60},
        "a chat": {"model": BASE, "messages": CONVERSATION, "pin": False},
    },
}


def media_examples(key: tuple[str, str], media: str) -> dict[str, Any]:
    """OpenAPI's `examples` of a content type; none for files."""
    shown = {name: {"value": value} for name, value in EXAMPLES.get(key, {}).items()}
    return {"examples": shown} if media in (JSON, "multipart/form-data") and shown else {}
