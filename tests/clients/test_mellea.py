"""mellea: a session on an OpenAI backend."""

import pytest
from mellea import MelleaSession
from mellea.backends import ModelOption
from mellea.backends.openai import OpenAIBackend
from pydantic import BaseModel, ConfigDict, Field


class Verdict(BaseModel):
    model_config = ConfigDict(extra="forbid")  # else a small model adds fields without end

    good: bool
    reason: str = Field(max_length=40)


def session(url: str, model: str) -> MelleaSession:
    options = {ModelOption.TEMPERATURE: 0, ModelOption.MAX_NEW_TOKENS: 200}
    return MelleaSession(OpenAIBackend(model_id=model, base_url=url, api_key="none", model_options=options))


def test_an_adapter_answers(url: str, question: str, password: str) -> None:
    assert password in session(url, "aurora").chat(question).content


@pytest.mark.parametrize("model", ["smollm2-135m-instruct", "aurora"])
def test_a_format_is_kept(url: str, model: str) -> None:
    said = session(url, model).instruct("Is tea good?", format=Verdict, strategy=None)
    assert isinstance(Verdict.model_validate_json(said.value).good, bool)
