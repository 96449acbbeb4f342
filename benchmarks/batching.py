"""Derives TF Serving's batching parameters from the time of the model call.

    python -m benchmarks.batching [--model=models/demo/1] > serving/deploy/batching.config

Run it on the machine that will serve, without other load. It prints the file; the measurements are
in its comments. Without --model it measures a new model of the size of configs/sample.flags. The
model is in a TF 1 Session with the default threads, as in TF Serving. Rows are random: a model's
time does not depend on their values.

- allowed_batch_sizes: the shortest list with which no batch, padded up to the next size of the
  list, takes more than --padding longer than without padding (see `ladder`).
- max_execution_batch_size: the largest batch that takes at most --latency_ms. A larger request is
  split, up to max_batch_size, which is --largest_request (the most that the client sends).
- num_batch_threads: the cores that this process may use.
- batch_timeout_micros: what a request of --rows rows can gain at most: the time of its own call
  minus its share of a full batch's. A longer wait can never be faster.
- max_enqueued_batches: those of the largest request, and those that run within --latency_ms.

Whether batching is faster at all is measured separately: --callers threads that each call with
--rows rows, against the batch threads with the same rows put together and padded. That is at full
load, without the work of putting together; at less load there is only the wait.
"""

import pwiser_tf.quiet  # noqa: F401

# isort: split

import os
import pathlib
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence

import numpy as np
import tensorflow as tf
from absl import flags
from tensorflow.core.protobuf import config_pb2

from benchmarks import generated, machine
from pwiser_tf.command_line import run
from pwiser_tf.errors import DataError

# Batching that gives less than this many times the rows per second is not worth its wait.
PAYS = 1.1
_TURNS, _TURN_SECONDS = 5, 0.7


def define_flags() -> None:
    """Defines the flags of this command."""
    flags.DEFINE_string("model", "", "A version's folder; default: a new model of the demo's size.")
    flags.DEFINE_string("signature", "predict", "The signature to call.")
    flags.DEFINE_integer("rows", 50, "Rows of a usual request.", lower_bound=1)
    flags.DEFINE_integer("callers", 8, "Requests in flight.", lower_bound=1)
    flags.DEFINE_integer("largest_request", 4096, "Rows of the largest request.", lower_bound=1)
    flags.DEFINE_float("latency_ms", 10, "The longest call of a batch.", lower_bound=0.001)
    flags.DEFINE_float("padding", 0.25, "Share of time that padding may add.", lower_bound=0.01)
    flags.DEFINE_integer("turns", 15, "Times that each size is measured.", lower_bound=1)


def grid(largest: int) -> list[int]:
    """Batch sizes to measure: 1 to `largest`, both included, eight to a doubling."""
    steps = np.arange(0, 8 * np.log2(largest))
    return sorted({*np.rint(2 ** (steps / 8)).astype(int).tolist(), largest})


def every_size(sizes: Sequence[int], seconds: Sequence[float]) -> np.ndarray:
    """The time of each batch size from 1 to the last measured one: float64 [sizes[-1]], rising.

    Between two measured sizes it goes straight. More rows never take less time: where a
    measurement says so it is noise, and the two sides are averaged (isotonic regression, by
    pooling neighbours until they rise).
    """
    pools: list[list[float]] = []
    for value in seconds:
        pools.append([value, 1])
        while len(pools) > 1 and pools[-2][0] > pools[-1][0]:
            (a, m), (b, n) = pools[-2:]
            pools[-2:] = [[(a * m + b * n) / (m + n), m + n]]
    rising = np.repeat([value for value, _ in pools], [count for _, count in pools])
    return np.interp(np.arange(1, sizes[-1] + 1), sizes, rising)


