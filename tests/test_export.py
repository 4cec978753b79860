"""Exported encoders give the same embeddings, and serve in front of an index that nobody touched."""

from __future__ import annotations

import importlib.util
import json
import shutil
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
from qdrant_client import QdrantClient
from sentence_transformers import SentenceTransformer
from transformers import AutoTokenizer

from novelret import encode
from novelret.build import IndexConfig, build_index
from novelret.cli import main
from novelret.export.arrays import serve
from novelret.index import open_index
from tests.commands import fails
from tests.conftest import make_encoder

EXAMPLE = Path(__file__).parents[1] / "examples" / "qdrant_union.py"
TEXTS = ["buy red sofa", "lamp", "buy grey desk unknown words here", "chair " * 40]


def train(world, index_folder, out, *arguments):
    command = ["train", "--data", world, "--index", index_folder, "--labels", out.parent / "labels", "--device", "cpu",
               "--base-depth", 3, "--depth", 12, "--steps", 10, "--batch-size", 16, "--max-recall-drop", 1,
               "--validation-fraction", 0.2, "--out", out, "--quiet", *arguments]  # fmt: skip
    assert main([str(word) for word in command]) == 0
    # The weights of the last step, whichever the validation preferred, differ from the start in these tests.
    return out


@pytest.fixture(scope="module")
def models(world, index_folder, tmp_path_factory):
    """An adapter, a full model, an adapter behind each."""
    folder = tmp_path_factory.mktemp("models")
    judge = f"file:{world / 'judgements.tsv'}"
    label = ["label", "--data", world, "--index", index_folder, "--judge", judge, "--missing", "irrelevant", "--device", "cpu",
             "--base-depth", 3, "--depth", 12, "--out", folder / "labels", "--quiet"]  # fmt: skip
    assert main([str(word) for word in label]) == 0
    adapter = ("--tune", "adapter", "--learning-rate", 0.05, "--validation-fraction", 0)
    full = ("--tune", "full", "--learning-rate", 0.01, "--validation-fraction", 0)
    made = {
        "adapter": train(world, index_folder, folder / "adapter", *adapter),
        "full": train(world, index_folder, folder / "full", *full),
    }
    made["second"] = train(world, index_folder, folder / "second", *adapter, "--init", made["adapter"])
    made["behind"] = train(world, index_folder, folder / "behind", *adapter, "--init", made["full"])
    return made


def export(capsys, *arguments) -> dict:
    assert main(["export", *map(str, arguments), "--json", "--quiet"]) == 0, capsys.readouterr().err
    return json.loads(capsys.readouterr().out)


def embeddings_of(model) -> np.ndarray:
    return encode.encode_queries(encode.load_encoder(model), TEXTS)


@pytest.mark.parametrize("name", ["adapter", "full"])
def test_onnx_agrees_with_torch_at_any_batch_size_and_length(models, name, tmp_path, capsys):
    out = tmp_path / "onnx"
    made = export(capsys, "--model", models[name], "--format", "onnx", "--out", out)
    assert made["difference"] < 1e-4
    # As somebody else would call it: onnxruntime and the tokenizer that lies beside the model, nothing of ours.
    session = onnxruntime.InferenceSession(str(out / "model.onnx"))
    how = json.loads((out / "novelret.json").read_text())
    tokenizer = AutoTokenizer.from_pretrained(str(out))
    expected = embeddings_of(models[name])
    for texts, rows in ((TEXTS, slice(None)), (TEXTS[1:2], slice(1, 2)), (TEXTS[:3] * 7, [0, 1, 2] * 7)):
        texts = [how["prompt"] + text for text in texts]
        tokens = tokenizer(
            texts, padding=True, truncation=True, max_length=how["max_length"], return_tensors="np"
        )
        (found,) = session.run([how["output"]], {key: tokens[key].astype(np.int64) for key in how["inputs"]})
        assert np.abs(found - expected[rows]).max() < 1e-4


def test_a_folder_loads_as_sentence_transformers(models, tmp_path, capsys):
    export(capsys, "--model", models["full"], "--format", "st", "--out", tmp_path / "st")
    model = SentenceTransformer(str(tmp_path / "st"), device="cpu")
    assert np.allclose(
        model.encode_query(TEXTS, normalize_embeddings=True), embeddings_of(models["full"]), atol=1e-6
    )
    assert "novelret" in (tmp_path / "st" / "README.md").read_text()


@pytest.mark.parametrize("name", ["adapter", "second"])
def test_a_matrix_turns_deployed_embeddings_into_new_ones(models, index_folder, name, tmp_path, capsys):
    made = export(capsys, "--model", models[name], "--format", "npz", "--out", tmp_path / "adapter.npz")
    assert made["difference"] < 1e-5
    with np.load(tmp_path / "adapter.npz") as file:  # no pickle in it
        matrix, normalize = file["matrix"], bool(file["normalize"])
    deployed = encode.encode_queries(open_index(index_folder).query_encoder(), TEXTS)
    moved = deployed @ matrix
    if normalize:
        moved /= np.linalg.norm(moved, axis=1, keepdims=True)
    assert np.allclose(moved, embeddings_of(models[name]), atol=1e-5)
    assert np.abs(moved - deployed).max() > 0.05


