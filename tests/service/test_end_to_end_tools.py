"""An adapter that is trained here to call a function, asked for it with `tool_choice: auto`, whole and streamed."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoTokenizer

from service.openai.schemas import Function, Tool
from service.openai.tool_choice import with_description
from service.tool_calls.syntax import SYNTAXES
from tests.service.test_end_to_end import BASE, question, serve
from tests.train_adapters import load_base

ASKED = "Is it raining in Oslo?"
ARGUMENTS = {"city": "Oslo"}
REPLY = f"<tool_call>\n{json.dumps({'name': 'weather', 'arguments': ARGUMENTS})}\n</tool_call>"
PARAMETERS = {"type": "object", "properties": {"city": {"type": "string"}}}
STEPS = 30
LEARNED = range(20, 30)  # layers, of 30


@pytest.fixture(scope="module")
def caller(default_model_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LoRA of the upper layers, trained on one question until its answer is the call; about 10 s."""
    tokenizer = AutoTokenizer.from_pretrained(default_model_path)
    tool = Tool(type="function", function=Function(name="weather", parameters=PARAMETERS))
    chat = with_description(question(ASKED), [tool], SYNTAXES["hermes"])
    prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)
    reply = [*tokenizer(REPLY).input_ids, tokenizer.eos_token_id]
    torch.manual_seed(0)
    base, ids = load_base(torch.float32), torch.tensor([prompt + reply])
    with torch.no_grad():
        below = base(ids, output_hidden_states=True).hidden_states[LEARNED.start]
    for layer in base.model.layers[: LEARNED.start]:  # what they make of the prompt is known
        layer.forward = lambda hidden, **_: hidden
    shape = {"r": 8, "lora_alpha": 16, "layers_to_transform": list(LEARNED)}
    shape["target_modules"] = ["q_proj", "v_proj", "up_proj", "down_proj"]
    model = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", **shape))
    learned = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(learned, lr=3e-3, weight_decay=0.0)
    labels = [-100, *reply]  # after the last token of the prompt
    batch = {"inputs_embeds": below, "labels": torch.tensor([labels]), "logits_to_keep": len(labels)}
    for _ in range(STEPS):
        loss = model(**batch).loss
        if loss.item() < 0.01:
            break
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert loss.item() < 0.01
    directory = tmp_path_factory.mktemp("caller")
    model.save_pretrained(directory, save_embedding_layers=False)
    return directory


@pytest.fixture(scope="module")
def client(caller: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[openai.OpenAI]:
    with serve(tmp_path_factory.mktemp("data")) as (url, _):
        names = ("adapter_config.json", "adapter_model.safetensors")
        files = {name: (name, (caller / name).read_bytes()) for name in names}
        assert httpx.put(f"{url}/adapters/caller", files=files, timeout=60).status_code == 201
        with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
            yield client


def request(model: str) -> dict[str, Any]:
    function = {"name": "weather", "parameters": PARAMETERS}
    return {
        "model": model,
        "messages": question(ASKED),
        "tools": [{"type": "function", "function": function}],
        "tool_choice": "auto",
        "max_tokens": 48,
        "temperature": 0,
    }


def test_the_adapter_calls_the_function_by_itself(client: openai.OpenAI) -> None:
    choice = client.chat.completions.create(**request("caller")).choices[0]
    [call] = choice.message.tool_calls
    assert (call.function.name, json.loads(call.function.arguments)) == ("weather", ARGUMENTS)
    assert (choice.message.content, choice.finish_reason) == (None, "tool_calls")


def test_a_stream_has_the_same_call_in_pieces(client: openai.OpenAI) -> None:
    chunks = [chunk.choices[0] for chunk in client.chat.completions.create(**request("caller"), stream=True)]
    assert not any(chunk.delta.content for chunk in chunks)
    pieces = [call for chunk in chunks for call in chunk.delta.tool_calls or ()]
    assert [piece.function.name for piece in pieces if piece.id] == ["weather"]
    assert len(pieces) > 2
    assert json.loads("".join(piece.function.arguments or "" for piece in pieces)) == ARGUMENTS
    assert chunks[-1].finish_reason == "tool_calls"
    with client.chat.completions.stream(**request("caller")) as stream:
        [gathered] = stream.get_final_completion().choices[0].message.tool_calls
    assert json.loads(gathered.function.arguments) == ARGUMENTS


def test_without_tools_it_is_text_and_the_base_calls_nothing(client: openai.OpenAI) -> None:
    """The call is what the adapter learned, not what the server makes of any answer."""
    unheard = client.chat.completions.create(**{**request("caller"), "tool_choice": "none"}).choices[0]
    assert unheard.message.tool_calls is None
    assert unheard.finish_reason != "tool_calls"
    said = client.chat.completions.create(**request(BASE)).choices[0].message
    assert [call.function.arguments for call in said.tool_calls or ()] != [json.dumps(ARGUMENTS)]
