"""Without a GPU the Triton kernels run in Triton's interpreter."""

import os

import torch

# Before any kernel is imported: Triton reads it when it decorates one.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
# Its default, said aloud: Triton 3.9 warns of a default that it will change.
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")
