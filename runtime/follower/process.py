"""A rank that follows, as a process of its own: commands in and reports out over a socket that it inherits.

usage: python -m runtime.follower.process --parent=PID DESCRIPTOR

It ends when rank 0 closes the socket, and is killed when rank 0 ends, whatever it is doing.
"""

import argparse
import gc
import logging
import os
import signal
import sys
import threading
from multiprocessing.connection import Connection

from runtime.output.logs import write_lines
from runtime.parallel.commands import Failed, Joining, Ready, Report, Start, decode_command, encode
from runtime.parallel.group import GroupFailed
from runtime.parent import die_with

FAILED = 1  # the exit status
SWITCH_SECONDS = 0.0005  # as in runtime.process


def main(connection: "Connection[bytes, bytes]") -> None:
    start = decode_command(connection.recv_bytes())
    assert isinstance(start, Start)
    write_lines(start.config.log_format, "ERROR")  # rank 0 says what all ranks would say
    sending = threading.Lock()

    def report(message: Report) -> None:
        with sending:
            connection.send_bytes(encode(message))

    try:
        from runtime.follower.follower import Follower  # which takes seconds

        report(Joining())
        follower = Follower(start, report)
        report(Ready())
        sys.setswitchinterval(SWITCH_SECONDS)
        gc.collect()
        gc.freeze()
        while True:
            follower.obey(decode_command(connection.recv_bytes()))
    except (EOFError, ConnectionError):
        return  # rank 0 does not need it any more
    except GroupFailed as error:  # rank 0 knows better why
        report(Failed(_line(error), group=True))
        raise
    except Exception as error:
        logging.getLogger("runtime.follower").exception("rank %d failed", start.rank)
        report(Failed(_line(error)))
        raise


def _line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0]


if __name__ == "__main__":
    arguments = argparse.ArgumentParser(prog="python -m runtime.follower.process")
    arguments.add_argument("--parent", type=int, required=True, help="process id of rank 0")
    arguments.add_argument("descriptor", type=int, help="the socket, a file descriptor")
    given = arguments.parse_args()
    die_with(given.parent)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C in a terminal is rank 0's to answer
    status = FAILED
    try:
        main(Connection(given.descriptor))
        status = 0
    finally:
        os._exit(status)  # at once: threads may wait for a rank that is gone
