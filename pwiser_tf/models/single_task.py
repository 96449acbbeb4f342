"""Single task: two networks that share nothing, trained together (Covington et al., 2016)."""

import tensorflow as tf

from pwiser_tf.models.base import ClickConversionModel


class SingleTask(ClickConversionModel):
    """Each tower has its own encoder and its own bottom MLP."""

    def __init__(self, schema, config, loss=None):
        super().__init__(schema, config, loss)
        self._encoders = {tower: self._encoder() for tower in self.towers}
        self._bottoms = {tower: self._mlp(config.bottom_units) for tower in self.towers}

    def tower_inputs(self, features, training) -> dict[str, tf.Tensor]:
        return {
            tower: self._bottoms[tower](self._encoders[tower](features), training)  # [B, units]
            for tower in self.towers
        }
