"""python -m service: serve one base model and any number of adapters over HTTP."""

import asyncio
import contextlib
import ipaddress
import logging
import os
import signal
import socket
from collections.abc import Mapping, Sequence
from typing import NoReturn

import msgspec
import uvicorn

from runtime.models.config_file import UnsupportedModel
from service.app import create_app
from service.configure import configure
from service.default_model import DefaultModelMissing
from service.door.server import Server, allow_descriptors
from service.engine.process import EngineStartFailed
from service.keys.keys_file import KeysFileError
from service.kv.events import EventsUnavailable
from service.logs import say, set_up, shows_bars
from service.options.parser import BAD_VALUE
from service.settings import Settings, read
from service.text.tokenizer import TokenizerMissing
from service.traces.tracing import TracesMissing
from storage.store import StoreError

BACKLOG = 2048  # connections that the system accepts before the service does
CANNOT_START = 1  # the exit status, beside BAD_VALUE

BANNER = """
Rootstock serves {name} at {url}

  upload an adapter:  curl -X PUT {url}/adapters/mine -F adapter_config.json=@adapter_config.json \\
                           -F adapter_model.safetensors=@adapter_model.safetensors{key}
  chat with it:       curl {url}/v1/chat/completions -H 'content-type: application/json'{key} \\
                           -d '{{"model": "mine", "messages": [{{"role": "user", "content": "Hello"}}]}}'
  or with the base:   the same with "model": "{name}"
"""


def main(argv: Sequence[str] | None = None, environment: Mapping[str, str] | None = None) -> None:
    """Serve until a signal. None stands for the process's own command line or environment.

    A bad value ends the program with a sentence and status 2, an engine or a store that does not answer with 1.
    """
    arguments = read(argv, environment)
    set_up(arguments.log_level, arguments.log_format)
    try:
        settings = configure(arguments)
    except (ValueError, DefaultModelMissing) as error:
        refuse(str(error), BAD_VALUE)
    engine = msgspec.structs.replace(settings.engine, bars=shows_bars())
    settings = msgspec.structs.replace(settings, engine=engine)
    allow_descriptors(settings.max_connections)
    listener = listen(settings)
    loop_factory = uvicorn.Config("", loop="uvloop", log_config=None).get_loop_factory()
    try:
        with listener, asyncio.Runner(loop_factory=loop_factory) as runner:
            runner.run(serve(settings, listener))
    except (UnsupportedModel, TokenizerMissing, KeysFileError, TracesMissing, EventsUnavailable) as error:
        refuse(str(error), BAD_VALUE)
    except (EngineStartFailed, StoreError) as error:
        refuse(str(error), CANNOT_START)


def listen(settings: Settings) -> socket.socket:
    """Bind the port before the model is loaded, so that a port in use is reported at once."""
    try:
        found = socket.getaddrinfo(settings.host, settings.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        family, kind, protocol, _, address = found[0]
        listener = socket.socket(family, kind, protocol)
        try:
            keyed = settings.api_key or settings.keys_file
            if not (keyed or settings.insecure or ipaddress.ip_address(address[0]).is_loopback):
                advice = "set --keys-file or --api-key, or --insecure"
                refuse(f"{settings.host} is not this machine's own address: {advice}", BAD_VALUE)
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(address)
        except BaseException:
            listener.close()
            raise
    except OSError as error:
        refuse(f"cannot listen on {settings.host}:{settings.port}: {error.strerror}", BAD_VALUE)
    return listener


async def serve(settings: Settings, listener: socket.socket) -> None:
    """Start the engine, serve until a signal, end the engine."""
    app = create_app(settings)
    loop, task = asyncio.get_running_loop(), asyncio.current_task()
    assert task is not None
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, task.cancel)
    say(f"starting the engine: loading {settings.engine.model}")
    with contextlib.suppress(asyncio.CancelledError):  # a signal during the start of the engine: no request is open
        async with app.router.lifespan_context(app):
            server = Server(app, lifespan="off")
            for number in (signal.SIGINT, signal.SIGTERM):
                loop.remove_signal_handler(number)
                signal.signal(number, server.handle_exit)  # uvicorn sets it later, and raises signals again at its end
            listener.listen(BACKLOG)
            say_where(settings, listener)
            await server.serve([listener])


def say_where(settings: Settings, listener: socket.socket) -> None:
    """Write the banner."""
    host, port = listener.getsockname()[:2]
    url = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
    keyed = settings.api_key is not None or settings.keys_file is not None
    key = " -H 'authorization: Bearer KEY'" if keyed else ""
    say(BANNER.format(name=settings.served_name, url=url, key=key))


def refuse(reason: str, status: int) -> NoReturn:
    say(f"rootstock: {reason}", logging.ERROR)
    raise SystemExit(status)


if __name__ == "__main__":
    main()
    logging.shutdown()
    os._exit(0)  # without joining threads: one that waits for a store could delay the exit by minutes
