"""Labels of the tiny world, and the command that trains on them."""

from __future__ import annotations

from pathlib import Path

import pytest
from safetensors.torch import load_file
from torch import Tensor

from novelret.blocks import BLOCK, Items
from novelret.cli import main
from novelret.train import policy

SHORT = ("--base-depth", 3, "--depth", 12, "--steps", 12, "--eval-every", 4, "--batch-size", 16, "--max-recall-drop", 1,
         "--validation-fraction", 0.2, "--device", "cpu")  # fmt: skip


def weights_of(folder: Path) -> dict[str, Tensor]:
    """All weights of a MODEL and its checkpoints, by file and name."""
    return {
        f"{path.relative_to(folder)}/{name}": tensor
        for path in sorted(folder.rglob("*.safetensors"))
        for name, tensor in load_file(path).items()
    }


def log_partition(
    queries: Tensor, items: Items, temperature: float, excluded: Tensor | None = None, block: int = BLOCK
) -> Tensor:
    """Log-partition log Z(q), (B,), with its gradient in the queries."""
    log_z, mean = policy.moments(queries.detach(), items, temperature, excluded, block)
    return policy.with_slope(queries, log_z, mean, temperature)


@pytest.fixture(scope="session")
def labels(world, index_folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("labels") / "labels"
    command = ["label", "--data", world, "--index", index_folder, "--judge", f"file:{world}/judgements.tsv",
               "--missing", "irrelevant", "--base-depth", 3, "--depth", 12, "--out", out, "--quiet"]  # fmt: skip
    assert main([str(part) for part in command]) == 0
    return out


@pytest.fixture(scope="session")
def command(world, index_folder, labels):
    return ["train", "--data", world, "--index", index_folder, "--labels", labels, *SHORT]
