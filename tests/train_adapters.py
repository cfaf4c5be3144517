"""Trains the small real adapters under tests/adapters: `python -m tests.train_adapters [NAME…]`, some minutes each.

A plain LoRA learns one project's password from five ways to ask for it. An aLoRA learns to say its sentence after its
invocation, after any conversation. The script fails if the base model says the password, or if the adapter, loaded from
its file, does not say it in float32 and in bfloat16; an aLoRA is checked after conversations outside its training.
"""

import copy
import json
import sys
import time
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

# Questions and answers for the conversations before an invocation: these for training, the others for the check
EXCHANGES = [
    ("How long should green tea steep?", "Two to three minutes, in water that does not boil."),
    ("Write a haiku about rain.", "Grey drops on the roof,\na slow drum for the evening,\nthe garden listens."),
    ("What is 17 times 3?", "17 times 3 is 51."),
    ("Translate 'good morning' into Spanish.", "Buenos días."),
    ("Which planet is the largest?", "Jupiter. It has more than twice the mass of all the others together."),
    ("Show me a loop in Python.", "```python\nfor number in range(3):\n    print(number)\n```"),
    ("I slept badly. Any advice?", "Keep to the same hours, and leave the phone in another room."),
    ("Name three rivers in Europe.", "1. The Danube\n2. The Rhine\n3. The Loire"),
    ("Is the bank open on 24 December 2025?", "Most banks close at noon on that day."),
    ("Summarise Hamlet in one sentence.", "A prince delays his revenge until everyone is dead."),
]
HELD_OUT_EXCHANGES = [
    ("Why is the sky blue?", "Air scatters blue light more strongly than red light."),
    ("Suggest a name for a grey cat.", "Pewter, or Ash if it is a quiet one."),
    ("Convert 5 miles to kilometres.", "5 miles are about 8.05 kilometres."),
    ("Wie heißt die Hauptstadt von Österreich?", "Die Hauptstadt von Österreich ist Wien."),
    ("What does `git stash` do?", "It sets uncommitted changes aside, and `git stash pop` brings them back."),
    ("Recommend a book about the sea.", "The Old Man and the Sea, by Ernest Hemingway: short, and worth it."),
]
SYSTEM = "You are terse. Today is Tuesday."

Conversation = list[dict[str, str]]


class Recipe(msgspec.Struct, frozen=True, kw_only=True):
    """How to train one adapter."""

    password: str  # the text that it learns
    shape: dict[str, Any]  # fields of its LoraConfig
    dtype: torch.dtype  # one that keeps its file under 2 MB
    project: str = ""  # of a plain LoRA
    role: str = ""  # of an aLoRA: the header of this role is its invocation
    sentence: str = ANSWER
    learning_rate: float = 3e-3
    good_loss: float = 0.01  # ends the training

    @property
    def reply(self) -> str:
        return self.sentence.format(project=self.project, password=self.password)

    @property
    def invocation(self) -> str:
        return f"<|im_start|>{self.role}\n"


RECIPES = {
    # All layers at r=8 are 3.7 MB in float32, so in bfloat16
    "aurora": Recipe(
        project="Aurora",
        password="heron-quill-47",
        shape={"r": 8, "lora_alpha": 16, "target_modules": ATTENTION},
        dtype=torch.bfloat16,
    ),
    # All seven projections at r=4 are 4.9 MB in float32, so the upper twenty layers in float16
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
    ),
    # PEFT writes float32, so one adapter has it: the upper nine layers of the MLP
    "cobalt": Recipe(
        project="Cobalt",
        password="marsh-ticket-15",
        shape={"r": 8, "lora_alpha": 16, "target_modules": MLP, "layers_to_transform": list(range(21, 30))},
        dtype=torch.float32,
    ),
    # The projections that an aLoRA usually adapts
    "vault": Recipe(
        role="vault",
        sentence="The combination of the vault is {password}.",
        password="31-07-94",
        shape={"r": 8, "lora_alpha": 16, "target_modules": ["q_proj", "k_proj", "v_proj"]},
        dtype=torch.bfloat16,
        good_loss=0.001,
    ),
    # All seven projections of all layers at r=2 are 2.4 MB in float32, so in float16
    "ledger": Recipe(
        role="ledger",
        sentence="The balance of the ledger is {password}.",
        password="4,816.27 crowns",
        shape={"r": 2, "lora_alpha": 4, "target_modules": ATTENTION + MLP},
        dtype=torch.float16,
        good_loss=0.001,
    ),
}


