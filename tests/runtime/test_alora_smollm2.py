"""The trained aLoRA adapters on the embedded model, in fp32: a conversation on the base and checks of it, as PEFT's."""

import json

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file

from runtime.config import MIB, EngineConfig
from runtime.engine import Engine
from runtime.messages import SamplingParams
from tests.oracle import greedy_choices

NAMES = ("vault", "ledger")
GREEDY = SamplingParams(max_tokens=20, temperature=0.0, ignore_eos=True)
QUESTION = [{"role": "user", "content": "Why is the sky blue, and what has the sea to do with it?"}]


@pytest.fixture(scope="module")
def oracle(default_model_path, trained_adapters):
    base = transformers.AutoModelForCausalLM.from_pretrained(default_model_path, dtype=torch.float32)
    first, *others = NAMES
    model = peft.PeftModel.from_pretrained(base, trained_adapters / first, adapter_name=first)
    for name in others:
        model.load_adapter(trained_adapters / name, adapter_name=name)
    return model.eval()


@pytest.fixture(scope="module")
def engine(default_model_path, trained_adapters):
    options = {"dtype": "float32", "kv_cache_bytes": 256 * MIB, "max_batch_tokens": 24, "max_running": 4, "threads": 1}
    made = Engine(EngineConfig(model=str(default_model_path), **options))
    made.digests = {None: None}
    for name in NAMES:
        config = json.loads((trained_adapters / name / "adapter_config.json").read_text())
        made.digests[name] = made.add_adapter(load_file(trained_adapters / name / "adapter_model.safetensors"), config)
    yield made
    made.check()
    assert made.blocks.used == 0
    made.close()


def ask(engine, tokens, name=None):
    [completion] = engine.generate([tokens], GREEDY, engine.digests[name])
    return completion


def assert_oracle(oracle, name, tokens, output, invocation_start=None):
    if name is None:
        with oracle.disable_adapter():
            assert greedy_choices(oracle, tokens, output) == output
    else:
        oracle.set_adapter(name)
        assert greedy_choices(oracle, tokens, output, invocation_start) == output


def test_checks_of_a_conversation_and_what_is_said_after_them_are_pefts_warm_and_cold(
    engine, oracle, default_model_path
):
    tokenizer = transformers.AutoTokenizer.from_pretrained(default_model_path)
    question = tokenizer.apply_chat_template(QUESTION, add_generation_prompt=True, return_dict=False)
    answer = ask(engine, question)
    assert_oracle(oracle, None, question, answer.token_ids)
    talk = [*question, *answer.token_ids]
    invoked = {name: [*talk, *oracle.peft_config[name].alora_invocation_tokens] for name in NAMES}
    warm = {name: ask(engine, invoked[name], name) for name in NAMES}
    assert [each.cached_tokens for each in warm.values()] == [len(talk) - 1, len(talk)]
    for name in NAMES:
        assert_oracle(oracle, name, invoked[name], warm[name].token_ids, len(talk))
    on = ask(engine, invoked["vault"])  # the same tokens, on the base
    assert on.cached_tokens == len(talk)
    assert on.token_ids != warm["vault"].token_ids
    assert_oracle(oracle, None, invoked["vault"], on.token_ids)
    for digest in engine.digests.values():
        engine.drop_namespace(digest)
    together = engine.generate([*invoked.values(), invoked["vault"]], GREEDY, [*map(engine.digests.get, NAMES), None])
    assert [each.token_ids for each in together] == [each.token_ids for each in (*warm.values(), on)]
