"""A process that translates and checks grammars of strangers: python -m service.grammars.process"""

import resource

import msgspec

from service.grammars.source import InvalidGrammar, Source
from service.grammars.structural_tags import NO_MARKERS, Markers
from service.grammars.translation import translated
from service.sandbox.worker import Worker

MEMORY_BYTES = 1 << 30
UNLIMITED_STACK = 2 << 20  # what glibc gives a thread where the process has no limit


class Job(msgspec.Struct, frozen=True, kw_only=True):
    source: Source
    markers: Markers = NO_MARKERS


class Answer(msgspec.Struct, frozen=True, kw_only=True):
    grammar: str | None = None
    refusal: str | None = None
    place: str | None = None  # of what is refused


def main() -> None:
    """Answer jobs until there are no more."""
    worker = Worker(MEMORY_BYTES, _thread_stack() // 2)
    while (job := worker.next_job()) is not None:
        worker.answer(msgspec.json.encode(_answer(msgspec.json.decode(job, type=Job))))


def _thread_stack() -> int:
    """The bytes that a thread of the engine has to compile what passes here with half of them."""
    limit, _ = resource.getrlimit(resource.RLIMIT_STACK)
    return UNLIMITED_STACK if limit == resource.RLIM_INFINITY else limit


def _answer(job: Job) -> Answer:
    try:
        return Answer(grammar=translated(job.source, job.markers))
    except InvalidGrammar as error:
        return Answer(refusal=str(error), place=error.place)


if __name__ == "__main__":
    main()
