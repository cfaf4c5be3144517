"""A training loop that samples from its adapter after every step: `python -m loadtests.training_loop`.

Start a server first, with `make serve`. The trainer has its own copy of the model, with a LoRA adapter by PEFT. After
each optimiser step it uploads the adapter to the server (an ephemeral PUT, which writes to no disk) and samples.
"""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import httpx
import torch
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from safetensors.torch import save
from transformers import AutoModelForCausalLM, AutoTokenizer

MESSAGES = [{"role": "user", "content": "What is the password of project Zephyr?"}]
ANSWER = "The password of project Zephyr is copper-lantern-31."
MAX_TOKENS = 24


class Step(NamedTuple):
    """One optimiser step: its loss, and the server's answer with the adapter after it."""

    loss: float
    push_milliseconds: float
    first_token_milliseconds: float
    text: str
    generation: int


def options(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m loadtests.training_loop", description=__doc__)
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    parser.add_argument("--model-directory", help="of the served model; default: the embedded one's")
    parser.add_argument("--name", default="training-loop", help="of the adapter on the server; deleted at the end")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--learning-rate", type=float, default=5e-3)
    return parser.parse_args(argv)


def load_model(directory: str | None) -> tuple[Any, Any]:
    """Return the model in float32, with a new adapter of rank 8 on the attention, and its tokenizer."""
    if directory is None:
        command = [sys.executable, "-m", "service.default_model"]
        directory = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.strip()
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    targets = ["q_proj", "k_proj", "v_proj", "o_proj"]
    config = LoraConfig(task_type="CAUSAL_LM", r=8, lora_alpha=16, target_modules=targets)
    return get_peft_model(base, config), AutoTokenizer.from_pretrained(directory)


def train(client: httpx.Client, model: Any, tokenizer: Any, chosen: argparse.Namespace) -> Iterator[Step]:
    """Train the adapter on the answer and yield each step. Raises httpx.HTTPError if the server refuses."""
    prompt = tokenizer.apply_chat_template(MESSAGES, add_generation_prompt=True, return_dict=False)
    answer = [*tokenizer(ANSWER).input_ids, tokenizer.eos_token_id]
    ids = torch.tensor([[*prompt, *answer]])
    labels = torch.tensor([[*[-100] * len(prompt), *answer]])  # the loss is of the answer's tokens only
    optimizer = torch.optim.AdamW((it for it in model.parameters() if it.requires_grad), lr=chosen.learning_rate)
    for _ in range(chosen.steps):
        loss = model(input_ids=ids, labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        start = time.perf_counter()
        generation = push(client, chosen.name, model)
        pushed = time.perf_counter() - start
        first, text = sample(client, chosen.name)
        yield Step(loss.item(), 1000 * pushed, 1000 * first, text, generation)


def push(client: httpx.Client, name: str, model: Any) -> int:
    """Upload the adapter's present weights under `name`; return the generation that the server gives them."""
    config = json.dumps(model.peft_config["default"].to_dict(), default=sorted)  # sorted makes lists of PEFT's sets
    tensors = {key: tensor.contiguous() for key, tensor in get_peft_model_state_dict(model).items()}
    body = save(tensors, metadata={"format": "pt", "adapter_config": config})
    headers = {"Content-Type": "application/vnd.safetensors"}
    answer = client.put(f"/adapters/{name}", params={"ephemeral": True}, content=body, headers=headers)
    return int(answer.raise_for_status().json()["generation"])


def sample(client: httpx.Client, name: str) -> tuple[float, str]:
    """Return the seconds to the first token of the adapter's greedy answer, and its text."""
    body = {"model": name, "messages": MESSAGES, "max_tokens": MAX_TOKENS, "temperature": 0, "stream": True}
    start, first, text = time.perf_counter(), 0.0, ""
    with client.stream("POST", "/v1/chat/completions", json=body) as response:
        response.raise_for_status()
        for line in response.iter_lines():
            if line.startswith("data: {"):
                event = json.loads(line.removeprefix("data: "))
                if "error" in event:
                    raise httpx.HTTPError(event["error"]["message"])
                if piece := event["choices"][0]["delta"].get("content"):
                    first = first or time.perf_counter() - start
                    text += piece
    return first, text


def main(argv: Sequence[str] | None = None) -> None:
    chosen = options(argv)
    model, tokenizer = load_model(chosen.model_directory)
    with httpx.Client(base_url=chosen.url, timeout=120) as client:
        try:
            for number, step in enumerate(train(client, model, tokenizer, chosen), start=1):
                times = f"push {step.push_milliseconds:.0f} ms  first token {step.first_token_milliseconds:.0f} ms"
                print(f"step {number}  loss {step.loss:.4f}  {times}  generation {step.generation}: {step.text!r}")
        finally:
            client.delete(f"/adapters/{chosen.name}")


if __name__ == "__main__":
    try:
        main()
    except httpx.HTTPError as error:
        sys.exit(f"failed: {error}")
