"""Many requests at once on too few blocks: preempted, evicted to host memory, ended at any time, with late results."""

import random

import pytest

from runtime.messages import Failed, Generate, SamplingParams, Tokens
from tests.runtime.adapters.peft_engine import PeftOracle, engines
from tests.runtime.gpu.late_runner import LateRunner
from tests.runtime.tiny_engine import BLOCK_BYTES, prompt

NAMES = [None, None, "plain", "attention", "linears"]


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    with engines(PeftOracle(tmp_path_factory.mktemp("model"))) as start:
        yield start


@pytest.fixture(scope="module")
def uncached(start):
    return start(prefix_cache=False)


class Storm:
    """Requests that come and go at random, whose outputs are held against an engine that is asked for each alone."""

    def __init__(self, seed, start, uncached):
        self.random = random.Random(seed)
        draw = self.random.choice
        host = draw([0, 8, 40]) * BLOCK_BYTES
        blocks, budget, running = self.random.randint(9, 16), draw([8, 32, 64]), draw([3, 5])
        self.engine = start(blocks=blocks, host_kv_bytes=host, max_batch_tokens=budget, max_running=running)
        if seed % 4:
            self.engine.runner = LateRunner(self.engine.runner)
        self.uncached = uncached
        self.texts = [prompt(60, text) for text in range(3)]
        self.asked, self.outputs, self.compared = {}, {}, 0

    def ask(self):
        draw = self.random
        name = draw.choice(NAMES)
        tokens = [*draw.choice(self.texts)[: draw.randint(4, 60)], *draw.choices(range(20, 24), k=draw.randint(0, 4))]
        params = SamplingParams(
            max_tokens=draw.randint(1, 60),
            temperature=0.0,
            ignore_eos=draw.random() < 0.7,
            stop_token_ids=tuple(draw.sample(range(300), 30)) if draw.random() < 0.3 else (),
        )
        request = Generate(
            request_id=f"{len(self.outputs)}",
            token_ids=tokens,
            params=params,
            adapter=self.engine.digests[name],
            invocation_start=draw.randint(0, len(tokens)) if name in ("attention", "linears") else 0,
        )
        self.engine.add_request(request)
        self.asked[request.request_id], self.outputs[request.request_id] = request, []

    def step(self):
        steps = self.engine.steps
        for event in self.engine.step():
            assert not isinstance(event, Failed), event
            if isinstance(event, Tokens) and event.request_id in self.asked:
                self.outputs[event.request_id] += event.token_ids
                if event.finish_reason:
                    self.compare(self.asked.pop(event.request_id), event.finish_reason)
        self.engine.check()
        if self.engine.steps == steps:
            self.engine.wait(timeout=1.0)

    def compare(self, request, reason):
        [expected] = self.uncached.generate(
            [request.token_ids], request.params, request.adapter, [request.invocation_start]
        )
        assert (self.outputs[request.request_id], reason) == (expected.token_ids, expected.finish_reason)
        self.compared += 1

    def blow(self, turns):
        for _ in range(turns):
            if self.random.random() < 0.35 and len(self.engine.requests) < 8:
                self.ask()
            if self.random.random() < 0.05 and self.asked:
                request_id = self.random.choice(list(self.asked))
                self.engine.abort(request_id)
                del self.asked[request_id]
            if self.random.random() < 0.03:
                self.engine.drop_namespace(self.engine.digests[self.random.choice([None, "attention"])])
            for _ in range(self.random.randint(1, 6)):
                self.step()

    def end(self):
        while self.engine.busy or self.engine.offload.held:
            self.step()
        assert self.engine.blocks.used == 0


def test_whatever_happens_at_once_every_output_is_what_it_is_alone(start, uncached):
    compared = preempted = recalled = late = 0
    for seed in range(12):
        storm = Storm(seed, start, uncached)
        try:
            storm.blow(50)
            storm.end()
        except AssertionError as error:
            raise AssertionError(f"seed {seed}") from error
        compared += storm.compared
        preempted += storm.engine.scheduler.preemptions
        recalled += storm.engine.stats().host_kv.loads
        late += getattr(storm.engine.runner, "late", 0)
    assert compared > 100
    assert min(preempted, recalled, late) > 0, "it was no storm"
