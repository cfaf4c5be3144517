import pytest

from runtime.scheduler import QueueFull
from tests.runtime.scheduler_fakes import FakeAdapters, FakeOffload, request, scheduler, step


def test_a_long_prompt_is_computed_in_chunks_under_the_budget_beside_decoding_ones():
    s = scheduler(budget=8)
    short, long = request(3), request(20)
    s.add(short)
    s.add(long)
    assert step(s) == {short: (0, 3), long: (0, 5)}
    assert step(s) == {short: (3, 1), long: (5, 7)}
    assert step(s) == {short: (4, 1), long: (12, 7)}
    assert long.num_generated == 0
    assert step(s) == {short: (5, 1), long: (19, 1)}
    assert long.num_generated == 1


def test_a_long_prompt_shares_the_budget_with_those_that_come_after_it():
    s = scheduler(budget=8)
    long = request(40)
    s.add(long)
    assert step(s) == {long: (0, 8)}
    short, other = request([8] * 2), request([9] * 3)
    s.add(short)
    s.add(other)
    assert step(s) == {long: (8, 4), short: (0, 2), other: (0, 2)}
    assert step(s) == {long: (12, 6), short: (2, 1), other: (2, 1)}, "each decoding one has its token beside the prompt"


def test_what_nobody_could_be_admitted_for_goes_to_the_prompts_under_way():
    adapters = FakeAdapters()
    s = scheduler(budget=8, adapters=adapters)
    s.add(long := request(40))
    step(s)
    s.add(request(4, adapter="slow"))
    assert step(s) == {long: (8, 8)}


def test_a_shared_prefix_is_reused_but_its_last_token_is_computed_again():
    s = scheduler()
    first, again, longer = request(12, max_tokens=1), request(12), request(14)
    s.add(first)
    step(s)
    s.add(again)
    s.add(longer)
    assert step(s) == {again: (11, 1), longer: (12, 2)}
    assert (again.cached_tokens, longer.cached_tokens) == (11, 12)


def test_when_blocks_run_out_the_youngest_is_preempted_and_finishes_later():
    s = scheduler(blocks=6, budget=32)
    old, young = request([1] * 8, max_tokens=10), request([2] * 8, max_tokens=10)
    s.add(old)
    s.add(young)
    for _ in range(40):
        step(s)
    assert s.preemptions > 0
    assert (old.num_generated, young.num_generated) == (10, 10)
    assert not s.running
    assert not s.waiting
    assert s.block_manager.pool.used == 0


def test_a_sequence_whose_adapter_is_loading_is_passed_over_and_keeps_its_place():
    adapters = FakeAdapters()
    s = scheduler(adapters=adapters, running=2)
    slow, base = request(4, adapter="slow"), request(4)
    s.add(slow)
    s.add(base)
    assert adapters.prefetched == ["slow"], "loading starts when the request is queued"
    assert set(step(s)) == {base}
    adapters.resident.add("slow")
    assert set(step(s)) == {base, slow}


def test_a_sequence_whose_kv_come_back_is_passed_over_without_its_adapter_and_keeps_its_place():
    offload = FakeOffload()
    subject = scheduler(offload=offload)
    first, early, other = (
        request(5, adapter="a"),
        request(9, adapter="missing", invocation_start=8, first=20),
        request(3),
    )
    for each in (first, early, other):
        subject.add(each)
    offload.reloading = {first, early}
    chunks, _ = subject.schedule()
    assert [chunk.request for chunk in chunks] == [other]
    assert list(subject.waiting) == [first, early]
    assert not subject.adapters.references["a"]
    subject.check()
    offload.reloading = set()
    chunks, _ = subject.schedule()
    assert [chunk.request for chunk in chunks] == [other, first, early], "early may still begin without its adapter"


def test_every_request_keeps_a_place_in_line_for_its_adapter_until_it_acquires_it_or_ends():
    adapters = FakeAdapters()
    s = scheduler(blocks=3, adapters=adapters)
    s.add(old := request([1] * 4, adapter="a", max_tokens=6))
    s.add(young := request([2] * 4, adapter="b", max_tokens=6))
    s.add(slow := request(4, adapter="slow"))
    assert adapters.waiting == {"a": 1, "b": 1, "slow": 1}
    assert set(step(s)) == {old, young}
    assert adapters.waiting == {"a": 0, "b": 0, "slow": 1}
    while not s.preemptions:
        step(s)
    assert list(s.waiting) == [young, slow]
    assert (adapters.waiting["b"], adapters.references["b"]) == (1, 0), "the preempted one waits for its adapter again"
    for each in (young, slow):
        s.remove(each)
    assert not adapters.waiting.total()


