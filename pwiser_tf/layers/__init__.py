"""Layers: feature encoder, MLP blocks, gates, heads."""

from pwiser_tf.layers.blocks import MLP, Block, Head, l2
from pwiser_tf.layers.features import Encoder, RawFeatures
from pwiser_tf.layers.gates import Gate
from pwiser_tf.layers.noise import AccidentalClicks, observed_logits

__all__ = [
    "MLP",
    "AccidentalClicks",
    "Block",
    "Encoder",
    "Gate",
    "Head",
    "RawFeatures",
    "l2",
    "observed_logits",
]
