"""The losses: PWiseR and the losses that it is compared with, as functions of tensors.

    pwiser              squared hinges between conversions and other rows  (arXiv 2406.02163)
    pairwise_logistic   RankNet on the pairs of PWiseR
    combined_pair       RankNet on the pairs of one binary label           (arXiv 2403.14144)
    jrc                 softmax among the rows of one group, per class     (arXiv 2208.06164)
    listce              softmax cross-entropy of a group's probabilities   (arXiv 2211.01494)
    focal               cross-entropy with less weight on easy rows        (arXiv 1708.02002)

All except focal are terms that are added to binary cross-entropy (BCE) with a weight. If a paper
has alpha * BCE + (1 - alpha) * term, this is the same up to scale as
BCE + (1 - alpha) / alpha * term. `tasks.LOSSES` defines how training calls each loss.
"""

from pwiser_tf.losses.listwise import jrc, listce
from pwiser_tf.losses.logistic import (
    CombinedPairLoss,
    PairwiseLogisticLoss,
    combined_pair,
    pairwise_logistic,
)
from pwiser_tf.losses.pairwise import NORMALIZATIONS, PairLoss, PWiseRLoss, pwiser, strength
from pwiser_tf.losses.pointwise import focal

__all__ = [
    "NORMALIZATIONS",
    "CombinedPairLoss",
    "PWiseRLoss",
    "PairLoss",
    "PairwiseLogisticLoss",
    "combined_pair",
    "focal",
    "jrc",
    "listce",
    "pairwise_logistic",
    "pwiser",
    "strength",
]
