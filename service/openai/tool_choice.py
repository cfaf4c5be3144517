"""Which functions an answer may or must call, and the grammar that makes it."""

import json
from collections.abc import Sequence
from typing import Any

from service.errors import RequestError
from service.openai.schemas import ChatRequest, FunctionChoice, Tool
from service.tool_calls.syntax import Syntax


def check_tools(body: ChatRequest) -> None:
    """Raise RequestError for functions of one name, and for a choice among functions that are not there."""
    names = [tool.function.name for tool in body.tools or ()]
    for index, name in enumerate(names):
        if name in names[:index]:
            message = f"tools[{index}].function.name: {name!r} is the name of an earlier function as well"
            raise RequestError("invalid_field", message, f"tools[{index}].function.name")
    if isinstance(body.tool_choice, FunctionChoice) and body.tool_choice.function.name not in names:
        message = (
            f"tool_choice.function.name: {body.tool_choice.function.name!r} is not among tools: {', '.join(names)}"
        )
        raise RequestError("invalid_field", message, "tool_choice.function.name")
    if body.tool_choice == "required" and not names:
        raise RequestError("invalid_field", "tool_choice is required, and tools has no function", "tool_choice")


def usable_tools(body: ChatRequest) -> Sequence[Tool]:
    """The functions that the model is told of."""
    return () if body.tool_choice == "none" else body.tools or ()


def forced_tools(body: ChatRequest) -> Sequence[Tool]:
    """The functions of which the answer must call one or more; none if it may be text."""
    if isinstance(body.tool_choice, FunctionChoice):
        return [tool for tool in body.tools or () if tool.function.name == body.tool_choice.function.name]
    return body.tools or () if body.tool_choice == "required" else ()


def calls_schema(tools: Sequence[Tool], *, several: bool) -> dict[str, Any]:
    """The JSON Schema of a list of calls of some functions; one call, or `several`."""
    parameters = {f"parameters_{index}": tool.function.parameters for index, tool in enumerate(tools)}
    calls = [
        {
            "type": "object",
            "properties": {
                "name": {"const": tool.function.name},
                "arguments": {"type": "object", "additionalProperties": False}
                if tool.function.parameters is None
                else {"$ref": f"#/$defs/parameters_{index}"},
            },
            "required": ["name", "arguments"],
            "additionalProperties": False,
        }
        for index, tool in enumerate(tools)
    ]
    definitions = {
        key: {"type": "object", **_below(schema, f"#/$defs/{key}")}
        for key, schema in parameters.items()
        if schema is not None
    }
    limits = {"minItems": 1} if several else {"minItems": 1, "maxItems": 1}
    return {"$defs": definitions, "type": "array", "items": {"anyOf": calls}, **limits}


def _below(schema: Any, place: str) -> Any:
    """A schema whose references to itself hold at another place of a document."""
    if isinstance(schema, list):
        return [_below(each, place) for each in schema]
    if not isinstance(schema, dict):
        return schema
    moved = {key: _below(each, place) for key, each in schema.items()}
    reference = moved.get("$ref")
    if isinstance(reference, str) and reference.startswith("#"):
        moved["$ref"] = place + reference[1:]
    return moved


def with_description(messages: Sequence[dict[str, Any]], tools: Sequence[Tool], syntax: Syntax) -> list[dict[str, Any]]:
    """Messages for a chat template that shows the model no tools: a system message describes them."""
    if not tools:
        return list(messages)
    description = described(tools, syntax)
    if messages and messages[0]["role"] == "system":
        return [{**messages[0], "content": f"{messages[0]['content']}\n\n{description}"}, *messages[1:]]
    return [{"role": "system", "content": description}, *messages]


def calls_as_text(message: dict[str, Any], syntax: Syntax) -> dict[str, Any]:
    """A message for a chat template that knows no calls: they are text, as the model would write them."""
    calls = [call["function"] for call in message.get("tool_calls", ())]
    texts = [
        f"{syntax.begin}\n{json.dumps({'name': call['name'], syntax.arguments: call['arguments']})}\n{syntax.end}"
        for call in calls
    ]
    kept = {key: value for key, value in message.items() if key != "tool_calls"}
    return {**kept, "content": "\n".join([*([message["content"]] if message["content"] else []), *texts])}


def described(tools: Sequence[Tool], syntax: Syntax) -> str:
    """What a model has to know to call functions."""
    functions = "\n".join(json.dumps(as_json(tool)) for tool in tools)
    call = json.dumps({"name": "the function's name", syntax.arguments: {"argument": "value"}})
    return (
        f"You may call functions. Their signatures are:\n<tools>\n{functions}\n</tools>\n"
        f"For each call answer with a JSON object:\n{syntax.begin}\n{call}\n{syntax.end}"
    )


def as_json(tool: Tool) -> dict[str, Any]:
    """A tool as chat templates know it."""
    function: dict[str, Any] = {"name": tool.function.name}
    if tool.function.description is not None:
        function["description"] = tool.function.description
    function["parameters"] = tool.function.parameters or {"type": "object", "properties": {}}
    return {"type": "function", "function": function}
