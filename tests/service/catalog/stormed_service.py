"""A service on the fake engine in a process of its own, which a test kills.

usage: python -m tests.service.catalog.stormed_service MODEL DATA. Prints its address once it serves.
"""

import sys
import threading
from pathlib import Path

from service.app import create_app
from service.door.server import Server
from tests.service.live_server import fake_settings, wait_until


def main(model: Path, data: Path) -> None:
    server = Server(create_app(fake_settings(model, data)), port=0)

    def tell() -> None:
        wait_until(lambda: server.started)
        print(f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}", flush=True)

    threading.Thread(target=tell, daemon=True).start()
    server.run()


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
