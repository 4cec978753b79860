"""New items behind an index: old rows untouched, and what was trained and labelled before serves them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from novelret import encode
from novelret.append import AppendConfig, append_items
from novelret.build import IndexConfig, build_index
from novelret.data.split import load_split
from novelret.evaluate.config import EvalConfig
from novelret.evaluate.provenance import commands
from novelret.index import base_lists, open_index
from novelret.progress import Reporter
from tests.cli.test_chain import fails, result, run
from tests.conftest import make_encoder, write_jsonl, write_qrels

LATER = 8  # every fifth item (those that are "black") comes later


@pytest.fixture(scope="module")
def start(world, encoder, tmp_path_factory):
    """The world's data before the black items came, its index, and a model trained and labels made with it."""
    folder = tmp_path_factory.mktemp("append")
    data = folder / "before"
    shutil.copytree(world, data)
    items = [json.loads(line) for line in (world / "corpus.jsonl").read_text().splitlines()]
    old = [item for item in items if "black" not in item["text"]]
    assert len(items) - len(old) == LATER
    ids = {item["_id"] for item in old}
    write_jsonl(data / "corpus.jsonl", old)
    for name in ("train", "test"):
        lines = [line.split("\t") for line in (world / "qrels" / f"{name}.tsv").read_text().splitlines()[1:]]
        write_qrels(data / "qrels" / f"{name}.tsv", [tuple(line) for line in lines if line[1] in ids])
    build_index(IndexConfig(str(data), str(encoder), device="cpu"), folder / "index")
    return folder, data


@pytest.fixture(scope="module")
def trained(start, tmp_path_factory):
    from novelret.label.label import LabelConfig, build_labels
    from novelret.train.config import TrainConfig
    from novelret.train.trainer import train_model

    folder, data = start
    index = str(folder / "index")
    build_labels(
        LabelConfig(
            str(data), index, f"file:{data}/judgements.tsv", missing="irrelevant", base_depth=3, depth=12
        ),
        folder / "labels",
    )
    settings = TrainConfig(
        str(data), index, labels=str(folder / "labels"), tune="adapter", base_depth=3, depth=12, steps=10,
        batch_size=16, learning_rate=0.02, max_recall_drop=1.0, device="cpu",
    )  # fmt: skip
    train_model(settings, folder / "model")
    return folder


def append(world, folder, out, **settings):
    return append_items(AppendConfig(str(world), str(folder / "index"), device="cpu", **settings), out)


def test_nothing_is_gone_on_with_where_nothing_was_begun(world, start, tmp_path, capsys):
    _, _, err = run(capsys, "index", "--data", world, "--append", start[0] / "index", "--out", tmp_path / "g")
    assert "8 new items behind 32 old ones" in err
    assert "going on" not in err


def test_old_rows_stay_and_only_new_items_are_encoded(world, start, index_folder, tmp_path, monkeypatch):
    folder, _ = start
    real, encoded = encode.encode_items, []
    monkeypatch.setattr(
        encode, "encode_items", lambda m, texts, b: encoded.extend(texts) or real(m, texts, b)
    )
    index = append(world, folder, tmp_path / "grown")
    assert len(encoded) == LATER
    assert all("black" in text for text in encoded)
    old, whole = open_index(folder / "index"), open_index(index_folder)
    assert len(index) == 40
    assert index.catalog.ids.to_pylist()[:32] == old.catalog.ids.to_pylist()
    assert np.asarray(index.embeddings[:32]).tobytes() == np.asarray(old.embeddings).tobytes()
    # The same catalog as if it had been indexed at once: by id, and in every list, ties included.
    rows = whole.catalog.rows_of(index.catalog.ids.to_pylist())
    assert np.allclose(index.embeddings, whole.embeddings[rows], atol=1e-6)
    assert index.catalog.texts.to_pylist() == whole.catalog.texts_at(rows)
    split = load_split(str(world), "test", index.catalog)
    found = base_lists(index, split, 10)[0]
    assert (rows[found] == base_lists(whole, load_split(str(world), "test", whole.catalog), 10)[0]).all()
    open_index(index.folder, str(world))


