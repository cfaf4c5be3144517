"""The runner for each configuration; a refusal names the option."""

import json

import pytest
import torch
import triton

from kernels import interpreter
from kernels.cpu.compiled.build import CannotBuild
from runtime.config import EngineConfig
from runtime.cpu.compiled_runner import CompiledRunner
from runtime.cpu.torch_runner import TorchRunner
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


@pytest.mark.parametrize("kernels", ["auto", "compiled", "torch", "triton"])
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
@pytest.mark.parametrize("kernels", ["compiled", "torch"])
def test_kernels_for_a_cpu_are_refused_on_a_cuda_device(config, with_cuda, device, kernels):
    with pytest.raises(ValueError, match=rf"kernels \(--kernels\) {kernels} .* set device \(--device\) to cpu"):
        make_runner(config(device=device, kernels=kernels))


@pytest.mark.parametrize("device", ["auto", "cpu"])
@pytest.mark.parametrize(
    ("kernels", "expected"), [("auto", CompiledRunner), ("compiled", CompiledRunner), ("torch", TorchRunner)]
)
def test_a_cpu_gets_the_compiled_kernels_unless_others_are_asked_for(config, without_cuda, device, kernels, expected):
    assert type(make_runner(config(device=device, kernels=kernels))) is expected


def test_asked_for_the_cpu_a_machine_with_a_gpu_uses_it(config, with_cuda):
    for kernels in ("auto", "torch"):
        assert make_runner(config(device="cpu", kernels=kernels)).device.type == "cpu"


def test_torch_keeps_its_threads_in_a_program_that_starts_an_engine(config, without_cuda):
    before = torch.get_num_threads()
    make_runner(config(threads=3))
    assert torch.get_num_threads() == before


@pytest.fixture
def without_compiler(monkeypatch):
    def load():
        raise CannotBuild("there is no C++ compiler")

    monkeypatch.setattr("runtime.cpu.choice.load", load)


def test_without_a_compiler_pytorch_computes_and_the_log_says_so(config, without_cuda, without_compiler, caplog):
    assert type(make_runner(config())) is TorchRunner
    assert "slower ones of PyTorch run: there is no C++ compiler" in caplog.text


def test_what_only_the_compiled_kernels_do_is_refused_without_them(config, without_cuda, without_compiler):
    with pytest.raises(ValueError, match=r"kernels \(--kernels\) compiled cannot be built: there is no C\+\+ compiler"):
        make_runner(config(kernels="compiled"))
    with pytest.raises(ValueError, match=r"quantization \(--quantization\) int8 needs kernels .* compiled, not torch"):
        make_runner(config(quantization="int8"))


def test_blocks_that_are_no_whole_tiles_are_for_pytorch(config, without_cuda, caplog):
    assert type(make_runner(config(block_size=8))) is TorchRunner
    assert "block_size 8 is no multiple of 16" in caplog.text
    with pytest.raises(ValueError, match=r"block_size must be a multiple of 16 for kernels .* compiled, not 8"):
        make_runner(config(block_size=8, kernels="compiled"))
    assert make_runner(config(block_size=32)).block_size == 32


def test_interpreted_triton_kernels_run_on_a_cpu_with_adapters_in_the_models_dtype(config, without_cuda, monkeypatch):
    monkeypatch.setattr(triton.knobs.runtime, "interpret", True)
    runner = make_runner(config(kernels="triton", dtype="bfloat16"))
    assert type(runner) is TritonRunner
    assert (runner.device.type, runner.adapter_dtype) == ("cpu", torch.bfloat16)
    assert runner.graphs is None
