"""One thread for torch: these tensors are too small for more."""

import importlib.util

import pytest


@pytest.fixture(scope="session", autouse=True)
def _one_thread():
    if importlib.util.find_spec("torch") is None:
        yield  # the tests that need torch skip themselves
        return
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
