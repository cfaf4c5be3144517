"""What every test starts from: no network, one thread a process, Triton's interpreter where there is no GPU,
reproducible hypothesis runs, the default model."""

import os
from pathlib import Path

# Before torch or huggingface_hub is imported, and inherited by the servers that tests start. One thread a process:
# the suite's workers fill the cores already, and threads that spin beside them slow everything down.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"  # tests of the hub set offline mode off, and telemetry asks the real hub

import hypothesis
import pytest
import torch

from service.default_model import ensure_default_model

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # Triton reads it when it decorates a kernel
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")  # its default, said aloud: 3.9 warns that it will change

hypothesis.settings.register_profile("rootstock", deadline=None, print_blob=True)
hypothesis.settings.load_profile("rootstock")


@pytest.fixture(scope="session")
def default_model_path() -> Path:
    """The embedded model as a Hugging Face directory, shared by all workers and runs; about 30 s the first time."""
    return ensure_default_model()


@pytest.fixture(scope="session")
def trained_adapters() -> Path:
    """The directory of the committed adapters; its `passwords.json` has the prompt and the password of each."""
    return Path(__file__).with_name("adapters")
