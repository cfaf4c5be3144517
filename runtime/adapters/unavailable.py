"""The errors of an adapter that a request cannot use."""


class AdapterUnavailable(Exception):
    """An adapter cannot be used; the message says why."""


class UnknownAdapter(AdapterUnavailable):
    """The digest was never registered, or has been retired."""


class AdapterFailed(AdapterUnavailable):
    """The adapter could not be loaded."""
