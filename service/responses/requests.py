"""From a request for a response to the chat that gives it, and from a chat's refusal to the request's fields."""

import re
from collections.abc import Sequence

from service.errors import RequestError
from service.openai.known_fields import Refused
from service.openai.schemas import (
    ChatRequest,
    ChosenFunction,
    Function,
    FunctionChoice,
    Message,
    NamedSchema,
    ResponseFormat,
    TextFormat,
    Tool,
    asks_for_nothing,
)
from service.openai.schemas import JsonSchema as ChatSchema
from service.responses.items import messages_of
from service.responses.schemas import LOGPROBS, Item, NamedFunction, ResponsesRequest, SchemaFormat

UNBUILT = {
    "background": Refused((False,), "stream"),
    "background_options": Refused(),
    "conversation": Refused((), "previous_response_id"),
    "prompt": Refused((), "instructions and input"),
    "context_management": Refused(([],)),
    "moderation": Refused(),
    "access_programs": Refused(),
    "image": Refused(),
    "n": Refused((1,), "a request for each"),
    # a chat's
    "messages": Refused((), "input"),
    "logprobs": Refused((False,), f"include with {LOGPROBS}"),
    "max_tokens": Refused((), "max_output_tokens"),
    "max_completion_tokens": Refused((), "max_output_tokens"),
    "response_format": Refused((TextFormat(),), "text.format"),
    "functions": Refused(([],), "tools"),
    "function_call": Refused(("none", "auto"), "tool_choice"),
    "echo": Refused((False,)),
    "prompt_logprobs": Refused(),
    "reasoning_effort": Refused((), "reasoning.effort"),
    "add_generation_prompt": Refused((True,)),
    "continue_final_message": Refused((False,)),
    "return_token_ids": Refused((False,)),
    "modalities": Refused((["text"],)),
    "audio": Refused(),
    "prediction": Refused(),
    "web_search_options": Refused(),
}
# Fields of one name in both that differ in form
OWN = {"tools", "tool_choice", *UNBUILT}
SHARED = [
    name for name in ChatRequest.__struct_fields__ if name in ResponsesRequest.__struct_fields__ if name not in OWN
]
# A chat's words for the fields of a response
WORDS = {
    "max_completion_tokens": "max_output_tokens",
    "max_tokens": "max_output_tokens",
    "response_format.json_schema.schema": "text.format.schema",
    "response_format": "text.format",
    "messages": "input",
    "reasoning_effort": "reasoning.effort",
}
_WORD = re.compile(rf"(?<![\w.'\"])(?:{'|'.join(map(re.escape, WORDS))})(?![\w'\"])")


def check_request(body: ResponsesRequest) -> None:
    """Raise RequestError for a field that asks for something that is not built, or that needs another one."""
    for name, refused in UNBUILT.items():
        value = getattr(body, name)
        if not asks_for_nothing(value, refused.harmless):
            instead = f": use {refused.instead}" if refused.instead else ": leave it out"
            raise RequestError("unsupported_parameter", f"{name} is not supported{instead}", name)
    if body.truncation == "auto":
        message = "truncation: auto is not supported, for nothing is left out of a conversation: send less input"
        raise RequestError("unsupported_parameter", message, "truncation")
    if body.text is not None and body.text.verbosity not in (None, "medium"):
        message = "text.verbosity is not supported: say in instructions how long the answer is to be"
        raise RequestError("unsupported_parameter", message, "text.verbosity")
    if body.top_logprobs and LOGPROBS not in (body.include or ()):
        raise RequestError("invalid_field", f"top_logprobs needs {LOGPROBS} in include", "top_logprobs")


def chat_request(body: ResponsesRequest, items: Sequence[Item]) -> ChatRequest:
    """The chat of a conversation's items and the request's own instructions."""
    instructions = [] if body.instructions is None else [Message(role="system", content=body.instructions)]
    messages = [*instructions, *messages_of(items)]
    if not messages:
        raise RequestError("invalid_field", "input holds thoughts alone: send a message too", "input")
    included = LOGPROBS in (body.include or ())
    fields = {name: getattr(body, name) for name in SHARED}
    return ChatRequest(
        **{
            **fields,
            "messages": messages,
            "max_completion_tokens": body.max_output_tokens,
            "reasoning_effort": None if body.reasoning is None else body.reasoning.effort,
            "logprobs": included,
            "top_logprobs": body.top_logprobs if included else None,
            "response_format": _response_format(body),
            "tools": _tools(body),
            "tool_choice": FunctionChoice(type="function", function=ChosenFunction(name=body.tool_choice.name))
            if isinstance(body.tool_choice, NamedFunction)
            else body.tool_choice,
        }
    )


def _response_format(body: ResponsesRequest) -> ResponseFormat | None:
    asked = None if body.text is None else body.text.format
    if isinstance(asked, SchemaFormat):
        return ChatSchema(json_schema=NamedSchema(name=asked.name, schema=asked.schema))
    return asked


def _tools(body: ResponsesRequest) -> list[Tool] | None:
    if body.tools is None:
        return None
    return [
        Tool(
            type="function",
            function=Function(
                name=tool.name, description=tool.description, parameters=tool.parameters, strict=tool.strict
            ),
        )
        for tool in body.tools
    ]


def in_own_words(error: RequestError) -> RequestError:
    """A chat's refusal with the fields that the client of a response sent."""
    if error.param is not None and error.param.startswith("messages["):  # the input itself has been checked
        message = (
            "previous_response_id: a call of that conversation has arguments that are no JSON object: send the "
            "conversation as input, without the call"
        )
        return RequestError("invalid_field", message, "previous_response_id")
    return type(error)(error.code, _own(error.message), None if error.param is None else _own(error.param))


def _own(text: str) -> str:
    return _WORD.sub(lambda word: WORDS[word[0]], text).replace(".function.name", ".name")
