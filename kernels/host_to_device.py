"""Host memory that a device copies from and to without waiting: page-locked."""

import mmap
import weakref

import numpy as np
import torch
from torch import Tensor


def host_buffer(count: int, dtype: torch.dtype, device: torch.device | str) -> Tensor:
    """A host tensor of `count` numbers, to be filled and uploaded to a device; page-locked unless that is a CPU."""
    return torch.empty(count, dtype=dtype, pin_memory=torch.device(device).type != "cpu")


def page_locked(count: int, dtype: torch.dtype) -> Tensor:
    """A host tensor of `count` numbers, page-locked, that takes exactly its pages. For large memory that stays.

    torch's own allocator of page-locked memory rounds every size up to a power of two, 5 GiB to 8. Raises
    MemoryError, whose text has the size and the reason.
    """
    size = count * dtype.itemsize
    if not size:
        return torch.empty(0, dtype=dtype)
    memory = np.frombuffer(mmap.mmap(-1, size), np.uint8)
    address = memory.ctypes.data
    status = torch.cuda.cudart().cudaHostRegister(address, size, 0)
    if int(status) != 0:
        raise MemoryError(f"{size} bytes of host memory cannot be page-locked: CUDA's error {int(status)}")
    # Runs before the array lets go of its pages. At the program's end the pages go with it.
    weakref.finalize(memory, torch.cuda.cudart().cudaHostUnregister, address).atexit = False
    return torch.from_numpy(memory).view(dtype)


def upload(buffer: Tensor, device: torch.device | str) -> Tensor:
    """The buffer's numbers on a device, in stream order with its kernels; on a CPU, the buffer itself.

    The host does not wait. It must not write to the buffer again, but may free it at once: a `non_blocking` copy
    records its stream in torch's allocator of page-locked memory (`CachingHostAllocator::record_event`), and that
    allocator reuses a freed block only after an event on each recorded stream has completed.
    """
    return buffer.to(device, non_blocking=True)
