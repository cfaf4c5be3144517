"""Why an adapter cannot be used, or not yet."""

from runtime.messages import EngineCode


class AdapterUnavailable(Exception):
    """A request cannot use the adapter; the message says why."""

    code: EngineCode = "adapter_failed"


class UnknownAdapter(AdapterUnavailable):
    """The digest is not registered, or has been retired."""


class AdapterFailed(AdapterUnavailable):
    """The adapter could not be loaded."""


class FileUnusable(Exception):
    """An adapter's file is missing, or its content does not match the digest; fetching it again may help."""
