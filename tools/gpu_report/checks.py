"""The engine's output against transformers and PEFT, on tiny models with random weights."""

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from kernels.interpreter import interpreted
from runtime.config import MIB, EngineConfig
from runtime.engine import Engine
from runtime.library import Completion
from runtime.messages import SamplingParams
from tests.oracle import logits_of_output
from tests.runtime.adapters.peft_engine import INVOCATIONS, MODULES, PeftOracle
from tests.runtime.models.families import write_checkpoint
from tools.gpu_report.clock import Clock, OutOfTime
from tools.gpu_report.plan import Plan
from tools.gpu_report.rows import Goal, Row

# Twice the tolerance of logits in tests/runtime/models/test_decoder.py, because a log-probability is the difference of
# two logits.
FLOAT32_TOLERANCE = 2e-4
TIMES_THEIRS = 2  # the allowed error in bfloat16, in multiples of the error of transformers and PEFT, as in that test
TOP = 20  # log-probabilities of each token

Logits = Callable[[list[int], list[int]], Tensor]  # of a prompt and its output, (tokens of the output, vocabulary)


def correctness(plan: Plan, clock: Clock, device: str) -> Iterator[Row]:
    """Greedy output and its log-probabilities: model families against transformers, mixed adapters against PEFT."""
    for family in (None, *plan.families):
        for dtype in plan.dtypes:
            clock.check()
            name = f"{family or 'adapters'}, {dtype}"
            if dtype == "bfloat16" and interpreted():
                yield Row(name=name, note="not run: Triton's interpreter multiplies the bits of bfloat16")
                continue
            with TemporaryDirectory() as scratch:
                case = Case(plan, dtype, device, Path(scratch))
                try:
                    yield from case.adapters() if family is None else case.family(family)
                except OutOfTime:
                    raise
                except Exception as error:
                    reason = f"{type(error).__name__}: {error}"
                    yield Row(name=name, goal=Goal("nat", None, 0.0), note=reason)


class Case(NamedTuple):
    """One tiny model in one dtype."""

    plan: Plan
    dtype: str
    device: str
    directory: Path

    def family(self, family: str) -> Iterator[Row]:
        """The base with some prompts in one batch, against transformers in float32 and in our dtype."""
        model = write_checkpoint(family, self.directory)
        theirs = None
        if self.dtype != "float32":
            rounded = AutoModelForCausalLM.from_pretrained(self.directory, dtype=getattr(torch, self.dtype))
            theirs = partial(logits_of_output, rounded)
        prompts = [_tokens(8 + 13 * number, 131, number) for number in range(self.plan.check_prompts)]
        with closing(self._engine()) as engine:
            outputs = engine.generate(prompts, self._params())
        pairs = list(zip(prompts, outputs, strict=True))
        yield from _judge(f"{family}, {self.dtype}", pairs, partial(logits_of_output, model), theirs)

    def adapters(self) -> Iterator[Row]:
        """The base, LoRA and aLoRA adapters in one batch, each against PEFT in float32 and in our dtype."""
        oracle = PeftOracle(self.directory)
        rounded = copy.copy(oracle)
        rounded.model = copy.deepcopy(oracle.model)
        assert rounded.model is not None
        rounded.model.to(getattr(torch, self.dtype))
        names = [None, *MODULES]
        each = max(self.plan.check_prompts // 2, 1)
        prompts = [(name, _invoking(name, seed)) for seed in range(each) for name in names]
        with closing(self._engine()) as engine:
            digests = {name: engine.add_adapter(*oracle.adapter(name)) for name in MODULES}
            adapters = [None if name is None else digests[name] for name, _ in prompts]
            outputs = engine.generate([prompt for _, prompt in prompts], self._params(), adapters)
        for name in names:
            pairs = [(prompt, out) for (adapter, prompt), out in zip(prompts, outputs, strict=True) if adapter == name]
            theirs = None if self.dtype == "float32" else partial(rounded.logits, name)
            yield from _judge(f"adapter {name or 'none'}, {self.dtype}", pairs, partial(oracle.logits, name), theirs)

    def _engine(self) -> Engine:
        """An engine whose steps are so small that prompts are split into chunks and run beside decoding requests."""
        return Engine(
            EngineConfig(
                model=str(self.directory),
                dtype=self.dtype,  # type: ignore[arg-type]
                device=self.device,  # type: ignore[arg-type]
                kernels="triton",
                kv_cache_bytes=8 * MIB,
                adapter_bytes=MIB,
                host_adapter_bytes=MIB,
                max_model_len=128,
                max_running=16,
                max_batch_tokens=48,
                max_lora_rank=16,
            )
        )

    def _params(self) -> SamplingParams:
        return SamplingParams(max_tokens=self.plan.check_tokens, temperature=0.0, ignore_eos=True, logprobs=TOP)


def _tokens(count: int, vocabulary: int, seed: int) -> list[int]:
    return torch.randint(20, vocabulary, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


def _invoking(name: str | None, seed: int) -> list[int]:
    """A prompt with the adapter's invocation, if it has one, in the middle."""
    invocation = INVOCATIONS[name] if name is not None else None
    return [*_tokens(14, 300, seed), *(invocation or []), *_tokens(9 + seed, 300, seed + 100)]


def _judge(
    name: str, pairs: Sequence[tuple[list[int], Completion]], exact: Logits, theirs: Logits | None
) -> Iterator[Row]:
    """The errors of all reported log-probabilities, and how much likelier another choice would have been.

    The bound is a tolerance in float32 (`theirs` is None), otherwise a multiple of the errors of `theirs` at the same
    tokens.
    """
    errors, allowed, regrets = [], [], []
    for prompt, output in pairs:
        right = exact(prompt, output.token_ids).log_softmax(-1)
        rounded = None if theirs is None else theirs(prompt, output.token_ids).log_softmax(-1)
        for row, (token, told) in enumerate(zip(output.token_ids, output.logprobs, strict=True)):
            ids = [token, *told.top_ids]
            errors.append((torch.tensor([told.logprob, *told.top_logprobs]) - right[row, ids]).abs())
            regrets.append(float(right[row].max() - right[row, token]))
            if rounded is not None:
                allowed.append((rounded[row, ids] - right[row, ids]).abs())
    each = torch.cat(errors)
    largest = TIMES_THEIRS * float(torch.cat(allowed).max()) if allowed else FLOAT32_TOLERANCE
    yield _error(f"{name}, largest error", float(each.max()), largest, f"of {len(each)} log-probabilities")
    if allowed:
        yield _error(f"{name}, mean error", float(each.mean()), TIMES_THEIRS * float(torch.cat(allowed).mean()))
    yield _error(f"{name}, choices", max(regrets), 2 * largest, "how much likelier the likeliest token is")


def _error(name: str, value: float, bound: float, note: str = "") -> Row:
    return Row(name=name, unit="nat", rounds=[[value]], goal=Goal("nat", value, bound), note=note)
