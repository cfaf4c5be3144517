"""Ranks as threads of this process, for tests of what ranks compute: a process takes seconds to start.

What they send goes over Gloo and pipes all the same. `test_ranks.py` has them as processes.
"""

import contextlib
import threading
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from multiprocessing import Pipe

import pytest
import torch

from runtime.follower import process
from runtime.parallel import followers, group
from runtime.parallel.group import RankGroup

PATIENCE = timedelta(seconds=60)  # with a rank that has failed


def on_ranks(size, store, compute):
    """[compute(group of each rank)], computed together."""

    def rank_of(rank):
        with torch.inference_mode():
            return compute(RankGroup.join(rank, size, str(store), torch.device("cpu")))

    with pytest.MonkeyPatch.context() as patch, ThreadPoolExecutor(size) as threads:
        patch.setattr(group, "TIMEOUT", PATIENCE)
        return list(threads.map(rank_of, range(size)))


class ThreadedFollower(followers._Follower):
    """A rank that follows, as `runtime.follower.process` runs it, on a thread."""

    def __init__(self, rank):
        self.rank = rank
        self.connection, theirs = Pipe()
        self.process = None
        self.stages = followers.queue.SimpleQueue()
        self._sending = threading.Lock()
        self._thread = threading.Thread(target=self._run, args=(theirs,), daemon=True)
        self._thread.start()

    def _run(self, theirs):
        with contextlib.closing(theirs), contextlib.suppress(Exception):
            process.main(theirs)

    def end(self):
        self.hang_up()
        self._thread.join(20)
        assert not self._thread.is_alive()
        return "it ended"


@contextlib.contextmanager
def ranks_as_threads():
    """Engines that start meanwhile have their other ranks here."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(followers, "_Follower", ThreadedFollower)
        patch.setattr(process, "write_lines", lambda *arguments: None)
        patch.setattr(process.gc, "freeze", lambda: None)
        patch.setattr(process.sys, "setswitchinterval", lambda seconds: None)
        patch.setattr(group, "TIMEOUT", PATIENCE)
        yield