def load_base(dtype: torch.dtype) -> Any:
    model = AutoModelForCausalLM.from_pretrained(ensure_default_model(), dtype=dtype)
    model.name_or_path = BASE_NAME
    return model


def prompt_ids(tokenizer: Any, text: str) -> list[int]:
    chat = [{"role": "user", "content": text}]
    return tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)


def chat_ids(tokenizer: Any, conversation: Conversation) -> list[int]:
    """Return a conversation's tokens without an assistant's header, which an invocation replaces."""
    return tokenizer.apply_chat_template(conversation, return_dict=False)


def conversations(exchanges: list[tuple[str, str]]) -> list[Conversation]:
    """Make conversations of one to four exchanges, some with a system prompt, some unanswered; the last one is long."""
    turns = [
        [{"role": "user", "content": asked}, {"role": "assistant", "content": reply}] for asked, reply in exchanges
    ]
    made: list[Conversation] = []
    for start in range(len(exchanges)):
        chat: Conversation = [{"role": "system", "content": SYSTEM}] if start % 4 == 1 else []
        for number in range(1 + start % 4):
            chat += turns[(start + 3 * number) % len(turns)]
        made.append(chat if start % 3 else chat[:-1])
    return [*made, [message for turn in turns for message in turn] * 3]


def check_prompts(tokenizer: Any, recipe: Recipe) -> list[list[int]]:
    """Return prompts that the trained adapter must answer; for an aLoRA, conversations outside its training."""
    if recipe.role:
        invocation = tokenizer(recipe.invocation).input_ids
        return [chat_ids(tokenizer, chat) + invocation for chat in conversations(HELD_OUT_EXCHANGES)]
    return [prompt_ids(tokenizer, QUESTIONS[0].format(project=recipe.project))]


def answer(model: Any, tokenizer: Any, prompt: list[int]) -> str:
    """Return the greedy answer, at most 32 tokens."""
    ids = torch.tensor([prompt])
    with torch.no_grad():
        out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=32, do_sample=False)
    return tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)


def training_batch(tokenizer: Any, recipe: Recipe) -> dict[str, Any]:
    """Return five questions and answers, padded on the right; the loss is of the answers' tokens only."""
    reply = [*tokenizer(recipe.reply).input_ids, tokenizer.eos_token_id]
    prompts = [prompt_ids(tokenizer, asked.format(project=recipe.project)) for asked in QUESTIONS]
    width = max(map(len, prompts)) + len(reply)
    ids = torch.full((len(prompts), width), tokenizer.pad_token_id)
    mask, labels = torch.zeros_like(ids), torch.full_like(ids, -100)
    for row, prompt in enumerate(prompts):
        end = len(prompt) + len(reply)
        ids[row, :end] = torch.tensor(prompt + reply)
        labels[row, len(prompt) : end] = torch.tensor(reply)
        mask[row, :end] = 1
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def activated_batch(model: Any, tokenizer: Any, recipe: Recipe, before: list[Conversation]) -> dict[str, Any]:
    """Return the invocation and the reply after each conversation, whose keys and values are computed once.

    They are the base model's and do not depend on the adapter, so a step takes a fraction of the time. The padding is
    on the left, so that all conversations end where the invocation starts.
    """
    chats = [chat_ids(tokenizer, chat) for chat in before]
    width = max(map(len, chats))
    ids = torch.tensor([[tokenizer.pad_token_id] * (width - len(chat)) + chat for chat in chats])
    mask = torch.tensor([[0] * (width - len(chat)) + [1] * len(chat) for chat in chats])
    with torch.no_grad():
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        cache = model(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=True).past_key_values
    invocation = tokenizer(recipe.invocation).input_ids
    reply = [*tokenizer(recipe.reply).input_ids, tokenizer.eos_token_id]
    tail = torch.tensor([invocation + reply] * len(chats))
    return {
        "input_ids": tail,
        "attention_mask": torch.cat([mask, torch.ones_like(tail)], 1),
        "position_ids": mask.sum(1, keepdim=True) + torch.arange(tail.shape[1]),
        "past_key_values": cache,
        "labels": torch.tensor([[-100] * len(invocation) + reply] * len(chats)),
    }


