"""Transformers and PEFT as the judges of greedy output."""

import torch


def logits_of_output(model, prompt, output, activation=None):
    """The logits (tokens of `output`, vocabulary) that `model` would choose each token of `output` by, in float32.

    `activation` is where an aLoRA adapter begins to apply: PEFT would look for an invocation in `output` too.
    """
    tokens = [*prompt, *output]
    options = {} if activation is None else {"alora_offsets": [len(tokens) - activation]}
    with torch.inference_mode():
        logits = model(torch.tensor([tokens]), **options).logits[0].float()
    return logits[len(prompt) - 1 : -1]


def greedy_choices(model, prompt, output, activation=None):
    """What `model` would choose at every position of `output` after `prompt`, given all tokens before it.

    Equal to `output` itself exactly when greedy decoding of the model yields it: each position then follows from
    those before it. One forward pass instead of one for each token. `activation` is as in `logits_of_output`.
    """
    return logits_of_output(model, prompt, output, activation).argmax(-1).tolist()
