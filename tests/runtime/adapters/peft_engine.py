"""A tiny model with random weights under transformers and PEFT, and engines on the same weights and adapters."""

import contextlib
import json

import peft
import torch
import transformers

from runtime.config import MIB, EngineConfig
from runtime.engine import Engine
from runtime.invocation import find_invocation
from runtime.messages import SamplingParams
from tests.oracle import logits_of_output
from tests.runtime.tiny_engine import BLOCK_BYTES
from tests.runtime.tiny_model import TINY

LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
INVOCATIONS = {"attention": [7, 8, 9], "linears": [11, 12, 11], "head": [17], "plain": None, "last_layer": None}
MODULES = {
    "attention": {"target_modules": ["q_proj", "k_proj", "v_proj"]},
    "linears": {"target_modules": LINEAR},
    "head": {"target_modules": ["lm_head", "v_proj"]},
    "plain": {"target_modules": LINEAR},
    "last_layer": {"target_modules": ["q_proj", "o_proj", "gate_proj", "down_proj"], "layers_to_transform": [1]},
}
CONFIG = TINY | {"tie_word_embeddings": False}  # so that an adapter of the head is an ordinary one
TOKENS = 6
GREEDY = SamplingParams(max_tokens=TOKENS, temperature=0.0, ignore_eos=True)


class PeftOracle:
    """Judges greedy output of the base and of each adapter of MODULES."""

    def __init__(self, directory):
        torch.manual_seed(1)
        base = transformers.LlamaForCausalLM(transformers.LlamaConfig(**CONFIG, initializer_range=0.15))
        (directory / "config.json").write_text(json.dumps(CONFIG))
        base.save_pretrained(directory / "weights")
        (directory / "weights" / "model.safetensors").rename(directory / "model.safetensors")
        self.directory = directory
        self.model = None
        for name, modules in MODULES.items():
            config = peft.LoraConfig(
                r=4, lora_alpha=8, alora_invocation_tokens=INVOCATIONS[name], task_type="CAUSAL_LM", **modules
            )
            if self.model is None:
                self.model = peft.get_peft_model(base, config, adapter_name=name)
            else:
                self.model.add_adapter(name, config)
        for name, parameter in self.model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.2)
        self.model.eval()

    def adapter(self, name):
        """An adapter as PEFT has it: with copies of the base's embeddings, if it adapts one of them."""
        state = peft.get_peft_model_state_dict(
            self.model, adapter_name=name, save_embedding_layers="lm_head" in MODULES[name]["target_modules"]
        )
        return state, self.model.peft_config[name].to_dict()

    def agrees(self, name, prompt, output, invocation_start=None):
        """Whether greedy decoding under an adapter, None for the base, gives `output` after `prompt`."""
        return self.logits(name, prompt, output, invocation_start).argmax(-1).tolist() == output

    def logits(self, name, prompt, output, invocation_start=None):
        """What each token of `output` is chosen by, (tokens, vocabulary), under an adapter, None for the base."""
        if name is None:
            with self.model.disable_adapter():
                return logits_of_output(self.model, prompt, output)
        self.model.set_adapter(name)
        invocation = INVOCATIONS[name]
        if invocation is not None and invocation_start is None:
            invocation_start = find_invocation(prompt, invocation)
        return logits_of_output(self.model, prompt, output, invocation_start)


@contextlib.contextmanager
def engines(oracle):
    """Starts engines on the oracle's weights, with all adapters: `digests` has them by name."""
    started = []

    def start(blocks=400, **options):
        options = {"adapter_bytes": MIB, "host_adapter_bytes": MIB, "max_model_len": 128, "threads": 1} | options
        config = EngineConfig(model=str(oracle.directory), kv_cache_bytes=blocks * BLOCK_BYTES, **options)
        engine = Engine(config)
        engine.digests = {name: engine.add_adapter(*oracle.adapter(name)) for name in MODULES}
        engine.digests[None] = None
        started.append(engine)
        return engine

    yield start
    for engine in started:
        engine.check()
        assert engine.blocks.used == 0
        engine.close()


def forget(engine):
    """Make all cached K/V unfindable."""
    engine.drop_namespace(None)
    for digest in engine.digests.values():
        engine.drop_namespace(digest)
