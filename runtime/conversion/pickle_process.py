"""A process that turns a pickle of PyTorch into safetensors: python -m runtime.conversion.pickle_process IN OUT

Unpickling may run any program, so it is done with `weights_only`, in which PyTorch takes tensors and plain containers
only, and in a process of its own with bounded memory and time, in case that has a hole or a tensor claims too much.
"""

import resource
import sys
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file

from runtime.adapter_format.safetensors_header import GATHER

MEMORY_BYTES = 8 << 30  # PyTorch alone maps some of it
SECONDS = 300  # of processor time


def tensors_in(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a pickled state dict. Raises ValueError, and whatever a broken pickle makes of it."""
    found = torch.load(path, map_location="cpu", weights_only=True)
    if not isinstance(found, Mapping) or not all(isinstance(each, torch.Tensor) for each in found.values()):
        raise ValueError("has other things than tensors; give the file that PEFT's save_pretrained wrote")
    if not any(tensor.numel() for tensor in found.values()):
        raise ValueError(f"has no values; {GATHER}")
    # each in memory of its own: safetensors knows no views
    return {str(name): tensor.detach().contiguous().clone() for name, tensor in found.items()}


def main(source: Path, target: Path) -> None:
    most = MEMORY_BYTES + 4 * source.stat().st_size
    resource.setrlimit(resource.RLIMIT_AS, (most, most))
    resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    try:
        tensors = tensors_in(source)
    except ValueError as error:
        print(error)
        sys.exit(1)
    save_file(tensors, target)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
