"""MetaHeac: hybrid experts and critics, shared by all tasks (Zhu et al., KDD 2021)."""

import tensorflow as tf
import tf_keras as keras

from pwiser_tf.layers import Gate, Head, l2
from pwiser_tf.models.base import TOWERS, ClickConversionModel, log_odds


class MetaHeac(ClickConversionModel):
    """All tasks share the experts and critics; gates that get the task as input mix them.

    t is the embedding of the task and m the mean of the row's field embeddings:

        z_t = sum over experts e of softmax(W [t, m])_e f_e(x)
        p_t = sum over critics c of softmax(V [t, m])_c sigmoid(h_c(z_t) + b_t)

    The tasks share W and V; only t and b_t differ between tasks. The weights of the critics sum to
    1, so p_t can be any probability. MTReclib's version also takes a mean over the critics, and so
    cannot exceed 1 / critics.

    Our choices: the bias b_t, with which each task starts at its base rate; gates without a hidden
    layer, as in MTReclib (the authors' code has one); a critic is an MLP of `tower_units`.

    Left out: the meta-learning of the paper's title (MAML over campaigns with support and query
    sets) and the fine-tuning to a new campaign. It prepares the network for unseen tasks. Here
    both tasks and all their data are known.
    """

    towers = ()
    options = ("experts", "critics")
    needs_conversions = True

    def __init__(self, schema, config, loss=None):
        super().__init__(schema, config, loss)
        self._shared_encoder = self._encoder()
        self._experts = [self._mlp(config.bottom_units) for _ in range(config.experts)]
        self._critics = [self._mlp(config.tower_units) for _ in range(config.critics)]
        # All critics have an energy if a task has the loss JRC.
        self._critic_heads = [
            Head(0.0, config.weight_decay, energy=bool(self._energies))
            for _ in range(config.critics)
        ]
        self._expert_gate = Gate(config.experts, config.weight_decay)
        self._critic_weights = keras.layers.Dense(
            config.critics, "log_softmax", kernel_regularizer=l2(config.weight_decay)
        )
        self._task_embeddings = {
            tower: self.add_weight(
                f"{tower}_embedding", [1, config.embedding_dim], initializer="glorot_uniform"
            )
            for tower in TOWERS
        }
        self._biases = {
            tower: self.add_weight(
                f"{tower}_bias", [], initializer=keras.initializers.Constant(log_odds(rate))
            )
            for tower, rate in self._rates.items()
        }

    def tower_logits(self, features, training) -> dict[str, tf.Tensor]:
        x = self._shared_encoder(features)  # [B, fields * D]
        fields = tf.reshape(x, [tf.shape(x)[0], -1, self._config.embedding_dim])
        mean_field = tf.reduce_mean(fields, axis=1)  # [B, D]
        experts = [expert(x, training) for expert in self._experts]  # E times [B, units]
        return {tower: self._mixed_logit(tower, mean_field, experts, training) for tower in TOWERS}

    def _mixed_logit(self, tower, mean_field, experts, training) -> tf.Tensor:
        """The tower's logit, [B, 1], or [B, 2] with the energy."""
        task = tf.repeat(self._task_embeddings[tower], tf.shape(mean_field)[0], axis=0)  # [B, D]
        gate_input = tf.concat([task, mean_field], axis=1)  # [B, 2 D]
        z = self._expert_gate(gate_input, experts, training)  # [B, units]
        log_weights = self._critic_weights(gate_input)  # [B, critics]
        columns = tf.stack(  # [B, critics, width]
            [
                head(critic(z, training))
                for critic, head in zip(self._critics, self._critic_heads, strict=True)
            ],
            axis=1,
        )
        # The logit of the mixed probability, log p - log(1 - p), computed in log space.
        logits = columns[:, :, 0] + self._biases[tower]  # [B, critics]
        log_p = tf.reduce_logsumexp(log_weights + tf.math.log_sigmoid(logits), axis=1)
        log_not_p = tf.reduce_logsumexp(log_weights + tf.math.log_sigmoid(-logits), axis=1)
        mixed = (log_p - log_not_p)[:, tf.newaxis]  # [B, 1]
        if tower not in self._energies:
            return mixed
        energy = tf.reduce_sum(tf.exp(log_weights) * columns[:, :, 1], axis=1, keepdims=True)
        return tf.concat([mixed, energy], axis=1)
