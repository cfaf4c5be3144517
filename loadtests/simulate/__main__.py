"""Simulates replicas with many adapters under several routers: `python -m loadtests.simulate`.

Prints a table, one row for each router and each value of what is varied, and writes plots. What a step, a load and a
byte of K/V cost comes from a file (--costs); docs/scale.md says what is simulated and what is left out.
"""

import argparse
import json
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from hashlib import blake2b
from pathlib import Path
from typing import NamedTuple

from loadtests.bench.report import say
from loadtests.simulate import costs as cost_tables
from loadtests.simulate import routers
from loadtests.simulate.costs import Costs, Transfer
from loadtests.simulate.figures import Figures, Goal, Run, figures, plots, runs_table
from loadtests.simulate.simulation import Cluster, Simulation
from loadtests.simulate.traffic import Lengths, Traffic, conversations, popular

DEFAULTS = Traffic()
AXES = {  # what can be varied, and how it is named
    "replicas": "replicas",
    "adapters": "adapters",
    "rate": "requests a second and replica",
    "zipf": "exponent of Zipf's law",
    "burst": "burstiness",
    "spread": "spread, of a replica's places",
    "publish-seconds": "seconds between publications",
    "senders": "routers that do not know of each other",
    "kv-bandwidth": "K/V between replicas, GB/s",
}


NOT_OF_A_RUN = {"vary", "axis", "values", "routers", "seed", "seeds", "out", "name", "keep", "processes"}  # options


def options(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m loadtests.simulate",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--vary", nargs="+", default=["replicas", "4", "16"], metavar=("NAME", "VALUE"), help=", ".join(AXES))
    add("--routers", default=",".join(routers.NAMES), help="separated by commas")
    add("--costs", default="gpu-assumed", help="a table in loadtests/simulate/costs, or a file [gpu-assumed]")
    add("--out", type=Path, help="directory of the plots; default: none are written")
    add("--name", default="simulation", help="what the plots' names begin with")
    add("--seed", type=int, default=0)
    add("--seeds", type=int, default=1, help="from --seed on; of several: medians, and the least and the most [1]")
    add("--processes", type=int, default=1, help="that simulate, each one run at a time [1]")
    add("--keep", type=Path, help="directory of runs that ended: they are not simulated again; empty it after changes")
    add("--seconds", type=float, default=60.0, help="for which conversations begin [60]")
    add("--warm-seconds", type=float, default=20.0, help="at the beginning that are not counted [20]")
    add("--first-ms", type=float, default=1000.0, help="goal: first token at the latest [1000]")
    add("--token-ms", type=float, default=50.0, help="goal: from token to token in the mean [50]")
    replicas = parser.add_argument_group("replicas and routers").add_argument
    replicas("--replicas", type=int, default=16)
    replicas("--spread", type=float, default=routers.SPREAD, help=f"ours: see routers.Affinity [{routers.SPREAD}]")
    replicas("--publish-seconds", type=float, default=0.5, help="between two publications of a replica [0.5]")
    replicas("--senders", type=int, default=1, help="routers that send, each without knowing what others send [1]")
    replicas("--kv-bandwidth", type=float, default=0.0, help="GB/s of K/V between replicas; 0: they share none [0]")
    replicas("--kv-latency-ms", type=float, default=2.0, help="before the first byte of them [2]")
    replicas("--adapter-megabytes", type=float, help="of each adapter; default: the table's")
    traffic = parser.add_argument_group("traffic").add_argument
    traffic("--adapters", type=int, default=DEFAULTS.adapters)
    traffic("--rate", type=float, default=5.0, help="requests a second and replica [5]")
    traffic("--zipf", type=float, default=DEFAULTS.zipf, help="exponent of the adapters' popularity [1]")
    traffic("--base-share", type=float, default=DEFAULTS.base_share, help="of the conversations, without adapter [0.1]")
    traffic("--burst", type=float, default=1.0, help="squared coefficient of variation of gaps; 1: Poisson [1]")
    for name, default in (("prompt", DEFAULTS.prompt), ("follow-up", DEFAULTS.follow_up), ("answer", DEFAULTS.answer)):
        shown = " ".join(f"{each:g}" for each in default)
        traffic(f"--{name}", type=float, nargs=3, default=default, metavar=("MEDIAN", "SIGMA", "MOST"), help=shown)
    traffic("--continues", type=float, default=DEFAULTS.continues, help="probability of another turn [0.5]")
    traffic("--pause-seconds", type=float, default=DEFAULTS.pause_seconds, help="mean, before another turn [8]")
    chosen = parser.parse_args(argv)
    check(chosen, parser)
    return chosen


