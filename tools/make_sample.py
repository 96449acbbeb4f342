"""python -m tools.make_sample: the same as `pwiser sample`."""

from pwiser_tf import command_line
from pwiser_tf.synthetic import command

__doc__ = command.__doc__

if __name__ == "__main__":
    command.define_flags()
    command_line.run(command.main)
