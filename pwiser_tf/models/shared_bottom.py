"""Shared bottom: one MLP feeds both towers (Caruana, Multitask Learning, 1997)."""

import tensorflow as tf

from pwiser_tf.models.base import ClickConversionModel


class SharedBottom(ClickConversionModel):
    """One encoder and one bottom MLP for both towers."""

    def __init__(self, schema, config, loss=None):
        super().__init__(schema, config, loss)
        self._shared_encoder = self._encoder()
        self._bottom = self._mlp(config.bottom_units)

    def tower_inputs(self, features, training) -> dict[str, tf.Tensor]:
        shared = self._bottom(self._shared_encoder(features), training)  # [B, units]
        return dict.fromkeys(self.towers, shared)
