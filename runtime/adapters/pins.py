"""The adapters that are to be pinned: one wish for all of them, which replaces the wish before it."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from runtime.adapters.adapter import Adapter, State
from runtime.adapters.events import AdapterEvents
from runtime.adapters.loads import AdapterLoads
from runtime.messages import PinsSet, Refusal, Tier


@dataclass(slots=True)
class Wish:
    """A `SetPins` that is being decided."""

    request_id: str
    undecided: dict[str, Tier]  # by digest: the adapters whose size is not known yet
    refused: dict[str, Refusal] = field(default_factory=dict)


class AdapterPins:
    """Makes the tiers pin what was asked for last. The tiers own the pins; an undecided wish is owned here.

    A pin is decided once the adapter's size is known: its file is read for that if need be. It stands until another
    wish leaves it out or the adapter is retired; if the adapter cannot be loaded later, its bytes stay promised.
    """

    def __init__(
        self,
        adapters: Mapping[str, Adapter],
        loads: AdapterLoads,
        events: AdapterEvents,
        next_place: Callable[[], int],
    ) -> None:
        self._adapters = adapters  # the pool's, by digest
        self._loads = loads
        self._events = events
        self._next_place = next_place  # in line, for the loads of pinned adapters
        self._wish: Wish | None = None

    def tier(self, digest: str) -> Tier | None:
        """The tier in which an adapter is pinned."""
        return next((name for name, tier in self._loads.tiers.items() if tier.pinned(digest)), None)

    def set(self, request_id: str, pins: Mapping[str, Tier]) -> None:
        """Pin these adapters, in these tiers, and no others. Answered when all of it has been decided.

        Refuses an adapter as "pins_full", "adapter_failed" or "unknown_adapter"; the others are pinned all the same. A
        wish that was still undecided is answered with "superseded" for what was open.
        """
        self._supersede()
        for digest, adapter in self._adapters.items():
            if self.tier(digest) not in (None, pins.get(digest)):
                self._unpin(adapter)
        wish = self._wish = Wish(request_id, dict(pins))
        granted = [digest for digest in pins if self._decide(wish, digest)]
        for digest in granted:  # once all are pinned, so that no load evicts another adapter of the wish
            self._load(wish, digest)
        self._answer_if_decided()

    def decide(self, adapter: Adapter) -> None:
        """Decide on an adapter whose size may be known now, or turned out to be unknowable."""
        wish = self._wish
        if wish is not None and adapter.digest in wish.undecided:
            if self._decide(wish, adapter.digest):
                self._load(wish, adapter.digest)
            self._answer_if_decided()

    def reload(self, adapter: Adapter) -> None:
        """Load a pinned adapter if it is not where it is pinned."""
        tier = self.tier(adapter.digest)
        if tier is not None:
            self._loads.ask(adapter, tier, self._next_place())

    def retire(self, adapter: Adapter) -> None:
        """Unpin an adapter that has been retired."""
        self._unpin(adapter)
        self.decide(adapter)

    def check(self) -> None:
        """Assert that only known adapters are pinned, and that an undecided one is being read."""
        for digest, adapter in self._adapters.items():
            pinned = [name for name, tier in self._loads.tiers.items() if tier.pinned(digest)]
            assert len(pinned) <= 1, f"{digest} is pinned twice"
            assert not pinned or adapter.state is not State.RETIRED
        if self._wish is not None:
            assert self._wish.undecided, "a decided wish was not answered"
            assert all(self._adapters[digest].load is not None for digest in self._wish.undecided)

    def _decide(self, wish: Wish, digest: str) -> bool:
        """Whether an adapter is pinned now; otherwise it is refused, or its file is read for its size."""
        tier = wish.undecided[digest]
        adapter = self._adapters.get(digest)
        refusal = None
        if adapter is None or adapter.state is State.RETIRED:
            refusal = Refusal("unknown_adapter", f"adapter {digest} is not registered")
        elif self.tier(digest) != tier:
            if adapter.failure is not None:
                refusal = _failed(adapter)
            elif adapter.size is None:
                self._loads.ask(adapter, None, self._next_place())
                return False
            elif (full := self._loads.tiers[tier].pin(digest, adapter.size)) is not None:
                refusal = Refusal("pins_full", full)
            self._events.touch(adapter)
        del wish.undecided[digest]
        if refusal is not None:
            wish.refused[digest] = refusal
        return refusal is None

    def _load(self, wish: Wish, digest: str) -> None:
        """Load an adapter that has just been pinned; refuse the pin if that fails at once."""
        adapter = self._adapters[digest]
        if adapter.failure is None:
            self.reload(adapter)
            if adapter.failure is not None:
                self._unpin(adapter)
                wish.refused[digest] = _failed(adapter)

    def _unpin(self, adapter: Adapter) -> None:
        for tier in self._loads.tiers.values():
            tier.unpin(adapter.digest)
        self._events.touch(adapter)

    def _supersede(self) -> None:
        if self._wish is not None:
            for digest in self._wish.undecided:
                refusal = Refusal("superseded", "other pins were asked for before this one was decided on")
                self._wish.refused[digest] = refusal
            self._wish.undecided.clear()
            self._answer_if_decided()

    def _answer_if_decided(self) -> None:
        wish = self._wish
        if wish is not None and not wish.undecided:
            self._events.answer_pins(PinsSet(request_id=wish.request_id, refused=wish.refused))
            self._wish = None


def _failed(adapter: Adapter) -> Refusal:
    return Refusal("adapter_failed", f"adapter {adapter.digest} failed to load: {adapter.problem}")
