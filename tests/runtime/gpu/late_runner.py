"""A runner whose results come late, as a GPU's do: after the next step has been laid out and launched."""

import contextlib


class LateRunner:
    """The CPU runner, whose results are returned one step late; it keeps the tokens itself."""

    def __init__(self, runner):
        self._runner = runner
        self._tokens = {}
        self.late = 0  # steps that were launched before the results of the one before were asked for
        self._open = 0  # steps whose results have not been read yet

    def __getattr__(self, name):
        return getattr(self._runner, name)

    def prepare(self, chunks):
        unknown = [chunk.request for chunk in chunks if chunk.start >= len(chunk.request.token_ids)]
        with self._told(unknown):
            ordered = self._runner.prepare(chunks)
        self._sampling = [chunk.request for chunk in ordered if chunk.samples]
        return ordered

    @contextlib.contextmanager
    def _told(self, requests):
        for request in requests:
            request.tell(self._tokens[request])
        yield
        for request in requests:
            request.untell()

    def launch(self):
        self.late += self._open > 0
        pending = [request for request in self._sampling if request.pending]
        with self._told([request for request in pending if self._tokens[request] not in request.stop_ids]):
            results, _ = self._runner.launch()
            sampled = results()
        self._tokens = {
            request: choice.token_id if choice.token_id is not None else 0
            for request, choice in zip(self._sampling, sampled, strict=True)
        }
        self._open += 1

        def wait():
            self._open -= 1
            return sampled

        return wait, True
