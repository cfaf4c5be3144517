"""An engine process whose device fails for good at a prompt that begins with token 13; otherwise it is the real one.

Command line: python -m tests.runtime.failing_engine --parent=PID ENDPOINT.
"""

import sys

import runtime.engine
from runtime import process

UNLUCKY = 13
LASTING = "CUDA error: an illegal memory access was encountered\nCUDA kernel errors might be reported later"


class FailingRunner:
    """A runner that fails as a CUDA device does; `failures` are the messages of its next steps, None for a good one."""

    def __init__(self, runner, failures=()):
        self._runner, self._failures, self._unlucky = runner, list(failures), False

    def __getattr__(self, name):
        return getattr(self._runner, name)

    def prepare(self, chunks):
        self._unlucky |= any(chunk.request.token_ids[0] == UNLUCKY for chunk in chunks)
        return self._runner.prepare(chunks)

    def launch(self):
        failure = LASTING if self._unlucky else self._failures.pop(0) if self._failures else None
        if failure is not None:
            raise RuntimeError(failure)
        return self._runner.launch()


class FailingEngine(runtime.engine.Engine):
    def __init__(self, config):
        super().__init__(config)
        self.runner = FailingRunner(self.runner)


if __name__ == "__main__":
    runtime.engine.Engine = FailingEngine
    process.main(sys.argv[2], int(sys.argv[1].removeprefix("--parent=")))
