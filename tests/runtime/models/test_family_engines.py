"""Engines on each family against PEFT: adapters of all linears, and K/V that are shared, evicted and recomputed."""

import re

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
FAMILIES = [
    "phi3-partial-longrope",
    "phi3-window",
    "smollm3",
    "olmo2",
    "glm4",
    "mistral-window",
    "gemma2",
    "gemma3",
    "qwen3-moe",
    "qwen2-moe",
    "granite-moe-shared",
    "gpt-oss-moe",
]
INVOCATIONS = {"plain": None, "alora": [7, 8, 9]}
TOLERANCE = 1e-4
BLOCK = 16
PARAMS = SamplingParams(max_tokens=16, temperature=0.0, ignore_eos=True, logprobs=3)


def prompt(length: int, seed: int) -> list[int]:
    return torch.randint(10, 131, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


class Family:
    """A family's tiny model under PEFT, by default with a LoRA and an aLoRA of all linears of its layers."""

    def __init__(self, name, directory, adapters=INVOCATIONS, targets=None):
        self.directory = directory
        base = write_checkpoint(name, directory)
        self.model = ModelConfig.from_directory(directory)
        self.adapters = adapters
        modules = [part.module for site in self.model.sites() for part in site.parts]
        # Of routers and routed experts PEFT adapts parameters, and has no aLoRA of them; nor of Qwen's shared expert
        if self.model.experts is not None:
            modules = [module for module in modules if "self_attn" in module or ".shared_mlp" in module]
        targets = targets or sorted({module.rpartition(".")[2] for module in modules} - {"embed_tokens", "lm_head"})
        self.peft = None
        for adapter, invocation in adapters.items():
            config = peft.LoraConfig(
                r=4, lora_alpha=8, target_modules=targets, alora_invocation_tokens=invocation, task_type="CAUSAL_LM"
            )
            if self.peft is None:
                self.peft = peft.get_peft_model(base, config, adapter_name=adapter)
            else:
                self.peft.add_adapter(adapter, config)
        for parameter_name, parameter in self.peft.named_parameters():
            if "lora_B" in parameter_name or "lora_embedding_A" in parameter_name:  # those that begin as zeros
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
            threads=1,
            **options,
        )
        engine = Engine(config)
        engine.digests = {None: None}
        for name in self.adapters:
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


@pytest.fixture(scope="module")
def family(request, tmp_path_factory):
    return Family(request.param, tmp_path_factory.mktemp("model"))


def ask(engine, tokens, name=None):
    [completion] = engine.generate([tokens], PARAMS, engine.digests[name])
    engine.check()
    return completion


# PyTorch's kernels take longer, and test_compiled_decoder.py compares them with the compiled ones for every family
ENGINES = [
    *((name, "compiled") for name in FAMILIES),
    *((name, "torch") for name in ("olmo2", "gemma3", "gpt-oss-moe")),
]


@pytest.mark.filterwarnings("ignore:::peft")
@pytest.mark.parametrize(("family", "kernels"), ENGINES, indirect=["family"])
def test_preempted_shared_and_evicted_kv_give_the_numbers_of_peft(family, kernels):
    check_kv(family, family.engine(8, kernels=kernels, host_kv_bytes=MIB))


def check_kv(family, engine):
    """Contexts are longer than the windows; the seven blocks of an engine hold half of what the requests need."""
    assert engine.runner.num_blocks == 8
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
    engine.generate([prompt(56, seed) for seed in (10, 11, 12)], SamplingParams(max_tokens=1))
    loads = engine.stats().host_kv.loads
    again = ask(engine, turn, "alora")
    assert engine.stats().host_kv.loads > loads
    assert again.cached_tokens == len(turn) - 1
    family.check("alora", turn, again, 44)
    assert engine.blocks.used == 0
    engine.close()


@pytest.mark.filterwarnings("ignore:::peft")
@pytest.mark.parametrize("kernels", ["compiled", "torch"])
def test_an_adapter_of_scaled_embeddings_is_scaled_as_they_are(tmp_path, kernels):
    family = Family("gemma2", tmp_path, adapters={"embedding": None}, targets=["embed_tokens", "v_proj"])
    engine = family.engine(9, kernels=kernels)
    tokens = prompt(30, 1)
    family.check("embedding", tokens, ask(engine, tokens, "embedding"))
    engine.close()