def test_a_model_trained_before_serves_the_new_items(world, trained, capsys, tmp_path):
    result(capsys, "index", "--data", world, "--append", trained / "index", "--out", tmp_path / "grown")
    common = ["--data", world, "--index", tmp_path / "grown"]
    report = result(
        capsys, "eval", *common, "--model", f"new={trained / 'model'}", "--judge", f"file:{world}/judgements.tsv",
        "--missing", "irrelevant", "--base-depth", 3, "--k", 3, "--out", tmp_path / "report",
    )  # fmt: skip
    assert report["models"]["new"]["Novelty@3"] > 0
    new_ids = set(open_index(tmp_path / "grown").catalog.ids.to_pylist()[32:])
    run = [line.split() for line in (tmp_path / "report" / "runs" / "new.trec").read_text().splitlines()]
    asked = next(row[0] for row in run if row[2] in new_ids)  # returned by a model never trained with it
    queries = map(json.loads, (world / "queries.jsonl").read_text().splitlines())
    text = next(query["text"] for query in queries if query["_id"] == asked)
    hits = result(
        capsys,
        "search",
        *common,
        "--model",
        f"new={trained / 'model'}",
        "--k",
        5,
        "--base-depth",
        3,
        text,
    )
    assert {hit["id"] for hit in hits["results"]["new"]} & new_ids
    # Labels of the old index go on serving, for instance to train again.
    again = result(
        capsys, "train", *common, "--labels", trained / "labels", "--tune", "adapter", "--base-depth", 3,
        "--depth", 12, "--steps", 2, "--init", trained / "model", "--out", tmp_path / "model",
    )  # fmt: skip
    assert again["points"]
    # But not the other way round, nor for an index that is no descendant.
    assert "was trained for another index" in fails(
        capsys, "eval", "--data", trained / "before", "--index", trained / "index", "--k", 3, "--base-depth", 3,
        "--model", f"new={tmp_path / 'model'}", "--out", tmp_path / "no",
    )  # fmt: skip


def test_appended_twice_and_in_place(world, start, encoder, tmp_path, capsys):
    folder, _ = start
    shutil.copytree(folder / "index", tmp_path / "index")
    data = tmp_path / "data"
    shutil.copytree(world, data)
    place = ["--append", tmp_path / "index", "--out", tmp_path / "index"]
    assert "exists already" in fails(capsys, "index", "--data", data, *place)
    result(capsys, "index", "--data", data, *place, "--force")
    with (data / "corpus.jsonl").open("a") as file:
        file.write('{"_id": "a-first-by-id", "text": "red red sofa"}\n')
    found = result(capsys, "index", "--data", data, *place, "--force")
    index = open_index(tmp_path / "index", str(data))
    assert (found["items"], len(index)) == (41, 41)
    assert index.descends_from(open_index(folder / "index").manifest.fingerprint)
    assert index.id_rank[40] == 0
    assert not (tmp_path / "index.partial").exists()
    same = result(capsys, "index", "--data", data, *place, "--force")  # nothing new
    assert same["items"] == 41


def test_goes_on_after_a_kill_and_keeps_the_old_index(world, start, tmp_path, monkeypatch):
    folder, _ = start
    real, calls = encode.encode_items, []
    before = (folder / "index" / "embeddings.npy").read_bytes()

    def dies(model, texts, batch_size):
        calls.append(len(texts))
        raise KeyboardInterrupt

    monkeypatch.setattr(encode, "encode_items", dies)
    with pytest.raises(KeyboardInterrupt):
        append(world, folder, tmp_path / "grown")
    assert not (tmp_path / "grown").exists()
    monkeypatch.setattr(encode, "encode_items", real)
    monkeypatch.setattr("novelret.append.write_catalog", lambda *_: pytest.fail("read again"))
    index = append(world, folder, tmp_path / "grown")
    assert len(index) == 40
    assert calls == [LATER]
    assert (
        np.asarray(index.embeddings[:32]).tobytes()
        == np.asarray(open_index(folder / "index").embeddings).tobytes()
    )
    assert (folder / "index" / "embeddings.npy").read_bytes() == before


