"""Choosing a kernel's launch configuration: the fastest candidate that computes the reference's numbers."""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

from torch import Tensor
from triton.errors import TritonError

Inputs = tuple[Any, ...]
Launch = Callable[[], object]
Timer = Callable[[Sequence[Launch]], float]  # seconds of all launches together, each once

# What a candidate may fail with: in the compiler, at the launch, or in the call around it
FAULTS = (
    TritonError,
    RuntimeError,
    AssertionError,
    ValueError,
    TypeError,
    AttributeError,
    LookupError,
    ArithmeticError,
)
COLD_BYTES = 128 << 20  # more than twice the largest L2 cache there is
MOST_COPIES = 16
FEW_SEEDS = 2


class Case(NamedTuple):
    """A kernel at one shape, or at several whose times are added up.

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
    others: tuple[Callable[[int], tuple[Any, ...]], ...] = ()  # inputs at the other shapes
    cold: bool = False  # a step reads the inputs from memory: by turns, copies are launched that fill the L2 cache
    eager: bool = False  # steps launch it outside CUDA graphs
    combine: Callable[[Tensor], Tensor] | None = None  # what `launch` returned, before it is compared


class Chosen(NamedTuple):
    """The fastest configuration of a case."""

    config: Any
    seconds: float  # at all shapes together
    slowest_seconds: float
    timed: int  # how many candidates were timed
    refused: tuple[tuple[Any, str], ...]  # the other candidates, each with the reason


class NoRightConfig(Exception):
    """No candidate computed the reference's numbers."""


class DeviceBroken(Exception):
    """After a candidate's fault, no call of the device succeeds any more."""


def choose(
    case: Case,
    timer: Timer,
    *,
    until: float = math.inf,
    ready: Callable[[int], bool] = lambda index: True,
    alive: Callable[[], object] = lambda: None,
) -> Chosen:
    """The fastest candidate with the right numbers, of equally fast ones the first.

    After `until`, by time.monotonic(), no further candidate is tried once one is timed. `ready` says whether a
    candidate, by its index, has been compiled in time. `alive` raises if the device has failed for good. Raises
    NoRightConfig, DeviceBroken.

    Candidates that follow each other get other inputs. A candidate that writes nothing would otherwise pass if its
    output reused the memory in which the candidate before left the right numbers.
    """
    times: list[tuple[float, Any]] = []
    refused: list[tuple[Any, str]] = []
    expected: dict[int, list[list[Tensor]]] = {}
    for index, config in enumerate(case.candidates):
        if times and time.monotonic() > until:
            refused.append((config, "not tried: the time was used up"))
        elif not ready(index):
            refused.append((config, "not tried: its compilation took too long"))
        else:
            try:
                inputs = [prepare(index % FEW_SEEDS) for prepare in (case.prepare, *case.others)]
                fault = _fault_of(case, config, inputs, _expected(case, index % FEW_SEEDS, expected))
                if fault is None:
                    rounds = [inputs, *_copies(inputs)] if case.cold else [inputs]
                    launches = [partial(case.launch, *each, config=config) for turn in rounds for each in turn]
                    times.append((timer(launches) / len(rounds), config))
                else:
                    refused.append((config, fault))
            except FAULTS as error:
                _raise_if_broken(config, error, alive)
                refused.append((config, f"does not launch: {type(error).__name__}: {error}"))
    if not times:
        reasons = "".join(f"\n  {config}: {fault}" for config, fault in refused)
        raise NoRightConfig(f"no configuration of {case.kernel} ({case.shape}, {case.rows} rows) is right:{reasons}")
    seconds, config = min(times, key=lambda timed: timed[0])
    return Chosen(config, seconds, max(timed[0] for timed in times), len(times), tuple(refused))


def pruned(candidates: Sequence[Any], default: Any, most: int) -> list[Any]:
    """At most `most` candidates: the default, and others at even distances in the list."""
    others = [each for each in candidates if each != default]
    count = min(most - 1, len(others))
    return [default, *(others[place * len(others) // count] for place in range(count))]


def _raise_if_broken(config: Any, error: BaseException, alive: Callable[[], object]) -> None:
    try:
        alive()
    except RuntimeError as lasting:
        raise DeviceBroken(f"{config} broke the device ({error}): {lasting}") from error


def _expected(case: Case, seed: int, known: dict[int, list[list[Tensor]]]) -> list[list[Tensor]]:
    """The right outputs at each shape, for the inputs of a seed."""
    if seed not in known:
        each = [prepare(seed) for prepare in (case.prepare, *case.others)]
        known[seed] = [_outputs(case.twin(*inputs), inputs, case) for inputs in each]
    return known[seed]


def _fault_of(case: Case, config: Any, inputs: Sequence[Inputs], expected: list[list[Tensor]]) -> str | None:
    """What is wrong with a candidate's numbers, at the first shape where they are wrong."""
    for each, right in zip(inputs, expected, strict=True):
        returned = case.launch(*each, config=config)
        combined = returned if case.combine is None else case.combine(returned)
        fault = _fault(_outputs(combined, each, case), right, case)
        if fault is not None:
            return fault
    return None


def _copies(inputs: Sequence[Inputs]) -> Iterator[list[Inputs]]:
    """The inputs in other memory, so often that all together do not fit into a cache."""
    size = sum(part.nbytes for each in inputs for part in each if isinstance(part, Tensor))
    for _ in range(1, min(COLD_BYTES // max(size, 1), MOST_COPIES)):
        yield [tuple(part.clone() if isinstance(part, Tensor) else part for part in each) for each in inputs]


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
