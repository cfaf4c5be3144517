"""Sources whose bytes come when a test says so."""

import threading
from pathlib import Path

from service.errors import RequestError
from service.ingest.bundle import CONFIG, WEIGHTS, Bundle
from service.ingest.sources import Fetched, Sources
from service.settings import Settings
from service.source_urls import Source
from storage.store import OnProgress
from tests.service.adapters.adapter_bundles import bundle

TOTAL = 1000


class GatedSources(Sources):
    """Fetches half of the adapter and waits until `gate` is open; it fails with `error`, if there is one.

    `deaf` makes it as one that waits for a store: it does not notice that nobody wants the adapter any more.
    The seed of a source's adapter is the last part of its URL.
    """

    def __init__(self, settings: Settings) -> None:
        super().__init__(settings.allowed_sources, settings.max_upload_bytes)
        self.gate = threading.Event()
        self.error: Exception | None = None
        self.deaf = False
        self.running = 0
        self.most_running = 0
        self._counting = threading.Lock()

    def fetch(self, source: Source, directory: Path, on_progress: OnProgress) -> Fetched:
        self._count(1)
        try:
            config, weights = bundle(int(source.path[-1]))
            (directory / CONFIG).write_bytes(config)
            (directory / WEIGHTS).write_bytes(weights)
            on_progress(TOTAL // 2, TOTAL)
            while not self.gate.wait(0.01):
                if not self.deaf:
                    on_progress(TOTAL // 2, TOTAL)
            if self.error is not None:
                raise self.error
            return Fetched(Bundle(directory / WEIGHTS, config), source.url)
        finally:
            self._count(-1)

    def _count(self, more: int) -> None:
        with self._counting:
            self.running += more
            self.most_running = max(self.most_running, self.running)


def denied() -> RequestError:
    return RequestError("source_access_denied", "the server may not read it", "src")
