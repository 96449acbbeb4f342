"""python -m pwiser_tf.tune: the same as `pwiser tune`."""

import pwiser_tf.quiet  # noqa: F401

# isort: split

from pwiser_tf.command_line import run
from pwiser_tf.study import tune

__doc__ = tune.__doc__

if __name__ == "__main__":
    tune.define_flags()
    run(tune.main)
