"""Engines on each family against PEFT: adapters of all linears, and K/V that are shared, evicted and recomputed."""

import peft
import pytest
import torch

from runtime.config import MIB, EngineConfig
from runtime.engine import Engine
from runtime.kv.cache import bytes_per_block
from runtime.messages import SamplingParams
from runtime.models.config import ModelConfig
from tests.oracle import logits_of_output
from tests.runtime.models.families import write_checkpoint

# Every operation that only some families have is in one of these
FAMILIES = ["phi3-partial-longrope", "phi3-window", "smollm3", "olmo2", "glm4", "mistral-window", "gemma2", "gemma3"]
INVOCATIONS = {"plain": None, "alora": [7, 8, 9]}
TOLERANCE = 1e-4
BLOCK = 16
PARAMS = SamplingParams(max_tokens=16, temperature=0.0, ignore_eos=True, logprobs=3)


def prompt(length: int, seed: int) -> list[int]:
    return torch.randint(10, 131, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


class Family:
    """A family's tiny model under PEFT, with a LoRA and an aLoRA of all linears of its layers."""

    def __init__(self, name, directory):
        self.directory = directory
        base = write_checkpoint(name, directory)
        self.model = ModelConfig.from_directory(directory)
        targets = sorted({part.module.rpartition(".")[2] for site in self.model.sites()[:-2] for part in site.parts})
        self.peft = None
        for adapter, invocation in INVOCATIONS.items():
            config = peft.LoraConfig(
                r=4, lora_alpha=8, target_modules=targets, alora_invocation_tokens=invocation, task_type="CAUSAL_LM"
            )
            if self.peft is None:
                self.peft = peft.get_peft_model(base, config, adapter_name=adapter)
            else:
                self.peft.add_adapter(adapter, config)
        for parameter_name, parameter in self.peft.named_parameters():
            if "lora_B" in parameter_name:
                torch.nn.init.normal_(parameter, std=0.1)
        self.peft.eval()

    def engine(self, blocks, **options):
        config = EngineConfig(
            model=str(self.directory),
            device="cpu",
            dtype="float32",
            kv_cache_bytes=blocks * bytes_per_block(self.model, BLOCK, torch.float32),
            adapter_bytes=MIB,
            host_adapter_bytes=MIB,
            max_model_len=64,
            max_batch_tokens=32,
            max_running=4,
            threads=2,
            **options,
        )
        engine = Engine(config)
        engine.digests = {None: None}
        for name in INVOCATIONS:
            tensors = peft.get_peft_model_state_dict(self.peft, adapter_name=name, save_embedding_layers=False)
            digest = engine.digests[name] = engine.add_adapter(tensors, self.peft.peft_config[name].to_dict())
            engine.adapters.load(digest, "device")
            while not engine.adapters.device.holds(digest):  # so that requests need not wait for it
                engine.wait(timeout=1.0)
                engine.step()
        return engine

    def check(self, name, tokens, completion, invocation_start=None):
        """Whether the log-probabilities of an output are those of PEFT, None for the base."""
        assert len(completion.token_ids) == PARAMS.max_tokens
        output = completion.token_ids
        if name is None:
            with self.peft.disable_adapter():
                logits = logits_of_output(self.peft, tokens, output)
        else:
            self.peft.set_adapter(name)
            logits = logits_of_output(self.peft, tokens, output, invocation_start)
        for row, one in zip(logits.log_softmax(-1), completion.logprobs, strict=True):
            assert one.top_logprobs == pytest.approx(row[one.top_ids].tolist(), abs=TOLERANCE)


@pytest.fixture(scope="module", params=FAMILIES)
def family(request, tmp_path_factory):
    return Family(request.param, tmp_path_factory.mktemp("model"))


def ask(engine, tokens, name=None):
    [completion] = engine.generate([tokens], PARAMS, engine.digests[name])
    engine.check()
    return completion


@pytest.mark.filterwarnings("ignore:::peft")
@pytest.mark.parametrize("kernels", ["compiled", "torch"])
def test_preempted_shared_and_evicted_kv_give_the_numbers_of_peft(family, kernels):
    """Contexts are longer than the windows; seven blocks hold half of what the requests need."""
    engine = family.engine(8, kernels=kernels, host_kv_bytes=MIB)
    talk = prompt(28, 1)
    names = [None, "plain", "alora", "alora"]
    prompts = [talk, prompt(29, 2), [*talk, *INVOCATIONS["alora"]], [*prompt(22, 3), *INVOCATIONS["alora"], 50, 51]]
    outputs = engine.generate(prompts, PARAMS, [engine.digests[name] for name in names])
    assert engine.scheduler.preemptions > 0
    for name, tokens, output, start in zip(names, prompts, outputs, [None, None, 28, 22], strict=True):
        family.check(name, tokens, output, start)
    # A second turn under the aLoRA finds what the base has computed of the first
    turn = [*talk, *outputs[0].token_ids, *INVOCATIONS["alora"]]
    after = ask(engine, turn, "alora")
    assert after.cached_tokens == 43
    family.check("alora", turn, after, 44)
    for seed in range(3):
        ask(engine, prompt(56, 10 + seed))
    loads = engine.stats().host_kv.loads
    again = ask(engine, turn, "alora")
    assert engine.stats().host_kv.loads > loads
    assert again.cached_tokens == len(turn) - 1
    family.check("alora", turn, again, 44)
    assert engine.blocks.used == 0
    engine.close()
