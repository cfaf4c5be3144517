"""Requests, adapters that come and go, tenants and too few blocks, in any order, with results that come at once
or after the next step: never another output than uncached."""

import contextlib
import itertools

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test

from runtime.kv.block_keys import root_key
from runtime.messages import Failed, Generate, HoldPrefix, SamplingParams, Tokens
from runtime.request import RequestRefused
from tests.runtime.adapters.peft_engine import PeftOracle, engines
from tests.runtime.gpu.late_runner import LateRunner
from tests.runtime.tiny_engine import BLOCK_BYTES, prompt

NAMES = [None, "plain", "attention", "linears", "last_layer"]
SALTS = ["", "", "tenant"]
tokens = st.lists(st.integers(20, 23), max_size=20)


@pytest.fixture(scope="module")
def oracle(tmp_path_factory):
    return PeftOracle(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def start(oracle):
    with engines(oracle) as start:
        yield start


class Interleavings(RuleBasedStateMachine):
    """One engine with few blocks, and one that keeps nothing and is asked for each output alone."""

    ROOTS = tuple(map(root_key, SALTS))
    start = uncached = oracle = None

    @initialize(
        blocks=st.integers(9, 24),
        host_blocks=st.sampled_from([0, 3, 12, 60]),
        budget=st.sampled_from([5, 16, 48]),
        late=st.booleans(),
    )
    def begin(self, blocks, host_blocks, budget, late):
        host = host_blocks * BLOCK_BYTES
        self.engine = self.start(blocks=blocks, host_kv_bytes=host, max_batch_tokens=budget, max_running=4)
        if late:
            self.engine.runner = LateRunner(self.engine.runner)
        self.digests = dict(self.engine.digests)
        self.names = map(str, itertools.count())
        self.texts = [prompt(30)]
        self.asked = {}
        self.outputs = {}

    @rule(
        name=st.sampled_from(NAMES),
        text=st.integers(0, 50),
        cut=st.integers(1, 60),
        more=tokens,
        invocation_start=st.integers(0, 60),
        salt=st.sampled_from(SALTS),
        length=st.integers(1, 12),
        held=st.booleans(),
    )
    def ask(self, name, text, cut, more, invocation_start, salt, length, held):
        token_ids = [*self.texts[text % len(self.texts)][:cut], *more][:100]
        fields = {
            "request_id": next(self.names),
            "token_ids": token_ids,
            "adapter": self.digests[name],
            "invocation_start": min(invocation_start, len(token_ids)) if name in ("attention", "linears") else 0,
            "kv_is_base": name == "last_layer",
            "cache_salt": salt,
        }
        if held and text % 3 == 0:
            with contextlib.suppress(RequestRefused):  # too many, or one of that name
                self.engine.hold_prefix(HoldPrefix(prefix_id=str(text % 4), **fields))
            return
        params = SamplingParams(max_tokens=length, temperature=0.0, ignore_eos=True)
        request = Generate(params=params, **fields)
        self.engine.add_request(request)
        self.asked[request.request_id] = request
        self.outputs[request.request_id] = []

    @rule(times=st.integers(1, 8))
    def step(self, times):
        for _ in range(times):
            steps = self.engine.steps
            for event in self.engine.step():
                self.take(event)
            self.engine.check()
            if self.engine.steps == steps:
                self.engine.wait(timeout=1.0)

    def take(self, event):
        if isinstance(event, Tokens) and event.request_id in self.asked:
            self.outputs[event.request_id] += event.token_ids
            if event.finish_reason:
                self.compare(self.asked.pop(event.request_id), self.outputs[event.request_id])
        elif isinstance(event, Failed) and event.request_id in self.asked:
            request = self.asked.pop(event.request_id)
            assert event.code == "adapter_failed"
            assert request.adapter not in self.digests.values(), "its adapter had been retired"

    def compare(self, request, output):
        [expected] = self.uncached.generate(
            [request.token_ids], request.params, request.adapter, [request.invocation_start]
        )
        assert output == expected.token_ids
        self.texts.append([*request.token_ids, *output])

    @rule(data=st.data())
    def abort(self, data):
        if self.asked:
            request_id = data.draw(st.sampled_from(sorted(self.asked)))
            self.engine.abort(request_id)
            del self.asked[request_id]

    @rule(prefix=st.integers(0, 3))
    def release(self, prefix):
        self.engine.release_prefix(str(prefix))

    @rule(name=st.sampled_from(["plain", "attention"]), generation=st.integers(0, 2))
    def replace(self, name, generation):
        tensors, config = self.oracle.adapter(name)
        tensors = {key: tensor * (1 + generation) for key, tensor in tensors.items()}
        before = self.digests[name]
        self.uncached.add_adapter(tensors, config)
        self.digests[name] = self.engine.add_adapter(tensors, config)
        if before != self.digests[name]:
            self.engine.retire_adapter(before)

    @rule(name=st.sampled_from(NAMES))
    def drop(self, name):
        self.engine.drop_namespace(self.digests[name])

    @invariant()
    def recount(self):
        if hasattr(self, "engine"):
            self.engine.check()
            self.engine.offload.check(self.ROOTS)

    def teardown(self):
        if hasattr(self, "engine"):
            for prefix in range(4):
                self.release(prefix)
            while self.engine.busy or self.engine.offload.held:
                self.step(1)
            assert self.engine.blocks.used == 0


def test_no_interleaving_changes_an_output(start, oracle):
    Interleavings.start, Interleavings.oracle = staticmethod(start), oracle
    Interleavings.uncached = start(prefix_cache=False)
    run_state_machine_as_test(
        Interleavings,
        settings=settings(
            max_examples=25, stateful_step_count=40, deadline=None, suppress_health_check=list(HealthCheck)
        ),
    )
