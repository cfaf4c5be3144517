"""Prompts and chats become the tokens that transformers makes of them."""

import asyncio
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import msgspec
import pytest
from tokenizers import Tokenizer as Backend
from tokenizers import decoders
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast

from service.errors import RequestError
from service.openai.sampling_params import sampling_params
from service.openai.schemas import CompletionRequest
from service.text.encoder import LONG_TEXT
from service.text.token_bytes import TokenBytes
from service.text.tokenizer import Tokenizer, TokenizerMissing
from tests.service.tiny_model import make_tokenizer, write_tiny_model


@pytest.fixture(scope="module")
def tokenizer(default_model_path: Path) -> Tokenizer:
    return Tokenizer(default_model_path)


def test_prompts_are_those_of_transformers(tokenizer: Tokenizer, default_model_path: Path) -> None:
    from transformers import AutoTokenizer  # imports torch, which the service must not

    oracle = AutoTokenizer.from_pretrained(default_model_path)
    for text in ("Hello  world", "", " 1234 \n\n<|im_start|>", "東京 😀" * 20):
        assert tokenizer.encode(text) == oracle(text)["input_ids"]


def test_a_tokenizer_that_transformers_finds_wrong_is_told_with_what_an_operator_can_do(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    Tokenizer(tiny_model)
    assert caplog.text == ""
    monkeypatch.setattr(PreTrainedTokenizerFast, "fix_mistral_regex", False, raising=False)  # as transformers marks it
    Tokenizer(tiny_model)
    assert 'set "fix_mistral_regex": true in tokenizer_config.json' in caplog.text


def test_long_texts_are_encoded_as_short_ones_are(tokenizer: Tokenizer) -> None:
    text = "The quick brown fox. " * (LONG_TEXT // 10)

    assert asyncio.run(tokenizer.encode_texts([text])) == [tokenizer.encode(text)]


def test_special_tokens_are_left_out_of_text_but_shown_one_by_one(tokenizer: Tokenizer) -> None:
    token_ids = tokenizer.encode("<|im_start|>Hi<|im_end|>")
    assert tokenizer.decode(token_ids) == "Hi"
    assert [tokenizer.token_bytes(i) for i in token_ids] == [b"<|im_start|>", b"Hi", b"<|im_end|>"]


def test_the_bytes_of_tokens_joined_are_the_text(tokenizer: Tokenizer) -> None:
    text = "  Hello wörld 🌟🎉😀 €\n\t x"
    assert b"".join(map(tokenizer.token_bytes, tokenizer.encode(text))).decode() == text
    assert tokenizer.token_bytes(10**6) == b""


def test_sentencepieces_tokens_keep_their_space_and_their_bytes() -> None:
    vocab = {"<unk>": 0, "\u2581Hello": 1, "<0xF0>": 2, "<0x9F>": 3, "wor": 4, "\u2581": 5}
    backend = Backend(BPE(vocab=vocab, merges=[], unk_token="<unk>", byte_fallback=True))
    backend.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()])
    found = TokenBytes(backend)
    assert [found.of(i) for i in range(1, 6)] == [b" Hello", b"\xf0", b"\x9f", b"wor", b" "]


@pytest.mark.parametrize(
    ("decoder", "joins"),
    [
        (decoders.ByteLevel(), True),
        (decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]), True),
        (decoders.Metaspace(), True),
        (decoders.WordPiece(), False),
        (None, False),
    ],
    ids=["byte level", "SentencePiece", "Metaspace", "WordPiece", "none"],
)
def test_special_tokens_are_joined_as_transformers_joins_them_with_spaces_and_without(
    tmp_path: Path, decoder: Any, joins: bool
) -> None:
    from transformers import PreTrainedTokenizerFast

    write_tiny_model(tmp_path)
    backend = make_tokenizer()
    if decoder is None:
        saved = json.loads(backend.to_str()) | {"decoder": None}
        (tmp_path / "tokenizer.json").write_text(json.dumps(saved))
    else:
        backend.decoder = decoder
        backend.save(str(tmp_path / "tokenizer.json"))
    oracle, tokenizer = PreTrainedTokenizerFast.from_pretrained(tmp_path), Tokenizer(tmp_path)
    for spaces in (True, False):
        assert tokenizer.shown([1, 2, 1]) == oracle.decode([1, 2, 1], spaces_between_special_tokens=spaces)
    assert (" " not in tokenizer.shown([1, 2, 1])) is joins
    assert tokenizer.joins_special is joins
    body = CompletionRequest(model="m", prompt="x", spaces_between_special_tokens=False)
    if joins:
        sampling_params(body, 5, None, 100, None, tokenizer)
    else:
        with pytest.raises(RequestError, match="puts spaces between special tokens") as refused:
            sampling_params(body, 5, None, 100, None, tokenizer)
        assert refused.value.param == "spaces_between_special_tokens"
    sampling_params(msgspec.structs.replace(body, spaces_between_special_tokens=True), 5, None, 100, None, tokenizer)


def test_a_directory_without_a_tokenizer_is_named(tmp_path: Path) -> None:
    with pytest.raises(TokenizerMissing, match=r"no tokenizer\.json"):
        Tokenizer(tmp_path)


def test_the_service_never_imports_torch() -> None:
    program = "import sys, service.__main__; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
