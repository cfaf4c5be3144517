"""A rank that follows: its part of the model, and what it does at each command."""

from collections.abc import Callable

import torch

from runtime.cpu.choice import threads_of
from runtime.follower.adapters import FollowedAdapters
from runtime.follower.steps import chunks_of
from runtime.kv.cache import KvCopy
from runtime.kv.transfer import BlockTransfer
from runtime.parallel.commands import AwaitOffloads, Command, Done, Fill, Offload, Reload, Report, Start, Step
from runtime.parallel.group import RankGroup
from runtime.runner import device_of, load_part


class Follower:
    """Computes what rank 0 computes, with another part of the model; it decides nothing."""

    def __init__(self, start: Start, report: Callable[[Report], None]) -> None:
        config, device = start.config, device_of(start.config, start.rank)
        if device.type == "cuda":
            torch.cuda.set_device(device)
        torch.set_num_threads(threads_of(config))
        group = RankGroup.join(start.rank, config.tensor_parallel_size, start.store, device)
        self._runner = runner = load_part(config, group)
        self._adapters = FollowedAdapters(runner, config, report)
        runner.start(self._adapters)
        self._transfer = BlockTransfer(runner.kv, runner.num_host_blocks, self._adapters.pacer)
        self._report = report

    def obey(self, command: Command) -> None:
        match command:
            case Step():
                self._compute(command)
            case Fill():
                self._adapters.fill(command)
            case Offload(block, slot):
                self._transfer.offload(block, slot)
            case AwaitOffloads(blocks):
                self._transfer.wait_offloaded(blocks)
            case Reload(ticket=ticket, slots=slots, blocks=blocks):
                reloading = self._transfer.reload(slots, blocks)
                reloading.add_done_callback(lambda done: self._answer(ticket, done.exception()))

    def _compute(self, step: Step) -> None:
        self._adapters.place(step.places)
        self._runner.prepare(chunks_of(step))
        self._runner.kv.copy([KvCopy(*copy) for copy in step.copies])
        with self._adapters.pacer.computing():
            self._runner.compute()

    def _answer(self, ticket: int, error: BaseException | None) -> None:
        self._report(Done(ticket) if error is None else Done(ticket, str(error), type(error).__name__))