@pytest.mark.parametrize("moment", ["manifest", "rename"])
def test_in_place_goes_on_after_a_kill_at_the_end(world, start, tmp_path, monkeypatch, moment):
    place = tmp_path / "index"
    shutil.copytree(start[0] / "index", place)
    config = AppendConfig(str(world), str(place), device="cpu")
    real = Path.replace

    def dies(path, target):
        if path.name == "index.partial":
            raise KeyboardInterrupt
        return real(path, target)

    def dies_at_once(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        if moment == "rename":
            patch.setattr(Path, "replace", dies)
        else:
            patch.setattr("novelret.append.write_manifest", dies_at_once)
        with pytest.raises(KeyboardInterrupt):
            append_items(config, place, force=True)
    assert place.exists() == (moment == "manifest")
    monkeypatch.setattr(encode, "encode_items", lambda *_: pytest.fail("encoded again"))
    assert len(append_items(config, place, force=True)) == 40
    assert [path.name for path in tmp_path.iterdir()] == ["index"]
    assert not (place / "progress.json").exists()


@pytest.mark.parametrize("factory", ["IVF2,Flat", "HNSW8"])
def test_faiss_indexes_grow_too(world, start, encoder, tmp_path, factory):
    _, data = start
    build_index(
        IndexConfig(str(data), str(encoder), factory=factory, dtype="float16", device="cpu"),
        tmp_path / "index",
    )
    index = append(world, tmp_path, tmp_path / "grown")
    assert (index.faiss_index.ntotal, index.embeddings.dtype) == (40, np.float16)
    new = np.asarray(index.embeddings[32:], dtype=np.float32)
    assert (index.search(new, 1)[0][:, 0] >= 32).mean() > 0.5


def test_what_a_grown_faiss_index_misses_is_measured_anew(world, start, encoder, tmp_path):
    _, data = start
    old = build_index(
        IndexConfig(str(data), str(encoder), factory="IVF4,Flat", device="cpu"), tmp_path / "index"
    )
    report = Reporter()
    config = AppendConfig(str(world), str(tmp_path / "index"), device="cpu")
    index = append_items(config, tmp_path / "grown", report=report)
    texts = [json.loads(line)["text"] for line in (world / "queries.jsonl").read_text().splitlines()]
    found = index.search(encode.encode_queries(index.query_encoder(), texts), 40)[0]
    recall = round(float((found >= 0).mean()), 4)  # of all 40 items
    assert index.manifest.facts["recall"] == {"k": 40, "recall": recall, "queries": 40}
    assert old.manifest.facts["recall"]["k"] == 32
    assert any(f"IVF4,Flat: finds {recall:.1%} of the exact top 40" in line for line in report.warnings)
    # Where it cannot be measured, the old figure does not stand for it.
    shutil.copytree(world, tmp_path / "data")
    (tmp_path / "data" / "queries.jsonl").unlink()
    assert "recall" not in append(tmp_path / "data", tmp_path, tmp_path / "none").manifest.facts


def test_a_report_names_the_commands_of_the_indexes_before(world, start, encoder, tmp_path):
    folder, data = start

    def index_lines(*indexes):
        config = EvalConfig(str(world), tuple(str(index.folder) for index in indexes))
        made = SimpleNamespace(config=config, models={}, out=tmp_path / "report")
        return [line for line in commands(made) if line.startswith("novelret index ")]

    index = append(world, folder, tmp_path / "grown")
    first, then = index_lines(index)
    assert f"--data {data} --model {encoder} " in first
    assert first.endswith(f" --out {folder / 'index'}")
    assert f"--append {folder / 'index'} " in then
    # Where several are pooled, all of them; what two come from, once.
    again = append(world, folder, tmp_path / "again")
    assert [line.split()[-1] for line in index_lines(index, again)] == [
        str(folder / "index"), str(tmp_path / "grown"), str(tmp_path / "again")
    ]  # fmt: skip
    # In place there is nothing left to go back to.
    shutil.copytree(folder / "index", tmp_path / "index")
    in_place = AppendConfig(str(world), str(tmp_path / "index"), device="cpu")
    assert len(index_lines(append_items(in_place, tmp_path / "index", force=True))) == 1


def test_items_are_encoded_by_the_item_side(world, start, encoder, tmp_path):
    _, data = start
    other = make_encoder(tmp_path / "queries", seed=9)
    build_index(
        IndexConfig(str(data), str(encoder), query_model=str(other), device="cpu"), tmp_path / "index"
    )
    index = append(world, tmp_path, tmp_path / "grown")
    texts = index.catalog.texts_at(range(32, 40))
    expected = encode.encode_items(encode.load_encoder(encoder), texts, 8)
    assert np.allclose(index.embeddings[32:], expected, atol=1e-6)
    assert encode.fingerprint_encoder(index.query_encoder()) == encode.fingerprint_encoder(
        encode.load_encoder(other)
    )


def test_bad_input_has_one_line_each(world, start, encoder, capsys, tmp_path):
    folder, _ = start
    out = ["--append", folder / "index", "--out", tmp_path / "out"]
    changed, smaller = tmp_path / "changed", tmp_path / "smaller"
    lines = (world / "corpus.jsonl").read_text().splitlines(keepends=True)
    for data, text in (
        (changed, "".join(line.replace("blue sofa", "navy sofa") for line in lines)),
        (smaller, "".join(line for line in lines if "lamp" not in line)),
    ):
        data.mkdir()
        (data / "corpus.jsonl").write_text(text)
    cases = {
        "item 'i01' has another text than in": ["--data", changed, *out],
        "item 'i10' of": ["--data", smaller, *out],
        "(4 such items); --append takes the whole corpus": ["--data", smaller, *out],
        "--model: new items are encoded like those of": ["--data", world, "--model", encoder, *out],
        "--dtype: new items": ["--data", world, "--dtype", "float16", *out],
        "no such folder; make it with `novelret index`": [
            "--data", world, "--append", tmp_path / "none", "--out", tmp_path / "out"
        ],
        "--model is missing": ["--data", world, "--out", tmp_path / "out"],
    }  # fmt: skip
    for message, arguments in cases.items():
        assert message in fails(capsys, "index", *arguments)
    assert not (tmp_path / "out").exists()
