"""Launches: their sizes, from plain integers, and a short way to kernels that were launched before.

Triton's own sizes take 6 µs a call on the host, these less than 0.1. A launch of its own takes two to three times
as long as one here: it makes strings of options, asks the environment, and compares the constants that a kernel names.
"""

from types import NoneType
from typing import Any

import triton
from torch import Tensor
from triton.compiler import CompiledKernel
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

_compiled: dict[tuple[Any, ...], CompiledKernel] = {}  # what was launched, by `_facts`


def ceil_div(count: int, size: int) -> int:
    """How many blocks of `size` hold `count`."""
    return -(-count // size)


def power_of_2(count: int) -> int:
    """The least power of 2 that is not less than `count`."""
    return 1 << (count - 1).bit_length()


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, **constants: Any) -> None:
    """As `kernel[grid](*args, **constants)`, and of the same compiled kernel.

    `constants` are all the kernel's constants, in its order, and then options of the launch. What was not launched
    before goes Triton's way, and so do interpreted kernels, GPUs that are not NVIDIA's, and every launch while a tool
    watches them. Triton's settings, such as its debug mode, count when a kernel is launched for the first time.
    """
    if not isinstance(kernel, JITFunction) or _watched(kernel):
        kernel[grid](*args, **constants)
        return
    active = driver.active
    device = active.get_current_device()
    facts = _facts(kernel, device, args, constants)
    compiled = _compiled.get(facts) if facts else None
    if compiled is None:
        assert _in_order(kernel, args, constants), f"constants are to be named as {kernel} has them, and nothing else"
        compiled = kernel[grid](*args, **constants)
        if facts and _is_complete(compiled):
            _compiled[facts] = compiled
        return
    x, y, z = (*grid, 1, 1)[:3]
    values = (*args, *constants.values())[: len(kernel.params)]
    stream, no_hooks = active.get_current_stream(device), (None, None, None)
    compiled.run(x, y, z, stream, compiled.function, compiled.packed_metadata, *no_hooks, *values)


def _watched(kernel: JITFunction) -> bool:
    """Whether a tool, such as a profiler, is told of a kernel's launches. A hook is a function, or a chain of some."""
    runtime = triton.knobs.runtime
    enter, leave = runtime.launch_enter_hook, runtime.launch_exit_hook
    return bool(kernel.pre_run_hooks or getattr(enter, "calls", enter) or getattr(leave, "calls", leave))


def _facts(
    kernel: JITFunction, device: int, args: tuple[Any, ...], constants: dict[str, Any]
) -> tuple[Any, ...] | None:
    """All that Triton may choose a compiled kernel by, and a little more; None where that is not known.

    Of a pointer that is its dtype and its place between multiples of 16, of an integer its value, and of a float, or an
    integer of 32 bits that the kernel is not specialised for, its type.
    """
    facts = [kernel.fn, device]
    for value, parameter in zip(args, kernel.params, strict=False):
        kind = type(value)
        if kind is Tensor:
            facts += value.dtype, value.data_ptr() % 16
        elif kind is int and not parameter.do_not_specialize:
            facts.append(value)
        elif kind is float or kind is NoneType or (kind is int and -(2**31) <= value < 2**31):
            facts.append(kind)
        else:
            return None
    return *facts, *constants, *constants.values()


def _in_order(kernel: JITFunction, args: tuple[Any, ...], constants: dict[str, Any]) -> bool:
    """Whether all arguments are there, by place, and all constants, by name, in the kernel's order."""
    names = kernel.arg_names[len(args) :]
    constexprs = list(range(len(args), len(kernel.params)))
    return bool(kernel.constexprs == constexprs and list(constants)[: len(names)] == names)


def _is_complete(compiled: Any) -> bool:
    """Whether this is a compiled kernel, not one under way or refused by a hook, and chosen by `_facts` alone."""
    return isinstance(compiled, CompiledKernel) and bool(compiled.metadata.target.backend == "cuda")