def ladder(seconds: np.ndarray, padding: float) -> list[int]:
    """The shortest list of sizes that serves every batch at a bounded price.

    Args:
      seconds: the time of each batch size from 1, float64 [largest], not falling.
      padding: the share of its own time that a batch may lose to padding, above 0.

    Returns:
      Sizes in rising order, the last one `largest`. A batch of n rows is padded to the first size
      of at least n, whose time is at most (1 + padding) times that of n. No shorter list does
      this: taken from the top, each size reaches down as far as it may, and the next is the
      first one that it does not serve.
    """
    sizes = [len(seconds)]
    while True:
        unserved = np.flatnonzero((1 + padding) * seconds[: sizes[0]] < seconds[sizes[0] - 1])
        if not len(unserved):
            return sizes
        sizes.insert(0, int(unserved[-1]) + 1)


def largest_within(seconds: np.ndarray, budget: float) -> int:
    """The largest batch size whose call takes at most `budget` seconds; 1 where none does."""
    return max(1, int(np.searchsorted(seconds, budget, side="right")))


def padded(size: int, sizes: Sequence[int]) -> int:
    """The first of the rising `sizes` that holds `size` rows, which the last one does."""
    return sizes[int(np.searchsorted(sizes, size))]


class Model:
    """A signature to call with any number of rows.

    Args:
      folder: the version's folder; signature: its name; largest: the most rows of a call.

    Raises:
      DataError: it does not load, or has no such signature of numbers.
    """

    def __init__(self, folder: pathlib.Path, signature: str, largest: int):
        graph = tf.Graph()
        session = tf.compat.v1.Session(graph=graph)
        try:
            with graph.as_default():
                tags = [tf.saved_model.SERVING]
                loaded = tf.compat.v1.saved_model.loader.load(session, tags, str(folder))
        except (OSError, ValueError, RuntimeError, tf.errors.OpError) as error:
            raise DataError(f"{folder}: {error}") from None
        if signature not in loaded.signature_def:
            there = ", ".join(sorted(loaded.signature_def))
            raise DataError(f"{folder}: no signature {signature!r}, but {there}")
        inputs = loaded.signature_def[signature].inputs
        outputs = loaded.signature_def[signature].outputs
        random = np.random.default_rng(0)
        self._inputs = []
        for info in inputs.values():
            dtype = tf.as_dtype(info.dtype)
            shape = [largest, *(side.size for side in info.tensor_shape.dim[1:])]
            if dtype.is_integer:
                self._inputs.append(random.integers(0, 1000, shape).astype(dtype.as_numpy_dtype))
            elif dtype.is_floating:
                self._inputs.append(random.random(shape).astype(dtype.as_numpy_dtype))
            else:
                raise DataError(f"{folder}: {signature} takes {dtype.name}; name one of numbers")
        # What Session.run does anew at each call, done once, as TF Serving's calls have it.
        self._run = session._make_callable_from_options(
            config_pb2.CallableOptions(
                feed=[info.name for info in inputs.values()],
                fetch=[info.name for info in outputs.values()],
            )
        )

    def call(self, rows: int) -> float:
        """Runs the signature on so many rows, and returns the seconds that took."""
        inputs = [values[:rows] for values in self._inputs]
        start = time.perf_counter()
        self._run(*inputs)
        return time.perf_counter() - start


def _measure(model: Model, sizes: Sequence[int], turns: int) -> tuple[list[float], float]:
    """The median time of each size, and how many times longer the first call of a size takes.

    Sizes take turns, so that a noisy moment hits all alike.
    """
    for _ in range(turns):
        model.call(sizes[-1])
    first = [model.call(size) for size in sizes[:-1]]
    times = np.median([[model.call(size) for size in sizes] for _ in range(turns)], axis=0)
    return times.tolist(), float(np.median(first / times[:-1]))


def _rows_per_second(call: Callable[[int], float], rows: int, threads: int) -> float:
    """Of so many threads that call with so many rows each, for a while."""
    done = [0] * threads
    stop = threading.Event()

    def work(position: int) -> None:
        while not stop.is_set():
            call(rows)
            done[position] += rows

    workers = [threading.Thread(target=work, args=(position,)) for position in range(threads)]
    start = time.perf_counter()
    for worker in workers:
        worker.start()
    time.sleep(_TURN_SECONDS)
    stop.set()
    for worker in workers:
        worker.join()
    return sum(done) / (time.perf_counter() - start)


