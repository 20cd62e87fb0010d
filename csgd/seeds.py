"""The generators that code may draw from without saying so: torch's, numpy's and Python's."""

import random
from typing import Any

import numpy as np
import torch

RandomState = dict[str, Any]  # of what torch.load reads with weights_only=True


def seed_all(seed: int) -> None:
    """Seeds torch on all devices, numpy and Python's random; torch draws what torch.manual_seed(seed) gives."""
    torch.manual_seed(seed)
    # numpy takes 32 bits a word, and a seed of an epoch may have more.
    np.random.seed(np.random.SeedSequence(seed % 2**64).generate_state(4))
    random.seed(seed)


def random_state() -> RandomState:
    """The state of all of them, of CUDA that of the present device."""
    kind, keys, *place = np.random.get_state()
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_initialized() else None,
        "numpy": (kind, keys.tolist(), *place),
        "python": random.getstate(),
    }


def set_random_state(state: RandomState) -> None:
    """Goes on from what `random_state` returned."""
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
    np.random.set_state(state["numpy"])
    random.setstate(state["python"])
