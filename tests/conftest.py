"""What every test starts from: no network, one thread a process, Triton's interpreter where there is no GPU,
reproducible hypothesis runs, the default model; and what `--quick` leaves out."""

import os
import sys
from pathlib import Path

# Before torch or huggingface_hub is imported, and inherited by the servers that tests start. One thread a process, and
# `threads` of engines in tests is 1: the suite's workers fill the cores already, and threads that spin beside them slow
# everything down, torch's small products on two threads to a tenth.
os.environ["OMP_NUM_THREADS"] = os.environ["ROOTSTOCK_THREADS"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"
if not Path("/dev/nvidiactl").exists():
    os.environ["TRITON_INTERPRET"] = "1"  # Triton asks when it decorates a kernel, and its own when it is imported

import hypothesis
import pytest

from service.default_model import ensure_default_model
from service.settings import user_cache_directory

os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")  # its default, said aloud: 3.9 warns that it will change

hypothesis.settings.register_profile("rootstock", deadline=None, print_blob=True)
hypothesis.settings.load_profile("rootstock")

# What `make test-quick` leaves out to take less than a minute: files and folders, which it never imports, and fixtures.
SLOW = {
    Path(__file__).parent / path
    for path in (
        # Triton's interpreter
        "kernels",
        "runtime/gpu",
        "tools",
        # PEFT and transformers as oracles
        "runtime/models",
        "runtime/parallel",
        "runtime/adapters/test_adapter_maths.py",
        "runtime/adapters/test_storms.py",
        "runtime/kv/test_eviction.py",
        "runtime/kv/test_kv_interleavings.py",
        "runtime/kv/test_kv_logprobs.py",
        "runtime/kv/test_kv_reuse.py",
        "runtime/kv/test_offload_engine.py",
        "runtime/test_alora.py",
        "runtime/test_alora_smollm2.py",
        "runtime/test_engine_smollm2.py",
        "service/ingest/test_upload_fuzz.py",
        # servers and engines as processes of their own, and programs that are killed at each step
        "loadtests",
        "runtime/kv/test_process_kv.py",
        "runtime/test_process.py",
        "service/catalog/test_catalog_kills.py",
        "service/catalog/test_kill_storm.py",
        "service/test_end_to_end.py",
        "service/test_end_to_end_alora.py",
        "service/test_end_to_end_tools.py",
        "service/test_serve.py",
        "test_readme.py",
        # S3 servers
        "service/catalog/test_catalog_s3.py",
        "service/ingest/test_remote_sources.py",
        "storage/test_s3.py",
        "storage/test_s3_faults.py",
        # others that take more than 10 s
        "runtime/adapters/test_engine_adapters.py",
        "service/test_default_model.py",
    )
}
SLOW_FIXTURES = {"default_model_path", "s3_server"}

# A file's tests share a worker: those that take longest come first, or one worker has them alone at the end.
LONGEST = (
    "runtime/test_engine_smollm2.py",
    "kernels/test_compiled.py",
    "kernels/cpu/compiled/test_portable_builds.py",
    "tools/test_gpu_report.py",
    "runtime/gpu/test_compiled_engine.py",
    "service/test_serve.py",
    "test_readme.py",
    "loadtests/test_benchmarks.py",
    "loadtests/test_load_report.py",
    "storage/test_s3_faults.py",
)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--quick", action="store_true", help="leave out the tests that tests/conftest.py calls slow")


def pytest_configure(config: pytest.Config) -> None:
    """Choose Triton's interpreter also where a GPU cannot be used."""
    if config.option.quick:
        return  # no kernel runs, and torch takes seconds to import
    import torch

    if not torch.cuda.is_available():
        os.environ["TRITON_INTERPRET"] = "1"


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    return True if config.option.quick and collection_path in SLOW else None


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.option.quick:
        slow = [item for item in items if SLOW_FIXTURES & set(getattr(item, "fixturenames", ()))]
        config.hook.pytest_deselected(items=slow)
        items[:] = [item for item in items if item not in set(slow)]
    items.sort(key=_place)  # stable: the rest keeps its order


def pytest_runtest_teardown() -> None:
    """Have torch compute on one thread again: an engine sets the number, for its whole process."""
    if torch := sys.modules.get("torch"):
        torch.set_num_threads(1)


def _place(item: pytest.Item) -> int:
    file = item.path.relative_to(Path(__file__).parent).as_posix()
    return LONGEST.index(file) if file in LONGEST else len(LONGEST)


@pytest.fixture(scope="session")
def default_model_path() -> Path:
    """The embedded model as a Hugging Face directory, shared by all workers and runs; about 30 s the first time."""
    return ensure_default_model()


@pytest.fixture(scope="session")
def kept_builds() -> Path:
    """Where tests keep what compilers made, between runs: each thing under a name that changes with all it is made of.

    It grows by a few MB with a change of the kernels, and may be deleted at any time.
    """
    directory = user_cache_directory() / "tests"
    directory.mkdir(parents=True, exist_ok=True)
    return directory


@pytest.fixture(scope="session")
def triton_cache(kept_builds: Path) -> dict[str, str]:
    """The environment by which Triton keeps what it compiles, each under a key of the source, options and version."""
    return {"TRITON_CACHE_DIR": str(kept_builds / "triton"), "TRITON_STORE_BINARY_ONLY": "1"}


@pytest.fixture(scope="session")
def trained_adapters() -> Path:
    """The directory of the committed adapters; its `passwords.json` has the prompt and the password of each."""
    return Path(__file__).with_name("adapters")