@pytest.mark.parametrize(("limit", "long"), [(None, False), (64, False), (65, True)])
def test_longrope_has_its_long_factors_only_where_longer_contexts_are_asked_for(tmp_path, caplog, limit, long):
    write_checkpoint("phi3-partial-longrope", tmp_path)
    engine = Engine(
        EngineConfig(
            model=str(tmp_path), device="cpu", kernels="torch", max_model_len=limit, kv_cache_bytes=MIB, threads=1
        )
    )
    assert engine.runner.max_model_len == (limit or 64)
    assert engine.runner.decoder.config.rope.long == long
    assert ("max_model_len 65 is over the 64 tokens" in caplog.text) == long
    engine.close()


# By family, names of a checkpoint, and of the module
RENAMED = {
    "mixtral": {"block_sparse_moe": "mlp", ".w1": ".gate_proj", ".w3": ".up_proj", ".w2": ".down_proj"},
    "granite": {"router.layer": "router"},
}
# By expert's projection: the parameter, and which of its outputs
PLACES = {"gate": ("gate_up_proj", 0), "up": ("gate_up_proj", 1), "down": ("down_proj", 0)}


def merged(family, directory, tensors):
    """The family's model in transformers, with an adapter of scale 1 added to its weights."""
    model = write_checkpoint(family, directory)
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name in [name for name in tensors if name.endswith("lora_A.weight")]:
            module = name.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
            for old, new in RENAMED.get(family.partition("-")[0], {}).items():
                module = module.replace(old, new)
            change = tensors[name.replace("lora_A", "lora_B")] @ tensors[name]
            expert = re.fullmatch(r"(.*\.experts)\.(\d+)\.(gate|up|down)_proj", module)
            if expert is None:
                parameters[f"{module}.weight"] += change
                continue
            name, place = PLACES[expert[3]]
            whole, count = parameters[f"{expert[1]}.{name}"][int(expert[2])], 1 if name == "down_proj" else 2
            # In GPT-OSS's the inputs come first, and gates and ups take turns
            outputs = whole.T[place::count] if "gpt" in family else whole.chunk(count)[place]
            outputs += change
    return model


@pytest.mark.parametrize("kernels", ["compiled", "torch"])
@pytest.mark.parametrize(
    "name", ["qwen3-moe", "qwen3-moe-sparse-step", "mixtral-moe", "qwen2-moe", "granite-moe-shared", "gpt-oss-moe"]
)
def test_adapters_of_routers_and_experts_give_the_numbers_of_merged_weights(tmp_path, name, kernels):
    """Two adapters and the base in one batch: an expert's rows are of several of them, or of none."""
    base = write_checkpoint(name, tmp_path / "base")
    model = ModelConfig.from_directory(tmp_path / "base")
    adapters = [experts_adapter(model, seed) for seed in (1, 2)]
    config = {"peft_type": "LORA", "r": 3, "lora_alpha": 3, "bias": "none"}
    config["target_modules"] = sorted({key.split(".lora_")[0].rpartition(".")[2] for key in adapters[0]})
    engine = Engine(
        EngineConfig(
            model=str(tmp_path / "base"),
            device="cpu",
            dtype="float32",
            kernels=kernels,
            kv_cache_bytes=MIB,
            adapter_bytes=MIB,
            host_adapter_bytes=MIB,
            max_model_len=64,
            max_batch_tokens=24,
            max_running=4,
            threads=1,
        )
    )
    digests = [engine.add_adapter(tensors, config) for tensors in adapters]
    prompts = [prompt(length, length) for length in (30, 21, 9, 5)]
    outputs = engine.generate(prompts, PARAMS, [digests[0], None, digests[1], digests[0]])
    engine.check()
    engine.close()
    models = [merged(name, tmp_path / "again", tensors) for tensors in adapters]
    for tokens, output, oracle in zip(prompts, outputs, [models[0], base, models[1], models[0]], strict=True):
        rows = logits_of_output(oracle, tokens, output.token_ids).log_softmax(-1)
        for row, one in zip(rows, output.logprobs, strict=True):
            assert one.top_logprobs == pytest.approx(row[one.top_ids].tolist(), abs=TOLERANCE)


def experts_adapter(model, seed):
    """Random tensors of rank 3 for every module of the layers."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for site in model.sites():
        for module, out in site.parts:
            if module.startswith("model.layers."):
                prefix = f"base_model.model.{module}"
                tensors[f"{prefix}.lora_A.weight"] = torch.randn(3, site.in_features, generator=generator) * 0.1
                tensors[f"{prefix}.lora_B.weight"] = torch.randn(out, 3, generator=generator) * 0.2
    return tensors
