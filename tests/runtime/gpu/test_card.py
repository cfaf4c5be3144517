"""Sizes from a GPU's memory: the arithmetic, an engine that is sized so, and what is refused with its figures."""

import json
import logging

import pytest
import torch

from runtime.config import CPU_SIZES, MIB, EngineConfig, Sizes
from runtime.engine import Engine
from runtime.gpu import card as cards
from runtime.gpu.card import Needs, sizes_of
from runtime.gpu.triton_runner import TritonRunner
from tests.runtime.gpu.pretend_card import PretendCard
from tests.runtime.tiny_engine import ADAPTER_CONFIG, BLOCK_BYTES, GREEDY, adapter_tensors, prompt
from tests.runtime.tiny_model import TINY

GIB = 1024 * MIB
TOKEN_BYTES = 147456  # of Qwen3-8B
NEEDS = Needs(weights=16 * GIB, step=2 * GIB, graphs=1 * GIB)
H100 = {"total": 80 * GIB, "free": 79 * GIB, "weights": 0, "peaks": []}


@pytest.fixture
def h100(monkeypatch):
    return PretendCard(**H100).install(monkeypatch)


def sized(card, needs=NEEDS, least=41_000, **options):
    return sizes_of(EngineConfig(model="", **options), card, needs, TOKEN_BYTES, least)


