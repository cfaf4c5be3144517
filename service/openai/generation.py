"""One request's sequences: run side by side, their text as it grows, what they add up to."""

import asyncio
import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from typing import Literal, NamedTuple

import msgspec

from runtime.messages import Generate, SamplingParams, TokenLogprobs, Tokens
from service.access import AccessRecord
from service.engine.client import Deadline, EngineClient
from service.errors import EngineError
from service.keys.limits import KeyUsage
from service.metrics import Finish, SequenceTimes, Series, VllmSeries
from service.openai.invocation import Prompt
from service.openai.schemas import PromptTokensDetails, Usage
from service.text.detokenizer import StopStrings
from service.text.tokenizer import Tokenizer
from service.traces.stages import MOST_SEQUENCES, SequenceStages

FinishReason = Literal["stop", "length"]


class Plan(NamedTuple):
    """What is to be generated."""

    request_id: str
    prompts: list[Prompt]
    params: SamplingParams
    choices: int  # sequences for each prompt
    stops: tuple[str, ...]  # stop strings
    cache_salt: str
    tenant: str = ""  # whose turn it is; empty: that of the cache_salt
    special: bool = False  # whether the text has the special tokens too
    include_stop: bool = False  # whether it has the stop string that ended it
    seconds: float | None = None  # that it may take from the arrival of its request


class Counted(NamedTuple):
    """Where it is counted what a request used."""

    series: Series  # of its adapter
    vllm: VllmSeries
    record: AccessRecord
    usage: KeyUsage


class Delta(NamedTuple):
    """What one choice gained."""

    choice: int
    text: str  # empty for part of a character, or while text is held back for a stop string
    token_ids: list[int]
    logprobs: list[TokenLogprobs] | None
    finish_reason: FinishReason | None
    prompt_logprobs: list[TokenLogprobs] | None = None  # in the first of a prompt's first choice, if asked for
    stop_token: int | None = None  # the token that ended the choice; it is not among token_ids, nor in the text
    stop_logprobs: TokenLogprobs | None = None

    @property
    def generated(self) -> list[int]:
        """All its tokens, the one that ended the choice included."""
        return self.token_ids if self.stop_token is None else [*self.token_ids, self.stop_token]


class Choice:
    """The text of one sequence: whole characters, cut at a stop string."""

    def __init__(self, index: int, plan: Plan, tokenizer: Tokenizer):
        self.index = index
        self.finish_reason: FinishReason | None = None
        self._text = tokenizer.detokenizer(special=plan.special)
        self._stops = StopStrings(plan.stops, included=plan.include_stop)
        self._plan, self._tokenizer = plan, tokenizer
        self._unstoppable = plan.params.min_tokens  # tokens in which a stop string does not count yet

    def push(self, tokens: Tokens) -> Delta:
        text = self._text.push(tokens.token_ids)
        if tokens.finish_reason is not None:
            text += self._text.flush()
        self.finish_reason = tokens.finish_reason
        stops = not self._unstoppable >= len(tokens.token_ids) > 0
        if not stops:
            self._unstoppable -= len(tokens.token_ids)
        text, stopped = self._stops.push(text, stops=stops)
        if stopped:
            self.finish_reason = "stop"
        elif tokens.finish_reason is not None:
            text += self._stops.flush() + self._stop_shown(tokens.stop_token)
        return Delta(
            self.index,
            text,
            tokens.token_ids,
            tokens.logprobs,
            self.finish_reason,
            tokens.prompt_logprobs,
            tokens.stop_token,
            tokens.stop_logprobs,
        )

    def _stop_shown(self, stop_token: int | None) -> str:
        """The text of a special token that ended the sequence, if it was a stop string that the answer includes."""
        if stop_token is None or not self._plan.include_stop:
            return ""
        text = self._tokenizer.shown([stop_token])
        return text if text in self._plan.stops else ""


