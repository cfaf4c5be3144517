"""A GPU as far as Triton's compiler is concerned: kernels are compiled as they are launched, and nothing runs.

The interpreter accepts code that the compiler refuses, and has no registers. Tensors are on the CPU. Use it in a
process of its own, in which kernels are not interpreted.
"""

import itertools
import re
import struct
import subprocess
from collections.abc import Sequence
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
INSTRUCTION_BYTES = 16


class Compiled(NamedTuple):
    """A kernel as it would run: bytes of shared memory a program, and the machine's code."""

    name: str
    shared_bytes: int
    binary: bytes

    @property
    def spilled_bytes(self) -> int:
        """Bytes of a thread that do not fit into its registers."""
        usage = _run(triton.knobs.nvidia.cuobjdump.path, ["--dump-resource-usage"], self.binary)
        return int(usage.partition("STACK:")[2].split()[0])


class PretendGpu(CompilerOnly):
    """Triton's driver for it; `compiled` are the kernels that were launched for the first time, in order.

    Each one installed is another device of the process, which has no kernels yet.
    """

    _numbers = itertools.count()

    def __init__(self, capability: int = H100) -> None:
        super().__init__(GPUTarget("cuda", capability, 32))
        self.number = next(self._numbers)
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

    def get_current_device(self) -> int:
        return self.number

    def get_device_properties(self, device: int) -> dict[str, int]:
        capability = self.get_current_target().arch
        return super().get_device_properties(device) | {"max_shared_mem": SHARED_BYTES[capability]}


def instructions(kernels: Sequence[Compiled], capability: int = H100) -> list[list[str]]:
    """The names of each kernel's machine instructions, such as `LDG.E.128`.

    LDG reads global memory, LDGSTS copies it to shared memory, HMMA and HGMMA are products on tensor cores. All code is
    disassembled at once: most of the disassembler's time is its start.
    """
    codes = [_code(kernel.binary) for kernel in kernels]
    listing = _run(triton.knobs.nvidia.nvdisasm.path, ["--binary", f"SM{capability}"], b"".join(codes))
    found = re.findall(r"^\s+/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+ +)?([A-Z][A-Z0-9_.x]*)", listing, re.M)
    counts = [len(code) // INSTRUCTION_BYTES for code in codes]
    assert len(found) == sum(counts)
    names = iter(found)
    return [list(itertools.islice(names, count)) for count in counts]


def _code(binary: bytes) -> bytes:
    """The section of an ELF file that holds its kernel's code."""
    (table,) = struct.unpack_from("<Q", binary, 0x28)
    size, sections, of_names = struct.unpack_from("<HHH", binary, 0x3A)
    heads = [struct.unpack_from("<IIQQQQ", binary, table + size * index) for index in range(sections)]
    names = heads[of_names][4]
    (code,) = (
        binary[offset : offset + length]
        for name, _, _, _, offset, length in heads
        if binary.startswith(b".text.", names + name)
    )
    return code


def _run(program: str, options: Sequence[str], content: bytes) -> str:
    """What a program prints of a file."""
    with TemporaryDirectory() as scratch:
        file = Path(scratch, "code")
        file.write_bytes(content)
        return subprocess.run([program, *options, str(file)], capture_output=True, text=True, check=True).stdout
