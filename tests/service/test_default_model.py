"""The embedded model: complete, exact in its tokens, and never half-made."""

import signal
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest
from transformers import AutoTokenizer

from service.default_model import ensure_default_model, made_once

SLOW_MAKER = """
import pathlib, sys
from service.default_model import made_once

def make(directory):
    (directory / "weights").write_text("half")
    print("started", flush=True)
    sys.stdin.readline()
    (directory / "weights").write_text("whole")

made_once(pathlib.Path(sys.argv[1]), make)
print("done", flush=True)
"""


def start_maker(target: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", SLOW_MAKER, str(target)]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def read_json(path: Path) -> dict:
    return msgspec.json.decode(path.read_bytes())


def test_a_second_call_finds_the_first_ones_model(default_model_path: Path) -> None:
    before = default_model_path.stat().st_mtime_ns
    assert ensure_default_model() == default_model_path
    assert default_model_path.stat().st_mtime_ns == before


def test_the_config_keeps_what_the_gguf_file_says(default_model_path: Path) -> None:
    config = read_json(default_model_path / "config.json")
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert config["rope_parameters"] == {"rope_theta": 100000.0, "rope_type": "default"}
    assert config["max_position_embeddings"] == 8192
    assert config["tie_word_embeddings"] is True
    assert config["dtype"] == "bfloat16"
    assert config["rms_norm_eps"] == pytest.approx(1e-5, rel=1e-7)


def test_generation_ends_at_the_end_of_a_chat_turn(default_model_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(default_model_path)
    generation = read_json(default_model_path / "generation_config.json")
    assert tokenizer.convert_ids_to_tokens(generation["eos_token_id"]) == "<|im_end|>" == tokenizer.eos_token
    assert tokenizer.bos_token == "<|im_start|>"
    assert tokenizer.model_max_length == 8192


def test_a_chat_is_laid_out_as_the_model_was_trained(default_model_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(default_model_path)
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hi"}], tokenize=False, add_generation_prompt=True
    )
    system = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
    assert text == f"<|im_start|>system\n{system}<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    ids = tokenizer(text).input_ids
    assert (ids[0], ids.count(1), ids.count(2)) == (1, 3, 2)


@pytest.mark.parametrize(
    ("text", "tokens"),
    [
        ("a  5", ["a", "ĠĠ", "5"]),
        ("42\n\n7", ["4", "2", "ĊĊ", "7"]),
        (" 10 x", ["Ġ", "1", "0", "Ġx"]),
    ],
)
def test_digits_are_split_off_before_white_space_is_grouped(
    default_model_path: Path, text: str, tokens: list[str]
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(default_model_path)
    ids = tokenizer(text).input_ids
    assert tokenizer.convert_ids_to_tokens(ids) == tokens
    assert tokenizer.decode(ids) == text


def test_a_maker_that_fails_leaves_nothing(tmp_path: Path) -> None:
    def make(directory: Path) -> None:
        (directory / "weights").write_text("half")
        raise OSError("no space left on device")

    target = tmp_path / "models" / "tiny"
    with pytest.raises(OSError, match="no space left"):
        made_once(target, make)
    assert [path.name for path in target.parent.iterdir()] == ["tiny.lock"]


def test_a_killed_maker_is_cleared_away_by_the_next_call(tmp_path: Path) -> None:
    target = tmp_path / "tiny"
    with start_maker(target) as maker:
        assert maker.stdout is not None
        assert maker.stdout.readline() == "started\n"
        maker.send_signal(signal.SIGKILL)
    assert not target.exists()

    def make(directory: Path) -> None:
        assert not list(directory.iterdir())
        (directory / "weights").write_text("whole")

    made_once(target, make)
    assert (target / "weights").read_text() == "whole"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["tiny", "tiny.lock"]


def test_of_two_makers_the_second_waits_and_takes_the_firsts_result(tmp_path: Path) -> None:
    target = tmp_path / "tiny"
    with start_maker(target) as first:
        assert first.stdout is not None
        assert first.stdout.readline() == "started\n"
        with start_maker(target) as second:
            assert second.stderr is not None
            assert "waiting" in second.stderr.readline()
            first.communicate("go on\n", timeout=60)
            assert second.communicate(timeout=60)[0] == "done\n"
    assert (target / "weights").read_text() == "whole"
