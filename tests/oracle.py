"""Checks greedy output against transformers and PEFT in one forward pass."""

import torch


def logits_of_output(model, prompt, output, invocation_start=None):
    """Return the logits by which `model` chooses each token of `output`, (tokens of `output`, vocabulary) float32.

    `invocation_start` is the index from which an aLoRA adapter applies: PEFT itself would search `output` too.
    """
    tokens = [*prompt, *output]
    options = {} if invocation_start is None else {"alora_offsets": [len(tokens) - invocation_start]}
    with torch.inference_mode():
        logits = model(torch.tensor([tokens]), **options).logits[0].float()
    return logits[len(prompt) - 1 : -1]


def greedy_choices(model, prompt, output, invocation_start=None):
    """Return what `model` chooses at every position of `output` after `prompt`, given all tokens before it.

    It equals `output` if and only if greedy decoding gives `output`, because each token then follows from those before
    it. One forward pass replaces one for each token. `invocation_start` is as in `logits_of_output`.
    """
    return logits_of_output(model, prompt, output, invocation_start).argmax(-1).tolist()
