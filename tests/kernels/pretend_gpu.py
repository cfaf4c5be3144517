"""A GPU as far as Triton's compiler is concerned: kernels are compiled as they are launched, and nothing runs.

The interpreter accepts code that the compiler refuses, and has no registers. Tensors are on the CPU. Use it in a
process of its own, in which kernels are not interpreted.
"""

import re
import subprocess
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver

from kernels.tune.compiling import CompilerOnly

H100 = 90
# Bytes of shared memory of a program, at most, by compute capability: an A100, an L4 or RTX 4090, an H100
SHARED_BYTES = {80: 163 * 1024, 89: 99 * 1024, H100: 227 * 1024}


class Compiled(NamedTuple):
    """A kernel as it would run: bytes of shared memory a program, and the machine's code."""

    name: str
    shared_bytes: int
    binary: bytes

    @property
    def spilled_bytes(self) -> int:
        """Bytes of a thread that do not fit into its registers."""
        return int(_cuobjdump("--dump-resource-usage", self.binary).partition("STACK:")[2].split()[0])

    def count(self, *instructions: str, width: str = "") -> int:
        """How many instructions of these names there are in the code, of a width such as `.128` bits if one is given.

        LDG reads global memory, LDGSTS copies it to shared memory, HMMA and HGMMA are products on tensor cores.
        """
        code = re.findall(r"\s([A-Z][A-Z0-9_.x]*[A-Z0-9])(?= .*;)", _cuobjdump("-sass", self.binary))
        return sum(each.split(".")[0] in instructions and width in each for each in code)


class PretendGpu(CompilerOnly):
    """Triton's driver for it; `compiled` are the kernels that were launched for the first time, in order."""

    def __init__(self, capability: int = H100) -> None:
        super().__init__(GPUTarget("cuda", capability, 32))
        self.compiled: list[Compiled] = []

    @classmethod
    def install(cls, capability: int = H100) -> "PretendGpu":
        assert not triton.knobs.runtime.interpret, "kernels are interpreted in this process"
        gpu = cls(capability)
        driver.set_active(gpu)
        return gpu

    def load_binary(self, name: str, binary: bytes, shared: int, device: int) -> tuple[object, object, int, int, int]:
        self.compiled.append(Compiled(name, shared, binary))
        return super().load_binary(name, binary, shared, device)

    def get_device_properties(self, device: int) -> dict[str, int]:
        capability = self.get_current_target().arch
        return super().get_device_properties(device) | {"max_shared_mem": SHARED_BYTES[capability]}


@cache  # a kernel's code is asked for several times
def _cuobjdump(what: str, binary: bytes) -> str:
    with TemporaryDirectory() as scratch:
        file = Path(scratch, "kernel.cubin")
        file.write_bytes(binary)
        command = [triton.knobs.nvidia.cuobjdump.path, what, str(file)]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout
