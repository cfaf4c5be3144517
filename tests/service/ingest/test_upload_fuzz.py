"""Some of `upload_fuzz` in every run, and the uploads that it once found something with."""

import gzip
import io
import json
import tarfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from safetensors.numpy import save

from runtime.adapter_format.canonical import canonicalise
from tests.service.adapters.adapter_bundles import CONFIG, TINY, WEIGHTS, bundle, config, tensors
from tests.service.ingest.upload_fuzz import Upload, check, judge_archive, judge_tensors, uploads


@settings(max_examples=40, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large], derandomize=True)
@given(uploads())
def test_an_upload_is_refused_by_name_or_is_what_safetensors_and_peft_say(upload: Upload) -> None:
    check(upload)


def archive(*files: tuple[str, bytes]) -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as made:
        for name, content in files:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            made.addfile(member, io.BytesIO(content))
    return stream.getvalue()


def test_what_is_whole_is_accepted_in_pieces_of_any_size() -> None:
    whole = archive(*zip((CONFIG, WEIGHTS), bundle(), strict=True))
    raw = save(tensors(), metadata={"adapter_config": config().decode()})
    for piece in (1, 512, 1 << 20):
        assert check(Upload("application/x-tar", whole, piece)) == "accepted"
        assert check(Upload("application/gzip", gzip.compress(whole), piece)) == "accepted"
        assert check(Upload("application/vnd.safetensors", raw, piece)) == "accepted"


def test_the_judges_object_to_other_tensors_and_to_other_files(tmp_path: Path) -> None:
    """They can fail: a canonical file of other weights, or of another scale, and a file that tarfile does not find."""
    (tmp_path / WEIGHTS).write_bytes(save(tensors(seed=1)))
    canonicalise(tmp_path / WEIGHTS, config(), TINY, tmp_path / "canonical", max_rank=8)
    judge_tensors(save(tensors(seed=1)), config(), tmp_path / "canonical")
    with pytest.raises(AssertionError):
        judge_tensors(save(tensors(seed=2)), config(), tmp_path / "canonical")
    louder = json.dumps(json.loads(config()) | {"lora_alpha": 5}).encode()
    with pytest.raises(AssertionError):
        judge_tensors(save(tensors(seed=1)), louder, tmp_path / "canonical")
    (tmp_path / CONFIG).write_bytes(b"{}")
    with pytest.raises(AssertionError, match="another adapter_config"):
        judge_archive(Upload("application/x-tar", archive((CONFIG, config())), 512), tmp_path)
