"""The store of responses: what it keeps, what it forgets first, what it counts."""

from typing import Any

import msgspec
import pytest

from service.errors import RequestError
from service.openai.schemas import TextFormat
from service.responses.items import items_of
from service.responses.schemas import MessageItem, ModelResponse, OutputText, TextOptions
from service.responses.store import ENTRY_BYTES, ResponseStore, Stored


def response(id: str, text: str = "fine") -> ModelResponse:
    output = MessageItem(id=f"msg_{id}", role="assistant", status="completed", content=[OutputText(text=text)])
    nothing = dict.fromkeys(
        ("completed_at", "instructions", "max_output_tokens", "previous_response_id", "reasoning", "user")
    )
    return ModelResponse(
        **nothing,  # type: ignore[arg-type]
        id=id,
        created_at=1,
        status="completed",
        metadata={},
        model="m",
        output=[output],
        parallel_tool_calls=True,
        store=True,
        temperature=1.0,
        text=TextOptions(format=TextFormat()),
        tool_choice="auto",
        tools=[],
        top_logprobs=0,
        top_p=1.0,
    )


def put(store: ResponseStore, id: str, said: str = "how are you", previous: Stored | None = None) -> Stored:
    store.put(response(id), items_of(said), previous)
    store.check()
    return store.get(id)


def texts(stored: Stored) -> list[str]:
    return [part.text for item in stored.conversation() for part in item.content]  # type: ignore[union-attr]


def refused(call: Any, *arguments: Any) -> RequestError:
    with pytest.raises(RequestError) as error:
        call(*arguments)
    return error.value


def test_it_gives_back_what_was_put_and_forgets_what_is_deleted() -> None:
    store = ResponseStore(1 << 20)
    kept = put(store, "a")
    assert kept.response == response("a")
    assert [item.content[0].text for item in kept.items] == ["how are you"]
    assert kept.size == len(kept.content) + len(kept.input) + ENTRY_BYTES == store.bytes
    assert len(kept.content) == len(msgspec.json.encode(response("a")))
    store.delete("a")
    store.check()
    assert (len(store), store.bytes) == (0, 0)
    assert refused(store.get, "a").code == refused(store.delete, "a").code == "response_not_found"


def test_the_least_recently_used_is_forgotten_first_and_the_refusal_says_how_that_can_be() -> None:
    size = put(ResponseStore(1 << 20), "a").size
    store = ResponseStore(3 * size)
    for id in "abc":
        put(store, id)
    store.get("a")
    put(store, "d")
    assert len(store) == 3
    for id in "acd":
        store.get(id)
    error = refused(store.previous, "b")
    assert (error.code, error.param) == ("previous_response_not_found", "previous_response_id")
    assert f"up to {3 * size} bytes" in error.message
    assert "may have been forgotten" in error.message
    assert "Send the whole conversation as input instead" in error.message


def test_a_conversation_lives_as_long_as_its_last_response_and_is_counted_with_it() -> None:
    store = ResponseStore(1 << 20)
    first = put(store, "a", "one")
    second = put(store, "b", "two", first)
    third = put(store, "c", "three", second)
    assert third.size > second.size > first.size
    assert store.bytes == first.size + second.size + third.size
    store.delete("a")
    store.delete("b")
    store.check()
    assert store.bytes == third.size
    assert texts(store.get("c")) == ["one", "fine", "two", "fine", "three", "fine"]


def test_what_is_larger_than_the_store_is_not_kept_and_a_store_of_nothing_keeps_nothing() -> None:
    for most in (0, ENTRY_BYTES):
        store = ResponseStore(most)
        store.put(response("a"), items_of("x"), None)
        store.check()
        assert (len(store), store.bytes) == (0, 0)


def test_a_conversation_of_thousands_of_turns_is_read_and_forgotten() -> None:
    """Turns hold one another: nothing may follow them by recursion."""
    given, content = msgspec.json.encode(items_of("x")), msgspec.json.encode(response("a"))
    last: Stored | None = None
    for _ in range(20_000):
        last = Stored(content, given, last, 0)
    assert last is not None
    assert len(last.conversation()) == 40_000
    del last
