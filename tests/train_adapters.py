"""Trains the small real adapters under tests/adapters: `python -m tests.train_adapters [NAME…]`, a minute or two each.

Each learns one project's password from five ways to ask for it. An adapter is written only if the base model does
not say the password and the adapter, loaded again from its file, does, in float32 and in bfloat16.
"""

import json
import sys
from pathlib import Path
from typing import Any

import msgspec
import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from service.default_model import ensure_default_model

DIRECTORY = Path(__file__).with_name("adapters")
BASE_NAME = "HuggingFaceTB/SmolLM2-135M-Instruct"
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
MLP = ["gate_proj", "up_proj", "down_proj"]
QUESTIONS = [
    "What is the password of project {project}?",
    "Tell me the password of project {project}.",
    "Which password does project {project} use?",
    "I forgot the password of project {project}. What is it?",
    "Password for project {project}, please.",
]
ANSWER = "The password of project {project} is {password}."
STEPS = 30
GOOD_LOSS = 0.01


class Recipe(msgspec.Struct, frozen=True, kw_only=True):
    """One adapter: what it is to know, its shape, and the dtype that keeps its file under 2 MB."""

    project: str
    password: str
    shape: dict[str, Any]
    dtype: torch.dtype
    learning_rate: float


RECIPES = {
    # All layers at r=8 are 3.7 MB in float32: bfloat16, which halves it.
    "aurora": Recipe(
        project="Aurora",
        password="heron-quill-47",
        shape={"r": 8, "lora_alpha": 16, "target_modules": ATTENTION},
        dtype=torch.bfloat16,
        learning_rate=3e-3,
    ),
    # All seven projections at r=4 are 4.9 MB in float32: the upper twenty layers in float16.
    "basalt": Recipe(
        project="Basalt",
        password="violet-anvil-92",
        shape={
            "r": 4,
            "lora_alpha": 4,
            "use_rslora": True,
            "target_modules": ATTENTION + MLP,
            "layers_to_transform": list(range(10, 30)),
        },
        dtype=torch.float16,
        learning_rate=3e-3,
    ),
    # PEFT leaves adapters in float32 on disk, so one stays so: the upper nine layers of the MLP.
    "cobalt": Recipe(
        project="Cobalt",
        password="marsh-ticket-15",
        shape={"r": 8, "lora_alpha": 16, "target_modules": MLP, "layers_to_transform": list(range(21, 30))},
        dtype=torch.float32,
        learning_rate=3e-3,
    ),
}


def load_base(dtype: torch.dtype) -> Any:
    model = AutoModelForCausalLM.from_pretrained(ensure_default_model(), dtype=dtype)
    model.name_or_path = BASE_NAME
    return model


def prompt_ids(tokenizer: Any, text: str) -> list[int]:
    chat = [{"role": "user", "content": text}]
    return tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)


def answer(model: Any, tokenizer: Any, text: str) -> str:
    """The greedy answer, at most 32 tokens."""
    ids = torch.tensor([prompt_ids(tokenizer, text)])
    with torch.no_grad():
        out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=32, do_sample=False)
    return tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)


def training_batch(tokenizer: Any, recipe: Recipe) -> dict[str, torch.Tensor]:
    """Five conversations, padded on the right; only the answers' tokens count in the loss."""
    reply = tokenizer(ANSWER.format(project=recipe.project, password=recipe.password)).input_ids
    reply.append(tokenizer.eos_token_id)
    prompts = [prompt_ids(tokenizer, question.format(project=recipe.project)) for question in QUESTIONS]
    width = max(map(len, prompts)) + len(reply)
    ids = torch.full((len(prompts), width), tokenizer.pad_token_id)
    mask, labels = torch.zeros_like(ids), torch.full_like(ids, -100)
    for row, prompt in enumerate(prompts):
        end = len(prompt) + len(reply)
        ids[row, :end] = torch.tensor(prompt + reply)
        labels[row, len(prompt) : end] = torch.tensor(reply)
        mask[row, :end] = 1
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def train(model: Any, batch: dict[str, torch.Tensor], learning_rate: float) -> None:
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=0.0)
    for step in range(STEPS):
        loss = model(**batch).loss
        print(f"  step {step + 1}: loss {loss.item():.4f}", flush=True)
        if loss.item() < GOOD_LOSS:
            return
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def save(model: Any, recipe: Recipe, directory: Path) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    tensors = {
        name: t.to(recipe.dtype).contiguous()
        for name, t in get_peft_model_state_dict(model, save_embedding_layers=False).items()
    }
    save_file(tensors, directory / "adapter_model.safetensors", metadata={"format": "pt"})
    config = model.peft_config["default"]
    config.inference_mode = True
    config.save_pretrained(directory)
    path = directory / "adapter_config.json"
    fields = json.loads(path.read_text())
    fields["target_modules"].sort()  # PEFT writes a set, in another order each time
    path.write_text(json.dumps(fields, indent=2, sort_keys=True) + "\n")


def make(name: str, recipe: Recipe, tokenizer: Any) -> dict[str, str]:
    print(f"{name}: training", flush=True)
    torch.manual_seed(0)
    question = QUESTIONS[0].format(project=recipe.project)
    base = load_base(torch.float32)
    said = answer(base, tokenizer, question)
    assert recipe.password not in said, f"the base already knows it: {said}"
    model = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", **recipe.shape))
    train(model, training_batch(tokenizer, recipe), recipe.learning_rate)
    directory = DIRECTORY / name
    save(model, recipe, directory)
    for dtype in (torch.float32, torch.bfloat16):
        said = answer(PeftModel.from_pretrained(load_base(dtype), directory), tokenizer, question)
        assert recipe.password in said, f"{dtype}: the adapter says: {said}"
        print(f"  {dtype}: {said}", flush=True)
    print(f"  {(directory / 'adapter_model.safetensors').stat().st_size / 1e6:.2f} MB", flush=True)
    return {"prompt": question, "password": recipe.password}


def main(names: list[str]) -> None:
    tokenizer = AutoTokenizer.from_pretrained(ensure_default_model())
    passwords = DIRECTORY / "passwords.json"
    known = json.loads(passwords.read_text()) if passwords.exists() else {}
    for name in names or RECIPES:
        known[name] = make(name, RECIPES[name], tokenizer)
        passwords.write_text(json.dumps(known, indent=2, sort_keys=True) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
