"""What one key may use in a time, and what it has used: rates, requests at one time, counts."""

import math
import time
from collections import Counter
from collections.abc import Callable
from typing import NamedTuple

from service.errors import RequestError

MINUTE = 60.0  # seconds


class Limits(NamedTuple):
    """What a key may use; None: as much as it likes. Each server counts for itself."""

    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None  # of prompts and answers together
    concurrent_requests: int | None = None


NO_LIMITS = Limits()


class Bucket:
    """So many a minute, and as many at once after a minute without any."""

    def __init__(self, per_minute: int, clock: Callable[[], float]) -> None:
        self._per_minute, self._clock = per_minute, clock
        self._level, self._filled_at = float(per_minute), clock()

    def change(self, per_minute: int) -> None:
        """Go on at another rate."""
        self._fill()
        self._per_minute, self._level = per_minute, min(self._level, per_minute)

    def wait_seconds(self) -> float:
        """How long it is until there is a whole one."""
        self._fill()
        return max(0.0, 1 - self._level) * MINUTE / self._per_minute

    def take(self, amount: int) -> None:
        """Take more than there are, if need be: what comes next waits for it."""
        self._fill()
        self._level -= amount

    def _fill(self) -> None:
        now = self._clock()
        gained = (now - self._filled_at) * self._per_minute / MINUTE
        self._level, self._filled_at = min(float(self._per_minute), self._level + gained), now


class KeyUsage:
    """Owns the rates of one key and the number of its requests in flight. All calls belong to one event loop.

    How long an answer becomes is known at its end, so a request may begin while there are any tokens, and its tokens
    are taken as they come. A key that has taken more than its rate waits until that is made up for.
    """

    def __init__(self, limits: Limits = NO_LIMITS, clock: Callable[[], float] = time.monotonic) -> None:
        self._limits, self._clock = limits, clock
        self._requests: Bucket | None = None
        self._tokens: Bucket | None = None
        self.in_flight = 0
        self.answered: Counter[str] = Counter()  # requests that have ended, by the kind of their status
        self.tokens = 0
        self.limit(limits)

    def limit(self, limits: Limits) -> None:
        """Set other limits; what has been used still counts."""
        self._limits = limits
        self._requests = self._changed(self._requests, limits.requests_per_minute)
        self._tokens = self._changed(self._tokens, limits.tokens_per_minute)

    def enter(self) -> None:
        """Begin a request. Raises RequestError for a limit, and has then begun none."""
        most = self._limits.concurrent_requests
        if most is not None and self.in_flight >= most:
            message = f"{most} requests of this key are under way, as many as it may have: await one of them"
            raise RequestError("concurrent_requests_exceeded", message)
        _require(self._requests, "requests", self._limits.requests_per_minute)
        if self._requests is not None:
            self._requests.take(1)
        self.in_flight += 1

    def leave(self, status: int) -> None:
        """End a request that `enter` has begun."""
        self.in_flight -= 1
        self.count(status)

    def count(self, status: int) -> None:
        """Count an answer by its status: 429, or its class."""
        self.answered["429" if status == 429 else f"{status // 100}xx"] += 1

    def require_tokens(self) -> None:
        """Raise RequestError while more tokens have been used than the rate allows."""
        _require(self._tokens, "tokens", self._limits.tokens_per_minute)

    def spend(self, tokens: int) -> None:
        """Count tokens of a prompt or of an answer."""
        self.tokens += tokens
        if self._tokens is not None:
            self._tokens.take(tokens)

    def _changed(self, bucket: Bucket | None, per_minute: int | None) -> Bucket | None:
        if per_minute is None or bucket is None:
            return None if per_minute is None else Bucket(per_minute, self._clock)
        bucket.change(per_minute)
        return bucket


def _require(bucket: Bucket | None, what: str, per_minute: int | None) -> None:
    seconds = 0.0 if bucket is None else bucket.wait_seconds()
    if seconds > 0:
        later = math.ceil(seconds)
        message = f"this key may use {per_minute} {what} a minute, and has used them: try again in {later} s"
        code = "requests_per_minute_exceeded" if what == "requests" else "tokens_per_minute_exceeded"
        raise RequestError(code, message, retry_seconds=later)
