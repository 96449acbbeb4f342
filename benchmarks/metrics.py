"""Exact AUC and GAUC against scikit-learn in time, and against keras.metrics.AUC in value.

    python -m benchmarks.metrics [--rows=1000000,10000000]

needs scikit-learn (pip install '.[bench]'). Both sides of a comparison run in turn on the same
generated rows, and the fastest of --repeats runs counts: read the ratios, not the seconds. GAUC by
scikit-learn, a call a group, is timed on a slice of the groups and extrapolated; the line says so.
"""

import time
from collections.abc import Callable

import pwiser_tf.quiet  # noqa: F401

# isort: split

import numpy as np
import pandas as pd
import sklearn.metrics
import tf_keras as keras
from absl import flags

from benchmarks import machine
from pwiser_tf import command_line, metrics

ROWS = flags.DEFINE_list("rows", ["1000000", "10000000"], "Row counts to measure.")
REPEATS = flags.DEFINE_integer("repeats", 3, "Runs of each side.", lower_bound=1)
SEED = flags.DEFINE_integer("seed", 0, "Of the generated rows.")

# Labels as rare as conversions and as clicks are on AliExpress, in searches of 20 exposures.
RATES = {"conversions": 0.0008, "clicks": 0.02}
ROWS_PER_GROUP = 20
# As many groups as scikit-learn takes a few seconds for.
GROUPS_ON_SLICE = 5000


def generate(rows: int, rate: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Labels bool [rows], float32 probabilities with an AUC of 0.76, and groups int64 [rows]."""
    generator = np.random.default_rng(SEED.value)
    labels = generator.random(rows) < rate
    # One standard deviation between two normal classes: this is then the true probability.
    utility = generator.normal(size=rows) + labels
    logit = utility - 0.5 + np.log(rate / (1 - rate))
    probabilities = (1 / (1 + np.exp(-logit))).astype(np.float32)
    groups = generator.integers(2**40, size=rows // ROWS_PER_GROUP + 1)
    return labels, probabilities, groups[np.arange(rows) // ROWS_PER_GROUP]


def race(**sides: Callable[[], object]) -> dict[str, tuple[float, object]]:
    """Runs the sides in turn. Returns name to (seconds of the fastest run, its result)."""
    fastest = {}
    for _ in range(REPEATS.value):
        for name, side in sides.items():
            start = time.perf_counter()
            value = side()
            seconds = time.perf_counter() - start
            fastest[name] = min(fastest.get(name, (seconds, value)), (seconds, value))
    return fastest


def gauc_by_sklearn(labels, probabilities, groups) -> float:
    """GAUC as it is usually written: a loop over groups, and a call for each."""
    areas, weights = [], []
    for rows in pd.Series(groups).groupby(groups).indices.values():
        if 0 < np.count_nonzero(labels[rows]) < len(rows):
            areas.append(sklearn.metrics.roc_auc_score(labels[rows], probabilities[rows]))
            weights.append(len(rows))
    return float(np.average(areas, weights=weights)) if areas else float("nan")


def compare_auc(labels, probabilities) -> None:
    """Prints time and value of the AUC of one set of rows."""
    found = race(
        ours=lambda: metrics.auc(labels, probabilities),
        interval=lambda: metrics.auc_interval(labels, probabilities),
        sklearn=lambda: float(sklearn.metrics.roc_auc_score(labels, probabilities)),
    )
    ours, interval, theirs = found["ours"], found["interval"], found["sklearn"]
    print(
        f"  AUC   ours {ours[0]:.3f} s (with interval {interval[0]:.3f} s), "
        f"sklearn {theirs[0]:.3f} s: {theirs[0] / ours[0]:.1f} times as long; "
        f"values differ by {abs(ours[1] - theirs[1]):.0e}"
    )
    approximate = keras.metrics.AUC(num_thresholds=200)
    approximate.update_state(labels, probabilities)
    value = float(approximate.result())
    print(
        f"        exact {ours[1]:.4f}, keras.metrics.AUC(num_thresholds=200) {value:.4f}: "
        f"wrong by {value - ours[1]:+.4f}"
    )


def compare_gauc(labels, probabilities, groups) -> None:
    """Prints the time of GAUC on all rows, and that of scikit-learn on a slice, extrapolated."""
    count = len(labels) // ROWS_PER_GROUP
    part = min(GROUPS_ON_SLICE, count)
    sliced = slice(part * ROWS_PER_GROUP)
    arrays = labels[sliced], probabilities[sliced], groups[sliced]
    found = race(
        ours=lambda: metrics.gauc(labels, probabilities, groups),
        sklearn=lambda: gauc_by_sklearn(*arrays),
    )
    (seconds, (_, used, skipped)), (on_slice, theirs) = found["ours"], found["sklearn"]
    difference = abs(metrics.gauc(*arrays)[0] - theirs)
    extrapolated = on_slice * count / part
    print(
        f"  GAUC  ours {seconds:.3f} s ({used:,} groups used, {skipped:,} of one class), "
        f"sklearn a call a group {extrapolated:.0f} s\n"
        f"        (extrapolated from {on_slice:.2f} s on {part:,} of {count:,} groups): "
        f"{extrapolated / seconds:.0f} times as long; values on the slice differ by "
        f"{difference:.0e}"
    )


def main() -> None:
    """Measures every row count at every rate."""
    print(machine.header(), end="\n\n")
    for rows in map(int, ROWS.value):
        for name, rate in RATES.items():
            labels, probabilities, groups = generate(rows, rate)
            print(f"{rows:,} rows, {name}: {rate:.2%} positive", flush=True)
            compare_auc(labels, probabilities)
            compare_gauc(labels, probabilities, groups)


if __name__ == "__main__":
    command_line.run(main)