def check(chosen: argparse.Namespace, parser: argparse.ArgumentParser) -> None:
    """Read what is varied and which routers run. Ends the program with a sentence where options make no sense."""
    chosen.axis, values = chosen.vary[0], chosen.vary[1:]
    if chosen.axis not in AXES or not values:
        parser.error(f"--vary takes one of {', '.join(AXES)}, and values for it")
    chosen.routers = chosen.routers.split(",")
    if unknown := [name for name in chosen.routers if name not in routers.NAMES]:
        parser.error(f"there is no router {unknown[0]!r}, only {', '.join(routers.NAMES)}")
    for name in ("seeds", "processes"):
        if getattr(chosen, name) < 1:
            parser.error(f"--{name} must be at least 1, not {getattr(chosen, name)}")
    if chosen.warm_seconds >= chosen.seconds:
        parser.error(f"--warm-seconds must be below --seconds ({chosen.seconds:g}), not {chosen.warm_seconds:g}")
    whole = isinstance(getattr(chosen, attribute(chosen.axis)), int)
    try:
        chosen.values = [int(value) if whole else float(value) for value in values]
    except ValueError as error:
        parser.error(f"--vary {chosen.axis}: {error}")


def attribute(axis: str) -> str:
    return axis.replace("-", "_")


def traffic_of(chosen: argparse.Namespace) -> Traffic:
    prompt, follow_up, answer = (
        Lengths(median, sigma, int(most)) for median, sigma, most in (chosen.prompt, chosen.follow_up, chosen.answer)
    )
    return Traffic(
        adapters=chosen.adapters,
        zipf=chosen.zipf,
        base_share=chosen.base_share,
        requests_per_second=chosen.rate * chosen.replicas,
        seconds=chosen.seconds,
        burst=chosen.burst,
        prompt=prompt,
        follow_up=follow_up,
        answer=answer,
        continues=chosen.continues,
        pause_seconds=chosen.pause_seconds,
    )


class Job(NamedTuple):
    """One run that is asked for."""

    chosen: argparse.Namespace  # with the value of what is varied
    costs: Costs
    router: str
    seed: int

    def figures(self) -> Figures:
        """Return those that are kept, or simulate."""
        if self.chosen.keep is None:
            return simulate(*self)
        options = {name: value for name, value in vars(self.chosen).items() if name not in NOT_OF_A_RUN}
        what = json.dumps([options, cost_tables.as_fields(self.costs), self.router, self.seed], sort_keys=True)
        path = self.chosen.keep / f"{blake2b(what.encode(), digest_size=16).hexdigest()}.json"
        if path.exists():
            return Figures(**json.loads(path.read_text()))
        found = simulate(*self)
        self.chosen.keep.mkdir(parents=True, exist_ok=True)
        written = path.with_suffix(".new")
        written.write_text(json.dumps(found._asdict()))
        written.replace(path)  # an interrupted run leaves no half of a file
        return found


def in_order(jobs: Sequence[Job], processes: int) -> Iterator[Figures]:
    """Yield the figures of the jobs, which run in so many processes."""
    if processes == 1:
        yield from map(Job.figures, jobs)
        return
    with ProcessPoolExecutor(processes) as pool:
        yield from pool.map(Job.figures, jobs)


