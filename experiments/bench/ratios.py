"""The ratios that README tells, from the JSON files of the benchmarks: python experiments/bench/ratios.py"""

import json
from pathlib import Path

RESULTS = Path(__file__).parent / "results"


def sentence(results: Path = RESULTS) -> str:
    step, clusters, latency = (
        json.loads((results / f"{name}.json").read_text()) for name in ("optimizer_step", "clusters", "latency")
    )
    to_sgd = {(row["network"], row["threads"], row["contender"]): row["to_sgd"] for row in step["rows"]}
    places = {place[:2] for place in to_sgd}
    ours = [to_sgd[*place, "CSGD"] for place in places]
    dense = [to_sgd[*place, "dense"] / to_sgd[*place, "CSGD"] for place in places]
    networks = ", ".join(dict.fromkeys(row["network"] for row in step["rows"]))
    faster = [row["faster"] for row in clusters["rows"] if row["contender"] == "csgd"]
    (pruned,) = [
        row for row in latency["rows"]
        if (row["network"], row["batch"], row["contender"]) == ("VGG-16", 32, "5/8") and row["threads"] == 1
    ]  # fmt: skip
    return (
        f"A step of CSGD takes {min(ours):.2f} to {max(ours):.2f} times that of torch.optim.SGD ({networks}; 1 and "
        f"{step['cores']} threads), and is {min(dense):.0f} to {max(dense):.0f} times faster than dense matrices, as "
        f"published. Clusters are found {min(faster):.1f} to {max(faster):.1f} times faster than by a loop over "
        f"scikit-learn's k-means. VGG-16 at 5/8, with {pruned['macs_ratio']:.2f} times fewer multiply-accumulates, "
        f"answers a batch of 32 {pruned['faster']:.2f} times faster."
    )


if __name__ == "__main__":
    print(sentence())
