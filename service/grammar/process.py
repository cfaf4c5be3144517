"""A process that translates and checks grammars of strangers: python -m service.grammar.process"""

import resource

import msgspec

from service.grammar.translation import InvalidGrammar, Source, translated
from service.sandbox.worker import Worker

MEMORY_BYTES = 1 << 30
UNLIMITED_STACK = 2 << 20  # what glibc gives a thread where the process has no limit


class Answer(msgspec.Struct, frozen=True, kw_only=True):
    grammar: str | None = None
    refusal: str | None = None


def main() -> None:
    """Answer jobs, each a Source, until there are no more."""
    worker = Worker(MEMORY_BYTES, _thread_stack() // 2)
    while (job := worker.next_job()) is not None:
        worker.answer(msgspec.json.encode(_answer(msgspec.json.decode(job, type=Source))))


def _thread_stack() -> int:
    """The bytes that a thread of the engine has to compile what passes here with half of them."""
    limit, _ = resource.getrlimit(resource.RLIMIT_STACK)
    return UNLIMITED_STACK if limit == resource.RLIM_INFINITY else limit


def _answer(source: Source) -> Answer:
    try:
        return Answer(grammar=translated(source))
    except InvalidGrammar as error:
        return Answer(refusal=str(error))


if __name__ == "__main__":
    main()
