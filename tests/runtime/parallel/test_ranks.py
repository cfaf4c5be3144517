"""Ranks as processes: their start, the tokens of an engine on them, and their end, whoever ends first."""

import json
import os
import signal
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file

from runtime.config import MIB, EngineConfig
from runtime.cpu.choice import threads_of
from runtime.engine import Engine
from runtime.messages import Ready, SamplingParams, Tokens
from runtime.parallel import followers, group
from runtime.parallel.followers import Followers
from runtime.parallel.group import GroupFailed
from tests.runtime.engine_peer import Peer, generate
from tests.runtime.parallel.rank_threads import PATIENCE
from tests.runtime.test_process import Served
from tests.runtime.tiny_engine import ADAPTER_CONFIG, GREEDY, adapter_tensors, prompt
from tests.runtime.tiny_model import TINY

DEADLINE_SECONDS = 30.0
MODULES = ("self_attn.q_proj", "self_attn.v_proj", "mlp.down_proj")
TARGETS = {"target_modules": ["q_proj", "v_proj", "down_proj"]}


def config(directory, **options):
    (directory / "config.json").write_text(json.dumps(TINY))
    sizes = {"kv_cache_bytes": MIB, "adapter_bytes": MIB, "host_adapter_bytes": MIB, "max_model_len": 128}
    defaults = {"load_format": "dummy", "threads": 1, "kernels": "torch"}
    return EngineConfig(model=str(directory), **sizes | defaults | options)


def alive(pid):
    """Whether a process runs: one that has ended and waits for its parent does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def wait_until(condition):
    deadline = time.monotonic() + DEADLINE_SECONDS
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.02)


def children(pid):
    """The processes that a process's first thread has started."""
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def outputs(engine):
    digest = engine.add_adapter(adapter_tensors(), ADAPTER_CONFIG)
    prompts = [prompt(60, seed) for seed in range(4)]
    found = engine.generate(prompts, GREEDY, [None, digest, None, digest], [None, None, None, 20])
    return [completion.token_ids for completion in found]


@pytest.mark.parametrize("size", [2, 4])
def test_tokens_are_those_of_one_rank(tmp_path, size):
    """Four requests on blocks for two, so that K/V go to host memory and come back."""
    alone = Engine(config(tmp_path))
    expected = outputs(alone)
    assert alone.stats().ranks is None
    alone.close()
    blocks = 10 * alone.runner.kv.block(0).nbytes // 2
    engine = Engine(config(tmp_path, tensor_parallel_size=size, kv_cache_bytes=blocks, host_kv_bytes=MIB))
    pids = engine.runner.followers.pids
    assert len(pids) == size - 1
    assert outputs(engine) == expected
    assert engine.scheduler.preemptions > 0
    assert engine.stats().host_kv.stores > 0
    sent, commands = engine.runner.group.bytes_sent, engine.stats().ranks.command_bytes
    steps = engine.steps
    engine.generate([prompt(30, 9)], GREEDY)
    rows = 30 + GREEDY.max_tokens - 1
    ranks = engine.stats().ranks
    assert ranks.summed_bytes - sent == 2 * 2 * rows * TINY["hidden_size"] * 4
    assert 0 < ranks.command_bytes - commands < (size - 1) * GREEDY.max_tokens * 100
    assert engine.steps - steps == GREEDY.max_tokens
    engine.check()
    engine.close()
    assert not any(map(alive, pids))


def test_an_engine_whose_rank_is_killed_ends_with_its_reason(tmp_path):
    """While it is idle: nothing but the end itself tells."""
    config(tmp_path)
    engine = Peer(tmp_path, tensor_parallel_size=3, kernels="torch")
    engine.next(Ready)
    engine.send(generate("good"))
    assert engine.next(Tokens).request_id == "good"
    first, second = children(engine.process.pid)
    os.kill(second, signal.SIGKILL)
    _, stderr = engine.process.communicate(timeout=DEADLINE_SECONDS)
    assert engine.process.returncode == 4
    assert stderr.splitlines()[-1] == "engine: rank 2: it was ended by SIGKILL"
    wait_until(lambda: not alive(first))
    engine.close()


