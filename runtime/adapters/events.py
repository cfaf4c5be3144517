"""What the next poll of the adapter pool returns: changes of adapters' states, and answers to commands."""

import msgspec

from runtime.adapters.adapter import REPORTED, Adapter
from runtime.adapters.tier import AdapterTier
from runtime.messages import AdapterState, Answer, EngineCode, PinsSet


class AdapterEvents:
    """Collects events between two polls. A state is reported once, however often an adapter was touched.

    Reports come before answers, so that the service knows the new state when the answer arrives.
    """

    def __init__(self, device: AdapterTier, host: AdapterTier) -> None:
        self._tiers = (device, host)  # the highest first
        self._touched: dict[Adapter, None] = {}
        self._gone: list[str] = []
        self._answers: list[Answer | PinsSet] = []

    def __bool__(self) -> bool:
        return bool(self._touched or self._gone or self._answers)

    def touch(self, adapter: Adapter) -> None:
        """Note that the state, tier or pin of an adapter may have changed."""
        self._touched[adapter] = None

    def gone(self, digest: str) -> None:
        """Note that nothing is left of an adapter."""
        self._touched = {adapter: None for adapter in self._touched if adapter.digest != digest}
        self._gone.append(digest)

    def answer(self, request_id: str, code: EngineCode | None = None, message: str = "") -> None:
        """Answer a command; `code` says that it is refused."""
        self._answers.append(Answer(request_id=request_id, code=code, message=message))

    def answer_pins(self, answer: PinsSet) -> None:
        """Answer a `SetPins`."""
        self._answers.append(answer)

    def take(self) -> list[AdapterState | Answer | PinsSet]:
        """The events since the last call."""
        touched, self._touched = self._touched, {}
        gone, self._gone = self._gone, []
        answers, self._answers = self._answers, []
        retired = [AdapterState(digest=digest, state="retired") for digest in gone]
        reports = [report for adapter in touched if (report := self._report(adapter)) is not None]
        return [*retired, *reports, *answers]

    def _report(self, adapter: Adapter) -> AdapterState | None:
        """The adapter's state, None if the last report said the same."""
        digest = adapter.digest
        state = AdapterState(
            digest=digest,
            state=REPORTED[adapter.state],
            tier=next((tier.name for tier in self._tiers if tier.holds(digest)), None),
            pinned=next((tier.name for tier in self._tiers if tier.pinned(digest)), None),
            reason=adapter.problem,
        )
        if state == adapter.reported and not adapter.stages:
            return None
        adapter.reported = state
        stages, adapter.stages = adapter.stages, {}
        return msgspec.structs.replace(state, stages=stages)
