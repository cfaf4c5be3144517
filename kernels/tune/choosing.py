"""Choosing a kernel's launch configuration: the fastest of those whose numbers are right."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

from torch import Tensor
from triton.runtime.errors import OutOfResources, PTXASError

Timer = Callable[[Callable[[], object]], float]  # seconds


class Case(NamedTuple):
    """A kernel at one shape.

    `kernel` is its name in kernels.tuned, `rows` the batch's, `shape` says the rest. `prepare(seed)` makes inputs, new
    ones each time and the same for a seed. `launch(*inputs, config=...)` and `twin(*inputs)` give the same outputs:
    what they return, and the inputs that they write, whose places are `written`. An output may differ from
    the twin's by `rtol` of it and `atol` of the largest.
    """

    kernel: str
    rows: int
    shape: str
    candidates: Sequence[Any]
    prepare: Callable[[int], tuple[Any, ...]]
    launch: Callable[..., Any]
    twin: Callable[..., Any]
    written: tuple[int, ...]
    rtol: float
    atol: float


class Chosen(NamedTuple):
    """The fastest configuration; times are in seconds, `refused` says of each that was not timed why."""

    config: Any
    seconds: float
    slowest_seconds: float
    timed: int
    refused: tuple[tuple[Any, str], ...]


class NoRightConfig(Exception):
    """No candidate gave the reference's numbers."""


def choose(case: Case, timer: Timer) -> Chosen:
    """The fastest right candidate, of equal ones the first; NoRightConfig if there is none.

    Every candidate has inputs of its own: one that writes nothing then leaves answers to another question in
    memory that is used again, and is found out.
    """
    times: list[tuple[float, Any]] = []
    refused: list[tuple[Any, str]] = []
    for seed, config in enumerate(case.candidates):
        inputs, others = case.prepare(seed), case.prepare(seed)
        launch = partial(case.launch, *inputs, config=config)
        try:
            actual = _outputs(launch(), inputs, case)
            fault = _fault(actual, _outputs(case.twin(*others), others, case), case)
            if fault is None:
                times.append((timer(launch), config))
        except (OutOfResources, PTXASError) as error:
            fault = f"does not launch: {error}"
        if fault is not None:
            refused.append((config, fault))
    if not times:
        reasons = "".join(f"\n  {config}: {fault}" for config, fault in refused)
        raise NoRightConfig(f"no configuration of {case.kernel} ({case.shape}, {case.rows} rows) is right:{reasons}")
    seconds, config = min(times, key=lambda timed: timed[0])
    return Chosen(config, seconds, max(timed[0] for timed in times), len(times), tuple(refused))


def _outputs(returned: Any, inputs: tuple[Any, ...], case: Case) -> list[Tensor]:
    values = [] if returned is None else [returned] if isinstance(returned, Tensor) else list(returned)
    return values + [inputs[place] for place in case.written]


def _fault(actual: Sequence[Tensor], expected: Sequence[Tensor], case: Case) -> str | None:
    """What is wrong with the numbers, None if nothing is."""
    for index, (ours, theirs) in enumerate(zip(actual, expected, strict=True)):
        if ours.shape != theirs.shape:
            return f"output {index} is {tuple(ours.shape)}, not {tuple(theirs.shape)}"
        exact = theirs.double()
        error = (ours.double() - exact).abs()
        allowed = case.rtol * exact.abs() + case.atol * exact.abs().max()
        wrong = int((~(error <= allowed)).sum())  # NaN is not less than anything
        if wrong:
            return f"output {index} has {wrong} of {ours.numel()} numbers wrong, by up to {float(error.max()):.2g}"
    return None
