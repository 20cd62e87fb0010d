"""The filters of one layer as a stage finds them, at their collapse, and after the cut: for the picture of the run."""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from csgd.checkpoint import load_weights, save_weights
from csgd.clusters import Clusters, clustered_tensors, tensor_of
from csgd.graph import ChannelSpace
from csgd.graph.twin import dotted


@dataclass(frozen=True)
class Album:
    """Where the filters of a stage are kept, under '<stage>/<layer>/<when>'.

    cluster  [slots] the number of each slot's cluster
    rows  [slots] position of each slot's filter in the kernel;  cut_rows  [clusters] the same after the cut
    """

    path: Path
    prefix: str
    space: ChannelSpace
    cluster: Tensor
    rows: Tensor
    cut_rows: Tensor

    @classmethod
    def of(
        cls, path: Path, number: int, model: nn.Module, spaces: list[ChannelSpace], clusters: Clusters
    ) -> "Album | None":
        """The album of the first layer that is cut and has filters of more than one pixel; None if there is none."""
        for space in spaces:
            parts = clusters.get(space.name, ())
            kernel = tensor_of(model, space.producers[0]) if 0 < len(parts) < space.size else None
            if kernel is not None and kernel.dim() == 4 and kernel[0, 0].numel() > 1:
                break
        else:
            return None
        ref = space.producers[0]
        segments = next(t.merged[1] for t in clustered_tensors(model, spaces, clusters) if t.owners == ref.owners)
        kept = (segments == torch.arange(len(segments))).nonzero().flatten()
        cluster = torch.empty(space.size, dtype=torch.long)
        for c, members in enumerate(parts):
            cluster[members] = c
        rows = ref.index[:, 0]
        cut_rows = torch.searchsorted(kept, rows[[members[0] for members in parts]])
        return cls(path, f"{number + 1}/{space.name}", space, cluster, rows, cut_rows)

    def keep(self, model: nn.Module, when: str) -> None:
        """Adds the filters of now; when: start (of the stage) | collapse | cut (just after it)."""
        ref = self.space.producers[0]
        kernel = model.get_parameter(dotted(*ref.owners[0])).detach().float().cpu()  # before the cut, and after it
        rows = self.cut_rows if when == "cut" else self.rows
        fresh = when == "start" and self.prefix.startswith("1/")
        kept = load_weights(self.path) if self.path.exists() and not fresh else {}
        kept[f"{self.prefix}/cluster"] = self.cluster
        kept[f"{self.prefix}/{when}"] = kernel.index_select(ref.dim, rows).movedim(ref.dim, 0)
        save_weights(self.path, kept)
