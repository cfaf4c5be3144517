"""The ranks that compute one model together, and what they send each other in a step."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor

# Of one call: what the slowest rank may lag behind. A rank that ended closes its connections, which ends the call.
TIMEOUT = timedelta(minutes=10)


class GroupFailed(RuntimeError):
    """What all ranks have to do together failed here; the reason may be another rank's, which has ended."""


@contextmanager
def _together() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:  # of Gloo and NCCL
        raise GroupFailed(str(error)) from error


class RankGroup:
    """One rank of several processes, each of which has its part of every layer; the only one, where nothing is sent.

    All ranks make the same calls in the same order. Gloo carries them between CPUs, over this machine's loopback
    device, and NCCL between GPUs, on the stream that computes, so that CUDA graphs may have them.
    """

    def __init__(self, rank: int = 0, size: int = 1, backend: Any = None) -> None:
        self.rank, self.size = rank, size
        self.bytes_sent = 0  # what this rank has given to the calls
        self._backend = backend

    @classmethod
    def join(cls, rank: int, size: int, store: str, device: torch.device) -> "RankGroup":
        """Wait for the other ranks, which have the same file as `store`, to join as well. Raises GroupFailed."""
        if size == 1:
            return cls()
        with _together():
            return cls(rank, size, cls._meet(rank, size, store, device))

    @staticmethod
    def _meet(rank: int, size: int, store: str, device: torch.device) -> Any:
        import torch.distributed as loaded  # which takes time to import

        distributed: Any = loaded  # torch's types lack what it has from C++
        meeting = distributed.FileStore(store, size)
        if device.type == "cuda":
            options = distributed.ProcessGroupNCCL.Options()
            options._timeout = TIMEOUT
            return distributed.ProcessGroupNCCL(meeting, rank, size, options)
        options = distributed.ProcessGroupGloo._Options()
        options._devices = [distributed.ProcessGroupGloo.create_device(hostname="127.0.0.1")]
        options._timeout = TIMEOUT
        return distributed.ProcessGroupGloo(meeting, rank, size, options)

    def add_up(self, x: Tensor) -> Tensor:
        """Return the sum of all ranks' `x`, with the same bits on each rank; where `x` has no gaps, in its place."""
        if self.size > 1:
            x = x.contiguous()  # the calls take memory as it lies
            self.bytes_sent += x.nbytes
            with _together():
                self._backend.allreduce([x]).wait()
        return x

    def gather(self, x: Tensor, columns: int) -> Tensor:
        """Return the columns of all ranks, (n, columns), on rank 0, and `x` on the others.

        Each rank's first ⌈columns / size⌉ columns of `x` count; what is behind `columns` is left out.
        """
        if self.size == 1 or not len(x):
            return x
        from torch.distributed import GatherOptions

        own = x[:, : -(-columns // self.size)].contiguous()
        options = GatherOptions()
        options.rootRank = 0
        parts: Sequence[Tensor] = [torch.empty_like(own) for _ in range(self.size if self.rank == 0 else 0)]
        self.bytes_sent += own.nbytes if self.rank else 0
        with _together():
            self._backend.gather([list(parts)] if parts else [], [own], options).wait()
        return torch.cat(list(parts), 1)[:, :columns] if parts else x
