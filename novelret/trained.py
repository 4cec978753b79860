"""How a query encoder was trained, wherever it lies: in a MODEL, among its checkpoints, or exported."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from novelret.artifacts import MANIFEST, is_kind, read_manifest

QUERIES, MIRRORED = "queries.npy", "mirrored.npy"
"""Files with the hashes of an encoder's training queries and of items that served it as such.

Those held back to choose the weights are among the former: it looks better on them than on others.
"""


@dataclass(frozen=True)
class Training:
    """What is known of a training.

    Attributes:
        index: fingerprint of the index it was for.
        index_folder: where that lay; of several, the one that was finetuned against.
        judges: who judged its labels.
        folder: of the MODEL or the export that tells.
        init: the encoder that it began with; None for the deployed one, and in exports of before.
        deployed: fingerprint of the deployed query encoder; None in models of before.
    """

    index: str
    index_folder: str
    judges: list[str]
    folder: Path
    init: str | None = None
    deployed: str | None = None

    def hashes(self, name: str) -> np.ndarray:
        """(n,) uint64 hashes of one of these files; none where a model of before lacks it."""
        path = self.folder / name
        return np.load(path) if path.is_file() else np.empty(0, dtype=np.uint64)

    def facts(self) -> dict[str, Any]:
        """As an export's manifest carries it; the hashes lie beside it."""
        told = ("index", "index_folder", "judges", "init", "deployed")
        return {name: getattr(self, name) for name in told}


def model_of(folder: Path) -> Path:
    """The MODEL that a kept checkpoint lies in, or the folder itself."""
    is_checkpoint = folder.parent.name == "checkpoints" and not (folder / MANIFEST).is_file()
    return folder.parent.parent if is_checkpoint else folder


def training_of(folder: Path) -> Training | None:
    """How the encoder in a folder was trained; None where nothing tells."""
    folder = model_of(folder)
    if is_kind(folder, "export"):
        facts = read_manifest(folder, "export").facts.get("training")
        return Training(**facts, folder=folder) if facts else None
    if not is_kind(folder, "model"):
        return None
    manifest = read_manifest(folder, "model")
    judges = manifest.facts.get("judges", [manifest.facts.get("judge")])  # models of before know one
    index, config = manifest.inputs["index"], manifest.config
    lay = config["index"] if isinstance(config["index"], str) else config["index"][0]
    init, deployed = config.get("init"), manifest.facts.get("deployed")
    return Training(index, lay, list(map(str, judges)), folder, init, deployed)