def test_a_sequence_whose_adapter_failed_is_handed_back_with_the_reason():
    adapters = FakeAdapters()
    s = scheduler(adapters=adapters)
    adapters.broken.add("c")
    broken = request(4, adapter="c")
    s.add(broken)
    chunks, [(rejected, error)] = s.schedule()
    assert not chunks
    assert rejected is broken
    assert "c is broken" in str(error)
    assert not adapters.waiting.total()
    s.check()


def test_the_queue_is_bounded():
    s = scheduler(running=1, waiting=2)
    for _ in range(3):
        s.add(request(4))
    with pytest.raises(QueueFull):
        s.add(request(4))


def test_preemption_keeps_tokens_and_invocation_and_releases_the_adapter():
    adapters = FakeAdapters()
    s = scheduler(blocks=6, adapters=adapters, budget=32)
    s.add(request([1] * 8, max_tokens=12, adapter="a"))
    young = request([2] * 8, max_tokens=12, adapter="b", invocation_start=5)
    s.add(young)
    while not s.preemptions:
        step(s)
    assert young.computed == 0
    assert young.num_generated > 0
    assert young.invocation_start == 5
    assert adapters.references == {"a": 1, "b": 0}


def test_rule_9_a_sequence_runs_up_to_its_invocation_while_its_adapter_loads():
    adapters = FakeAdapters()
    s = scheduler(adapters=adapters, budget=8)
    early, other = request(14, adapter="slow", invocation_start=10), request([9] * 3, max_tokens=20)
    s.add(early)
    s.add(other)
    assert step(s) == {early: (0, 5), other: (0, 3)}
    assert step(s) == {early: (5, 5), other: (3, 1)}, "no chunk reaches past the invocation"
    assert step(s) == {other: (4, 1)}
    assert early in s.waiting
    assert not early.blocks, "it waits without blocks, so that others can run"
    adapters.resident.add("slow")
    assert step(s) == {early: (10, 4), other: (5, 1)}, "to the token, although a block ends at 8 and at 12"
    assert (early.num_generated, s.preemptions) == (1, 0)


def test_rule_9_what_was_computed_early_and_lost_meanwhile_is_computed_again_with_the_adapter():
    adapters = FakeAdapters()
    s = scheduler(adapters=adapters, blocks=6)
    s.add(early := request(10, adapter="slow", invocation_start=8))
    assert step(s) == {early: (0, 8)}
    s.add(large := request([9] * 20, max_tokens=2))
    assert step(s) == {large: (0, 16)}
    assert step(s) == {large: (16, 4)}
    for _ in range(2):
        step(s)
    adapters.resident.add("slow")
    assert step(s) == {early: (0, 10)}


def test_rule_9_an_adapter_that_is_there_in_time_costs_no_stop():
    adapters = FakeAdapters()
    s = scheduler(adapters=adapters, budget=8)
    s.add(early := request(14, adapter="slow", invocation_start=10))
    assert step(s) == {early: (0, 8)}
    adapters.resident.add("slow")
    assert step(s) == {early: (8, 6)}


def test_rule_9_a_sequence_whose_adapter_fails_on_its_way_is_handed_back_with_the_reason():
    adapters = FakeAdapters()
    s = scheduler(adapters=adapters, budget=8)
    s.add(early := request(14, adapter="slow", invocation_start=10))
    step(s)
    adapters.broken.add("slow")
    chunks, [(rejected, error)] = s.schedule()
    assert (chunks, rejected) == ([], early)
    assert "slow is broken" in str(error)
    s.check()
    assert s.block_manager.pool.used == 0


def test_rule_9_without_base_tokens_left_to_compute_a_sequence_does_not_start_early():
    adapters = FakeAdapters()
    s = scheduler(adapters=adapters)
    s.add(request(10, max_tokens=1))
    step(s)
    s.add(request(10, adapter="slow", invocation_start=8))
    s.add(request(10, adapter="slow", invocation_start=0))
    assert step(s) == {}
