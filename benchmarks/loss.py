"""What PWiseR costs: exact, as an explicit matrix of pairs, beside its rivals and cross-entropy.

    python -m benchmarks.loss [--rows=2048,8192] [--rates=.001,.01]

bce is there for scale; the rivals are those of pwiser_tf.losses, group-wise ones on groups of ten
rows. Each figure is one forward and backward pass over the scores (the rivals': logits) of one
head, in a tf.function:

- ms: the median of --repeats passes; the methods take turns in one process, so that a noisy
  machine disturbs all of them alike. Compare rows of the table, not tables.
- MB: the peak of resident memory above what the process held before its first pass at this size,
  in a process of its own. Linux only (it resets and reads VmHWM in /proc).
- error: the largest relative error of loss and gradient against every pair in float64 NumPy, the
  gradient's relative to its largest element. "-" where that would be more than --checked_pairs.

The pair matrix is skipped where the matrices of its backward pass would exceed --pair_gb, and
ranknet and combined_pair, whose time goes with the pairs, above 200 million of them. Prints a
Markdown table.
"""

import time
from typing import NamedTuple

import pwiser_tf.quiet  # noqa: F401

# isort: split

import numpy as np
import tensorflow as tf
import tf_keras as keras
from absl import flags

from benchmarks import machine
from pwiser_tf import command_line, losses
from tests import oracles

FLAGS = flags.FLAGS
MARGIN_CLICK, MARGIN_NONCLICK = 0.05, 0.1
CTR = 0.04
# Rows of one group, on average.
GROUP_ROWS = 10
# Memory is that of the process: the three that have something to show.
MEASURED_IN_MEMORY = ("exact", "pairs", "combined_pair")
# ranknet and combined_pair do about 500 million pairs a second.
_LOGISTIC_PAIRS = 2e8
# The pair matrix's forward and backward pass hold about so many float32 matrices at once.
_LIVE_MATRICES = 4


def define_flags():
    flags.DEFINE_list("rows", "2048,32768,131072,1048576", "Batch sizes.")
    flags.DEFINE_list("rates", ".001,.01", "Conversions per row.")
    flags.DEFINE_integer("repeats", 20, "Passes timed for each figure.", lower_bound=1)
    flags.DEFINE_float("pair_gb", 4, "Skip the pair matrix above this many GB.")
    flags.DEFINE_float("checked_pairs", 2e9, "Skip the error above this many pairs.")
    flags.DEFINE_bool("memory", True, "Measure memory: one process a figure, 5 s each.")
    flags.DEFINE_string("only", "", "Used by the benchmark itself: a method whose MB to print.")


class Batch(NamedTuple):
    scores: tf.Tensor  # float32 [rows], probabilities
    logits: tf.Tensor  # float32 [rows], theirs
    grade: tf.Tensor  # int64 [rows]
    group: tf.Tensor  # int64 [rows]


