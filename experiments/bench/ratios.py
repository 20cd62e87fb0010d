"""The ratios that docs/results.md tells, from the JSON files of the benchmarks: python experiments/bench/ratios.py"""

import json
import statistics
from pathlib import Path

RESULTS = Path(__file__).parent / "results"


def sentence(results: Path = RESULTS) -> str:
    names = ("optimizer_step", "training_step", "clusters", "latency", "pruned_model")
    step, training, clusters, latency, whole = (json.loads((results / f"{name}.json").read_text()) for name in names)
    to_sgd = {(row["network"], row["threads"], row["contender"]): row["to_sgd"] for row in step["rows"]}
    places = {place[:2] for place in to_sgd}
    dense = [to_sgd[*place, "dense"] / to_sgd[*place, "CSGD"] for place in places]

    def ours(*networks: str) -> str:
        found = [to_sgd[network, threads, "CSGD"] for network, threads in places if network in networks]
        return f"{min(found):.2f} to {max(found):.2f} times that of SGD for {' and '.join(networks)}"

    within = [row for row in training["rows"] if row["contender"] == "CSGD"]
    main_job = [row["to_sgd"] for row in within if "main job" in row["network"]]
    parts = [row["optimizer_to_sgd"] for row in within]
    faster = [row["faster"] for row in clusters["rows"] if row["contender"] == "csgd"]
    (pruned,) = [
        row for row in latency["rows"]
        if (row["network"], row["batch"], row["contender"]) == ("VGG-16", 32, "5/8") and row["threads"] == 1
    ]  # fmt: skip
    cut, fine_tuned = (
        mean_of(whole, "VGG-16", way) for way in ("C-SGD, cut at the collapse", "Torch-Pruning, fine-tuned")
    )
    return (
        f"A training step of the main job takes {min(main_job):.3f} to {max(main_job):.3f} times that with "
        f"torch.optim.SGD, and the optimizer's part of such steps {min(parts):.2f} to {max(parts):.2f} times SGD's "
        f"(VGG-16, ResNet-50; 1 and {step['cores']} threads). On its own, a step of CSGD takes "
        f"{ours('VGG-16', 'ResNet-50')}, and {ours('ResNet-56', 'DenseNet-121')} with their many small tensors "
        f"(medians over {step['rows'][0]['processes']} processes); it is {min(dense):.0f} to {max(dense):.0f} times "
        f"faster than dense matrices, as published. Clusters are found {min(faster):.1f} to {max(faster):.1f} times "
        f"faster than by a loop over scikit-learn's k-means. VGG-16 at 5/8, with {pruned['macs_ratio']:.2f} times "
        f"fewer multiply-accumulates, answers a batch of 32 {pruned['faster']:.2f} times faster. To get it from the "
        f"same trained network costs {cut['seconds'] / fine_tuned['seconds']:.1f} times what pruning by magnitude and "
        f"fine-tuning for as many epochs does (Torch-Pruning): {cut['after_cut']:.1%} instead of "
        f"{fine_tuned['after_cut']:.1%} of the digits are right after the cut, {cut['at_end']:.1%} and "
        f"{fine_tuned['at_end']:.1%} at the end."
    )


def mean_of(whole: dict, network: str, way: str) -> dict[str, float]:
    """The means over seeds of what one way to a pruned network costs and gives."""
    rows = [row for row in whole["rows"] if (row["network"], row["way"]) == (network, way)]
    return {key: statistics.mean(row[key] for row in rows) for key in ("seconds", "after_cut", "at_end")}


if __name__ == "__main__":
    print(sentence())