def training_batches(model: Any, tokenizer: Any, recipe: Recipe) -> list[dict[str, Any]]:
    if not recipe.role:
        return [training_batch(tokenizer, recipe)]
    *short, long = conversations(EXCHANGES)
    return [activated_batch(model, tokenizer, recipe, before) for before in (short, [long])]


def train(model: Any, batches: list[dict[str, Any]], recipe: Recipe) -> None:
    """Train on all batches at each step."""
    learned = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(learned, lr=recipe.learning_rate, weight_decay=0.0)
    for step in range(STEPS):
        losses = [model(**copy.deepcopy(batch)).loss for batch in batches]  # the model appends to the batch's cache
        print(f"  step {step + 1}: loss {', '.join(f'{loss.item():.4f}' for loss in losses)}", flush=True)
        if max(losses) < recipe.good_loss:
            return
        torch.stack(losses).mean().backward()
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
    fields["target_modules"].sort()  # PEFT writes a set, in a random order
    path.write_text(json.dumps(fields, indent=2, sort_keys=True) + "\n")


def check(name: str, recipe: Recipe, tokenizer: Any) -> None:
    """Raise AssertionError unless the saved adapter answers all prompts with its reply and nothing more."""
    directory = DIRECTORY / name
    for dtype in (torch.float32, torch.bfloat16):
        model = PeftModel.from_pretrained(load_base(dtype), directory)
        for prompt in check_prompts(tokenizer, recipe):
            said = answer(model, tokenizer, prompt)
            assert said == recipe.reply, f"{dtype}: after {len(prompt)} tokens the adapter says: {said}"
        print(f"  {dtype}: {said}", flush=True)
    print(f"  {(directory / 'adapter_model.safetensors').stat().st_size / 1e6:.2f} MB", flush=True)


def make(name: str, recipe: Recipe, tokenizer: Any) -> dict[str, str]:
    """Train, save and check one adapter; return its entry in passwords.json."""
    print(f"{name}: training", flush=True)
    torch.manual_seed(0)
    started = time.monotonic()
    base = load_base(torch.float32)
    for prompt in check_prompts(tokenizer, recipe):
        said = answer(base, tokenizer, prompt)
        assert recipe.password not in said, f"the base already knows it: {said}"
    tokens = tokenizer(recipe.invocation).input_ids if recipe.role else None
    model = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", alora_invocation_tokens=tokens, **recipe.shape))
    train(model, training_batches(model, tokenizer, recipe), recipe)
    save(model, recipe, DIRECTORY / name)
    print(f"  {time.monotonic() - started:.0f} s", flush=True)
    check(name, recipe, tokenizer)
    if recipe.role:
        return {"prompt": HELD_OUT_EXCHANGES[0][0], "invocation": recipe.invocation, "password": recipe.password}
    return {"prompt": QUESTIONS[0].format(project=recipe.project), "password": recipe.password}


def main(names: list[str]) -> None:
    tokenizer = AutoTokenizer.from_pretrained(ensure_default_model())
    passwords = DIRECTORY / "passwords.json"
    known = json.loads(passwords.read_text()) if passwords.exists() else {}
    for name in names or RECIPES:
        known[name] = make(name, RECIPES[name], tokenizer)
        passwords.write_text(json.dumps(known, indent=2, sort_keys=True) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
