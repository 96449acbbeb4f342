"""python -m pwiser_tf.synthetic: the same as `pwiser sample`."""

from pwiser_tf import command_line
from pwiser_tf.synthetic import command

__doc__ = command.__doc__

command.define_flags()
command_line.run(command.main)
