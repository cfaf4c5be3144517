"""Adapters from memory that are prepared in the background: the same as those that are added at once."""

import json
import threading

import pytest
import torch

from runtime import library
from runtime.adapter_format.canonical import canonical_from_tensors
from runtime.adapter_format.errors import InvalidAdapter
from runtime.adapters.layout import layout_adapter
from runtime.adapters.pool import AdapterPool
from runtime.library import array_of
from runtime.messages import Generate, SamplingParams
from runtime.models.config import ModelConfig
from tests.runtime.tiny_engine import ADAPTER_CONFIG, GREEDY, adapter_tensors, engines, prompt
from tests.runtime.tiny_model import TINY


@pytest.fixture
def engine(tmp_path):
    with engines(tmp_path) as start:
        yield start(kernels="torch")


def test_it_has_the_digest_and_gives_the_tokens_of_one_that_is_added_at_once(engine):
    tensors = adapter_tensors(seed=3, scale=0.5)
    prepared = engine.prepare_adapter(tensors, ADAPTER_CONFIG).result(timeout=60)
    assert prepared.digest not in engine.adapters.digests, "nothing is known before it is added"
    digest = engine.add_prepared(prepared)
    assert digest == prepared.digest
    first = engine.generate([prompt(12)], GREEDY, digest)[0]
    assert engine.add_adapter(tensors, ADAPTER_CONFIG) == digest
    assert first.token_ids == engine.generate([prompt(12)], GREEDY, digest)[0].token_ids
    assert first.token_ids != engine.generate([prompt(12)], GREEDY)[0].token_ids


def test_what_is_wrong_with_it_is_told_with_the_result_and_changes_nothing(engine):
    tensors = adapter_tensors()
    name = min(tensors)
    tensors[name] = torch.full_like(tensors[name], torch.nan)
    preparing = engine.prepare_adapter(tensors, ADAPTER_CONFIG)
    with pytest.raises(InvalidAdapter, match="NaN or infinite"):
        preparing.result(timeout=60)
    assert engine.adapters.digests == []


def test_the_engine_s_thread_computes_steps_while_it_is_prepared(engine, monkeypatch):
    """A copy of a tensor that takes for ever holds up no step."""
    threads, go_on = set(), threading.Event()

    def copied(tensor):
        threads.add(threading.get_ident())
        assert go_on.wait(60)
        return array_of(tensor)

    monkeypatch.setattr(library, "array_of", copied)
    preparing = engine.prepare_adapter(adapter_tensors(), ADAPTER_CONFIG)
    params = SamplingParams(max_tokens=8, temperature=0.0, ignore_eos=True)
    engine.add_request(Generate(request_id="beside", token_ids=prompt(5), params=params))
    while engine.busy:
        engine.step()
    assert not preparing.done()
    go_on.set()
    assert engine.add_prepared(preparing.result(timeout=60))
    assert threads.isdisjoint({threading.get_ident()})


class OnDevice:
    """A tensor of a CUDA device, whose copy to the host is noted."""

    is_cuda, device = True, "cuda:0"

    def __init__(self, tensor, calls):
        self._tensor, self._calls = tensor, calls

    def detach(self):
        return self

    def clone(self):
        self._calls.append("clone")
        return self

    def cpu(self):
        self._calls.append("copy")
        return self._tensor


def test_tensors_on_a_device_are_read_after_what_their_thread_has_launched_on_a_stream_of_their_own(
    engine, monkeypatch
):
    calls = []

    class Event:
        device = "cuda:0"

        def record(self, stream):
            calls.append(f"record on {stream}")

    class Stream:
        def __init__(self, device):
            assert device == "cuda:0"

        def wait_event(self, event):
            calls.append("wait")

    class Entered:
        def __init__(self, stream):
            assert isinstance(stream, Stream)

        def __enter__(self):
            calls.append("stream")

        def __exit__(self, *_):
            calls.append("leave")

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "stream", Entered)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: f"the caller's of {device}")
    tensors = adapter_tensors(seed=4)
    on_device = {name: OnDevice(tensor, calls) for name, tensor in tensors.items()}
    prepared = engine.prepare_adapter(on_device, ADAPTER_CONFIG).result(timeout=60)
    each = len(tensors)
    assert calls == ["record on the caller's of cuda:0", "stream", "wait", *["clone"] * each, *["copy"] * each, "leave"]
    assert prepared.digest == engine.add_adapter(tensors, ADAPTER_CONFIG)


