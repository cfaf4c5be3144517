"""The embedded model and adapters on it, token for token against transformers and PEFT in fp32."""

import peft
import pytest
import torch
import transformers

from runtime.config import MIB, EngineConfig
from runtime.engine import Engine
from runtime.messages import SamplingParams
from tests.oracle import greedy_choices

# PEFT warns of lora_bias twice: it cannot be merged into a layer without a bias, and it takes the bias for a broken B.
pytestmark = pytest.mark.filterwarnings(
    "ignore:.lora_bias=True. was passed but the targeted layer",
    "ignore:Adapter 'lora_bias'. 90 LoRA tensor.s. have invalid shape",
)

SUBJECTS = (
    "The capital of France is",
    "Once upon a time, in a village by the sea,",
    "def fibonacci(n):\n",
    "Water boils at",
    "Q: What is 12 times 12?\nA:",
    "Dear committee,\n\nI am writing to",
    "The three laws of robotics are",
    "import numpy as np\n\n",
    "In 1969,",
    "To make bread, you need",
    "SELECT name FROM",
    "The mitochondria is",
    "Roses are red,",
    "A haiku about autumn:\n",
    "The quick brown fox",
    "Ingredients: flour, sugar,",
    "Translate to French: Good morning ->",
    "Here is a list of planets: Mercury,",
    "The derivative of x^2 is",
    "He opened the door and saw",
    "A rootstock is the part of a plant, often an underground part, from which new growth can be produced. "
    "It can refer to a rhizome or underground stem. In grafting, it refers to a plant, sometimes just a stump, which "
    "already has an established, healthy root system, onto which a cutting or a bud from another plant is grafted.",
)
GREEDY = SamplingParams(max_tokens=64, temperature=0.0, ignore_eos=True)
BRIEF = SamplingParams(max_tokens=20, temperature=0.0, ignore_eos=True)  # more than a block

LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
# PEFT confuses an adapter with a module of the same name ("mlp"), so none is called like one.
ADAPTERS = {
    "attention_only": peft.LoraConfig(r=8, lora_alpha=16, target_modules=LINEAR[:4]),
    "mlp_only": peft.LoraConfig(r=4, lora_alpha=8, target_modules=LINEAR[4:]),
    "all_linear": peft.LoraConfig(r=16, lora_alpha=16, target_modules=LINEAR),
    "rslora": peft.LoraConfig(r=8, lora_alpha=4, target_modules=["q_proj", "v_proj", "up_proj"], use_rslora=True),
    "patterns": peft.LoraConfig(
        r=4,
        lora_alpha=8,
        target_modules=LINEAR,
        rank_pattern={"q_proj": 12, "layers.3.mlp.down_proj": 2},
        alpha_pattern={"gate_proj": 3, "layers.0.self_attn.k_proj": 32},
    ),
    "lora_bias": peft.LoraConfig(r=8, lora_alpha=16, target_modules=["v_proj", "o_proj", "down_proj"], lora_bias=True),
    "few_layers": peft.LoraConfig(r=8, lora_alpha=32, target_modules=LINEAR, layers_to_transform=[0, 7, 29]),
}


@pytest.fixture(scope="module")
def prompts(default_model_path):
    tokenizer = transformers.AutoTokenizer.from_pretrained(default_model_path)
    return [tokenizer(text).input_ids for text in SUBJECTS]


@pytest.fixture(scope="module")
def oracle(default_model_path):
    """Transformers' model with every adapter of ADAPTERS attached by PEFT, all with weights that change the output."""
    torch.manual_seed(0)
    base = transformers.AutoModelForCausalLM.from_pretrained(default_model_path, dtype=torch.float32)
    names = iter(ADAPTERS.items())
    name, config = next(names)
    model = peft.get_peft_model(base, config, adapter_name=name)
    for name, config in names:
        model.add_adapter(name, config)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.06)
    return model.eval()


@pytest.fixture(scope="module")
def engine(default_model_path):
    made = Engine(
        EngineConfig(
            model=str(default_model_path),
            dtype="float32",
            kv_cache_bytes=512 * MIB,
            max_batch_tokens=48,  # long prompts take several chunks, beside decoding rows
            max_running=32,
            threads=1,
        )
    )
    yield made
    made.check()
    assert made.blocks.used == 0
    made.close()


@pytest.fixture(scope="module")
def digests(engine, oracle):
    """Each adapter's digest in the engine, its tensors handed over as PEFT would save them."""
    return {
        name: engine.add_adapter(
            peft.get_peft_model_state_dict(oracle, adapter_name=name), oracle.peft_config[name].to_dict()
        )
        for name in ADAPTERS
    }


def forget_cached_blocks(engine, digests):
    for namespace in (None, *digests.values()):
        engine.blocks.drop_namespace(namespace)


@pytest.fixture(scope="module")
def base_output(engine, prompts):
    """What the base alone makes of the last prompt."""
    return engine.generate([prompts[-1]], GREEDY)[0].token_ids


def assert_greedy(oracle, adapter, prompt, output):
    assert len(output) == 64
    if adapter is None:
        with oracle.disable_adapter():
            expected = greedy_choices(oracle, prompt, output)
    else:
        oracle.set_adapter(adapter)
        expected = greedy_choices(oracle, prompt, output)
    assert output == expected


def test_greedy_output_of_the_base_equals_transformers_alone_and_batched_together(engine, oracle, prompts):
    together = [completion.token_ids for completion in engine.generate(prompts, GREEDY)]
    for prompt, output in zip(prompts, together, strict=True):
        assert_greedy(oracle, None, prompt, output)
    forget_cached_blocks(engine, {})
    alone = [engine.generate([prompt], BRIEF)[0].token_ids for prompt in prompts]
    assert alone == [output[: BRIEF.max_tokens] for output in together]


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_greedy_output_with_an_adapter_equals_pefts(engine, oracle, digests, prompts, base_output, adapter):
    prompt = prompts[-1]  # two chunks long
    [cold] = engine.generate([prompt], GREEDY, digests[adapter])
    assert_greedy(oracle, adapter, prompt, cold.token_ids)
    [warm] = engine.generate([prompt], GREEDY, digests[adapter])
    assert warm.token_ids == cold.token_ids
    assert (cold.cached_tokens, warm.cached_tokens) == (0, len(prompt) - 1)
    assert base_output != cold.token_ids, "an adapter that changes nothing proves nothing"


def test_one_mixed_batch_of_all_adapters_and_base_rows_equals_peft_cold_and_warm(engine, oracle, digests, prompts):
    rows = [None, *ADAPTERS, None, *ADAPTERS]
    asked = [prompts[-1], *prompts[: len(rows) - 1]]
    adapters = [digests[name] if name else None for name in rows]
    forget_cached_blocks(engine, digests)
    cold = engine.generate(asked, GREEDY, adapters)
    for name, prompt, completion in zip(rows, asked, cold, strict=True):
        assert completion.cached_tokens == 0
        assert_greedy(oracle, name, prompt, completion.token_ids)
    warm = engine.generate(asked, GREEDY, adapters)
    assert [completion.token_ids for completion in warm] == [completion.token_ids for completion in cold]
    assert sum(completion.cached_tokens for completion in warm) > 0
