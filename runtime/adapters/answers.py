"""What is answered to those who asked something of adapters: each request once, as soon as it is decided."""

from runtime.adapters.registered import RegisteredAdapter
from runtime.adapters.tier import AdapterTier
from runtime.messages import Answer, EngineCode, Tier


class AdapterAnswers:
    """Collects the answers, and knows when a load has ended that somebody waits for."""

    def __init__(self, host: AdapterTier, device: AdapterTier) -> None:
        self._host, self._device = host, device
        self._answers: list[Answer] = []
        self._waited_for: dict[RegisteredAdapter, None] = {}  # those with loads that somebody waits for

    def give(self, request_id: str, code: EngineCode | None = None, message: str = "") -> None:
        """Answer a request; `code` if it is refused."""
        self._answers.append(Answer(request_id=request_id, code=code, message=message))

    def unknown(self, request_id: str, digest: str) -> None:
        self.give(request_id, "unknown_adapter", f"adapter {digest} is not registered")

    def failed(self, request_id: str, adapter: RegisteredAdapter) -> None:
        self.give(request_id, "adapter_failed", f"adapter {adapter.digest} failed to load: {adapter.reason}")

    def expect(self, request_id: str, adapter: RegisteredAdapter, tier: Tier) -> None:
        """Answer a request when the load has ended that it asked for, or at once if there is none to wait for."""
        adapter.loads.append((request_id, tier))
        self._waited_for[adapter] = None
        self.settle(adapter)

    def take(self) -> list[Answer]:
        """The answers since the last call; whatever way a load has ended, they are complete."""
        for adapter in list(self._waited_for):
            self.settle(adapter)
        answers, self._answers = self._answers, []
        return answers

    def settle(self, adapter: RegisteredAdapter) -> None:
        """Answer those who wait for loads of an adapter that have ended, one way or the other.

        To be called when an adapter has come, before others may take its room, and before a retired one may return.
        """
        waiting, adapter.loads = adapter.loads, []
        for request_id, tier in waiting:
            if adapter.retired or adapter.dropped:
                self.unknown(request_id, adapter.digest)
            elif self._device.holds(adapter.digest) or (tier == "host" and self._host.holds(adapter.digest)):
                self.give(request_id)
            elif adapter.failed:
                self.failed(request_id, adapter)
            elif adapter.goal is None:
                message = f"adapter {adapter.digest} was unloaded while it was loading"
                self.give(request_id, "load_cancelled", message)
            else:
                adapter.loads.append((request_id, tier))
        if not adapter.loads:
            self._waited_for.pop(adapter, None)