@pytest.mark.parametrize("stopped", [False, True])
def test_an_engine_whose_rank_is_killed_in_a_step_names_that_rank(tmp_path, stopped):
    """All others lose their connections to it, and see that before its own end is known."""
    config(tmp_path)
    engine = Peer(tmp_path, tensor_parallel_size=3, kernels="torch")
    engine.next(Ready)
    engine.send(generate("long", max_tokens=120))
    engine.next(Tokens)
    _, second = children(engine.process.pid)
    if stopped:
        os.kill(second, signal.SIGSTOP)  # the others wait for it in the middle of a step
        time.sleep(0.3)
    os.kill(second, signal.SIGKILL)
    _, stderr = engine.process.communicate(timeout=DEADLINE_SECONDS)
    assert engine.process.returncode == 4
    assert stderr.splitlines()[-1] == "engine: rank 2: it was ended by SIGKILL"
    engine.close()


def test_the_rank_that_ended_first_is_named_whoever_reports_first(tmp_path, monkeypatch):
    monkeypatch.setattr(followers, "PROGRAM", "tests.runtime.parallel.late_followers")
    ranks = Followers()
    with pytest.raises(ValueError, match=r"^rank 2: it was ended by SIGKILL$"):
        ranks.start(config(tmp_path, tensor_parallel_size=3))
    assert ranks.reason() == "rank 2: it was ended by SIGKILL"
    ranks.close()


def test_a_lost_connection_is_the_reason_where_no_rank_ends(tmp_path, monkeypatch):
    """The first of `late_followers` alone."""
    monkeypatch.setattr(followers, "PROGRAM", "tests.runtime.parallel.late_followers")
    monkeypatch.setattr(followers, "FIRST_SECONDS", 0.1)
    ranks = Followers()
    with pytest.raises(ValueError, match=r"^rank 1: GroupFailed: connection closed by peer$"):
        ranks.start(config(tmp_path, tensor_parallel_size=2))
    ranks.close()


@pytest.mark.parametrize("seconds", [0, 2])
def test_no_rank_outlives_an_engine_that_is_killed_while_it_starts(tmp_path, seconds):
    """At once, when Python has hardly begun in it; and later, when it imports or joins."""
    config(tmp_path)
    engine = Peer(tmp_path, tensor_parallel_size=2, kernels="torch")
    wait_until(lambda: children(engine.process.pid))
    time.sleep(seconds)
    [follower] = children(engine.process.pid)
    engine.process.kill()
    engine.process.wait()
    wait_until(lambda: not alive(follower))
    engine.close()


def test_a_rank_that_cannot_start_says_why(tmp_path, monkeypatch):
    """Its part of the checkpoint cannot be read: here the follower is another program."""
    before = children(os.getpid())  # servers that tests share
    monkeypatch.setattr(followers, "PROGRAM", "tests.runtime.parallel.unable_follower")
    with pytest.raises(ValueError, match=r"^rank 1: ValueError: the file is gone$"):
        Engine(config(tmp_path, tensor_parallel_size=2))
    assert children(os.getpid()) == before


def test_a_start_whose_ranks_cannot_meet_says_what_gloo_says(monkeypatch):
    def join():
        raise GroupFailed("no route to host")

    monkeypatch.setattr(followers, "FIRST_SECONDS", 0.1)
    with pytest.raises(ValueError, match=r"^the ranks cannot meet: no route to host$"):
        Followers().meet(join)


