"""instructor: a response_model, as a schema of the answer, as JSON and as a forced call."""

import instructor
import openai
import pytest
from pydantic import BaseModel, ConfigDict, Field


class Person(BaseModel):
    model_config = ConfigDict(extra="forbid")  # else a small model adds fields without end

    name: str = Field(max_length=30)
    age: int = Field(ge=0, le=120)


ASKED = {
    "messages": [{"role": "user", "content": "Ann is 31 years old."}],
    "max_tokens": 200,
    "temperature": 0,
    "max_retries": 0,
}
MODES = [instructor.Mode.JSON_SCHEMA, instructor.Mode.TOOLS, instructor.Mode.TOOLS_STRICT]


@pytest.mark.parametrize("model", ["smollm2-135m-instruct", "aurora"])
@pytest.mark.parametrize("mode", MODES)
def test_it_makes_a_response_model(url: str, mode: instructor.Mode, model: str) -> None:
    client = instructor.from_openai(openai.OpenAI(base_url=url, max_retries=0), mode=mode)
    person, raw = client.chat.completions.create_with_completion(model=model, response_model=Person, **ASKED)
    assert isinstance(person, Person)
    assert 0 <= person.age <= 120
    assert raw.usage.completion_tokens > 0


@pytest.mark.parametrize("mode", MODES[:2])
def test_it_streams_a_partial_model(url: str, base: str, mode: instructor.Mode) -> None:
    client = instructor.from_openai(openai.OpenAI(base_url=url, max_retries=0), mode=mode)
    states = list(client.chat.completions.create_partial(model=base, response_model=Person, **ASKED))
    assert len(states) > 1
    ages = [state.age for state in states]
    assert ages[0] is None  # it comes after the name
    assert isinstance(Person.model_validate(states[-1].model_dump()), Person)