def test_what_weights_and_the_largest_step_leave_goes_to_kv_and_an_eighth_to_adapters(h100):
    left = int(0.9 * 80 * GIB) - 19 * GIB
    assert sized(h100) == Sizes(left - left // 8, left // 8, 256, 2048)
    smaller = int(0.5 * 80 * GIB) - 19 * GIB
    assert sized(h100, gpu_memory_utilization=0.5).kv_cache_bytes == smaller - smaller // 8


def test_what_is_set_wins_and_the_rest_follows_from_it(h100):
    left = int(0.9 * 80 * GIB) - 19 * GIB
    assert sized(h100, adapter_bytes=3 * GIB)[:2] == (left - 3 * GIB, 3 * GIB)
    assert sized(h100, kv_cache_bytes=8 * GIB)[:2] == (8 * GIB, left // 8)
    assert sized(h100, kv_cache_bytes=50 * GIB)[:2] == (50 * GIB, left - 50 * GIB)
    assert sized(h100, max_running=500)[2:] == (500, 2048)
    assert sized(h100, max_running=4000)[2:] == (4000, 4000)
    assert sized(h100, max_batch_tokens=100)[2:] == (100, 100)


def test_a_request_at_a_time_for_each_1024_tokens_of_kv(h100):
    kv = 100 * 1024 * TOKEN_BYTES
    assert sized(h100, kv_cache_bytes=kv).max_running == 96, "a multiple of 16"
    assert sized(h100, kv_cache_bytes=kv // 50, least=1024).max_running == 16, "the least"


def test_memory_that_others_hold_is_refused_with_the_figures(monkeypatch):
    card = PretendCard(**H100 | {"free": 40 * GIB}).install(monkeypatch)
    with pytest.raises(ValueError, match=r"0.9 of the GPU's 80 GiB is 72 GiB, and 40 GiB are free: end what else"):
        sized(card)
    assert sized(card, gpu_memory_utilization=0.5)


@pytest.mark.parametrize("options", [{}, {"adapter_bytes": 60 * GIB}, {"kv_cache_bytes": 60 * GIB}])
def test_too_little_memory_is_refused_with_the_figures_and_the_options(h100, options):
    needs = NEEDS if options else Needs(70 * GIB, 1 * GIB, 0)
    with pytest.raises(ValueError, match=r"of the 72 GiB that gpu_memory_utilization .* 0.9 allows, the weights take"):
        sized(h100, needs, **options)
    with pytest.raises(ValueError, match=r"the largest step . GiB.*raise it, or lower .*--max-batch-tokens"):
        sized(h100, needs, **options)


def test_without_a_gpu_the_defaults_are_those_of_a_cpu():
    assert EngineConfig(model="").sizes(CPU_SIZES) == Sizes(512 * MIB, 1024 * MIB, 64, 256)
    assert EngineConfig(model="", max_running=600).sizes(CPU_SIZES)[2:] == (600, 600)
    assert EngineConfig(model="", max_batch_tokens=32).sizes(CPU_SIZES)[2:] == (32, 32)


@pytest.fixture
def start(tmp_path, monkeypatch):
    """Starts engines on a card of 64 MiB, in Triton's interpreter."""
    (tmp_path / "config.json").write_text(json.dumps(TINY))
    monkeypatch.setattr(cards, "GRAPH_BYTES", MIB)
    started = []

    def start(card=None, **options):
        seen = None if card is None else card.install(monkeypatch)
        monkeypatch.setattr(
            "runtime.engine.make_runner", lambda config: TritonRunner(config, torch.device("cpu"), card=seen)
        )
        options = {"load_format": "dummy", "host_adapter_bytes": MIB, "max_lora_rank": 8} | options
        started.append(Engine(EngineConfig(model=str(tmp_path), **options)))
        return started[-1]

    yield start
    for engine in started:
        engine.check()
        engine.close()


def small_card(**changes):
    sizes = {"total": 64 * MIB, "free": 63 * MIB, "weights": 3 * MIB, "peaks": [2 * MIB, MIB]}
    return PretendCard(**sizes | changes)


def outputs(engine):
    digest = engine.add_adapter(adapter_tensors(scale=0.5), ADAPTER_CONFIG)
    prompts = [prompt(20, 1), prompt(3, 2), prompt(40, 3)]
    return [one.token_ids for one in engine.generate(prompts, GREEDY, [None, digest, digest])]


def test_an_engine_is_sized_once_its_weights_are_there_and_the_largest_step_has_run(start, caplog):
    caplog.set_level(logging.INFO)
    card = small_card()
    engine = start(card, max_batch_tokens=48)
    left = int(0.9 * 64 * MIB) - (3 + 2) * MIB  # no graphs in the interpreter
    assert engine.ready.num_blocks == (left - left // 8) // BLOCK_BYTES
    assert engine.ready.adapter_bytes == left // 8 // 256 * 256
    assert (engine.ready.max_running, engine.ready.max_batch_tokens) == (48, 48)
    assert card.calls.index("max_memory_reserved") < card.calls.index("mem_get_info", 1), "the step comes first"
    [line] = [record.getMessage() for record in caplog.records if "tokens a step" in record.getMessage()]
    for figure in ("0.9 of 0.0625 GiB is 0.0562 GiB", "weights take 0.00293 GiB", "48 requests and 48 tokens a step"):
        assert figure in line
    explicit = start(kv_cache_bytes=4 * MIB, adapter_bytes=MIB, max_batch_tokens=48)
    assert outputs(engine) == outputs(explicit)


def test_sizes_that_are_all_set_are_not_measured(start):
    card = small_card(free=MIB)
    engine = start(card, kv_cache_bytes=4 * MIB, adapter_bytes=MIB, max_batch_tokens=48)
    assert engine.ready.num_blocks == 4 * MIB // BLOCK_BYTES
    assert engine.ready.max_running == 16
    assert "max_memory_reserved" not in card.calls


def test_a_model_length_that_does_not_fit_is_refused_before_kv_is_taken(start):
    with pytest.raises(ValueError, match=r"do not hold .* of K/V \(266 tokens\) beside any adapter"):
        start(small_card(weights=59 * MIB, peaks=[0]), max_model_len=250, max_batch_tokens=48)


def test_memory_that_runs_out_at_the_start_names_the_options(start, monkeypatch):
    def run_out(*arguments):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nMore words")

    monkeypatch.setattr("runtime.gpu.triton_runner.TritonRunner._run_largest", run_out)
    with pytest.raises(ValueError, match=r"steps of 48 tokens: lower --kv-cache-bytes.*2.00 GiB"):
        start(small_card(), max_batch_tokens=48)


def test_weights_that_do_not_fit_are_refused_as_weights(start, monkeypatch):
    def run_out(*arguments):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    monkeypatch.setattr("runtime.gpu.triton_runner.DeviceWeights.load", run_out)
    with pytest.raises(ValueError, match=r"too little memory for the model's weights: CUDA out of memory.*2.00 GiB"):
        start(small_card())


def test_an_engine_is_called_on_the_stream_that_it_was_started_under(start, monkeypatch):
    engine = start(kv_cache_bytes=4 * MIB, adapter_bytes=MIB, max_batch_tokens=48)
    engine.runner._stream = "the first"
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: "another")
    with pytest.raises(RuntimeError, match=r"under another torch.cuda.stream"):
        outputs(engine)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: "the first")
    assert outputs(engine)
    engine.runner._stream = None
