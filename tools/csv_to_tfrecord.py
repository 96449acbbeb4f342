"""python -m tools.csv_to_tfrecord: the same as `pwiser convert`."""

from pwiser_tf import command_line
from pwiser_tf.convert import command

__doc__ = command.__doc__

if __name__ == "__main__":
    command.define_flags()
    command_line.run(command.main)
