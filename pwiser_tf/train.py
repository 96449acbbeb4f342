"""Trains a model, evaluates it on the test split and exports it.

    pwiser train --flagfile=configs/us.flags

The files of the run are in --workdir. A run may be interrupted at any moment, even by kill -9. The
same command continues it, and it ends with the metrics of a run that was not interrupted.
"""

import pwiser_tf.quiet  # noqa: F401

# isort: split

import sys

from absl import flags

from pwiser_tf import config, runs
from pwiser_tf.command_line import run
from pwiser_tf.errors import DataError
from pwiser_tf.schema import Schema
from pwiser_tf.score import FACTORS, Score
from pwiser_tf.training import share_cores, train


def define_flags() -> None:
    """Defines the flags of this command."""
    config.define_flags()
    config.define_run_flags()


def main() -> None:
    """Trains, evaluates and, with --export_dir, exports a run."""
    args = flags.FLAGS
    chosen = config.config_from_flags(args, given=sys.argv[1:])
    score = _score(args.score, args.export_dir, chosen.data_dir)
    share_cores()
    with runs.file_errors():
        train(chosen, args.workdir, args.checkpoint_seconds)
        if args.export_dir:
            # Imported here, because training does not need the packages for serving.
            from pwiser_tf.export import export

            print("exported", export(args.workdir, args.export_dir, args.model_name, score))


def _score(text: str | None, export_dir: str | None, data_dir: str) -> Score | None:
    """The score to export; DataError before training if it cannot be one."""
    if not text:
        return None
    if not export_dir:
        raise DataError(f"--score={text}: it is only read with --export_dir")
    score = Score.parse(text)
    # What only the trained model knows, export checks.
    unknown = () if Schema.load(data_dir).conversion else ("cvr", "ctcvr")
    score.require([name for name in FACTORS if name not in unknown])
    return score


if __name__ == "__main__":
    define_flags()
    run(main)
