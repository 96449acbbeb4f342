"""MTReclib's MMoE and its loss in PyTorch, written anew; what the benchmarks hold ours against.

The facts are those of github.com/easezyc/Multitask-Recommendation-Library (models/mmoe.py,
models/layers.py and main.py), its choices of initialiser included. PyTorch comes with the `bench`
extra alone: import this where it is needed, not at the top of a file.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import nn


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


def _mlp(inputs: int, units: Sequence[int], dropout: float) -> nn.Sequential:
    layers = []
    for size in units:
        layers += [nn.Linear(inputs, size), nn.BatchNorm1d(size), nn.ReLU(), nn.Dropout(dropout)]
        inputs = size
    return nn.Sequential(*layers)


def _tower(inputs: int, units: Sequence[int], dropout: float) -> nn.Sequential:
    return nn.Sequential(_mlp(inputs, units, dropout), nn.Linear(units[-1], 1))
