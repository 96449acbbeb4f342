"""The losses: PWiseR and those that it is compared with, functions of tensors.

    pwiser              squared hinges of a batch's conversions over all other rows
    pairwise_logistic   RankNet, on PWiseR's own pairs
    combined_pair       RankNet, on the pairs of one binary label          (arXiv 2403.14144)
    jrc                 softmax among the rows of one group, per class     (arXiv 2208.06164)
    listce              softmax cross-entropy of a group's probabilities   (arXiv 2211.01494)
    focal               cross-entropy with less weight on easy rows        (arXiv 1708.02002)

All but focal are terms to be added to binary cross-entropy (BCE) with a weight. Where a paper mixes
alpha * BCE + (1 - alpha) * term, that is the same up to scale as BCE + (1 - alpha) / alpha * term.
`tasks.LOSSES` says how training calls each.
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
