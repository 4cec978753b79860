"""How a query encoder was trained, wherever it lies: in a MODEL, among its checkpoints, or exported."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from novelret.artifacts import MANIFEST, hash_texts, is_kind, read_manifest
from novelret.data.split import plain_texts

QUERIES, HELD_BACK, MIRRORED = "queries.npy", "held_back.npy", "mirrored.npy"
"""Files with the hashes of an encoder's training queries, of those among them that were held back to choose
its weights by, on which it looks better than on others, too, and of items that served it as queries.
"""
HASHES = (QUERIES, HELD_BACK, MIRRORED)


def hash_queries(texts: list[str]) -> np.ndarray:
    """(n,) uint64 hashes of query texts, as these files hold them."""
    return hash_texts(plain_texts(texts))


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
        refit: whether these weights were trained anew on all queries, held-back ones too.
    """

    index: str
    index_folder: str
    judges: list[str]
    folder: Path
    init: str | None = None
    deployed: str | None = None
    refit: bool = False

    def hashes(self, name: str) -> np.ndarray:
        """(n,) uint64 hashes of one of these files; none where a model of before lacks it."""
        path = self.folder / name
        return np.load(path) if path.is_file() else np.empty(0, dtype=np.uint64)

    def trained_on(self) -> np.ndarray:
        """(n,) uint64 hashes of the queries that the weights, or what they began with, were trained on.

        A model of before may not tell; there are none then.
        """
        queries = self.hashes(QUERIES)
        if self.refit:
            return queries
        is_told = (self.folder / HELD_BACK).is_file()
        return np.setdiff1d(queries, self.hashes(HELD_BACK)) if is_told else queries[:0]

    def facts(self) -> dict[str, Any]:
        """As an export's manifest carries it; the hashes lie beside it."""
        told = ("index", "index_folder", "judges", "init", "deployed", "refit")
        return {name: getattr(self, name) for name in told}


def model_of(folder: Path) -> Path:
    """The MODEL that a kept checkpoint lies in, whatever link leads there, or the folder itself."""
    lies_at = folder.resolve()
    if lies_at.parent.name != "checkpoints" or (lies_at / MANIFEST).is_file():
        return folder
    is_plain = folder.parent.name == "checkpoints" and not folder.is_symlink()
    return folder.parent.parent if is_plain else lies_at.parent.parent  # as it was typed, where that will do


def training_of(folder: Path) -> Training | None:
    """How the encoder in a folder was trained; None where nothing tells."""
    given, folder = folder, model_of(folder)
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
    refit = bool(manifest.facts.get("refit") or (given != folder and manifest.facts.get("checkpoints_refit")))
    return Training(index, lay, list(map(str, judges)), folder, init, deployed, refit)
