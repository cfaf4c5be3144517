"""Choosing a kernel's launch configuration: the fastest candidate that computes the reference's numbers."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

from torch import Tensor
from triton.runtime.errors import OutOfResources, PTXASError

Timer = Callable[[Callable[[], object]], float]  # seconds


class Case(NamedTuple):
    """A kernel at one shape.

    The outputs of `launch` and `twin` are the tensors that they return and the inputs that they write. An output of
    `launch` may differ from the twin's value by `rtol` times that value plus `atol` times the largest value.
    """

    kernel: str  # its name in kernels.tuned
    rows: int  # of the batch
    shape: str  # the other sizes, for people
    candidates: Sequence[Any]  # launch configurations
    prepare: Callable[[int], tuple[Any, ...]]  # new inputs from a seed
    launch: Callable[..., Any]  # called with the inputs and config=...
    twin: Callable[..., Any]  # the reference, called with the inputs
    written: tuple[int, ...]  # indices of the inputs that are written
    rtol: float
    atol: float


class Chosen(NamedTuple):
    """The fastest configuration of a case."""

    config: Any
    seconds: float
    slowest_seconds: float
    timed: int  # how many candidates were timed
    refused: tuple[tuple[Any, str], ...]  # the other candidates, each with the reason


class NoRightConfig(Exception):
    """No candidate computed the reference's numbers."""


def choose(case: Case, timer: Timer) -> Chosen:
    """The fastest candidate with the right numbers, of equally fast ones the first. Raises NoRightConfig.

    Every candidate gets inputs of its own. A candidate that writes nothing would otherwise pass if its output reused
    the memory in which the candidate before left the right numbers.
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
    """A description of the first wrong output, None if all are right."""
    for index, (ours, theirs) in enumerate(zip(actual, expected, strict=True)):
        if ours.shape != theirs.shape:
            return f"output {index} is {tuple(ours.shape)}, not {tuple(theirs.shape)}"
        exact = theirs.double()
        error = (ours.double() - exact).abs()
        allowed = case.rtol * exact.abs() + case.atol * exact.abs().max()
        wrong = int((~(error <= allowed)).sum())  # comparisons with NaN are false
        if wrong:
            return f"output {index} has {wrong} of {ours.numel()} numbers wrong, by up to {float(error.max()):.2g}"
    return None
