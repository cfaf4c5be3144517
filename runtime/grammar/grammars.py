"""The grammars of requests: compiled on a thread, and kept for the requests that follow."""

from collections import OrderedDict
from collections.abc import Callable, Iterable
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from pathlib import Path

from llguidance import LLMatcher, LLTokenizer

from runtime.background import yield_to_others
from runtime.grammar.constraint import Constraint, GrammarFailed, reason

KEPT = 256  # compiled grammars


class Grammars:
    """Owns the compiled grammars and the thread that compiles them. Only the engine's thread calls the methods.

    The thread also reads the tokenizer, from the model's `directory`, when the first grammar comes: most engines never
    need it.
    """

    def __init__(self, directory: Path, vocab_size: int, eos_token_ids: Iterable[int]) -> None:
        self._directory, self._vocab_size, self._eos = directory, vocab_size, sorted(eos_token_ids)
        self._thread = ThreadPoolExecutor(1, "grammars", yield_to_others)
        self._tokenizer: LLTokenizer | None = None  # of the thread
        self._kept: OrderedDict[str, Future[LLMatcher]] = OrderedDict()  # the least recently used first
        self._on_compiled: Callable[[], None] | None = None

    def constrain(self, grammar: str) -> Constraint:
        """A constraint for one request; starts to compile its grammar if it is not known."""
        compiled = self._kept.get(grammar)
        if compiled is None or (compiled.done() and compiled.exception() is not None):
            compiled = self._kept[grammar] = self._thread.submit(self._compile, grammar)
            compiled.add_done_callback(lambda _: self._notify())
        self._kept.move_to_end(grammar)
        if len(self._kept) > KEPT:
            self._kept.popitem(last=False)
        return Constraint(compiled, self._vocab_size, self._eos)

    def watch(self, on_compiled: Callable[[], None]) -> None:
        """Call `on_compiled`, from the thread, whenever a grammar has been compiled or refused."""
        self._on_compiled = on_compiled

    def wait(self, timeout: float) -> bool:
        """Block until a grammar has been compiled, or `timeout` seconds pass; False at once if none is under way."""
        compiling = [compiled for compiled in self._kept.values() if not compiled.done()]
        if compiling:
            wait(compiling, timeout, FIRST_COMPLETED)
        return bool(compiling)

    def close(self) -> None:
        self._thread.shutdown(cancel_futures=True)

    def _notify(self) -> None:
        if self._on_compiled is not None:
            self._on_compiled()

    def _compile(self, grammar: str) -> LLMatcher:
        if self._tokenizer is None:
            self._tokenizer = self._read_tokenizer()
        matcher = LLMatcher(self._tokenizer, grammar, log_level=0)
        if matcher.is_error():
            raise GrammarFailed(f"the grammar cannot be compiled: {reason(matcher)}")
        return matcher

    def _read_tokenizer(self) -> LLTokenizer:
        path = self._directory / "tokenizer.json"
        if not path.is_file():
            raise GrammarFailed(f"a grammar needs the model's tokenizer, and {self._directory} has no tokenizer.json")
        return LLTokenizer(str(path), n_vocab=self._vocab_size, eos_token=self._eos)
