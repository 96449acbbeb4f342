"""MMoE: experts shared by the towers, one gate per tower (Ma et al., KDD 2018)."""

import tensorflow as tf

from pwiser_tf.layers import Gate
from pwiser_tf.models.base import ClickConversionModel


class MMoE(ClickConversionModel):
    """Each tower gets its own softmax mixture of all experts; gates read the encoded features."""

    options = ("experts",)

    def __init__(self, schema, config, loss=None):
        super().__init__(schema, config, loss)
        self._shared_encoder = self._encoder()
        self._experts = [self._mlp(config.bottom_units) for _ in range(config.experts)]
        self._gates = {tower: Gate(config.experts, config.weight_decay) for tower in self.towers}

    def tower_inputs(self, features, training) -> dict[str, tf.Tensor]:
        x = self._shared_encoder(features)  # [B, fields * D]
        experts = [expert(x, training) for expert in self._experts]  # E times [B, units]
        return {tower: self._gates[tower](x, experts, training) for tower in self.towers}
