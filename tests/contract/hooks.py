"""What schemathesis is told of this API: requests stay small, names exist, and nothing stays paused or deleted.

A request is changed only where it stays what it was, valid or not.
"""

import random
from typing import Any

import requests
import schemathesis
from schemathesis.core import NOT_SET
from schemathesis.generation import GenerationMode
from schemathesis.generation.meta import CoveragePhaseData

from tests.contract.generations import GENERATIONS

SHARE, OF_A_FIELD = 1 / 16, 3  # steps of a location: /properties/prompt/minLength
BASE, ADAPTER = "smollm2-135m-instruct", "aurora"
LARGEST = 2**31 - 1
LENGTHS = {"messages": "max_tokens", "prompt": "max_tokens", "input": "max_output_tokens"}
LIMITS = {  # of a valid number, which is made this large at most
    "max_tokens": 4,
    "max_completion_tokens": 4,
    "max_output_tokens": 4,
    "max_new_tokens": 4,
    "min_tokens": 0,
    "n": 2,
    "best_of": 2,
}
UPPER = {"n": 128, "best_of": 128}
# What a request that the contract calls valid must not be refused as, for the contract could have said it
FORMAL = {
    "invalid_json",
    "missing_field",
    "unknown_field",
    "invalid_field",
    "invalid_query",
    "invalid_header",
    "invalid_name",
    "unsupported_parameter",
    "unsupported_media_type",
}
# Fields whose values are checked against those of others, or against the chat template: no schema can say that
OF_SEVERAL = {
    "allowed_token_ids",
    "adapter_id",
    "after",  # an item of this response
    "best_of",
    "chat_template",
    "documents",
    "input",  # of thoughts alone, unless there are instructions
    "lora_path",
    "max_completion_tokens",
    "min_tokens",
    "parameters.min_tokens",
    "prompt_logprobs",
    "sampling_params.min_tokens",
    "tool_choice",
    "tool_choice.name",
    "tool_choice.function.name",
    "top_logprobs",
}


@schemathesis.hook
def filter_case(context: Any, case: Any) -> bool:
    """Whether a case is sent: of what lies deep in a generation's body only a share of the forms, drawn anew each time.

    A completion has more than 20,000 of them, most in the tags of a structural tag.
    """
    data = case.meta.phase.data if case.meta else None
    if case.path not in GENERATIONS or not isinstance(data, CoveragePhaseData):
        return True
    of_a_field = data.location is not None and data.location.count("/") <= OF_A_FIELD
    return of_a_field or random.random() < SHARE


@schemathesis.hook
def before_call(context: Any, case: Any, kwargs: dict[str, Any]) -> None:
    if isinstance(case.body, dict) and not case.path.startswith("/adapters"):
        shorten(case.body, case.path)
    if case.path_parameters and case.method != "DELETE" and random.random() < 0.5:
        known = {"name": ADAPTER, "model": BASE}
        for key in case.path_parameters.keys() & known.keys():
            if case.method != "PUT":
                case.path_parameters[key] = known[key]
    if case.path == "/adapters" and case.method == "POST":
        in_body = case.body not in (None, NOT_SET)  # or in the query, as SageMaker has it
        for key in ("name", "src", "preload", "pin") if in_body and case.query else ():
            case.query.pop(key, None)
        if not in_body:
            case.query = {"name": "poet", "src": "file:///nowhere"} | (case.query or {})


def shorten(body: dict[str, Any], path: str) -> None:
    for field, largest in LIMITS.items():
        value = body.get(field)
        if isinstance(value, int) and not isinstance(value, bool) and largest < value <= UPPER.get(field, LARGEST):
            body[field] = largest
    if isinstance(body.get("timeout"), float | int) and 0 < body["timeout"] <= 1e6:
        body["timeout"] = 60
    for form, length in LENGTHS.items():
        if form in body and path not in ("/tokenize", "/kv/prefixes") and body.get(length) is None:
            body[length] = 4
    for field in ("sampling_params", "parameters"):
        if isinstance(body.get(field), dict):
            shorten({"prompt": None} | body[field], path)
            body[field].setdefault("max_tokens" if field == "sampling_params" else "max_new_tokens", 4)
    if isinstance(body.get("model"), str) and body["model"]:
        body["model"] = random.choice([BASE, BASE, BASE, ADAPTER, body["model"]])


@schemathesis.hook
def after_call(context: Any, case: Any, response: Any) -> None:
    if case.path == "/pause":
        requests.post(f"{case.operation.base_url}/resume", timeout=20)


@schemathesis.check
def the_server_makes_no_error(context: Any, response: Any, case: Any) -> None:
    """Besides what is not built, and what it cannot know: made-up names use up the reads of the store for names."""
    if response.status_code >= 500:
        code = response.json()["error"]["code"]
        assert (code, case.path) == ("not_implemented", "/sleep") or code == "generation_unknown", response.text


@schemathesis.check
def a_valid_request_has_no_mistake_of_form(context: Any, response: Any, case: Any) -> None:
    modes = {case.meta.generation.mode, *(each.mode for each in case.meta.components.values())} if case.meta else set()
    always_refused = case.path.endswith("/cancel")
    if modes != {GenerationMode.POSITIVE} or response.status_code < 400 or always_refused:
        return
    error = response.json()["error"]
    said = f"{error['code']} of {error['param']}: {error['message']}"
    param = error["param"] or ""
    told_in_words = (
        param in OF_SEVERAL
        or param.endswith(".arguments")  # text that holds JSON
        or param.startswith(("sampling_params.", "parameters."))  # of any fields of a completion
        or "each say what the answer must look like" in error["message"]
        or "is of one adapter, and this request names" in error["message"]
        # schemathesis has a value of its own for a header of this name, whatever its pattern is
        or (param == "If-Match" and case.headers["If-Match"] == "0")
    )
    assert error["code"] not in FORMAL or told_in_words, said
