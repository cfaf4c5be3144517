"""A rank that cannot load its part of the model."""

import sys
from multiprocessing.connection import Connection

from runtime.parallel.commands import Failed, decode_command, encode

if __name__ == "__main__":
    connection = Connection(int(sys.argv[2]))
    decode_command(connection.recv_bytes())
    connection.send_bytes(encode(Failed("ValueError: the file is gone")))
