"""Two ranks, the second of which is killed; the first says that its connection ended before that is known."""

import os
import signal
import sys
import time
from multiprocessing.connection import Connection

from runtime.parallel.commands import Failed, decode_command, encode

if __name__ == "__main__":
    connection = Connection(int(sys.argv[2]))
    if decode_command(connection.recv_bytes()).rank == 1:
        connection.send_bytes(encode(Failed("GroupFailed: connection closed by peer", group=True)))
        sys.exit(1)
    time.sleep(0.3)
    os.kill(os.getpid(), signal.SIGKILL)
