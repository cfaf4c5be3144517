"""The training example against a real server and PEFT's own answers, on a tiny random model in float32."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from loadtests import training_loop
from loadtests.server_process import running_server


@pytest.fixture(scope="module")
def random_model(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model, with weights that the trainer and the server share."""
    directory = tmp_path_factory.mktemp("models") / "random"
    shutil.copytree(tiny_model, directory)
    torch.manual_seed(1)
    config = AutoConfig.from_pretrained(directory, dtype=torch.float32, initializer_range=0.2)
    AutoModelForCausalLM.from_config(config).save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def url(random_model: Path) -> Iterator[str]:
    with running_server(["--model", str(random_model), "--dtype", "float32", "--kv-cache-bytes", "32M"]) as url:
        yield url


def greedy(model, tokenizer) -> str:
    """What PEFT itself says, as the server's client is asked to."""
    prompt = tokenizer.apply_chat_template(
        training_loop.MESSAGES, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    length = prompt["input_ids"].shape[1]
    with torch.inference_mode():
        out = model.generate(**prompt, max_new_tokens=training_loop.MAX_TOKENS, do_sample=False)
    return tokenizer.decode(out[0, length:], skip_special_tokens=True)


def test_after_every_step_the_server_says_what_peft_says(url: str, random_model: Path) -> None:
    chosen = training_loop.options(["--steps", "5", "--learning-rate", "0.05"])
    model, tokenizer = training_loop.load_model(str(random_model))
    steps = []
    with httpx.Client(base_url=url, timeout=60) as client:
        before = greedy(model, tokenizer)
        for step in training_loop.train(client, model, tokenizer, chosen):
            assert step.text == greedy(model, tokenizer)
            steps.append(step)
        resource = client.get(f"/adapters/{chosen.name}").json()
        client.delete(f"/adapters/{chosen.name}").raise_for_status()
    assert [step.generation for step in steps] == [1, 2, 3, 4, 5]
    assert len({before, *(step.text for step in steps)}) > 2
    assert steps[-1].loss < steps[0].loss
    assert resource["ephemeral"]
    assert min(step.push_milliseconds for step in steps) > 0


def test_it_prints_each_step_and_leaves_no_adapter_behind(
    url: str, random_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    training_loop.main(["--url", url, "--model-directory", str(random_model), "--steps", "2", "--name", "mine"])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("  ")[0] for line in lines] == ["step 1", "step 2"]
    for line in lines:
        assert all(word in line for word in ("loss", "push", "first token", "generation"))
    assert httpx.get(f"{url}/adapters/mine").status_code == 404


def test_a_server_that_refuses_ends_it(url: str, random_model: Path) -> None:
    with pytest.raises(httpx.HTTPStatusError, match="400"):
        training_loop.main(["--url", url, "--model-directory", str(random_model), "--name", "no name"])
