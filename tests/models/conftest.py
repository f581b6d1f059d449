"""What tests of models share: the device, a CUDA one under `-m gpu`."""

import pytest


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request):
    return request.param
