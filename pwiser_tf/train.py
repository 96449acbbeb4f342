"""Trains a model, evaluates it once on the test split and exports it.

    pwiser train --flagfile=configs/us.flags

The run lives in --workdir. Interrupted at any moment, even by kill -9, it goes on when the same
command is given again, and ends with the metrics of a run that was not interrupted.
"""

import pwiser_tf.quiet  # noqa: F401

# isort: split

import sys

from absl import flags

from pwiser_tf import config, runs
from pwiser_tf.command_line import run
from pwiser_tf.training import share_cores, train


def define_flags() -> None:
    """Defines the flags of this command."""
    config.define_flags()
    config.define_run_flags()


def main() -> None:
    """Trains, evaluates and exports as the flags say."""
    args = flags.FLAGS
    chosen = config.config_from_flags(args, given=sys.argv[1:])
    share_cores()
    with runs.file_errors():
        train(chosen, args.workdir, args.checkpoint_seconds)
        if args.export_dir:
            # Imported late: training needs none of what serving does.
            from pwiser_tf.export import export

            print("exported", export(args.workdir, args.export_dir, args.model_name))


if __name__ == "__main__":
    define_flags()
    run(main)
