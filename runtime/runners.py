"""Which runner an engine's configuration asks for."""

import torch

from runtime.config import EngineConfig
from runtime.model_runner import ReferenceRunner, Runner


def make_runner(config: EngineConfig) -> Runner:
    """Load the model where it is to run. Raises ValueError naming the option that cannot be had."""
    if config.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("device (--device) is cuda, and torch finds no CUDA device here")
    on_cuda = config.device != "cpu" and torch.cuda.is_available()
    kernels = ("triton" if on_cuda else "reference") if config.kernels == "auto" else config.kernels
    if kernels == "triton":
        from runtime.gpu.triton_runner import TritonRunner  # triton need not be installed where it is not used

        return TritonRunner(
            config, torch.device("cuda", torch.cuda.current_device()) if on_cuda else torch.device("cpu")
        )
    if on_cuda:
        raise ValueError("kernels (--kernels) reference run on the CPU only: set device (--device) to cpu as well")
    return ReferenceRunner(config)