def simulate(chosen: argparse.Namespace, costs: Costs, router: str, seed: int) -> Figures:
    traffic = traffic_of(chosen)
    size = costs.adapter_bytes if chosen.adapter_megabytes is None else 1e6 * chosen.adapter_megabytes
    link = Transfer(chosen.kv_latency_ms / 1000, 1e9 * chosen.kv_bandwidth) if chosen.kv_bandwidth else None
    cluster = Cluster(
        replicas=chosen.replicas,
        costs=costs,
        sizes=[size] * chosen.adapters,
        on_disk=popular(traffic, seed),
        publish_seconds=chosen.publish_seconds,
        routers=chosen.senders,
        kv_link=link,
        warm_seconds=chosen.warm_seconds,
    )
    began = time.perf_counter()
    simulation = Simulation(cluster, routers.by_name(router, chosen.spread), seed)
    outcome = simulation.run(conversations(traffic, seed))
    took = time.perf_counter() - began
    where = f"{chosen.axis} {getattr(chosen, attribute(chosen.axis)):g}"
    say(f"{where}, {router}, seed {seed}: {len(outcome.requests)} requests, {outcome.events} events in {took:.1f} s")
    goal = Goal(chosen.first_ms / 1000, chosen.token_ms / 1000)
    return figures(outcome, goal, chosen.warm_seconds, chosen.seconds)


def conditions(chosen: argparse.Namespace, costs: Costs) -> str:
    limits = costs.limits
    size = costs.adapter_bytes / 1e6 if chosen.adapter_megabytes is None else chosen.adapter_megabytes
    holds = [1e-6 * each / size for each in (limits.device_bytes, limits.host_bytes, limits.disk_bytes)]
    lengths = ", ".join(
        f"{name} {median:g} (σ {sigma:g}, at most {most:g})"
        for name, (median, sigma, most) in (
            ("prompt", chosen.prompt),
            ("what a later turn adds", chosen.follow_up),
            ("answer", chosen.answer),
        )
    )
    lines = [
        f"Costs: {costs.about}.",
        f"A replica: {holds[0]:.0f} adapters of {size:.3g} MB on the device, {holds[1]:.0f} in host memory, "
        f"{holds[2]:.0f} on the disk; {limits.kv_bytes / costs.kv_bytes_per_token:.0f} tokens of K/V; "
        f"{limits.max_running} requests and {limits.max_batch_tokens} tokens a step. Disks begin with the most popular "
        "adapters, memory empty.",
        f"Traffic: {chosen.rate:g} requests a second and replica, {chosen.adapters} adapters by Zipf({chosen.zipf:g}), "
        f"{chosen.base_share:.0%} of the conversations on the base. Median tokens: {lengths}. Another turn with "
        f"probability {chosen.continues:g}, after {chosen.pause_seconds:g} s in the mean. Squared coefficient of "
        f"variation of gaps {chosen.burst:g}. {chosen.seconds:g} s, the first {chosen.warm_seconds:g} not counted; "
        f"seed {chosen.seed}{f' to {chosen.seed + chosen.seeds - 1}' if chosen.seeds > 1 else ''}.",
        f"{chosen.replicas} replicas publish every {chosen.publish_seconds:g} s to {chosen.senders} router(s); "
        f"spread {chosen.spread:g} of a replica's places.",
        f"Goal: first token within {chosen.first_ms:g} ms, and {chosen.token_ms:g} ms a token in the mean.",
        f"What is varied ({chosen.axis}) has the values of the table.",
    ]
    return "\n".join(f"- {line}" for line in lines)


def main(argv: Sequence[str] | None = None) -> None:
    chosen = options(argv)
    costs = cost_tables.read(chosen.costs)
    stated, seeds = conditions(chosen, costs), range(chosen.seed, chosen.seed + chosen.seeds)
    points = []
    for value in chosen.values:
        setattr(chosen, attribute(chosen.axis), value)
        points += [(router, value, argparse.Namespace(**vars(chosen))) for router in chosen.routers]
    jobs = [Job(at, costs, router, seed) for router, _, at in points for seed in seeds]
    found = in_order(jobs, chosen.processes)
    runs = [Run(router, value, [next(found) for _ in seeds]) for router, value, _ in points]
    if chosen.out:
        chosen.out.mkdir(parents=True, exist_ok=True)
        for name, drawn in plots(AXES[chosen.axis], runs).items():
            (chosen.out / f"{chosen.name}-{name}.svg").write_text(drawn)
    print(f"{runs_table(AXES[chosen.axis], runs)}\n\n{stated}")


if __name__ == "__main__":
    try:
        main()
    except ValueError as error:
        sys.exit(f"failed: {error}")
    except KeyboardInterrupt:
        sys.exit("interrupted")
