"""STEM-Net: shared embeddings and embeddings of single towers (Su et al., AAAI 2024)."""

import tensorflow as tf

from pwiser_tf.layers import Gate
from pwiser_tf.models.base import TOWERS, ClickConversionModel
from pwiser_tf.models.ple import BRANCHES, SHARED, half_of


class STEM(ClickConversionModel):
    """All experts in the forward pass, only the task's own and shared experts in the backward pass.

    There is a branch for each tower and a shared branch. Each branch has its own embedding table,
    with the output x_b, and its own experts S_b. A tower mixes the experts of all branches,
    including those of the other tower, but does not train the latter:

        g_k = softmax(W_k (x_k + x_shared)) mixes S_k, S_shared and stop_gradient(S_other)

    So the embeddings of a tower learn only from its own task.

    As in PLE, half of `experts` are shared and half belong to each tower (a gate also mixes those
    of the other tower: 12 for 8). The authors tune both numbers. Their gates have hidden layers;
    ours are linear, as in our other models. There is one level, as in their experiments.
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
        self._encoders = {branch: self._encoder() for branch in BRANCHES}
        self._experts = {
            branch: [self._mlp(config.bottom_units) for _ in range(half)] for branch in BRANCHES
        }
        self._gates = {tower: Gate(3 * half, config.weight_decay) for tower in TOWERS}

    def tower_inputs(self, features, training) -> dict[str, tf.Tensor]:
        x = {branch: self._encoders[branch](features) for branch in BRANCHES}  # [B, fields * D]
        outputs = {  # {branch: E / 2 times [B, units]}
            branch: [expert(x[branch], training) for expert in self._experts[branch]]
            for branch in BRANCHES
        }
        inputs = {}
        for tower in TOWERS:
            seen = [
                output if branch in (tower, SHARED) else tf.stop_gradient(output)
                for branch in BRANCHES
                for output in outputs[branch]
            ]
            inputs[tower] = self._gates[tower](x[tower] + x[SHARED], seen, training)  # [B, units]
        return inputs
