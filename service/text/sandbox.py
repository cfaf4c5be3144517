"""Rendering chat templates of strangers: in processes that end if a template runs for too long."""

from collections.abc import Mapping

import msgspec

from service.sandbox.sandbox import JobFailed, Sandbox
from service.text.rendering import Conversation, InvalidChat
from service.text.template_process import Answer, Job

SECONDS = 2.0  # of processor time for one prompt
PLACES = 4  # prompts that are rendered at one time; others wait


class TemplateSandbox:
    """Owns the processes that render."""

    def __init__(self, seconds: float = SECONDS, environment: Mapping[str, str] | None = None) -> None:
        self._seconds = seconds
        self._sandbox = Sandbox("service.text.template_process", PLACES, seconds, environment)

    async def render(self, template: str, conversation: Conversation) -> str:
        """The prompt. Raises InvalidChat, also for a template that takes longer than the limit."""
        try:
            told = await self._sandbox.run(Job(template=template, conversation=conversation))
        except JobFailed as failed:
            if failed.too_long:
                message = f"the chat template takes longer than {self._seconds:g} s for these messages: make it simpler"
                raise InvalidChat(message) from None
            raise InvalidChat("the chat template ended the process that renders it: make it simpler") from None
        answer = msgspec.json.decode(told, type=Answer)
        if answer.text is None:
            raise InvalidChat(answer.refusal)
        return answer.text

    async def close(self) -> None:
        await self._sandbox.close()
