"""An S3 client whose calls can be ended while they wait for the server."""

from collections.abc import Callable, Mapping
from concurrent.futures import Executor, Future
from contextlib import suppress
from typing import Any, TypeVar

from storage.s3_errors import url
from storage.sockets import OpenSockets
from storage.store import StoreUnavailable

_Result = TypeVar("_Result")


def ended_with(sockets: OpenSockets, client: Any, bucket: str) -> None:
    """Have a client's calls fail with `StoreUnavailable`, soon and for good, when `sockets` are closed."""

    def refuse(**_: object) -> None:
        if sockets.closed.is_set():
            raise StoreUnavailable(f"s3://{bucket}: the store was closed")

    def watched(pool_class: Callable[..., Any]) -> Callable[..., Any]:
        def new_pool(*arguments: Any, **options: Any) -> Any:
            pool = pool_class(*arguments, **options)
            connection_class = pool.ConnectionCls

            def new_connection(*arguments: Any, **options: Any) -> Any:
                connection = connection_class(*arguments, **options)
                connect = connection.connect

                def connect_and_note() -> None:
                    connect()
                    sockets.add(connection.sock)

                connection.connect = connect_and_note
                return connection

            pool.ConnectionCls = new_connection
            return pool

        return new_pool

    client.meta.events.register("before-send.s3", refuse)  # also before each retry
    # botocore has no other way to its connections. If it is no longer there, closing waits for one silence.
    with suppress(AttributeError):
        pool_classes = client._endpoint.http_session._pool_classes_by_scheme
        pool_classes.update({scheme: watched(pool_class) for scheme, pool_class in pool_classes.items()})


def submit(
    threads: Executor, where: Mapping[str, str], call: Callable[..., _Result], *arguments: Any
) -> Future[_Result]:
    """Have a thread of the store do a part of a transfer; `StoreUnavailable` when the store has been closed."""
    try:
        return threads.submit(call, *arguments)
    except RuntimeError as error:
        raise StoreUnavailable(f"{url(where)}: the store was closed") from error
