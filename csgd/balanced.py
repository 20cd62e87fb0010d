"""k-means whose clusters all have one size, as norms over channels ask for (fact F12)."""

import numpy as np

ROUNDS = 50  # of assignments, and of swaps: both end by themselves, mostly within ten
GAIN = 1e-9  # of the spread of all rows, below which a swap is rounding


def balanced(rows: np.ndarray, centres: np.ndarray) -> np.ndarray:
    """Labels [n] of clusters of n / m rows each that lie close together; rows [n, k], centres to start from [m, k].

    Lloyd's iterations, in which all rows are assigned at once at the least sum of squared distances (a linear sum
    assignment to n / m seats at each centre), then swaps of two rows while these lower the inertia.
    """
    from scipy.optimize import linear_sum_assignment

    size, labels = len(rows) // len(centres), None
    for _ in range(ROUNDS):
        squares = (centres**2).sum(1) - 2 * rows @ centres.T  # distances, but for the square of the row itself
        before, labels = labels, linear_sum_assignment(np.repeat(squares, size, 1))[1] // size
        if before is not None and (labels == before).all():
            break
        centres = _sums(rows, labels, len(centres)) / size
    return _swapped(rows, labels, len(centres))


def _sums(rows: np.ndarray, labels: np.ndarray, m: int) -> np.ndarray:
    """The sum of the rows of each cluster [m, k]."""
    return (labels == np.arange(m)[:, None]).astype(rows.dtype) @ rows


def _swapped(rows: np.ndarray, labels: np.ndarray, m: int) -> np.ndarray:
    """Labels after swaps of two rows of different clusters, the best ones first, until none lowers the inertia.

    With d = x_j − x_i and the sums S of two clusters of s rows, a swap of i and j lowers the inertia by
    2 (d·(S_i − S_j) + d·d) / s.
    """
    labels, products = labels.copy(), rows @ rows.T
    squares = np.diag(products)
    for _ in range(ROUNDS):
        with_sums = _sums(products, labels, m).T[:, labels]  # [j, i]: x_j · S of the cluster of i
        own = np.diag(with_sums)
        gains = with_sums + with_sums.T - own - own[:, None] + squares + squares[:, None] - 2 * products
        gains[labels == labels[:, None]] = 0
        partner, gain = gains.argmax(1), gains.max(1)
        touched: set[int] = set()
        for i in np.argsort(-gain, kind="stable").tolist():
            pair = {int(labels[i]), int(labels[partner[i]])}
            if gain[i] <= GAIN * squares.sum():
                break
            if touched.isdisjoint(pair):
                touched |= pair
                labels[i], labels[partner[i]] = labels[partner[i]], labels[i]
        if not touched:
            break
    return labels
