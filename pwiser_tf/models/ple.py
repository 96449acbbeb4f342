"""PLE: levels of shared experts and experts of single towers (Tang et al., RecSys 2020)."""

import tensorflow as tf

from pwiser_tf.errors import DataError
from pwiser_tf.layers import Gate
from pwiser_tf.models.base import TOWERS, ClickConversionModel

SHARED = "shared"
BRANCHES = (*TOWERS, SHARED)


class PLE(ClickConversionModel):
    """Progressive layered extraction: one CGC level per entry of `bottom_units`.

    There is a branch for each tower and a shared branch. At each level, S_b are the experts of
    branch b. An expert is one block; its input is the branch's output of the level below.

        tower k  g_k = softmax(W_k x_k) mixes S_k and S_shared        customized gate control
        shared   g_shared = softmax(W_shared x_shared) mixes all experts of all branches

    The input of the first level is the encoded features. The last level has no shared output,
    because nothing would use it.

    `experts` is the number of experts that the gate of a tower mixes: half are shared, half are the
    tower's own. The defaults are those of MTReclib: 4 and 4, and two levels of one layer each.
    """

    options = ("experts",)
    needs_conversions = True

    @classmethod
    def check_config(cls, config) -> None:
        super().check_config(config)
        half_of(config.experts)

    def __init__(self, schema, config, loss=None):
        super().__init__(schema, config, loss)
        half = half_of(config.experts)
        self._shared_encoder = self._encoder()
        levels = len(config.bottom_units)
        self._experts = [
            {branch: [self._mlp((units,)) for _ in range(half)] for branch in BRANCHES}
            for units in config.bottom_units
        ]
        self._gates = [
            {tower: Gate(2 * half, config.weight_decay) for tower in TOWERS} for _ in range(levels)
        ]
        self._shared_gates = [Gate(3 * half, config.weight_decay) for _ in range(levels - 1)]

    def tower_inputs(self, features, training) -> dict[str, tf.Tensor]:
        x = dict.fromkeys(BRANCHES, self._shared_encoder(features))  # each [B, fields * D]
        for level, (experts, gates) in enumerate(zip(self._experts, self._gates, strict=True)):
            outputs = {  # {branch: E / 2 times [B, units]}
                branch: [expert(x[branch], training) for expert in experts[branch]]
                for branch in BRANCHES
            }
            mixed = {  # {tower: [B, units]}
                tower: gates[tower](x[tower], outputs[tower] + outputs[SHARED], training)
                for tower in TOWERS
            }
            if level < len(self._shared_gates):
                everything = [output for branch in BRANCHES for output in outputs[branch]]
                gate = self._shared_gates[level]
                mixed[SHARED] = gate(x[SHARED], everything, training)  # [B, units]
            x = mixed
        return x


def half_of(experts: int) -> int:
    """Half of the experts of a gate; DataError if their number is odd or less than 2."""
    if experts < 2 or experts % 2:
        raise DataError(
            f"--experts={experts}: expected an even number of at least 2: half are shared, half "
            "belong to each tower"
        )
    return experts // 2
