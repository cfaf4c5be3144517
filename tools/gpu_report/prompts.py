"""Time to first token: prompts under adapters, adapters that do not fit the device, aLoRA after a conversation."""

from collections.abc import Iterator

from tools.gpu_report.bench import Bench
from tools.gpu_report.rows import Goal, Rounds, Row, speed

PREFILL_SHARE = 95.0  # % of the base's speed
COLD_TIMES = 2.0  # the most times as long as with adapters that fit


def prefill(bench: Bench) -> Iterator[Row]:
    """New prompts on the base and under an adapter, in turn."""
    plan, floors = bench.plan, bench.floors
    (adapter,) = bench.adapters(1, plan.rank)
    bench.load([adapter])
    for tokens in plan.prefill:
        plain, adapted = _in_turn(bench, plan.prefill_rounds, tokens, adapter)
        yield Row(name=f"{tokens} tokens", rounds=plain, floor=floors.prefill(tokens))
        share = Goal("% of the base's speed", 100 * speed(adapted, plain), PREFILL_SHARE, at_least=True)
        floor = floors.prefill(tokens, rank=plan.rank)
        yield Row(name=f"{tokens} tokens, 1×r{plan.rank}", rounds=adapted, base=plain, floor=floor, goal=share)


def _in_turn(bench: Bench, rounds: int, tokens: int, adapter: str) -> tuple[Rounds, Rounds]:
    times: dict[str | None, Rounds] = {None: [], adapter: []}
    for number in range(rounds):
        for name in (None, adapter)[:: -1 if number % 2 else 1]:
            times[name].append([bench.first_token(bench.prompt(tokens), name)])
    return times[None], times[adapter]


def working_set(bench: Bench) -> Iterator[Row]:
    """One request at a time, each to the next adapter. With twice as many adapters as fit, every request loads one."""
    plan, floors = bench.plan, bench.floors
    digests = bench.adapters(2 * plan.tier, plan.rank)
    bench.load(digests, "host")
    for tokens in plan.first_token_prompts:
        floor = floors.prefill(tokens, rank=plan.rank)
        bench.load(digests[: plan.tier])
        bench.first_token(bench.prompt(tokens), digests[0])
        warm = [bench.first_token(bench.prompt(tokens), digest) for digest in digests[: plan.tier]]
        name = f"{plan.tier} adapters, {tokens} tokens"
        yield Row(name=f"1×: {name}", rounds=[warm], floor=floor)
        loads = bench.engine.adapters.device.loads
        in_turn = [*digests[plan.tier :], *digests[: plan.tier]]
        cold = [bench.first_token(bench.prompt(tokens), digest) for digest in in_turn]
        missed = bench.engine.adapters.device.loads - loads
        goal = Goal("times as long as 1×", 1 / speed([cold], [warm]), COLD_TIMES)
        name = f"{len(digests)} adapters, {tokens} tokens"
        note = f"{missed} of {len(cold)} requests loaded their adapter"
        floor += floors.load(plan.rank)
        yield Row(name=f"2×: {name}", rounds=[cold], base=[warm], floor=floor, goal=goal, note=note)


def alora(bench: Bench) -> Iterator[Row]:
    """A conversation on the base, then an adapter on the conversation and a suffix, as LoRA and as aLoRA.

    The LoRA applies from the first token. The aLoRA's invocation begins the suffix, so it reuses the base's K/V.
    """
    plan, floors = bench.plan, bench.floors
    (adapter,) = bench.adapters(1, plan.rank)
    bench.load([adapter])
    for length, goal in plan.alora:
        lora: Rounds = []
        invoked: Rounds = []
        for number in range(plan.alora_rounds + 1):
            conversation = bench.prompt(length)
            bench.first_token(conversation)
            prompt = [*conversation, *bench.prompt(plan.alora_suffix)]
            for into, invocation_start in ((lora, 0), (invoked, length))[:: -1 if number % 2 else 1]:
                into.append([bench.first_token(prompt, adapter, invocation_start)])
        del lora[0], invoked[0]  # the first round may have compiled kernels
        total = length + plan.alora_suffix
        yield Row(name=f"LoRA after {length}", rounds=lora, floor=floors.prefill(total, rank=plan.rank))
        times = Goal("times as fast as LoRA", speed(invoked, lora), goal, at_least=True)
        floor = floors.prefill(plan.alora_suffix, length, plan.rank)
        yield Row(name=f"aLoRA after {length}", rounds=invoked, base=lora, floor=floor, goal=times)
