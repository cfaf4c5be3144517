"""The runner for each configuration; a refusal names the option."""

import json

import pytest
import torch
import triton

from kernels import interpreter
from runtime.config import EngineConfig
from runtime.cpu_runner import CpuRunner
from runtime.gpu.triton_runner import TritonRunner
from runtime.runner import make_runner
from tests.runtime.tiny_engine import BLOCK_BYTES
from tests.runtime.tiny_model import TINY


@pytest.fixture
def config(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(TINY))

    def config(**options):
        return EngineConfig(
            model=str(tmp_path), load_format="dummy", max_model_len=64, kv_cache_bytes=9 * BLOCK_BYTES, **options
        )

    return config


@pytest.fixture
def without_cuda(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.fixture
def with_cuda(monkeypatch):
    """For decisions that are made before the device is used."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)


@pytest.mark.parametrize("kernels", ["auto", "reference", "triton"])
def test_a_cuda_device_that_is_not_there_is_refused_by_the_options_name(config, without_cuda, kernels):
    with pytest.raises(ValueError, match=r"device \(--device\) is cuda, and torch finds no CUDA device"):
        make_runner(config(device="cuda", kernels=kernels))


@pytest.mark.parametrize("device", ["auto", "cpu"])
def test_triton_on_a_cpu_is_refused_unless_it_is_interpreted(config, without_cuda, monkeypatch, device):
    monkeypatch.setattr(triton.knobs.runtime, "interpret", False)
    with pytest.raises(ValueError, match=r"kernels \(--kernels\) triton need a CUDA device; TRITON_INTERPRET=1"):
        make_runner(config(device=device, kernels="triton"))


def test_what_triton_lacks_on_a_cuda_device_is_told_by_triton(monkeypatch):
    class Driver:
        @property
        def active(self):
            raise RuntimeError("Failed to find C compiler")

    monkeypatch.setattr(triton.knobs.runtime, "interpret", False)
    monkeypatch.setattr(interpreter, "driver", Driver())
    assert interpreter.can_run_on(torch.device("cuda", 0)), "the first launch names the missing compiler"
    assert not interpreter.can_run_on(torch.device("cpu"))


@pytest.mark.parametrize("device", ["auto", "cuda"])
def test_reference_kernels_on_a_cuda_device_are_refused(config, with_cuda, device):
    with pytest.raises(ValueError, match=r"kernels \(--kernels\) reference .* set device \(--device\) to cpu"):
        make_runner(config(device=device, kernels="reference"))


@pytest.mark.parametrize("device", ["auto", "cpu"])
@pytest.mark.parametrize("kernels", ["auto", "reference"])
def test_a_cpu_gets_the_reference_kernels(config, without_cuda, device, kernels):
    assert type(make_runner(config(device=device, kernels=kernels))) is CpuRunner


def test_asked_for_the_cpu_a_machine_with_a_gpu_uses_it(config, with_cuda):
    for kernels in ("auto", "reference"):
        runner = make_runner(config(device="cpu", kernels=kernels))
        assert type(runner) is CpuRunner
        assert runner.device.type == "cpu"


def test_interpreted_triton_kernels_run_on_a_cpu_with_adapters_in_the_models_dtype(config, without_cuda, monkeypatch):
    monkeypatch.setattr(triton.knobs.runtime, "interpret", True)
    runner = make_runner(config(kernels="triton", dtype="bfloat16"))
    assert type(runner) is TritonRunner
    assert (runner.device.type, runner.adapter_dtype) == ("cpu", torch.bfloat16)
    assert runner.graphs is None
