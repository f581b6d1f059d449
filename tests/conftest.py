"""Shared by all tests: hypothesis profiles, and one thread a process (pytest-xdist runs one process a core)."""

import os

# The Triton kernels are tested in Triton's interpreter, on the CPU; benchmarks/gpu_check.sh sets 0 and tests them
# compiled. Triton reads it when a kernel is defined: it is set before anything imports structmat.
os.environ.setdefault("TRITON_INTERPRET", "1")

import torch
from hypothesis import settings

from structmat.testing.strategies import register_profiles

register_profiles()
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci" if os.environ.get("CI") else "dev"))
torch.set_num_threads(1)