@pytest.mark.parametrize("tune", ["adapter", "memory"])
def test_a_matrix_begins_where_a_deployed_adapter_ends(models, world, encoder, tune, tmp_path, capsys):
    """The first round's adapter has been deployed: what is served already holds it."""
    index = ["index", "--data", world, "--model", encoder, "--query-model", models["adapter"]]
    assert main([*map(str, index), "--out", str(tmp_path / "index"), "--quiet"]) == 0
    judge = ["--judge", f"file:{world / 'judgements.tsv'}", "--missing", "irrelevant", "--depth", 12]
    label = [
        "label",
        "--data",
        world,
        "--index",
        tmp_path / "index",
        *judge,
        "--base-depth",
        3,
        "--device",
        "cpu",
    ]
    assert main([*map(str, label), "--out", str(tmp_path / "labels"), "--quiet"]) == 0
    more = ("--tune", tune, "--learning-rate", 0.05, "--validation-fraction", 0)
    second = train(world, tmp_path / "index", tmp_path / "second", *more)
    capsys.readouterr()
    export(capsys, "--model", second, "--format", "npz", "--out", tmp_path / "arrays.npz")
    with np.load(tmp_path / "arrays.npz") as file:
        arrays = dict(file)
    assert ("keys" in arrays) == (tune == "memory")
    served = encode.encode_queries(open_index(tmp_path / "index").query_encoder(), TEXTS)
    assert np.allclose(served, embeddings_of(models["adapter"]), atol=1e-6)
    assert np.allclose(serve(served, arrays), embeddings_of(second), atol=1e-5)
    assert np.abs(served - embeddings_of(second)).max() > 0.01
    # Wherever it is called from, and when the index is gone.
    (tmp_path / "index").rename(tmp_path / "away")
    export(capsys, "--model", second, "--format", "npz", "--out", tmp_path / "again.npz")
    with np.load(tmp_path / "again.npz") as file:
        assert all(np.array_equal(file[name], array) for name, array in arrays.items())
    # Models of before do not hold which encoder was deployed.
    manifest = json.loads((second / "manifest.json").read_text())
    del manifest["facts"]["deployed"]
    (second / "manifest.json").write_text(json.dumps(manifest))
    command = ["export", "--model", str(second), "--format", "npz", "--out", str(tmp_path / "none.npz")]
    assert main(command) == 2
    assert "several adapters stand behind one another" in " ".join(capsys.readouterr().err.split())
    (tmp_path / "away").rename(tmp_path / "index")
    export(capsys, "--model", second, "--format", "npz", "--out", tmp_path / "none.npz")


def test_any_sentence_transformers_folder_is_exported(encoder, tmp_path, capsys):
    assert main(["export", "--help"]) == 0
    assert "any sentence-transformers folder" in " ".join(capsys.readouterr().out.replace("│", " ").split())
    export(capsys, "--model", encoder, "--out", tmp_path / "st")
    again = SentenceTransformer(str(tmp_path / "st"), device="cpu").encode_query(TEXTS)
    assert np.allclose(again, embeddings_of(encoder), atol=1e-6)
    made = export(capsys, "--model", encoder, "--format", "onnx", "--out", tmp_path / "onnx")
    assert (made["dimension"], made["difference"] < 1e-4) == (16, True)
    assert "is no adapter behind a frozen encoder" in fails(
        capsys, "export", "--model", encoder, "--format", "npz", "--out", tmp_path / "adapter.npz"
    )


def test_what_is_no_adapter_has_no_matrix(models, tmp_path, capsys):
    out = tmp_path / "adapter.npz"
    assert "is no adapter behind a frozen encoder" in fails(
        capsys, "export", "--model", models["full"], "--format", "npz", "--out", out
    )
    # So too where it lies among the checkpoints, or is exported.
    shutil.copytree(models["behind"], tmp_path / "model")
    checkpoint = tmp_path / "model" / "checkpoints" / "step-9"
    shutil.copytree(models["behind"], checkpoint)
    (checkpoint / "manifest.json").unlink()
    export(capsys, "--model", checkpoint, "--out", tmp_path / "st")
    for model in (models["behind"], checkpoint, tmp_path / "st"):
        said = fails(capsys, "export", "--model", model, "--format", "npz", "--out", out)
        assert "whose weights are not the deployed ones" in said
    assert not out.exists()


