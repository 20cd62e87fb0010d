"""What pictures show of a cut: the filters of one layer as a stage finds them, at their collapse and after the cut; and
what the network says of the test set before and after."""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from csgd.checkpoint import load_weights, save_weights
from csgd.clusters import Clusters, clustered_tensors, tensor_of
from csgd.graph import ChannelSpace
from csgd.graph.twin import dotted
from csgd.verify import relative_change

POINTS = 4000  # outputs of a network that are kept


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
        cluster = torch.full((space.size,), -1)  # slots that no cluster names are in none
        for c, members in enumerate(parts):
            cluster[members] = c
        rows = ref.index[:, 0]
        cut_rows = torch.searchsorted(kept, rows[[members[0] for members in parts]])
        return cls(path, f"{number + 1}/{space.name}", space, cluster, rows, cut_rows)

    def keep(self, model: nn.Module, when: str) -> None:
        """Adds the filters of now; when: start (of the stage) | collapse | cut (just after it)."""
        fresh = when == "start" and self.prefix.startswith("1/")
        kept = load_weights(self.path) if self.path.exists() and not fresh else {}
        kept[f"{self.prefix}/cluster"] = self.cluster
        kept[f"{self.prefix}/{when}"] = self.filters(model, when)
        save_weights(self.path, kept)

    def filters(self, model: nn.Module, when: str) -> Tensor:
        """The filters of now [c, i, h, w], by slot, or by cluster if they are cut."""
        ref = self.space.producers[0]
        kernel = model.get_parameter(dotted(*ref.owners[0])).detach().float().cpu()  # before the cut, and after it
        return kernel.index_select(ref.dim, self.cut_rows if when == "cut" else self.rows).movedim(ref.dim, 0)


def keep_outputs(path: Path, stage: int, before: list[Tensor], after: list[Tensor]) -> None:
    """What the network says of the test set before a cut and after it: some images' first output, the image that
    changed most among them; and of every image how much its outputs changed, by their spread."""
    kept, (before_logits, after_logits) = load_weights(path) if stage and path.exists() else {}, (before[0], after[0])
    changes = relative_change(before, after)
    count = max(1, min(len(before_logits), POINTS * len(before_logits) // max(1, before_logits.numel())))
    shown = torch.linspace(0, len(before_logits) - 1, count).round().long()
    shown[-1] = changes.argmax() if len(changes) == len(before_logits) else shown[-1]
    for when, logits in (("before", before_logits), ("after", after_logits)):
        kept[f"{stage + 1}/{when}"] = logits[shown].flatten()[:POINTS].float()
    kept[f"{stage + 1}/change"] = changes
    save_weights(path, kept)
