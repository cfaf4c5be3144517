"""The committed aLoRA adapters under PEFT: they answer after their invocation, and change nothing else."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.oracle import greedy_choices
from tests.train_adapters import EXCHANGES, HELD_OUT_EXCHANGES, RECIPES, conversations

NAMES = ("vault", "ledger")
CHATS = [conversations(HELD_OUT_EXCHANGES)[index] for index in (0, 4)]  # a question; one that was answered


@pytest.fixture(scope="module")
def tokenizer(default_model_path: Path) -> Any:
    return AutoTokenizer.from_pretrained(default_model_path)


@pytest.fixture(scope="module")
def base(default_model_path: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(default_model_path, dtype=torch.float32)


@pytest.fixture(scope="module")
def base_logits(base: Any, tokenizer: Any) -> list[torch.Tensor]:
    """The base's logits, computed before `adapted` puts PEFT's layers into it."""
    with torch.inference_mode():
        return [base(chat_ids(tokenizer, chat)).logits for chat in CHATS]


@pytest.fixture(scope="module")
def base_outputs(base: Any, tokenizer: Any) -> list[list[int]]:
    """The base's greedy tokens after each conversation, without any header, computed before `adapted` as well."""
    outputs = []
    for chat in CHATS:
        ids = chat_ids(tokenizer, chat)
        with torch.inference_mode():
            out = base.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=4, do_sample=False)
        outputs.append(out[0, ids.shape[1] :].tolist())
    return outputs


@pytest.fixture(scope="module")
def adapted(
    base: Any, base_logits: list[torch.Tensor], base_outputs: list[list[int]], trained_adapters: Path
) -> PeftModel:
    first, *others = NAMES
    model = PeftModel.from_pretrained(base, trained_adapters / first, adapter_name=first)
    for name in others:
        model.load_adapter(trained_adapters / name, adapter_name=name)
    return model


@pytest.fixture(scope="module")
def expected(trained_adapters: Path) -> dict[str, dict[str, str]]:
    return json.loads((trained_adapters / "passwords.json").read_text())


def chat_ids(tokenizer: Any, chat: list[dict[str, str]]) -> torch.Tensor:
    return torch.tensor([tokenizer.apply_chat_template(chat, return_dict=False)])


def invoked(tokenizer: Any, chat: list[dict[str, str]], invocation: str) -> torch.Tensor:
    return torch.cat([chat_ids(tokenizer, chat), torch.tensor([tokenizer(invocation).input_ids])], 1)


def test_the_conversations_are_not_those_of_the_training() -> None:
    trained = {text for exchange in EXCHANGES for text in exchange}
    assert not any(message["content"] in trained for chat in CHATS for message in chat)


@pytest.mark.parametrize("name", NAMES)
def test_the_invocation_in_the_config_is_that_of_the_tokenizer(
    name: str, tokenizer: Any, trained_adapters: Path, expected: dict[str, dict[str, str]]
) -> None:
    config = json.loads((trained_adapters / name / "adapter_config.json").read_text())
    assert config["alora_invocation_tokens"] == tokenizer(expected[name]["invocation"]).input_ids


@pytest.mark.parametrize("chat", CHATS, ids=["question", "answered"])
@pytest.mark.parametrize("name", NAMES)
def test_after_its_invocation_an_adapter_says_what_it_knows(
    name: str, chat: list[dict[str, str]], adapted: PeftModel, tokenizer: Any, expected: dict[str, dict[str, str]]
) -> None:
    adapted.set_adapter(name)
    start = chat_ids(tokenizer, chat).shape[1]
    [prompt] = invoked(tokenizer, chat, expected[name]["invocation"]).tolist()
    reply = tokenizer(RECIPES[name].reply).input_ids
    assert expected[name]["password"] in RECIPES[name].reply
    assert greedy_choices(adapted, prompt, reply, start) == reply


@pytest.mark.parametrize("name", NAMES)
def test_without_its_invocation_an_adapter_is_the_base(
    name: str,
    adapted: PeftModel,
    base_logits: list[torch.Tensor],
    base_outputs: list[list[int]],
    tokenizer: Any,
) -> None:
    adapted.set_adapter(name)
    for chat, logits, output in zip(CHATS, base_logits, base_outputs, strict=True):
        ids = chat_ids(tokenizer, chat)
        with torch.inference_mode():
            assert torch.equal(adapted(ids).logits, logits)
        assert greedy_choices(adapted, ids[0].tolist(), output) == output


@pytest.mark.parametrize("name", NAMES)
def test_before_its_invocation_an_adapter_is_the_base(
    name: str,
    adapted: PeftModel,
    base_logits: list[torch.Tensor],
    tokenizer: Any,
    expected: dict[str, dict[str, str]],
) -> None:
    adapted.set_adapter(name)
    ids = invoked(tokenizer, CHATS[1], expected[name]["invocation"])
    before = base_logits[1].shape[1]
    with torch.inference_mode():
        logits = adapted(ids).logits[:, :before]
    torch.testing.assert_close(logits, base_logits[1], rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_the_invocation_of_another_adapter_is_ordinary_text(
    name: str, adapted: PeftModel, tokenizer: Any, expected: dict[str, dict[str, str]]
) -> None:
    (other,) = set(NAMES) - {name}
    ids = invoked(tokenizer, CHATS[0], expected[other]["invocation"])
    adapted.set_adapter(name)
    with torch.inference_mode():
        logits = adapted(ids).logits
        with adapted.disable_adapter():
            assert torch.equal(logits, adapted(ids).logits)