def test_bad_arguments_are_one_line(models, tmp_path, capsys):
    model = models["adapter"]
    assert "--format pt: unknown" in fails(
        capsys, "export", "--model", model, "--format", "pt", "--out", tmp_path / "x"
    )
    assert "no such model folder" in fails(
        capsys, "export", "--model", tmp_path / "none", "--out", tmp_path / "x"
    )
    # No hub id has two slashes: nothing is looked up.
    assert "no such model folder" in fails(
        capsys, "export", "--model", "runs/none/model", "--out", tmp_path / "x"
    )
    assert "name it like adapter.npz" in fails(
        capsys, "export", "--model", model, "--format", "npz", "--out", tmp_path / "x"
    )
    for form, name in (("st", "x"), ("npz", "x.npz")):
        export(capsys, "--model", model, "--format", form, "--out", tmp_path / name)
        assert "exists already" in fails(
            capsys, "export", "--model", model, "--format", form, "--out", tmp_path / name
        )
        export(capsys, "--model", model, "--format", form, "--out", tmp_path / name, "--force")


def test_onnx_takes_the_prompt_that_queries_take(encoder, tmp_path, capsys):
    prompts = {"query": "", "document": "buy "}
    model = SentenceTransformer(str(encoder), device="cpu", prompts=prompts, default_prompt_name="document")
    model.save(str(tmp_path / "model"))
    made = export(capsys, "--model", tmp_path / "model", "--format", "onnx", "--out", tmp_path / "onnx")
    assert json.loads((tmp_path / "onnx" / "novelret.json").read_text())["prompt"] == ""
    assert made["difference"] < 1e-4


def test_what_onnx_would_serve_otherwise_than_the_encoder_is_refused(encoder, tmp_path, capsys):
    def refused(name, model) -> str:
        model.save(str(tmp_path / name))
        out = tmp_path / "onnx"
        line = fails(capsys, "export", "--model", tmp_path / name, "--format", "onnx", "--out", out)
        assert not out.exists()
        return line

    model = SentenceTransformer(str(encoder), device="cpu", prompts={"query": "red lamp "})
    model.set_pooling_include_prompt(False)
    assert "its pooling leaves the query prompt's tokens out" in refused("prompt", model)
    # Longer queries are cut, unlike what the files beside model.onnx say: only `encode_queries` knows.
    model = SentenceTransformer(str(encoder), device="cpu")
    model[0].query_length = 4
    assert "the ONNX embeddings differ from the encoder's by" in refused("short", model)


@pytest.fixture
def example():
    """The example that serves from Qdrant, as a module."""
    spec = importlib.util.spec_from_file_location("qdrant_union", EXAMPLE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_each_index_has_its_own_collection_however_far_it_was_filled(
    example, world, index_folder, tmp_path, monkeypatch
):
    index = open_index(index_folder)
    config = IndexConfig(str(world), str(make_encoder(tmp_path / "other", 8, seed=5)), device="cpu")
    other = build_index(config, tmp_path / "index")
    client = QdrantClient(":memory:")
    monkeypatch.setattr(example, "BATCH", 7)
    collections = [example.fill(client, each) for each in (index, other)]
    client.delete(collections[1], points_selector=[3, 39])  # as a kill would leave it
    assert example.fill(client, other) == collections[1]
    for each, collection in zip((index, other), collections, strict=True):
        assert client.count(collection).count == len(each)
        found = example.search(client, collection, each.embeddings[3], 3)
        assert each.catalog.ids_at([3])[0] in [item for item, _ in found]
    with monkeypatch.context() as patch:
        patch.setattr(client, "upsert", lambda *_: pytest.fail("filled again"))
        example.fill(client, index)


def test_a_vector_database_serves_both_encoders_over_one_collection(models, index_folder, example, capsys):
    text = "buy grey sofa"
    merged = example.main(
        [
            "--index",
            str(index_folder),
            "--model",
            str(models["adapter"]),
            "--base-depth",
            "5",
            "--k",
            "8",
            text,
        ]
    )
    index = open_index(index_folder)
    deployed = index.search(encode.encode_queries(index.query_encoder(), [text]), 5)[0][0]
    new = index.search(encode.encode_queries(encode.load_encoder(models["adapter"]), [text]), 8)[0][0]
    novel = [row for row in new if row not in deployed]
    assert [item for item, _, is_novel in merged if not is_novel] == index.catalog.ids_at(deployed)
    assert [item for item, _, is_novel in merged if is_novel] == index.catalog.ids_at(novel)
    assert novel
    assert capsys.readouterr().out.count("\n") == len(merged)


def test_an_exported_encoder_can_be_evaluated_and_trained_further(
    models, world, index_folder, tmp_path, capsys
):
    export(capsys, "--model", models["full"], "--format", "st", "--out", tmp_path / "served")
    command = ["eval", "--data", world, "--index", index_folder, "--split", "train", "--base-depth", 3, "--k", 3,
               "--model", f"a={models['full']}", "--model", f"b={tmp_path / 'served'}", "--out", tmp_path / "report",
               "--json", "--quiet"]  # fmt: skip
    assert main([str(word) for word in command]) == 0, capsys.readouterr().err
    found = json.loads(capsys.readouterr().out)["models"]
    assert found["a"] == found["b"]
    train(
        world,
        index_folder,
        models["full"].parent / "further",
        "--tune",
        "adapter",
        "--init",
        tmp_path / "served",
    )