def test_a_rank_that_ends_before_it_has_joined_ends_the_start(tmp_path, monkeypatch):
    """The others wait for it in Gloo, which would do so for minutes."""
    before = children(os.getpid())
    monkeypatch.setattr(followers, "PROGRAM", "tests.runtime.parallel.leaving_follower")
    monkeypatch.setattr(group, "TIMEOUT", PATIENCE)
    started = time.monotonic()
    with pytest.raises(ValueError, match=r"^rank 2: it was ended by SIGKILL$"):
        Engine(config(tmp_path, tensor_parallel_size=3))
    assert time.monotonic() - started < DEADLINE_SECONDS
    assert children(os.getpid()) == before


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kernels": "compiled"}, r"tensor_parallel_size .* is 2, and kernels \(--kernels\) compiled .* torch or auto"),
        (
            {"quantization": "int8"},
            r"tensor_parallel_size .* is 2, and quantization \(--quantization\) int8 .* serve a checkpoint",
        ),
    ],
)
def test_what_ranks_cannot_do_is_refused_by_name(tmp_path, options, message):
    before = children(os.getpid())
    with pytest.raises(ValueError, match=message):
        Engine(config(tmp_path, tensor_parallel_size=2, device="cpu", **options))
    assert children(os.getpid()) == before


def test_ranks_share_the_cores_where_no_threads_are_asked_for(tmp_path):
    cores = len(os.sched_getaffinity(0))
    assert threads_of(config(tmp_path, threads=None, tensor_parallel_size=2)) == max(cores // 2, 1)
    assert threads_of(config(tmp_path, threads=3, tensor_parallel_size=2)) == 3


def test_a_step_that_fails_on_rank_0_ends_the_engine(tmp_path):
    """The others are in the middle of that step, and would take the numbers of the next one for its."""
    served = Served(tmp_path, ["the device stumbled"], tensor_parallel_size=2, kernels="torch")
    pids = served.engine.runner.followers.pids
    assert served.end_of("r") is None
    served.close()
    assert served.broken == "a step of several ranks failed: RuntimeError: the device stumbled"
    assert not any(map(alive, pids))


def test_the_triton_runner_computes_the_same_on_two_ranks(tmp_path):
    """In Triton's interpreter, over Gloo: the calls are those that NCCL gets on GPUs, where they have never run."""
    short = SamplingParams(max_tokens=3, temperature=0.0, ignore_eos=True)
    found = []
    for size in (1, 2):
        engine = Engine(config(tmp_path, kernels="triton", tensor_parallel_size=size, max_running=4))
        digest = engine.add_adapter(adapter_tensors(modules=MODULES), ADAPTER_CONFIG | TARGETS)
        completions = engine.generate([prompt(20, 1), prompt(9, 2)], short, [None, digest])
        found.append([completion.token_ids for completion in completions])
        engine.check()
        engine.close()
    assert found[1] == found[0]


def test_smollm2_with_nine_heads_gives_its_tokens_on_two_ranks(default_model_path, trained_adapters):
    """Of twelve heads on two ranks three are zeros."""
    directory = trained_adapters / "vault"
    vault = (
        load_file(directory / "adapter_model.safetensors"),
        json.loads((directory / "adapter_config.json").read_text()),
    )
    sizes = {"kv_cache_bytes": 64 * MIB, "adapter_bytes": 64 * MIB, "host_adapter_bytes": 64 * MIB}
    found, blocks = [], []
    for size in (1, 2):
        engine = Engine(
            EngineConfig(
                model=str(default_model_path),
                dtype="float32",
                device="cpu",
                kernels="torch",
                threads=1,
                max_model_len=256,
                tensor_parallel_size=size,
                **sizes,
            )
        )
        digest = engine.add_adapter(*vault)
        prompts = [[token % 40_000 for token in prompt(50, seed)] for seed in range(3)]
        completions = engine.generate(prompts, GREEDY, [None, digest, digest], [None, 10, 20])
        found.append([completion.token_ids for completion in completions])
        blocks.append(engine.runner.kv.block(0).nbytes)
        engine.close()
    assert found[1] == found[0]
    assert blocks[1] * 3 == blocks[0] * 2, "two K/V heads of three"