EMBEDDING = {"target_modules": ["q_proj", "v_proj", "down_proj", "embed_tokens"]}


@pytest.fixture
def model(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(TINY))
    return ModelConfig.from_directory(tmp_path)


def wide_adapter(model, dtype, config):
    """An adapter of linears and the embedding in a dtype, its file and its tensors by their names there."""
    tensors = adapter_tensors(seed=5, modules=("self_attn.q_proj", "self_attn.v_proj", "mlp.down_proj"))
    generator = torch.Generator().manual_seed(6)
    prefix = "base_model.model.model.embed_tokens"
    tensors[f"{prefix}.lora_embedding_A"] = torch.randn(4, 300, generator=generator)
    tensors[f"{prefix}.lora_embedding_B"] = torch.randn(32, 4, generator=generator)
    tensors = {name: tensor.to(dtype) for name, tensor in tensors.items()}
    arrays = {name: array_of(tensor) for name, tensor in tensors.items()}
    digest, file = canonical_from_tensors(arrays, ADAPTER_CONFIG | EMBEDDING | config, model, max_rank=8)
    return digest, file, {name: tensors[own] for name, own in file.names.items()}


@pytest.mark.parametrize("extent", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("alpha", [4, 7])
def test_what_is_packed_on_the_device_has_the_bits_of_what_is_packed_on_the_host(model, extent, dtype, alpha):
    _, file, tensors = wide_adapter(model, dtype, {"lora_alpha": alpha})
    layout = layout_adapter(model, file.config, file.header)
    assert layout.can_pack_on_device()
    packed, on_device = (torch.zeros(layout.elements, dtype=extent) for _ in range(2))
    layout.pack(file.config, file.header, file.data, packed)
    layout.pack_on_device(file.config, tensors, on_device)
    assert packed.count_nonzero() > 1000
    assert torch.equal(packed, on_device)


def test_an_adapter_with_a_bias_is_packed_on_the_host(model):
    tensors = adapter_tensors()
    tensors |= {
        name.replace("weight", "bias"): torch.ones(len(tensor))
        for name, tensor in tensors.items()
        if name.endswith("lora_B.weight")
    }
    arrays = {name: array_of(tensor) for name, tensor in tensors.items()}
    _, file = canonical_from_tensors(arrays, ADAPTER_CONFIG | {"lora_bias": True}, model, max_rank=8)
    assert not layout_adapter(model, file.config, file.header).can_pack_on_device()


def loaded(pool, digest):
    """The adapter's extent on the device, once it is there."""
    pool.load(digest, "device")
    while not pool.device.holds(digest):
        assert pool.wait(60)
        pool.poll()
        pool.check()
    return pool.device.extent(digest)[: pool.device.layout(digest).elements]


def test_tensors_on_the_device_go_there_without_host_memory_and_come_back_from_the_file(model):
    digest, file, tensors = wide_adapter(model, torch.float32, {})
    pool = AdapterPool(model, 1 << 20, 1 << 20, torch.float32, "cpu")
    try:
        pool.register(digest, pool.loader.content_of(file)._replace(on_device=tensors))
        first = loaded(pool, digest).clone()
        assert pool.host.adapters == [], "nothing was packed in host memory"
        pool.unload("", digest, "device")
        pool.poll()
        for tensor in tensors.values():
            tensor.zero_()  # they have served
        assert torch.equal(loaded(pool, digest), first)
        assert pool.host.adapters == [digest]
    finally:
        pool.close()