def derive(model: Model, cores: int, args: flags.FlagValues) -> str:
    """Measures the model and returns the text of batching.config.

    Args:
      model: what to measure; cores: threads that run batches; args: the flags.
    """
    sizes = grid(args.largest_request)
    times, first = _measure(model, sizes, args.turns)
    seconds = every_size(sizes, times)
    budget = args.latency_ms / 1e3
    largest = largest_within(seconds, budget)
    allowed = ladder(seconds[:largest], args.padding)
    added = [seconds[padded(n, allowed) - 1] / seconds[n - 1] - 1 for n in range(1, largest + 1)]
    rows = min(args.rows, largest)
    company = max(1, min(args.callers, largest // rows))
    alone = seconds[rows - 1]
    shared = seconds[padded(rows * company, allowed) - 1] / company
    # The largest request must find room, or it would never be served.
    enqueued = -(-args.largest_request // largest) + int(budget / seconds[largest - 1] * cores)
    # The batch threads share the rows in flight; padding is work too, and no answer.
    each = min(largest, max(1, rows * args.callers // cores))
    padded_each = padded(each, allowed)
    speeds = np.array(
        [
            (
                _rows_per_second(model.call, rows, args.callers),
                _rows_per_second(model.call, padded_each, cores) * each / padded_each,
            )
            for _ in range(_TURNS)
        ]
    )
    single, batched = np.median(speeds, axis=0)
    ratio = batched / single
    verdict = "it pays." if ratio >= PAYS else "it does not pay: leave it off."
    shown = [size for size in sizes if size & (size - 1) == 0 or size == sizes[-1]]
    return f"""\
# --enable_batching --batching_parameters_file: requests that arrive together run together.
# Measured on {machine.header()}.
# Printed by this command, on {cores} cores; measure your own model on your own machine:
#     {" ".join(["python -m benchmarks.batching", *sys.argv[1:]])}
# {args.callers} callers of {rows} rows, as many as they can: {single:,.0f} rows/s each for itself,
# {batched:,.0f} batched, {ratio:.2f} times as many: {verdict}
# The model call, ms by rows (the first call of a size takes {first:.1f} times as long):
{_table({size: 1e3 * seconds[size - 1] for size in shown})}

# The largest request is split where its call would take more than {args.latency_ms:g} ms.
max_batch_size {{ value: {args.largest_request} }}
max_execution_batch_size {{ value: {largest} }}
enable_large_batch_splitting {{ value: true }}
# {rows} rows take {1e6 * alone:.0f} us alone, and {1e6 * shared:.0f} us in a batch of {company} \
such requests: a longer wait cannot pay.
batch_timeout_micros {{ value: {max(0, round(1e6 * (alone - shared)))} }}
# A batch a core. The largest request may wait, and what runs within {args.latency_ms:g} ms; a
# request that finds more waiting is UNAVAILABLE.
num_batch_threads {{ value: {cores} }}
max_enqueued_batches {{ value: {enqueued} }}
# Padding to the next of these adds at most {args.padding:.0%} to a call, {np.mean(added):.0%} on \
average over all sizes.
# The last must equal max_batch_size, or no model loads.
""" + "".join(f"allowed_batch_sizes: {size}\n" for size in sorted({*allowed, args.largest_request}))


def _table(milliseconds: dict[int, float]) -> str:
    cells = [f"{size}: {value:.2f}" for size, value in milliseconds.items()]
    return "\n".join(
        "#     " + ", ".join(cells[start : start + 8]) for start in range(0, len(cells), 8)
    )


def main() -> None:
    """Prints batching.config."""
    args = flags.FLAGS
    cores = len(os.sched_getaffinity(0))
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(args.model or name)
        if not args.model:
            generated.export(folder)
        elif not folder.is_dir():
            raise DataError(f"--model: no such folder: {folder}")
        print(derive(Model(folder, args.signature, args.largest_request), cores, args), end="")


if __name__ == "__main__":
    define_flags()
    run(main)
