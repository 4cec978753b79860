"""A deployed encoder that cuts its embeddings short (Matryoshka) is finetuned and evaluated."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
from sentence_transformers import SentenceTransformer
from torch.nn.functional import normalize

from novelret import encode
from novelret.build import IndexConfig, build_index
from novelret.cli import main
from novelret.index import load_finetuned, open_index

WIDTH = 8
TEXTS = ["buy red sofa", "lamp"]

ON_CPU = ("--device", "cpu", "--base-depth", 3)


@pytest.fixture(scope="module")
def truncated(encoder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("truncated") / "encoder"
    SentenceTransformer(str(encoder), device="cpu", truncate_dim=WIDTH).save(str(folder))
    return folder


@pytest.fixture(scope="module")
def start(world, truncated, tmp_path_factory):
    """An index, and labels made with it."""
    folder = tmp_path_factory.mktemp("start")
    build_index(IndexConfig(str(world), str(truncated), device="cpu"), folder / "index")
    run("label", "--data", world, "--index", folder / "index", "--judge", f"file:{world}/judgements.tsv",
        "--missing", "irrelevant", "--depth", 12, "--out", folder / "labels", *ON_CPU)  # fmt: skip
    return folder


def run(*arguments):
    assert main([*map(str, arguments), "--quiet"]) == 0


def test_modules_give_what_encode_gives(truncated, start):
    deployed = SentenceTransformer(str(truncated), device="cpu")
    expected = deployed.encode_query(TEXTS, normalize_embeddings=True)
    index = open_index(start / "index")
    assert index.embeddings.shape == (40, WIDTH)
    model = index.query_encoder()
    assert model.truncate_dim is None
    assert np.allclose(encode.encode_queries(model, TEXTS), expected, atol=1e-6)


def test_dot_products_keep_their_length(truncated, tmp_path):
    shutil.copytree(truncated, tmp_path / "dot")
    path = tmp_path / "dot" / "config_sentence_transformers.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"similarity_fn_name": "dot"}))
    expected = SentenceTransformer(str(tmp_path / "dot"), device="cpu").encode_query(TEXTS)
    found = encode.encode_queries(encode.load_encoder(tmp_path / "dot"), TEXTS)
    assert np.allclose(found, expected, atol=1e-6)
    assert np.linalg.norm(found, axis=1).max() < 0.99


def test_an_index_of_before_still_serves(truncated, start, tmp_path):
    shutil.copytree(start / "index", tmp_path / "index")
    shutil.rmtree(tmp_path / "index" / "query_encoder")
    shutil.copytree(truncated, tmp_path / "index" / "query_encoder")  # as it was kept: with a setting
    before, now = (open_index(folder).query_encoder() for folder in (tmp_path / "index", start / "index"))
    assert np.allclose(encode.encode_queries(before, TEXTS), encode.encode_queries(now, TEXTS), atol=1e-6)


@pytest.mark.filterwarnings("ignore:Implicit dimension")  # of a memory loaded without novelret
@pytest.mark.parametrize("tune", ["memory", "full"])
def test_finetuned_evaluated_and_searched(world, start, tmp_path, capsys, tune):
    index, model = start / "index", tmp_path / "model"
    run("train", "--data", world, "--index", index, "--labels", start / "labels", "--tune", tune, "--depth", 12,
        "--steps", 2, "--batch-size", 8, "--validation-fraction", 0, "--out", model, *ON_CPU)  # fmt: skip
    run("eval", "--data", world, "--split", "test", "--index", index, "--model", f"new={model}", "--k", 5,
        "--judge", f"file:{world}/judgements.tsv", "--missing", "irrelevant", "--out", tmp_path / "r", *ON_CPU)  # fmt: skip
    run("search", "--data", world, "--index", index, "--model", f"new={model}", TEXTS[0], *ON_CPU)
    served = SentenceTransformer(str(model), device="cpu").encode_query(TEXTS, normalize_embeddings=True)
    assert served.shape == (2, WIDTH)
    trained = load_finetuned(model, open_index(index))
    assert np.allclose(served, encode.encode_queries(trained, TEXTS), atol=1e-6)
    # What runs the modules alone, as training and ONNX do, sees the same up to the length.
    alone = trained(encode.query_features(trained, TEXTS))["sentence_embedding"].detach()
    assert np.allclose(normalize(alone, dim=1).numpy(), served, atol=1e-6)
