"""Connections that are open, so that what waits on them can be ended."""

import socket
from contextlib import suppress
from threading import Event, Lock
from weakref import WeakSet


class OpenSockets:
    """The connections of one client: after `close`, whoever reads from them meets their end, on whatever thread."""

    def __init__(self) -> None:
        self.closed = Event()
        self._sockets: WeakSet[socket.socket] = WeakSet()
        self._lock = Lock()

    def add(self, opened: socket.socket) -> None:
        with self._lock:
            self._sockets.add(opened)
            if self.closed.is_set():
                _end(opened)

    def discard(self, opened: socket.socket) -> None:
        with self._lock:
            self._sockets.discard(opened)

    def close(self) -> None:
        with self._lock:
            self.closed.set()
            for opened in self._sockets:
                _end(opened)


def _end(opened: socket.socket) -> None:
    with suppress(OSError):  # it has ended already
        socket.socket.shutdown(opened, socket.SHUT_RDWR)  # not TLS's own, which is not for another thread
