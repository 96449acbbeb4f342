"""MTReclib's MMoE, its loss and its training in PyTorch, written for this comparison.

The facts are those of github.com/easezyc/Multitask-Recommendation-Library (models/mmoe.py,
models/layers.py and main.py), its choices of initializer included. Only the extra `bench` installs
PyTorch: import this module where it is needed, not at the top of a file.
"""

import itertools
import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import nn

from pwiser_tf import runs
from pwiser_tf.config import Config
from pwiser_tf.models import ClickConversionModel
from pwiser_tf.models.base import TOWERS, log_odds
from pwiser_tf.schema import Schema


class MMoE(nn.Module):
    """Experts mixed for two towers by a softmax gate each; the gates read the encoded features.

    Call: ids int64 [B, C] (counted from 0 in each feature) and numbers float32 [B, N] to a list of
    two probabilities, float32 [B]: of a click, and of a click with a conversion.

    Args:
      sizes: the number of ids of each categorical feature. numbers: N.
      embedding_dim, bottom_units, tower_units, experts, dropout: as pwiser_tf.models.ModelConfig.
    """

    def __init__(
        self,
        sizes: Sequence[int],
        numbers: int,
        embedding_dim: int,
        bottom_units: Sequence[int] = (512, 256),
        tower_units: Sequence[int] = (128, 64),
        experts: int = 8,
        dropout: float = 0.2,
    ):
        super().__init__()
        width = (len(sizes) + 1) * embedding_dim
        self.embedding = nn.Embedding(sum(sizes), embedding_dim)
        nn.init.xavier_uniform_(self.embedding.weight)
        self.register_buffer("offsets", torch.tensor(np.cumsum([0, *sizes[:-1]])))
        self.numerical = nn.Linear(numbers, embedding_dim)
        self.experts = nn.ModuleList([_mlp(width, bottom_units, dropout) for _ in range(experts)])
        self.gates = nn.ModuleList(
            [nn.Sequential(nn.Linear(width, experts), nn.Softmax(dim=1)) for _ in range(2)]
        )
        self.towers = nn.ModuleList(
            [_tower(bottom_units[-1], tower_units, dropout) for _ in range(2)]
        )

    def forward(self, ids: torch.Tensor, numbers: torch.Tensor) -> list[torch.Tensor]:
        fields = [self.embedding(ids + self.offsets), self.numerical(numbers).unsqueeze(1)]
        x = torch.cat(fields, dim=1).flatten(1)  # [B, (C + 1) * D]
        experts = torch.stack([expert(x) for expert in self.experts], dim=1)  # [B, E, units]
        mixed = [torch.bmm(gate(x).unsqueeze(1), experts).squeeze(1) for gate in self.gates]
        return [
            torch.sigmoid(tower(m).squeeze(1)) for tower, m in zip(self.towers, mixed, strict=True)
        ]


def loss(probabilities: Sequence[torch.Tensor], grade: torch.Tensor) -> torch.Tensor:
    """The mean of the two towers' BCE, a scalar; probabilities [B] each, grades [B] in 0, 1, 2."""
    terms = [
        nn.functional.binary_cross_entropy(probability, (grade >= positive).float())
        for positive, probability in enumerate(probabilities, start=1)
    ]
    return sum(terms) / len(terms)


