"""The time of a training step of MMoE: ours against MTReclib's in PyTorch (study/mtreclib.py).

    python -m benchmarks.training

Both train MTReclib's MMoE with MTReclib's settings (8 experts of 512 and 256 units, towers of 128
and 64, batch normalisation, dropout 0.2, Adam, weight decay 1e-6) on the same generated batches
of 16 categories and 63 numbers held in memory. Ours runs as a user's does, under `fit`. All
programs take turns, each in its own process. A ratio is the median of the ratios of single turns.
Without torch (`pip install '.[bench]'`) only ours is measured.

The second table is ours at embedding 16, when one of the 16 categories has 1,000 ids, and when it
has 1,000,000. The gradient of a table is dense today, so the cost of a step grows with the table.
"""

import functools
import importlib.util
import statistics
import time

import numpy as np
from absl import flags

from benchmarks import generated, machine
from pwiser_tf import command_line

FLAGS = flags.FLAGS
_WARM_UP_STEPS = 4


def define_flags() -> None:
    """Defines the flags of this command line."""
    flags.DEFINE_list("embedding_dims", ["16", "128"], "Embedding sizes to compare at.")
    flags.DEFINE_list("vocabularies", ["1000", "1000000"], "Ids of a category to compare.")
    flags.DEFINE_integer("batch_size", 2048, "Rows a batch.")
    flags.DEFINE_integer("steps", 6, "Timed steps a turn.")
    flags.DEFINE_integer("turns", 2, "Turns of each.")
    flags.DEFINE_string("worker", None, "Used by the benchmark itself: what this process runs.")


def _batches(ids: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Ids [8, batch, 16], numbers [8, batch, 63], grades [8, batch]."""
    random = np.random.default_rng(0)
    shape = (8, FLAGS.batch_size)
    categories = np.stack([random.integers(0, count, shape) for count in ids], axis=-1)
    numbers = random.random((*shape, generated.NUMBERS), np.float32)
    return categories, numbers, random.choice(3, shape, p=[0.95, 0.045, 0.005])


def _tensorflow(ids: tuple[int, ...], **config) -> list[float]:
    """The times at which steps end under `fit`."""
    import pwiser_tf.quiet  # noqa: F401

    # isort: split

    import tensorflow as tf
    import tf_keras as keras

    from pwiser_tf.training import share_cores

    share_cores()
    model = generated.trainable(generated.schema(ids), **config)
    categories, numbers, grades = _batches(ids)
    features = {"categorical": categories, "numerical": numbers}
    dataset = tf.data.Dataset.from_tensor_slices((features, grades)).cache().repeat().prefetch(2)
    times = []
    clock = keras.callbacks.LambdaCallback(
        on_train_batch_end=lambda batch, logs: times.append(time.perf_counter())
    )
    steps = _WARM_UP_STEPS + FLAGS.steps + 1
    model.fit(dataset, steps_per_epoch=steps, verbose=0, callbacks=[clock])
    return times


def _torch(embedding_dim: int, mixed_precision: bool) -> list[float]:
    """The times at which steps of MTReclib's loop end."""
    import torch

    from pwiser_tf.study import mtreclib

    torch.manual_seed(0)
    model = mtreclib.MMoE(generated.IDS, generated.NUMBERS, embedding_dim)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3, weight_decay=1e-6)
    ids, numbers, grades = (torch.from_numpy(array) for array in _batches(generated.IDS))
    times = []
    for step in range(_WARM_UP_STEPS + FLAGS.steps + 1):
        batch = step % len(ids)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=mixed_precision):
            outputs = model(ids[batch], numbers[batch])
        loss = mtreclib.loss([output.float() for output in outputs], grades[batch])
        model.zero_grad()
        loss.backward()
        optimizer.step()
        loss.item()
        times.append(time.perf_counter())
    return times


def _programs(dim: int) -> dict:
    ours = functools.partial(_tensorflow, generated.IDS, embedding_dim=dim)
    rivals = {
        "MTReclib's MMoE, PyTorch": lambda: _torch(dim, False),
        "the same, under torch.autocast to bfloat16": lambda: _torch(dim, True),
    }
    return (rivals if importlib.util.find_spec("torch") else {}) | {
        "pwiser-tf, BCE + PWiseR": ours,
        "pwiser-tf, BCE + PWiseR, --mixed_precision": lambda: ours(mixed_precision=True),
    }


def _vocabularies() -> dict:
    """The same model with another number of ids in the first category."""
    return {
        f"{int(count):,} ids": functools.partial(
            _tensorflow, (int(count), *generated.IDS[1:]), embedding_dim=16
        )
        for count in FLAGS.vocabularies
    }


def _compare(label: str, dim: int, programs: dict) -> None:
    """Prints a row for each program; ratios are of the first one's time."""
    settings = [f"--{name}={FLAGS[name].value}" for name in ("batch_size", "steps")]
    settings += [f"--embedding_dims={dim}", f"--vocabularies={','.join(FLAGS.vocabularies)}"]
    turns = [
        {
            name: float(machine.run("benchmarks.training", f"--worker={name}", *settings))
            for name in programs
        }
        for _ in range(FLAGS.turns)
    ]
    first = next(iter(programs))
    for name in programs:
        seconds = statistics.median(turn[name] for turn in turns)
        ratios = sorted(turn[first] / turn[name] for turn in turns)
        print(
            f"| {label} | {name} | {1e3 * seconds:.0f} | {FLAGS.batch_size / seconds:,.0f} | "
            f"{statistics.median(ratios):.2f} ({ratios[0]:.2f}, {ratios[-1]:.2f}) |",
            flush=True,
        )


def main() -> None:
    """Prints two Markdown tables, or the median seconds a step where this is a worker."""
    if FLAGS.worker:
        workers = _programs(int(FLAGS.embedding_dims[0])) | _vocabularies()
        times = workers[FLAGS.worker]()
        print(statistics.median(np.diff(times[_WARM_UP_STEPS:])))
        return
    print(machine.header(), end="\n\n")
    columns = "ms a step | examples/s | times as fast (lowest, highest)"
    print(f"| embedding | program | {columns} |\n|---|---|---|---|---|")
    for dim in map(int, FLAGS.embedding_dims):
        _compare(str(dim), dim, _programs(dim))
    print(f"\n| embedding | vocabulary | {columns} |\n|---|---|---|---|---|")
    _compare("16", 16, _vocabularies())


if __name__ == "__main__":
    define_flags()
    command_line.run(main)
