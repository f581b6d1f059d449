"""Shared by all tests: hypothesis profiles, and one thread a process (pytest-xdist runs one process a core)."""

import os

import torch
from hypothesis import settings

from structmat.testing.strategies import register_profiles

register_profiles()
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci" if os.environ.get("CI") else "dev"))
torch.set_num_threads(1)
