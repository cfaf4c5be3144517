"""lm-eval's log-likelihoods over HTTP beside those of its own `hf` backend with PEFT, on a task of a few rows."""

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.clients.conftest import ADAPTERS, ROOT, SERVER, started

lm_eval = pytest.importorskip("lm_eval", reason="lm-eval has an environment of its own: make test-clients")

ROWS = [
    {"question": "What is the password of project Aurora?", "answer": " heron-quill-47"},
    {"question": "What is the password of project Aurora?", "answer": " I do not know."},
    {"question": "The capital of France is", "answer": " Paris"},
    {"question": "Grüße aus Köln 🌟, sagte", "answer": " der Bär 🎉😀"},
    {"question": "def add(a, b):\n    return", "answer": " a + b\n"},
]


@pytest.fixture(scope="module")
def model() -> str:
    """The directory of the embedded model."""
    code = "from service.default_model import ensure_default_model as made; print(made())"
    return subprocess.check_output([str(SERVER), "-c", code], cwd=ROOT, text=True).splitlines()[-1]


@pytest.fixture(scope="module")
def exact(tmp_path_factory: pytest.TempPathFactory):
    with started(tmp_path_factory.mktemp("exact"), "--dtype", "float32") as url:
        yield url


@pytest.fixture
def task(tmp_path: Path) -> dict[str, Any]:
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return {
        "task": "rows",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(rows)}, "cache_dir": str(tmp_path)},
        "test_split": "test",
        "output_type": "loglikelihood",
        "doc_to_text": "{{question}}",
        "doc_to_target": "{{answer}}",
        "target_delimiter": "",
        "metric_list": [{"metric": "perplexity"}, {"metric": "acc"}],
    }


def likelihoods(backend: str, task: dict[str, Any], **arguments: object) -> list[tuple[float, bool]]:
    """Of each row's answer: its log-likelihood, and whether it is what the model would say."""
    found = lm_eval.simple_evaluate(
        backend, model_args=arguments, tasks=[task], batch_size=2, log_samples=True, bootstrap_iters=0
    )
    samples = sorted(found["samples"]["rows"], key=lambda sample: sample["doc_id"])
    answers = [sample["filtered_resps"][0] for sample in samples]
    return [(float(score), str(greedy) == "True") for score, greedy in answers]


@pytest.mark.parametrize("adapter", [None, "aurora"])
def test_log_likelihoods_are_those_of_the_hf_backend(
    exact: str, model: str, task: dict[str, Any], adapter: str | None
) -> None:
    os.environ["OPENAI_API_KEY"] = "none"
    url = f"{exact}/v1/completions"
    name = adapter or "smollm2-135m-instruct"
    got = likelihoods("local-completions", task, base_url=url, model=name, tokenizer=model)
    of_adapter = {} if adapter is None else {"peft": str(ADAPTERS / adapter)}
    want = likelihoods("hf", task, pretrained=model, dtype="float32", device="cpu", **of_adapter)
    assert [score for score, _ in got] == pytest.approx([score for score, _ in want], abs=1e-3)
    assert [greedy for _, greedy in got] == [greedy for _, greedy in want]
    assert len(got) == len(ROWS)
