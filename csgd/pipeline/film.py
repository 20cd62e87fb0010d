"""What the pictures of a stage show of its steps: the filters of a layer on their way, and what is left of the
deviation."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from csgd.checkpoint import load_weights, save_weights
from csgd.pipeline.album import Album

FRAMES = 36  # of a stage, about


@dataclass
class Film:
    """The frames of a stage, written as they are taken.

    album   says whose filters they show; None where no layer that is cut has filters of more than one pixel
    every   steps between two of them;  due  the step at which the last is expected
    axes    [weights of a filter, 2] the plane in which the filters differ most at the start of the stage
    frames  {what: of each frame}: 'steps', 'left/<group>'; of the layer 'tiles' [c, h, w], its filters summed over
            their inputs, and 'places' [c, 2], where they lie in the plane
    """

    path: Path
    stage: int
    album: Album | None
    every: int
    due: int
    axes: Tensor | None
    frames: dict[str, list[Tensor]] = field(default_factory=dict)
    earlier: dict[str, Tensor] = field(default_factory=dict)

    @classmethod
    def of(cls, path: Path, stage: int, album: Album | None, due: int, step: int, left: Mapping[str, float]) -> "Film":
        """Of a stage that has come to `step`; what an earlier process has taken of it up to there is kept.

        left  {group: 1.0}
        """
        kept = load_weights(path) if path.exists() and (stage or step) else {}
        earlier = {key: value for key, value in kept.items() if int(key.split("/")[0]) <= stage}
        start = load_weights(album.path)[f"{album.prefix}/start"] if album else None
        axes = None if start is None else _plane(start.flatten(1))
        film = cls(path, stage, album, math.ceil(due / FRAMES), due, axes, earlier=earlier)
        own = {key.removeprefix(film.prefix): value for key, value in kept.items() if key.startswith(film.prefix)}
        if own:
            film.frames = {key: list(value[own["steps"] <= step]) for key, value in own.items()}
        else:
            film._add(0, start, left)
        return film

    @property
    def prefix(self) -> str:
        return f"{self.stage + 1}/"

    def is_due(self, step: int) -> bool:
        return step % self.every == 0 or step == self.due

    def take(self, model: nn.Module, step: int, left: Mapping[str, float]) -> None:
        """Adds a frame; left  {group: of its deviation at the start of the stage}"""
        self._add(step, self.album.filters(model, "collapse") if self.album else None, left)
        own = {f"{self.prefix}{key}": torch.stack(values) for key, values in self.frames.items()}
        save_weights(self.path, self.earlier | own)

    def _add(self, step: int, filters: Tensor | None, left: Mapping[str, float]) -> None:
        frame = {"steps": torch.tensor(step)} | {f"left/{group}": torch.tensor(value) for group, value in left.items()}
        if filters is not None:
            frame |= {"tiles": filters.sum(1), "places": filters.flatten(1) @ self.axes}
        for key, value in frame.items():
            self.frames.setdefault(key, []).append(value)


def _plane(filters: Tensor) -> Tensor:
    """The two directions in which some filters [c, k] differ most: [k, 2]."""
    return torch.linalg.svd(filters - filters.mean(0), full_matrices=False).Vh[:2].T
