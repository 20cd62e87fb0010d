"""Hooks on the steps of any torch optimizer."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from csgd.errors import InputError


def check_hooks(optimizer: object) -> None:
    """InputError for what is no torch optimizer, or wraps one and never calls hooks, as accelerate's does."""
    if not isinstance(optimizer, Optimizer) or not hasattr(optimizer, "_optimizer_step_pre_hooks"):
        raise InputError(
            f"a {type(optimizer).__name__} is no torch optimizer that calls hooks: give the one inside (.optimizer)"
        )


def parameters_of(optimizer: Optimizer) -> list[Tensor]:
    return [p for group in optimizer.param_groups for p in group["params"]]


def on_gradients(optimizer: Optimizer, change: Callable[[], None]) -> RemovableHandle:
    """Calls `change` when the gradients of a step are there: before it, or after each call of its closure, in which
    Lightning, LBFGS and SAM run their backward passes."""
    change = torch.compiler.disable(change)

    def hook(_: Optimizer, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]] | None:
        by_position = len(args) > 1
        closure = args[1] if by_position else kwargs.get("closure")
        if closure is None:
            change()
            return None

        def changed():
            loss = closure()
            change()
            return loss

        return ((args[0], changed, *args[2:]), kwargs) if by_position else (args, kwargs | {"closure": changed})

    return optimizer.register_step_pre_hook(hook)
