"""A second round: what the first model brings up is judged too, and training goes on from that model."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow.parquet as pq
from sentence_transformers import SentenceTransformer

from novelret.cli import main
from novelret.evaluate.config import EvalConfig
from novelret.evaluate.provenance import commands
from novelret.index import open_index


def novelret(capsys, *arguments) -> dict:
    assert main([*map(str, arguments), "--json", "--quiet"]) == 0
    return json.loads(capsys.readouterr().out)


def test_label_train_label_train(world, index_folder, capsys, tmp_path):
    common = ["--data", world, "--index", index_folder]
    label = ["label", *common, "--judge", f"file:{world}/judgements.tsv", "--missing", "irrelevant",
             "--base-depth", 3, "--depth", 6]  # fmt: skip
    train = ["train", *common, "--base-depth", 3, "--depth", 12, "--steps", 15, "--batch-size", 16,
             "--max-recall-drop", 1, "--validation-fraction", 0.2, "--device", "cpu"]  # fmt: skip
    novelret(capsys, *label, "--out", tmp_path / "labels1")
    novelret(
        capsys, *train, "--labels", tmp_path / "labels1", "--tune", "adapter", "--learning-rate", 0.05,
        "--no-refit", "--out", tmp_path / "model1",
    )  # fmt: skip
    counts = novelret(
        capsys, *label, "--from", "base-novel", "--from", f"model:{tmp_path / 'model1'}", "--out", tmp_path / "labels2"
    )  # fmt: skip
    assert counts["sources"][f"model:{tmp_path / 'model1'}"] > 0
    first, second = (
        {
            (row["query_id"], row["item_id"])
            for row in pq.read_table(tmp_path / name / "judgements.parquet").to_pylist()
        }
        for name in ("labels1", "labels2")
    )
    assert first < second
    # What was added is what the first model returns and nobody had looked at.
    index = open_index(index_folder)
    model = SentenceTransformer(str(tmp_path / "model1"), device="cpu")
    ids = index.catalog.ids_at(range(len(index)))
    texts = {}
    for line in (world / "queries.jsonl").read_text().splitlines():
        row = json.loads(line)
        texts[row["_id"]] = row["text"]
    for query, item in second - first:
        scores = (
            model.encode_query([texts[query]], normalize_embeddings=True) @ np.asarray(index.embeddings).T
        )
        assert item in {ids[row] for row in np.argsort(-scores[0])[:8]}
    found = novelret(
        capsys, *train, "--labels", tmp_path / "labels2", "--init", tmp_path / "model1", "--tune", "adapter",
        "--learning-rate", 0.05, "--out", tmp_path / "model2",
    )  # fmt: skip
    before = json.loads((tmp_path / "model1" / "manifest.json").read_text())
    after = json.loads((tmp_path / "model2" / "manifest.json").read_text())
    assert after["inputs"]["init"] == before["fingerprint"]
    assert (
        found["points"][0]["novelty"] == before["facts"]["chosen"]["novelty"]
    )  # it starts where that one ended
    # A report names what both rounds are made by, in an order in which it can be made.
    config = EvalConfig(str(world), str(index_folder))
    made = SimpleNamespace(config=config, models={"new": str(tmp_path / "model2")}, out=tmp_path / "report")
    lines = [line.split() for line in commands(made)]
    assert [(words[1], Path(words[-1]).name) for words in lines] == [
        ("index", index_folder.name), ("label", "labels1"), ("train", "model1"), ("label", "labels2"),
        ("train", "model2"), ("eval", "report"),
    ]  # fmt: skip
    # Both rounds' adapters stand in the saved encoder, which still loads by itself.
    again = SentenceTransformer(str(tmp_path / "model2"), device="cpu")
    assert [type(module).__name__ for module in again].count("Dense") == 2
    chosen = found["chosen"]["step"] > 0
    moved = not np.allclose(model.encode(["buy red sofa"]), again.encode(["buy red sofa"]))
    assert moved == chosen
