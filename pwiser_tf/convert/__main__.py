"""python -m pwiser_tf.convert: the same as `pwiser convert`."""

from pwiser_tf import command_line
from pwiser_tf.convert import command

__doc__ = command.__doc__

command.define_flags()
command_line.run(command.main)