class Trainer:
    """MTReclib's model and loop, with the sizes of a config and initialized from its seed.

    Args:
      at_rates: the towers start at the base rates, as ours.
      as_ours: the first weights and Adam are ours too.
    """

    def __init__(
        self, config: Config, schema: Schema, at_rates: bool = False, as_ours: bool = False
    ):
        torch.manual_seed(config.training.seed)
        sizes = config.model
        self.model = MMoE(
            [feature.size for feature in schema.categorical],
            len(schema.numerical),
            sizes.embedding_dim,
            sizes.bottom_units,
            sizes.tower_units,
            sizes.experts,
            sizes.dropout,
        )
        self._as_ours = as_ours
        self._steps = 0
        if at_rates:
            split = schema.split("train")
            positives = split.clicks, split.conversions
            for (_, head), count in zip(self.model.towers, positives, strict=True):
                nn.init.constant_(head.bias, log_odds((count, split.rows)))
        learnt = list(self.model.parameters())
        groups = [{"params": learnt, "weight_decay": sizes.weight_decay}]
        if as_ours:
            copy_weights(runs.build_model(config, schema), self.model)
            # Before a normalization a bias does nothing, but Adam scales its rounding errors up to
            # full steps, and the running mean lags behind it.
            for linear, norm in itertools.pairwise(self.model.modules()):
                if isinstance(norm, nn.BatchNorm1d):
                    linear.bias.requires_grad_(False)
            learnt = [parameter for parameter in learnt if parameter.requires_grad]
            groups = [
                {"params": [p for p in learnt if p.ndim > 1], "weight_decay": sizes.weight_decay},
                {"params": [p for p in learnt if p.ndim == 1]},
            ]
        self._optimizer = torch.optim.Adam(groups, lr=config.training.learning_rate)

    def step(self, features: dict, grade) -> None:
        """Trains on a batch of TensorFlow tensors."""
        self._steps += 1
        if self._as_ours:
            # Keras adds epsilon to the raw second moment's root, PyTorch to the corrected one's.
            for group in self._optimizer.param_groups:
                group["eps"] = 1e-7 / math.sqrt(1 - group["betas"][1] ** self._steps)
        self.model.train()
        mean = loss(self.model(*_tensors(features)), torch.tensor(grade.numpy()))
        self._optimizer.zero_grad()
        mean.backward()
        self._optimizer.step()

    def predict(self, features: dict) -> list[np.ndarray]:
        """The probabilities of a click, and of a click with a conversion, each [B]."""
        self.model.eval()
        with torch.no_grad():
            return [probabilities.numpy() for probabilities in self.model(*_tensors(features))]


def copy_weights(ours: ClickConversionModel, theirs: MMoE) -> None:
    """Gives MTReclib's model the weights and running statistics of ours, of the same sizes."""

    def assign(parameter, values):
        with torch.no_grad():
            parameter.copy_(torch.tensor(values))

    def dense(layer, linear):
        assign(linear.weight, layer.kernel.numpy().T)
        assign(linear.bias, layer.bias.numpy())

    def blocks(mlp, sequence):
        # A linear map, a normalization, a ReLU and a dropout each; ours has no bias before the
        # normalization, which would take it away.
        for block, linear, norm in zip(mlp._blocks, sequence[0::4], sequence[1::4], strict=True):
            assign(linear.weight, block.kernel.numpy().T)
            nn.init.zeros_(linear.bias)
            assign(norm.weight, block.gamma.numpy())
            assign(norm.bias, block.beta.numpy())
            assign(norm.running_mean, block.mean.numpy())
            assign(norm.running_var, block.variance.numpy())

    assign(theirs.embedding.weight, ours._shared_encoder.embeddings.numpy())
    dense(ours._shared_encoder._linear, theirs.numerical)
    for expert, sequence in zip(ours._experts, theirs.experts, strict=True):
        blocks(expert, sequence)
    for tower, gate, (sequence, head) in zip(TOWERS, theirs.gates, theirs.towers, strict=True):
        dense(ours._gates[tower]._weights, gate[0])
        blocks(ours._towers[tower], sequence)
        dense(ours._heads[tower]._columns[0], head)


def _tensors(features) -> tuple:
    return tuple(torch.tensor(features[name].numpy()) for name in ("categorical", "numerical"))


def _mlp(inputs: int, units: Sequence[int], dropout: float) -> nn.Sequential:
    layers = []
    for size in units:
        layers += [nn.Linear(inputs, size), nn.BatchNorm1d(size), nn.ReLU(), nn.Dropout(dropout)]
        inputs = size
    return nn.Sequential(*layers)


def _tower(inputs: int, units: Sequence[int], dropout: float) -> nn.Sequential:
    return nn.Sequential(_mlp(inputs, units, dropout), nn.Linear(units[-1], 1))
