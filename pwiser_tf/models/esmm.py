"""ESMM: CTR and CVR over all exposures, joined by their product (Ma et al., SIGIR 2018)."""

import tensorflow as tf

from pwiser_tf.models.base import ClickConversionModel


class ESMM(ClickConversionModel):
    """The towers share the embeddings alone; each has an MLP of its own, bottom and tower.

        ctcvr = ctr * cvr,  learnt as such over all exposures, and so is ctr

    so that CVR is learnt from clicks and yet where it will be used, on all exposures. Hence the
    product head only. The paper shares the embedding table and no layer above; for the other
    reading, a whole bottom shared, take `--model=shared_bottom --conversion_head=product`.
    """

    conversion_heads = ("product",)

    def __init__(self, schema, config, loss=None):
        super().__init__(schema, config, loss)
        self._shared_encoder = self._encoder()
        self._bottoms = {tower: self._mlp(config.bottom_units) for tower in self.towers}

    def tower_inputs(self, features, training) -> dict[str, tf.Tensor]:
        x = self._shared_encoder(features)  # [B, fields * D]
        return {
            tower: self._bottoms[tower](x, training)  # [B, units]
            for tower in self.towers
        }
