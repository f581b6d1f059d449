"""Kernel tests run in Triton's interpreter on the CPU, and compiled on a CUDA device (`-m gpu`)."""

import pytest


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request):
    return request.param
