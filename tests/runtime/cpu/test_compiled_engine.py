"""The engine on the compiled kernels: a request's tokens depend on nothing but the request."""

from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from kernels.cpu.compiled.panels import quantize
from kernels.cpu.compiled.program import Pool
from runtime.config import EngineConfig
from runtime.engine import Engine
from runtime.messages import SamplingParams
from tests.kernels.cpu.compiled.steps import exact_weight
from tests.runtime.models.families import write_checkpoint
from tests.runtime.tiny_engine import ADAPTER_CONFIG, adapter_tensors, engines, prompt

SAMPLED = SamplingParams(max_tokens=24, temperature=1.0, seed=7, ignore_eos=True, logprobs=3)


@pytest.fixture
def start(tmp_path):
    with engines(tmp_path) as start:
        yield lambda **options: start(**{"kernels": "compiled", "threads": 2} | options)


def drawn(engine, prompts, adapters=None):
    """Tokens and log-probabilities."""
    return [(one.token_ids, one.logprobs) for one in engine.generate(prompts, SAMPLED, adapters)]


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_a_seed_repeats_in_any_batch_to_the_last_bit(start, dtype):
    """Beside other requests and adapters, in chunks of other sizes, from cached K/V, on another number of threads."""
    engine = start(dtype=dtype, max_batch_tokens=64, prefix_cache=False)
    digests = [None, *(engine.add_adapter(adapter_tensors(seed), ADAPTER_CONFIG) for seed in range(3))]
    prompts = [prompt(length, length) for length in (5, 17, 40, 70)]
    wanted = [drawn(engine, [tokens], digest)[0] for tokens, digest in zip(prompts, digests, strict=True)]
    for count in (1, 2, 3):
        assert drawn(engine, prompts * count, digests * count) == wanted * count
    narrow = start(dtype=dtype, max_running=8, max_batch_tokens=16)  # cuts prompts into other pieces
    for seed in range(3):
        narrow.add_adapter(adapter_tensors(seed), ADAPTER_CONFIG)
    for _ in range(2):  # the second time from the prefix cache
        assert drawn(narrow, prompts, digests) == wanted


def test_preempted_requests_go_on_with_the_same_bits(start):
    roomy = start(dtype="bfloat16", prefix_cache=False)
    prompts = [prompt(30, seed) for seed in range(6)]
    wanted = [drawn(roomy, [tokens])[0] for tokens in prompts]
    tight = start(dtype="bfloat16", blocks=6, max_model_len=60)
    assert drawn(tight, prompts) == wanted
    assert tight.scheduler.preemptions > 0


def test_int8_gives_the_tokens_of_the_dequantised_weights(tmp_path):
    write_checkpoint("llama", tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    exact = {
        name: exact_weight(quantize(tensor)) if tensor.ndim == 2 else tensor.float() for name, tensor in tensors.items()
    }
    twin = tmp_path / "twin"
    twin.mkdir()
    (twin / "config.json").write_text((tmp_path / "config.json").read_text())
    save_file(exact, twin / "model.safetensors")
    options = {"kv_cache_bytes": 1 << 20, "adapter_bytes": 1 << 20, "host_adapter_bytes": 1 << 20}
    options |= {"max_model_len": 64, "dtype": "float32", "kernels": "compiled", "threads": 1}
    found = []
    for directory, quantization in ((tmp_path, "int8"), (twin, None)):
        engine = Engine(EngineConfig(model=str(directory), quantization=quantization, **options))
        found.append(engine.generate([[token % 131 for token in prompt(30, 4)]], SAMPLED)[0])
        engine.close()
    quantised, dequantised = found
    # Each projection rounds its rows to 16 bits, 2⁻¹⁶ of the largest of 128; tests of the kernels hold it exactly
    assert quantised.token_ids == dequantised.token_ids
    for one, other in zip(quantised.logprobs, dequantised.logprobs, strict=True):
        assert one.top_logprobs == pytest.approx(other.top_logprobs, abs=1e-3)


def test_a_closed_pool_has_ended_its_threads():
    def threads():
        return {task.name for task in Path("/proc/self/task").iterdir()}

    before = threads()
    pool = Pool(4)
    started = threads() - before
    assert len(started) >= 3, "a pool of four threads starts three; other tests' threads may begin and end meanwhile"
    pool.close()
    assert not started & threads()
