"""Examples a second of training MMoE: ours against MTReclib's in PyTorch (study/mtreclib.py).

    python -m benchmarks.training

Both train MTReclib's MMoE with MTReclib's settings (8 experts of 512 and 256 units, towers of 128
and 64, batch normalisation, dropout 0.2, Adam, weight decay 1e-6) on the same generated batches
of 16 categories and 63 numbers held in memory. Ours runs as a user's does, under `fit`. The two
take turns, each in a process of its own, and the ratio is that of neighbouring turns' medians.
"""

import statistics
import subprocess
import sys
import time

import numpy as np
from absl import app, flags

FLAGS = flags.FLAGS
flags.DEFINE_list("embedding_dims", ["16", "128"], "Embedding sizes to compare at.")
flags.DEFINE_integer("batch_size", 2048, "Rows a batch.")
flags.DEFINE_integer("steps", 20, "Timed steps a turn.")
flags.DEFINE_integer("turns", 3, "Turns of each.")
flags.DEFINE_string("worker", None, "Used by the benchmark itself: which one this process runs.")

_WARM_UP_STEPS = 5
_SIZES = tuple(50 * (position + 1) for position in range(16))
_NUMBERS = 63


def _batches() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Ids [steps, batch, 16], numbers [steps, batch, 63], grades [steps, batch]."""
    random = np.random.default_rng(0)
    shape = (8, FLAGS.batch_size)
    ids = np.stack([random.integers(0, size, shape) for size in _SIZES], axis=-1)
    numbers = random.random((*shape, _NUMBERS), np.float32)
    grades = random.choice(3, shape, p=[0.95, 0.045, 0.005])
    return ids, numbers, grades


def _run_tensorflow(embedding_dim: int, pwiser_weight: float, mixed_precision: bool) -> list[float]:
    """Seconds of each timed step under `fit`."""
    import pwiser_tf.quiet  # noqa: F401

    # isort: split

    import tensorflow as tf
    import tf_keras as keras

    from pwiser_tf.models import MODELS, ModelConfig
    from pwiser_tf.schema import Categorical, Numerical, Schema, Split
    from pwiser_tf.tasks import LossConfig
    from pwiser_tf.training import share_cores

    share_cores()
    schema = Schema(
        dataset="generated",
        # Id 0 is one of the sizes, as in the rival's tables.
        categorical=tuple(Categorical(f"c{k}", "int64", range(k - 1)) for k in _SIZES),
        numerical=tuple(Numerical(f"n{k}", "identity", 0.5, 0.3, 0.5) for k in range(_NUMBERS)),
        click="click",
        conversion="conversion",
        group=None,
        splits={"train": Split(1000, 50, 5, 0, ())},
    )
    loss = LossConfig(pwiser_weight=pwiser_weight)
    config = ModelConfig(embedding_dim=embedding_dim, mixed_precision=mixed_precision)
    model = MODELS["mmoe"](schema, config, loss)
    model.compile(optimizer=keras.optimizers.legacy.Adam(1e-3))
    ids, numbers, grades = _batches()
    dataset = tf.data.Dataset.from_tensor_slices(
        ({"categorical": ids, "numerical": numbers}, grades)
    )
    dataset = dataset.cache().repeat().prefetch(2)

    class Clock(keras.callbacks.Callback):
        times: list = []  # noqa: RUF012

        def on_train_batch_end(self, batch, logs=None):
            self.times.append(time.perf_counter())

    clock = Clock()
    steps = _WARM_UP_STEPS + FLAGS.steps + 1
    model.fit(dataset, steps_per_epoch=steps, verbose=0, callbacks=[clock])
    return np.diff(clock.times[_WARM_UP_STEPS:]).tolist()


def _run_torch(embedding_dim: int, mixed_precision: bool) -> list[float]:
    """Seconds of each timed step of MTReclib's loop."""
    import torch

    from pwiser_tf.study import mtreclib

    torch.manual_seed(0)
    model = mtreclib.MMoE(_SIZES, _NUMBERS, embedding_dim)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3, weight_decay=1e-6)
    ids, numbers, grades = (torch.from_numpy(array) for array in _batches())
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
    return np.diff(times[_WARM_UP_STEPS:]).tolist()


_WORKERS = {
    "MTReclib's MMoE, PyTorch": lambda dim: _run_torch(dim, False),
    "the same, under torch.autocast to bfloat16": lambda dim: _run_torch(dim, True),
    "pwiser-tf, BCE": lambda dim: _run_tensorflow(dim, 0.0, False),
    "pwiser-tf, BCE + PWiseR": lambda dim: _run_tensorflow(dim, 0.1, False),
    "pwiser-tf, BCE + PWiseR, --mixed_precision": lambda dim: _run_tensorflow(dim, 0.1, True),
}


def _turn(worker: str, embedding_dim: str) -> float:
    """The median seconds a step of one turn, in a process of its own."""
    command = [
        *(sys.executable, "-m", "benchmarks.training", f"--worker={worker}"),
        *(f"--embedding_dims={embedding_dim}", f"--steps={FLAGS.steps}"),
        f"--batch_size={FLAGS.batch_size}",
    ]
    output = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
    return float(output.split()[-1])


def main(_) -> None:
    """Prints a Markdown table, or the median seconds a step where this is a worker."""
    if FLAGS.worker:
        print(statistics.median(_WORKERS[FLAGS.worker](int(FLAGS.embedding_dims[0]))))
        return
    print("| embedding | program | ms a step | examples/s | times as fast (lowest, highest) |")
    print("|---|---|---|---|---|")
    for dim in FLAGS.embedding_dims:
        turns = [{name: _turn(name, dim) for name in _WORKERS} for _ in range(FLAGS.turns)]
        rival = next(iter(_WORKERS))
        for name in _WORKERS:
            seconds = statistics.median(turn[name] for turn in turns)
            ratios = sorted(turn[rival] / turn[name] for turn in turns)
            print(
                f"| {dim} | {name} | {1e3 * seconds:.0f} | {FLAGS.batch_size / seconds:,.0f} | "
                f"{statistics.median(ratios):.2f} ({ratios[0]:.2f}, {ratios[-1]:.2f}) |",
                flush=True,
            )


if __name__ == "__main__":
    app.run(main)
