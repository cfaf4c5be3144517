"""Compiles candidates ahead, in processes that need no GPU: what they compile lands in Triton's cache on disk.

A compilation takes seconds, and a measurement a tenth of one. What cannot be compiled here is compiled, or refused,
when it is measured.
"""

import multiprocessing
import time
from collections.abc import Callable, Sequence
from concurrent.futures import CancelledError, Future, ProcessPoolExecutor
from concurrent.futures import TimeoutError as TooLate
from concurrent.futures.process import BrokenProcessPool
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase
from triton.runtime.driver import driver

from kernels.tune.choosing import FAULTS, Case
from kernels.tune.rows import ModelShape

MakeCases = Callable[[ModelShape], Sequence[Case]]  # to be sent to another process


class Unfilled(ModelShape):
    """A model's shape whose tensors are on the CPU and hold nothing: no kernel runs on them."""

    def random(self, seed: int, *shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=self.dtype)


class CompilerOnly(DriverBase):  # type: ignore[misc]
    """Triton's driver where kernels are compiled for a GPU as they are launched, and nothing runs."""

    def __init__(self, target: GPUTarget) -> None:
        self.utils, self._target = self, target
        self.launcher_cls = _no_launcher

    def load_binary(self, name: str, binary: bytes, shared: int, device: int) -> tuple[object, object, int, int, int]:
        return object(), object(), 0, 0, 1024

    def unload_module(self, module: object) -> None:
        pass

    def get_device_properties(self, device: int) -> dict[str, int]:
        """Large ones: whether a kernel fits is found out where it runs."""
        return {"max_shared_mem": 1 << 20, "max_num_regs": 65536, "multiprocessor_count": 132, "warpSize": 32}

    @classmethod
    def is_active(cls) -> bool:
        return True

    def get_current_target(self) -> GPUTarget:
        return self._target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def map_python_to_cpp_type(self, ty: str) -> str:
        raise NotImplementedError

    def get_benchmarker(self) -> Any:
        raise NotImplementedError


def _no_launcher(source: object, metadata: object) -> Any:
    return lambda *arguments: None


class Ahead:
    """Compiles the candidates of all cases, in order, and says of each whether that is done."""

    def __init__(self, make_cases: MakeCases, model: ModelShape, cases: int, target: GPUTarget, workers: int) -> None:
        shape = Unfilled(*model)._replace(device="cpu")
        self._pool = ProcessPoolExecutor(
            workers, multiprocessing.get_context("spawn"), _begin, (make_cases, shape, target)
        )
        candidates = [len(case.candidates) for case in make_cases(shape)]
        assert len(candidates) == cases
        self._compiled = [
            [self._pool.submit(_compile, case, candidate) for candidate in range(count)]
            for case, count in enumerate(candidates)
        ]

    def ready(self, case: int, candidate: int, until: float) -> bool:
        """Whether a candidate's compilation has ended, after waiting for it until `until`, by time.monotonic()."""
        future: Future[str] = self._compiled[case][candidate]
        try:
            future.result(max(until - time.monotonic(), 0.0))
        except (TooLate, CancelledError):
            return False
        except BrokenProcessPool:
            pass  # the compiler ended its process: the measurement will compile, or say why not
        return True

    def drop(self, case: int) -> None:
        """Compile nothing more of a case."""
        for future in self._compiled[case]:
            future.cancel()

    def close(self) -> None:
        """Stop without waiting for compilations under way."""
        processes = list((self._pool._processes or {}).values())
        self._pool.shutdown(wait=False, cancel_futures=True)
        for process in processes:
            process.terminate()


_cases: Sequence[Case] = ()  # of this process, one of the pool's


def _begin(make_cases: MakeCases, shape: ModelShape, target: GPUTarget) -> None:
    global _cases
    assert not triton.knobs.runtime.interpret, "kernels are interpreted in this process"
    torch.set_num_threads(1)
    driver.set_active(CompilerOnly(target))
    _cases = make_cases(shape)


def _compile(case: int, candidate: int) -> str:
    """Launch one candidate for nothing; returns what went wrong, or nothing."""
    chosen = _cases[case]
    try:
        for prepare in (chosen.prepare, *chosen.others):
            chosen.launch(*prepare(0), config=chosen.candidates[candidate])
    except FAULTS as error:
        return f"{type(error).__name__}: {error}"
    return ""
