"""OMoE: experts shared by the towers, one gate for both (Ma et al., KDD 2018, their baseline)."""

import tensorflow as tf

from pwiser_tf.layers import Gate
from pwiser_tf.models.base import ClickConversionModel


class OMoE(ClickConversionModel):
    """Both towers get the same softmax mixture of all experts (Jacobs et al., 1991)."""

    options = ("experts",)

    def __init__(self, schema, config, loss=None):
        super().__init__(schema, config, loss)
        self._shared_encoder = self._encoder()
        self._experts = [self._mlp(config.bottom_units) for _ in range(config.experts)]
        self._gate = Gate(config.experts, config.weight_decay)

    def tower_inputs(self, features, training) -> dict[str, tf.Tensor]:
        x = self._shared_encoder(features)  # [B, fields * D]
        experts = [expert(x, training) for expert in self._experts]  # E times [B, units]
        return dict.fromkeys(self.towers, self._gate(x, experts, training))  # [B, units]
