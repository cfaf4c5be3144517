"""Launches: their sizes, from plain integers, and the quick way to a kernel that Triton has compiled.

Triton's own sizes take 6 µs a call on the host, these less than 0.1. Of a launch, Triton's own way takes several times
as long as what is needed: it writes the options into a string, asks the environment, and compares global constants.
"""

from typing import Any

import triton
from triton.compiler import CompiledKernel
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

_compiled: dict[tuple[Any, ...], CompiledKernel] = {}  # by all that Triton chooses a compiled kernel by


def ceil_div(count: int, size: int) -> int:
    """How many blocks of `size` hold `count`."""
    return -(-count // size)


def power_of_2(count: int) -> int:
    """The least power of 2 that is not less than `count`."""
    return 1 << (count - 1).bit_length()


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, **constants: Any) -> None:
    """As `kernel[grid](*args, **constants)`, and the same compiled kernel.

    Triton's own binder says what a launch is specialised for. What was not launched before goes Triton's way, and so do
    interpreted kernels, and all while a tool watches launches. Triton's settings for compiling, such as its debug mode,
    count when a kernel is launched for the first time.
    """
    if not isinstance(kernel, JITFunction) or _watched(kernel):
        kernel[grid](*args, **constants)
        return
    device = driver.active.get_current_device()
    _, _, _, _, bind = kernel.device_caches[device]
    bound, specialization, options = bind(*args, **constants)
    key = kernel.fn, device, tuple(specialization), tuple(options.items())
    compiled = _compiled.get(key)
    if compiled is None:
        found = kernel[grid](*args, **constants)
        if isinstance(found, CompiledKernel):  # and not one that is still being compiled, or that a hook has refused
            _compiled[key] = found
        return
    x, y, z = (*grid, 1, 1)[:3]
    stream = driver.active.get_current_stream(device)
    no_hooks = None, None, None
    compiled.run(x, y, z, stream, compiled.function, compiled.packed_metadata, *no_hooks, *bound.values())


def _watched(kernel: JITFunction) -> bool:
    """Whether a tool, such as a profiler, is told of a kernel's launches. A hook is a function, or a chain of some."""
    runtime = triton.knobs.runtime
    hooks = kernel.pre_run_hooks, runtime.launch_enter_hook, runtime.launch_exit_hook
    return any(getattr(hook, "calls", hook) for hook in hooks)
