"""What one training works with, from the deployed index to the folder it writes into."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from novelret.index import Index
from novelret.progress import Reporter
from novelret.train.config import TrainConfig
from novelret.train.judging import Judging
from novelret.train.matrix import ItemMatrix
from novelret.train.processes import Processes
from novelret.train.states import Material
from novelret.train.tower import Tower
from novelret.train.validation import Validation


@dataclass
class Run:
    """What a training run works with.

    Attributes:
        config: the settings.
        tower: the part that is trained.
        material: what states are drawn from; grows where a judge is asked.
        validation: this process's share of the held-back queries; None where none are.
        index: the deployed index that is finetuned against.
        items: its item matrix.
        folder: the MODEL folder in the making.
        processes: who trains.
        judging: asks about unlabelled states; None without a judge.
        report: told of what matters.
    """

    config: TrainConfig
    tower: Tower
    material: Material
    validation: Validation | None
    index: Index
    items: ItemMatrix
    folder: Path
    processes: Processes
    judging: Judging | None
    report: Reporter

    def embed(self, queries: np.ndarray, step: int) -> torch.Tensor:
        """(n, d) float32 embeddings of n rows of the training queries, none perhaps, with gradient."""
        if len(queries) == 0:
            return torch.zeros((0, self.index.dimension), device=self.processes.device)
        return self.tower.embed(queries, step)
