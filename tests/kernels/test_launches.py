"""The short way to a kernel that was launched before, against Triton's own way, which is the oracle.

Run as a program, this file launches every kernel both ways on a pretended GPU. There Triton chooses what to compile, as
ever, and nothing is compiled: a compiled kernel is an object that says who launches it.
"""

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest

ROOT = Path(__file__).parents[2]
WIDE, WIDER = 2**31 + 16, 2**63  # of 64 bits, and without a sign


@pytest.fixture(scope="module")
def seen() -> dict[str, Any]:
    pytest.importorskip("triton", reason="needs triton")
    environment = {name: value for name, value in os.environ.items() if not name.startswith("TRITON_")}
    command = [sys.executable, "-W", "error", __file__]
    environment |= {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def test_every_kernel_is_launched_the_short_way_as_triton_launches_it(seen: dict[str, Any]) -> None:
    assert set(seen["short"]) == set(seen["kernels"]), "kernels that never went the short way"
    assert seen["other launches"] == []


def test_no_other_argument_takes_a_kernel_that_triton_would_not_choose(seen: dict[str, Any]) -> None:
    """Misaligned views, other dtypes and widths, integers of 1 and of multiples of 16, other constants and options."""
    assert seen["other choices"] == []
    assert min(seen["changes"].values()) > 50
    assert seen["compiled for changes"] > 2 * len(seen["kernels"])


def test_what_is_launched_again_is_not_looked_for_again(seen: dict[str, Any]) -> None:
    assert seen["looked for again"] == {}


def test_a_tool_sees_every_launch_while_it_watches(seen: dict[str, Any]) -> None:
    ways = "at entry", "at exit", "by a function", "before"
    assert seen["watched"] == {way: [True, True] for way in ways}
    assert seen["unwatched"] == [False, False]


def test_a_launch_is_on_the_stream_of_its_time(seen: dict[str, Any]) -> None:
    assert seen["streams"] == [0, 7, 0]


def test_a_kernel_that_is_refused_or_under_way_is_not_remembered(seen: dict[str, Any]) -> None:
    assert seen["refused"] == ["not launched", "compiled"]


def test_on_a_gpu_of_another_maker_every_launch_goes_tritons_way(seen: dict[str, Any]) -> None:
    assert seen["short on AMD's"] == [False, False, False]


def test_constants_by_place_are_refused(seen: dict[str, Any]) -> None:
    assert "constants are to be named" in seen["by place"]


def main() -> dict[str, Any]:
    from tests.kernels.pretend_gpu import H100, SHARED_BYTES, PretendGpu
    from tests.kernels.test_compiled import kernel_names
    from tests.kernels.test_compiled import launches as all_launches

    gpu = PretendGpu.install()
    pretend_to_compile()
    both = BothWays()
    for dtype in ("bfloat16", "float32"):
        for call in all_launches(dtype, SHARED_BYTES[H100]):
            call()
    short = sorted({name.removesuffix(" short") for name in both.ways if name.endswith(" short")})
    seen = {"kernels": sorted(kernel_names()), "short": short, "other launches": both.differences}
    both.differences, compiled = [], len(both.compiled)
    for kernel, grid, args, constants in list(both.launches.values()):
        for changed, named in changes(args, constants):
            both.changes[kernel.fn.__name__] += 1
            both.launch(kernel, grid, *changed, **named)
    seen |= {"other choices": both.differences, "changes": both.changes}
    seen |= {"compiled for changes": len(both.compiled) - compiled, "looked for again": both.repeated}
    return seen | hooks(both) | streams(both, gpu) | refusals(both) | of_another_maker(both)


class Launched:
    """What launches a compiled kernel on the pretended GPU: notes the launch, by what was chosen."""

    log: ClassVar[list[tuple[Any, ...]]] = []

    def __call__(self, *launch: Any) -> None:
        x, y, z, stream, function, options, metadata, enter, leave, *values = launch
        for hook in (enter, leave):
            if hook is not None:
                hook(metadata)
        self.log.append((function, (x, y, z), stream, options, [id(value) for value in values]))


def pretend_to_compile() -> None:
    """Have Triton's compiler give objects, one for each call, whose launches are noted."""
    import triton.compiler
    from triton.backends.compiler import GPUTarget

    class Uncompiled(triton.compiler.CompiledKernel):
        def __init__(self, source: Any, target: GPUTarget, options: dict[str, Any]) -> None:
            self.src, self.name, self.module = source, source.fn.fn.__name__, None
            self.function, self._run = object(), Launched()
            self.metadata, self.packed_metadata = SimpleNamespace(target=target), (options["num_warps"], self)

        def _init_handles(self) -> None:
            pass

    triton.compiler.compile = Uncompiled


class BothWays:
    """Launches of the wrappers of all kernels, each made three times the short way and then Triton's way."""

    def __init__(self) -> None:
        import importlib
        import pkgutil

        from triton.runtime.jit import JITFunction

        import kernels
        from kernels import launches

        self._launch, self._run = launches.launch, JITFunction.run
        self.ways, self.changes, self.repeated = Counter[str](), Counter[str](), Counter[str]()
        self.launches: dict[Any, Any] = {}  # one of each kernel with the same dtypes
        self.differences: list[str] = []
        self.compiled: set[Any] = set()
        self._searches = 0
        both = self

        def run(kernel: Any, *args: Any, **options: Any) -> Any:
            both._searches += 1
            return both._run(kernel, *args, **options)

        JITFunction.run = run
        for module in pkgutil.iter_modules(kernels.__path__, "kernels."):
            found = importlib.import_module(module.name)
            if getattr(found, "launch", None) is self._launch and found is not launches:
                found.launch = self.launch  # type: ignore[attr-defined]

    def once(self, kernel: Any, grid: Any, *args: Any, **constants: Any) -> tuple[Any, bool]:
        """The launch as it was made, and whether it was the short way."""
        before, noted = self._searches, len(Launched.log)
        self._launch(kernel, grid, *args, **constants)
        [launched] = Launched.log[noted:]
        return launched, self._searches == before

    def launch(self, kernel: Any, grid: Any, *args: Any, **constants: Any) -> None:
        name = kernel.fn.__name__
        made = [self.once(kernel, grid, *args, **constants) for _ in range(3)]
        kernel[grid](*args, **constants)
        expected = Launched.log[-1]
        self.compiled.add(expected[0])
        self.differences += [f"{name}{args}{constants}" for launched, _ in made if launched != expected]
        self.ways.update(f"{name} short" for _, short in made if short)
        if not (made[1][1] and made[2][1]) and all(usual(value) for value in args):
            self.repeated[name] += 1
        self.launches.setdefault((name, *map(str, map(dtype_of, args))), (kernel, grid, args, constants))


def dtype_of(value: Any) -> Any:
    return getattr(value, "dtype", type(value))


def usual(value: Any) -> bool:
    """Whether a launch with the value may be remembered."""
    return type(value) is not bool and not (type(value) is int and value >= WIDE) and not is_parameter(value)


def is_parameter(value: Any) -> bool:
    return type(value).__name__ == "Parameter"


def changes(args: tuple[Any, ...], constants: dict[str, Any]) -> Any:
    """The launch with one argument changed, in all ways that Triton may take notice of, and in some that it may not."""
    import torch

    for place, value in enumerate(args):
        for other in others(value, torch):
            yield (*args[:place], other, *args[place + 1 :]), constants
    for name, value in constants.items():
        other = {"num_warps": 16, "num_stages": 7, "enable_fp_fusion": False}.get(name, f"not {value}")
        yield args, constants | {name: other}
        if type(value) is int and name.isupper():
            yield args, constants | {name: float(value)}
    yield args, constants | {"maxnreg": 64}


def others(value: Any, torch: Any) -> list[Any]:
    if isinstance(value, torch.Tensor):
        aligned = torch.empty(256, dtype=value.dtype)
        assert aligned.data_ptr() % 16 == 0
        views = [aligned.view(torch.uint8)[offset : offset + 64].view(value.dtype) for offset in (0, 8, 16, 24, 128)]
        byte = [] if value.element_size() > 1 else [aligned[1:], aligned[15:]]
        other_dtypes = [aligned.view(dtype) for dtype in (torch.int8, torch.float16, torch.int64)]
        return [*views, *byte, *other_dtypes, torch.nn.Parameter(aligned, requires_grad=False), None, 1, 16]
    if type(value) is int:
        return [0, 1, 2, 15, 16, 17, 24, 32, 4096, -16, WIDE, WIDE + 1, WIDER, True, False, 1.0, 16.0, None]
    return [0.0, 1.0, 16.0, float("nan"), 1, 16, 17, True, None]


def example(both: BothWays) -> tuple[Any, ...]:
    return next(launch for (name, *_), launch in both.launches.items() if name == "_silu_mul_kernel")


def hooks(both: BothWays) -> dict[str, Any]:
    """Whether each of two launches of a known kernel was told to a tool, however the tool asks to be told."""
    import triton

    kernel, grid, args, constants = example(both)
    runtime, told = triton.knobs.runtime, list[Any]()

    def twice() -> list[bool]:
        found = []
        for _ in range(2):
            told.clear()
            _, short = both.once(kernel, grid, *args, **constants)
            assert short == (not told)
            found.append(bool(told))
        return found

    watched, chain = {}, runtime.launch_enter_hook
    for way, hook in ("at entry", runtime.launch_enter_hook), ("at exit", runtime.launch_exit_hook):
        hook.add(told.append)
        watched[way] = twice()
        hook.remove(told.append)
    runtime.launch_enter_hook = told.append
    watched["by a function"] = twice()
    runtime.launch_enter_hook = chain
    kernel.add_pre_run_hook(lambda *args, **options: told.append(args))
    watched["before"] = twice()
    kernel.pre_run_hooks.clear()
    return {"watched": watched, "unwatched": twice()}


def streams(both: BothWays, gpu: Any) -> dict[str, Any]:
    """The streams of launches between which the current stream changes."""
    kernel, grid, args, constants = example(both)
    found = []
    for current in (0, 7, 0):
        gpu.get_current_stream = lambda device, current=current: current
        launched, short = both.once(kernel, grid, *args, **constants)
        assert short
        found.append(launched[2])
    return {"streams": found}


def refusals(both: BothWays) -> dict[str, Any]:
    """A kernel that a hook forbids to compile at first, and a call with a constant by its place."""
    import triton

    kernel, grid, args, constants = example(both)
    constants = constants | {"BLOCK": 8192}
    triton.knobs.runtime.jit_cache_hook = lambda **_: True
    noted = len(Launched.log)
    both._launch(kernel, grid, *args, **constants)
    refused = ["launched" if len(Launched.log) > noted else "not launched"]
    triton.knobs.runtime.jit_cache_hook = None
    _, short = both.once(kernel, grid, *args, **constants)
    refused.append("remembered" if short else "compiled")
    width, *_ = constants.values()
    try:
        both._launch(kernel, grid, *args, width, **{name: constants[name] for name in list(constants)[1:]})
    except AssertionError as error:
        return {"refused": refused, "by place": str(error)}
    return {"refused": refused, "by place": "accepted"}


def of_another_maker(both: BothWays) -> dict[str, Any]:
    """Whether launches on an AMD GPU went the short way: Triton looks at more there."""
    from triton.backends.compiler import GPUTarget
    from triton.runtime.driver import driver

    from kernels.tune.compiling import CompilerOnly

    other = CompilerOnly(GPUTarget("hip", "gfx942", 64))
    other.get_current_device = lambda: 1  # type: ignore[method-assign]
    driver.set_active(other)
    kernel, grid, args, constants = example(both)
    return {"short on AMD's": [both.once(kernel, grid, *args, **constants)[1] for _ in range(3)]}


if __name__ == "__main__":
    print(json.dumps(main()))
