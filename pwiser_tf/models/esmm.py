"""ESMM: CTR and CVR over all exposures, joined by their product (Ma et al., SIGIR 2018)."""

import tensorflow as tf

from pwiser_tf.models.base import ClickConversionModel


class ESMM(ClickConversionModel):
    """The towers share only the embeddings; each has its own bottom MLP and tower.

        ctcvr = ctr * cvr

    ctr and ctcvr are learnt over all exposures. So cvr is learnt for all exposures, where it is
    used, and not only for clicks. Only the product head is supported. The paper shares the
    embedding table and no layer above it. For a shared bottom MLP use
    `--model=shared_bottom --conversion_head=product`.
    """

    conversion_heads = ("product",)
    needs_conversions = True

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
