"""outlines, through the openai client: schemas, given to OpenAI and to vLLM; choices and expressions."""

import re
from typing import Literal

import openai
import outlines
import pytest
from pydantic import BaseModel, ConfigDict, Field


class Animal(BaseModel):
    model_config = ConfigDict(extra="forbid")  # else a small model adds fields without end

    kind: Literal["cat", "dog"]
    name: str = Field(max_length=20)


LIMITS = {"max_tokens": 200, "temperature": 0}


@pytest.fixture(params=["smollm2-135m-instruct", "aurora"])
def name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.mark.parametrize("dialect", [outlines.from_openai, outlines.from_vllm])
def test_a_schema_is_kept_and_streamed(url: str, name: str, dialect) -> None:
    model = dialect(openai.OpenAI(base_url=url, max_retries=0), name)
    said = model("Describe a pet.", Animal, **LIMITS)
    assert Animal.model_validate_json(said).kind in ("cat", "dog")
    assert "".join(outlines.Generator(model, Animal).stream("Describe a pet.", **LIMITS)) == said


def test_vllms_choices_and_expressions_are_kept(url: str, name: str) -> None:
    model = outlines.from_vllm(openai.OpenAI(base_url=url, max_retries=0), name)
    assert model("A cat or a dog?", Literal["cat", "dog"], **LIMITS) in ("cat", "dog")
    assert re.fullmatch(r"\d{3}-\d{2}", model("A code?", outlines.types.Regex(r"\d{3}-\d{2}"), **LIMITS))


def test_text_is_text(url: str, question: str, password: str) -> None:
    model = outlines.from_openai(openai.OpenAI(base_url=url, max_retries=0), "aurora")
    assert password in model(question, max_tokens=32, temperature=0)
