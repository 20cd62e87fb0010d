import os

import pytest
import torch


@pytest.fixture(autouse=True)
def _repeatable():
    """Every test starts from the same random state, in float32, on two threads or as many as OMP_NUM_THREADS says."""
    torch.manual_seed(0)
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "2")))
    yield
    assert torch.get_default_dtype() is torch.float32
