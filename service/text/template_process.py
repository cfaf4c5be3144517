"""A process that renders chat templates of strangers: python -m service.text.template_process"""

import msgspec

from service.sandbox.worker import Worker
from service.text.rendering import Conversation, InvalidChat, render

MEMORY_BYTES = 1 << 30


class Job(msgspec.Struct, frozen=True, kw_only=True):
    template: str
    conversation: Conversation


class Answer(msgspec.Struct, frozen=True, kw_only=True):
    text: str | None = None
    refusal: str | None = None


def main() -> None:
    """Answer jobs until there are no more."""
    worker = Worker(MEMORY_BYTES)
    while (job := worker.next_job()) is not None:
        worker.answer(msgspec.json.encode(_answer(msgspec.json.decode(job, type=Job))))


def _answer(job: Job) -> Answer:
    try:
        return Answer(text=render(job.template, job.conversation))
    except InvalidChat as error:
        return Answer(refusal=str(error))


if __name__ == "__main__":
    main()
