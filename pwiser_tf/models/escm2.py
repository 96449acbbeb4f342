"""ESCM2: ESMM with a counterfactual risk of CVR (Wang et al., SIGIR 2022, arXiv 2204.05125).

An exposure has a click o, a conversion r, a propensity p = ctr, and a CVR error d: the
cross-entropy of r and the predicted cvr. ESCM2 adds a term to ESMM's loss: an estimate of the mean
of d if all exposures had been clicked.

    IPS   mean of o d / p
    DR    mean of e + o (d - e) / p,  plus the loss of the imputation, mean of o (d - e)^2 / p

e is the error that a third tower, the imputation, predicts. The estimates are unbiased if p is
correct; DR's also if e is correct. All means are over all exposures of the batch. DR's gradients
reach the CVR tower and the imputation through both terms, and the shared embeddings through all
terms. No gradient goes through the propensity.

Choices where the paper leaves them open, or where its text was not available:

- The weight. The total is CTR + lambda_c * (the term above) + lambda_g * CTCVR. `auxiliary_weight`
  is lambda_c; its default, 0.5, is that of PaddleRec's implementation. lambda_g is ctcvr_weight /
  ctr_weight, by default 1.
- Clipping. Small propensities give a few rows very large weights. Here p is at least a tenth of
  the training split's click rate, so no row has more than ten times the weight that it would have
  with a constant p. (PaddleRec clips DR's 1 / p at 15, whatever the rate.)
- The imputation ends in a softplus, because an error is positive and unbounded. (PaddleRec's is a
  probability.)
- The towers have ESMM's structure: a shared embedding. (PaddleRec's have experts and gates.)
"""

import tensorflow as tf

from pwiser_tf.models.base import CLICK, CONVERSION, TOWERS, log_odds
from pwiser_tf.models.esmm import ESMM
from pwiser_tf.tasks import POSITIVE_GRADE

IMPUTATION = "imputation"
# The smallest propensity, as a share of the training split's click rate.
_SMALLEST_SHARE = 0.1


class ESCM2IPS(ESMM):
    """ESMM with the CVR risk estimated by inverse propensity scores."""

    auxiliary_weight = 0.5
    options = ("auxiliary_weight",)

    def auxiliary_loss(self, logits, grade) -> tf.Tensor:
        error, inverse = self._error_and_inverse_propensity(logits, grade)
        return tf.reduce_mean(inverse * error)

    def _error_and_inverse_propensity(self, logits, grade) -> tuple[tf.Tensor, tf.Tensor]:
        """d and o / p of each row, float32 [B] each; no gradient through the latter."""
        converted = tf.cast(grade >= POSITIVE_GRADE["ctcvr"], tf.float32)
        error = tf.nn.sigmoid_cross_entropy_with_logits(converted, logits[CONVERSION][:, 0])
        click_rate = tf.sigmoid(log_odds(self._rates[CLICK]))
        propensity = tf.sigmoid(logits[CLICK][:, 0])
        propensity = tf.maximum(propensity, _SMALLEST_SHARE * click_rate)
        clicked = tf.cast(grade >= POSITIVE_GRADE["ctr"], tf.float32)
        return error, tf.stop_gradient(clicked / propensity)


class ESCM2DR(ESCM2IPS):
    """ESMM with the CVR risk of the doubly robust estimator, with an imputation tower."""

    towers = (*TOWERS, IMPUTATION)

    def auxiliary_loss(self, logits, grade) -> tf.Tensor:
        error, inverse = self._error_and_inverse_propensity(logits, grade)
        imputed = tf.nn.softplus(logits[IMPUTATION][:, 0])
        missed = error - imputed
        risk = imputed + inverse * missed
        imputation_risk = inverse * tf.square(missed)
        return tf.reduce_mean(risk + imputation_risk)