def make_batch(rows: int, rate: float) -> Batch:
    """Scores around each row's base rate, as a trained head gives, and grades. Generated."""
    generator = np.random.default_rng(rows)
    grade = np.zeros(rows, np.int64)
    conversions = max(1, round(rows * rate))
    clicks = max(1, round(rows * CTR))
    grade[:conversions] = 2
    grade[conversions : conversions + clicks] = 1
    generator.shuffle(grade)
    logits = np.log(CTR) + 0.5 * grade + generator.normal(size=rows)
    scores = tf.constant(1 / (1 + np.exp(-logits)), tf.float32)
    group = tf.constant(generator.integers(0, max(1, rows // GROUP_ROWS), rows))
    return Batch(scores, tf.constant(logits, tf.float32), tf.constant(grade), group)


def bce(batch):
    labels = tf.cast(batch.grade > 0, batch.scores.dtype)
    return tf.reduce_mean(keras.losses.binary_crossentropy(labels, batch.scores))


def exact(batch):
    return losses.pwiser(batch.scores, batch.grade, MARGIN_CLICK, MARGIN_NONCLICK)


def pairs(batch):
    """The same loss as most would write it: all pairs in a matrix, TensorFlow's own gradient."""
    conversions = tf.boolean_mask(batch.scores, batch.grade == 2)[:, tf.newaxis]
    loss = 0.0
    for lower_grade, margin in ((1, MARGIN_CLICK), (0, MARGIN_NONCLICK)):
        lower = tf.boolean_mask(batch.scores, batch.grade == lower_grade)[tf.newaxis, :]
        loss += tf.reduce_mean(tf.square(tf.nn.relu(margin - (conversions - lower))))
    return loss


def ranknet(batch):
    return losses.pairwise_logistic(batch.logits, batch.grade)


def combined_pair(batch):
    return losses.combined_pair(batch.logits, batch.grade > 0)


def jrc(batch):
    # The energies, another output of the head, are as good as the logits for a timing.
    return losses.jrc(batch.logits, batch.logits, batch.grade > 0, batch.group)


def listce(batch):
    return losses.listce(batch.logits, batch.grade > 0, batch.group)


def focal(batch):
    return tf.reduce_mean(losses.focal(batch.logits, batch.grade > 0))


METHODS = {
    function.__name__: function
    for function in (bce, exact, pairs, ranknet, combined_pair, jrc, listce, focal)
}


def make_pass(method: str):
    """A compiled function from a batch to loss and gradient."""
    function = METHODS[method]

    @tf.function(reduce_retracing=True)
    def one_pass(batch):
        with tf.GradientTape() as tape:
            tape.watch([batch.scores, batch.logits])
            loss = function(batch)
        gradients = tape.gradient(loss, [batch.scores, batch.logits])
        return loss, next(gradient for gradient in gradients if gradient is not None)

    return one_pass


def can_run(method: str, batch: Batch) -> bool:
    exposures, clicks, conversions = np.bincount(batch.grade, minlength=3).tolist()
    if method == "pairs":
        return _LIVE_MATRICES * 4e-9 * conversions * len(batch.grade) <= FLAGS.pair_gb
    if method == "ranknet":
        return conversions * (clicks + exposures) <= _LOGISTIC_PAIRS
    if method == "combined_pair":
        return (conversions + clicks) * exposures <= _LOGISTIC_PAIRS
    return True


def milliseconds(passes: dict, batch: Batch) -> dict[str, float]:
    """The median time of each pass, taken in turns."""
    times = {method: [] for method in passes}
    for repeat in range(FLAGS.repeats + 2):
        for method, one_pass in passes.items():
            start = time.perf_counter()
            one_pass(batch)[1].numpy()
            if repeat >= 2:  # the first ones trace and warm up
                times[method].append(time.perf_counter() - start)
    return {method: 1e3 * float(np.median(values)) for method, values in times.items()}


def status(field: str) -> int:
    """A size from /proc/self/status, in KB."""
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith(field + ":"))


def peak_megabytes(method: str, rows: int, rate: float) -> float:
    """Peak resident memory of two passes, above what was there; to be run in a fresh process."""
    one_pass = make_pass(method)
    for small in (256, 512):  # the code, threads and graph are there before; shapes are unknown
        one_pass(make_batch(small, rate))
    batch = make_batch(rows, rate)
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # sets VmHWM to what is resident now
    before = status("VmRSS")
    for _ in range(2):
        one_pass(batch)
    return (status("VmHWM") - before) / 1024


def peak_megabytes_in_fresh_process(method: str, rows: int, rate: float) -> float:
    return float(
        machine.run("benchmarks.loss", f"--only={method}", f"--rows={rows}", f"--rates={rate}")
    )


def errors(one_pass, batch: Batch) -> str:
    """The relative errors of loss and gradient, as text."""
    grades = batch.grade.numpy()
    if np.count_nonzero(grades == 2) * len(grades) > FLAGS.checked_pairs:
        return "-"
    loss, gradient = (value.numpy() for value in one_pass(batch))
    expected, expected_gradient = oracles.pwiser_by_rows(
        batch.scores.numpy(), grades, MARGIN_CLICK, MARGIN_NONCLICK
    )
    of_loss = abs(loss - expected) / expected
    of_gradient = np.abs(gradient - expected_gradient).max() / np.abs(expected_gradient).max()
    return f"{of_loss:.0e} / {of_gradient:.0e}"


def main() -> None:
    """Prints a Markdown table, or with --only a number of MB."""
    sizes = [(int(rows), float(rate)) for rows in FLAGS.rows for rate in FLAGS.rates]
    if FLAGS.only:
        print(peak_megabytes(FLAGS.only, *sizes[0]))
        return
    print(machine.header(), end="\n\n")
    columns = ["rows", "conversions"]
    columns += [f"{method} ms" for method in METHODS]
    columns += [f"{method} MB" for method in MEASURED_IN_MEMORY] if FLAGS.memory else []
    columns += ["error of exact (loss / gradient)", "error of pairs"]
    print("|", " | ".join(columns), "|")
    print("|" + "---|" * len(columns))
    for rows, rate in sizes:
        batch = make_batch(rows, rate)
        passes = {method: make_pass(method) for method in METHODS if can_run(method, batch)}
        times = milliseconds(passes, batch)
        cells = [f"{rows:,}", f"{np.count_nonzero(batch.grade.numpy() == 2):,}"]
        cells += [f"{times[m]:.2f}" if m in passes else "too large" for m in METHODS]
        for method in MEASURED_IN_MEMORY if FLAGS.memory else ():
            cells.append(
                f"{peak_megabytes_in_fresh_process(method, rows, rate):.0f}"
                if method in passes
                else "too large"
            )
        for method in ("exact", "pairs"):
            cells.append(errors(passes[method], batch) if method in passes else "too large")
        print("|", " | ".join(cells), "|", flush=True)


if __name__ == "__main__":
    define_flags()
    command_line.run(main)