class Generation:
    """Runs a plan, and counts what it used."""

    def __init__(
        self,
        plan: Plan,
        engine: EngineClient,
        tokenizer: Tokenizer,
        counted: Counted,
        arrived: float,
    ):
        self._plan, self._engine, self._tokenizer = plan, engine, tokenizer
        self._series, self._vllm, self._record, self._usage = counted
        self._deadline = None if plan.seconds is None else Deadline(plan.seconds, arrived + plan.seconds)
        self._longest = [0] * len(plan.prompts)  # tokens of each prompt's longest choice
        self._arrived = self._last = arrived  # time.perf_counter() when the request came in, and at its last token
        self._completion_tokens = self._computed_prompts = 0
        self._finishes: set[Finish] = set()
        self.cached_tokens = 0
        self.queue_seconds = 0.0
        self.first_token_seconds: float | None = None

    @property
    def usage(self) -> Usage:
        prompt_tokens = sum(len(prompt.token_ids) for prompt in self._plan.prompts)
        return Usage(
            prompt_tokens=prompt_tokens,
            completion_tokens=self._completion_tokens,
            total_tokens=prompt_tokens + self._completion_tokens,
            prompt_tokens_details=PromptTokensDetails(cached_tokens=self.cached_tokens),
        )

    @property
    def headers(self) -> dict[str, str]:
        """What is known of the prompts' way through the engine: all of them once each has given a token."""
        if self._computed_prompts < len(self._plan.prompts):
            return {}
        return {
            "x-queue-time-ms": f"{self.queue_seconds * 1000:.1f}",
            "x-cached-tokens": str(self.cached_tokens),
        }

    async def deltas(self) -> AsyncGenerator[Delta, None]:
        """What the choices gain, as it comes; closing the generator aborts them.

        Choice c of prompt p has the index p·n + c. Raises EngineError.
        """
        runs = self._runs()
        finished = False
        try:
            async with aclosing(runs[0] if len(runs) == 1 else _side_by_side(runs)) as deltas:
                async for delta in deltas:
                    self._time()
                    yield delta
            finished = True
        finally:
            self._count_up(self.usage, finished=finished)

    def _count_up(self, usage: Usage, *, finished: bool) -> None:
        """Tell the metrics and the access log what the request used."""
        self._series.ended(usage.prompt_tokens, self.cached_tokens, usage.completion_tokens, finished=finished)
        for tokens in filter(None, self._longest):
            self._vllm.longest_choice.observe(tokens)
        self._record.prompt_tokens, self._record.cached_tokens = usage.prompt_tokens, self.cached_tokens
        self._record.generated_tokens = usage.completion_tokens
        self._record.first_token_seconds = self.first_token_seconds
        self._record.queue_seconds = self.queue_seconds if self._computed_prompts else None
        self._record.finish = ",".join(sorted(self._finishes)) or None

    def _time(self) -> None:
        now = time.perf_counter()
        if self.first_token_seconds is None:
            self.first_token_seconds = now - self._arrived
            self._series.first_token(self.first_token_seconds, self.queue_seconds)
        elif len(self._plan.prompts) * self._plan.choices == 1:  # the gaps of several are not one sequence's
            self._series.next_token(now - self._last)
        self._last = now

    def _runs(self) -> list[AsyncGenerator[Delta, None]]:
        """The first choice of a prompt computes it; the others wait for that, and so find it in the prefix cache."""
        runs = []
        for index, prompt in enumerate(self._plan.prompts):
            computed = asyncio.Event()
            for choice in range(self._plan.choices):
                runs.append(self._run(index, choice, prompt, computed))
        return runs

    async def _run(
        self, number: int, choice: int, prompt: Prompt, computed: asyncio.Event
    ) -> AsyncGenerator[Delta, None]:
        """One choice of the prompt with this number."""
        if choice > 0:
            await computed.wait()
        index = number * self._plan.choices + choice
        text, times = Choice(index, self._plan, self._tokenizer), SequenceTimes(self._vllm, self._arrived)
        stages = self._stages(index)
        finish: Finish = "abort"
        try:
            async with aclosing(self._engine.generate(self._command(index, choice, prompt), self._deadline)) as events:
                times.sent()
                async for tokens in events:
                    computed.set()
                    times.got(tokens)
                    if stages is not None and tokens.started_at is not None:
                        stages.started(tokens, self._engine.adapters.stages_of(prompt.adapter))
                    self._count(tokens, counts_prompt=choice == 0)
                    delta = text.push(tokens)
                    if delta.finish_reason is not None:
                        finish = delta.finish_reason
                    yield delta
                    if delta.finish_reason is not None:
                        return
        except EngineError:
            finish = "error"
            raise
        finally:
            times.ended(len(prompt.token_ids), finish)
            self._finishes.add(finish)
            if stages is not None:
                stages.ended(time.monotonic(), times.tokens)
            self._longest[number] = max(self._longest[number], times.tokens)

    def _stages(self, index: int) -> SequenceStages | None:
        """Where the stages of a sequence that begins now are noted; None where nobody asks for them."""
        asked = self._record.stages
        return None if asked is None or index >= MOST_SEQUENCES else SequenceStages(asked, index, time.monotonic())

    def _command(self, index: int, choice: int, prompt: Prompt) -> Generate:
        params = self._plan.params
        if choice:  # the first choice has scored the prompt for all
            params = msgspec.structs.replace(params, choice=choice, prompt_logprobs=None)
        return Generate(
            request_id=f"{self._plan.request_id}-{index}",
            token_ids=prompt.token_ids,
            params=params,
            adapter=prompt.adapter,
            invocation_start=prompt.invocation_start,
            kv_is_base=prompt.kv_is_base,
            cache_salt=self._plan.cache_salt,
            tenant=self._plan.tenant,
            call=self._plan.request_id,
        )

    def _count(self, tokens: Tokens, counts_prompt: bool) -> None:
        generated = len(tokens.token_ids) + (tokens.stop_token is not None)
        self._completion_tokens += generated
        self._usage.spend(generated)
        if counts_prompt and tokens.cached_tokens is not None:
            self._computed_prompts += 1
            self.cached_tokens += tokens.cached_tokens
            self.queue_seconds = max(self.queue_seconds, tokens.queue_seconds or 0.0)


async def _side_by_side(runs: Sequence[AsyncGenerator[Delta, None]]) -> AsyncGenerator[Delta, None]:
    """Interleave several runs as their deltas come; the first to fail ends them all."""
    queue: asyncio.Queue[Delta | asyncio.Task[None]] = asyncio.Queue()

    async def pump(run: AsyncGenerator[Delta, None]) -> None:
        async with aclosing(run):
            async for delta in run:
                queue.put_nowait(delta)

    tasks = [asyncio.create_task(pump(run)) for run in runs]
    for task in tasks:
        task.add_done_callback(queue.put_nowait)
    try:
        running = len(tasks)
        while running:
            item = await queue.get()
            if isinstance(item, asyncio.Task):
                item.result()
                running -= 1
            else:
                yield item
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
