"""A process that must not outlive its parent."""

import ctypes
import os
import signal
import sys
import threading
import time

PR_SET_PDEATHSIG = 1  # of Linux: prctl(2)
POLL_SECONDS = 0.5
ORPHANED = 0  # the exit status: nobody is left who could want another one


def die_with(parent: int) -> None:
    """End this process when the process `parent` ends, from now on and whatever this one is doing.

    On Linux the kernel kills it, when the thread that started it ends. Elsewhere a thread looks for its parent.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    else:
        threading.Thread(target=_watch, args=(parent,), name="parent", daemon=True).start()
    if os.getppid() != parent:  # it ended before that
        os._exit(ORPHANED)


def _watch(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(POLL_SECONDS)
    os._exit(ORPHANED)
