"""Indexing what is deployed already: embedding files and faiss indexes, and everything that can be wrong with them."""

from __future__ import annotations

import itertools
import json

import faiss
import numpy as np
import pytest
from sentence_transformers import SentenceTransformer

from novelret import build
from novelret.build import IndexConfig, build_index
from novelret.cli import main
from novelret.data.split import load_split
from novelret.index import base_lists, open_index
from novelret.progress import Reporter
from tests import commands
from tests.conftest import make_encoder

N, D = 40, 16


@pytest.fixture(scope="module")
def deployed(index_folder):
    """The items of the tiny world in another order: (N, D) embeddings and their ids."""
    index = open_index(index_folder)
    order = np.random.default_rng(3).permutation(N)
    return np.array(index.embeddings)[order], [index.catalog.ids_at([row])[0] for row in order]


@pytest.fixture
def ids(deployed, tmp_path):
    return write_ids(tmp_path / "ids.txt", deployed[1])


def write_ids(path, ids):
    path.write_text("".join(f"{item}\n" for item in ids), encoding="utf-8")
    return path


def write_fbin(path, matrix, rows=None):
    header = np.array([rows or len(matrix), matrix.shape[1]], dtype="<i4")
    path.write_bytes(header.tobytes() + matrix.astype("<f4").tobytes())
    return path


def write_faiss(path, matrix, factory, metric=faiss.METRIC_INNER_PRODUCT):
    index = faiss.index_factory(matrix.shape[1], factory, metric)
    if not index.is_trained:
        index.train(matrix)
    index.add(matrix)
    faiss.write_index(index, str(path))
    return path


def imported(world, encoder, out, report=None, **settings):
    settings = {name: str(value) for name, value in settings.items()}
    return build_index(IndexConfig(str(world), str(encoder), device="cpu", **settings), out, report=report)


def fails(capsys, world, encoder, tmp_path, *arguments) -> str:
    """The one line of the error of `novelret index`; no index may have appeared."""
    out = tmp_path / "refused"
    given = ("--data", world, "--model", encoder, "--device", "cpu", "--out", out)
    said = commands.fails(capsys, "index", *given, *arguments)
    assert not out.exists()
    return said


def check_same(index, deployed, index_folder, world):
    """Every item has its own embedding and text, and the deployed lists name the same items."""
    whole = open_index(index_folder, str(world))
    embeddings, ids = deployed
    assert index.catalog.ids.to_pylist() == ids
    assert np.array_equal(index.embeddings, embeddings)
    assert index.catalog.texts_at(range(N)) == whole.catalog.texts_at(whole.catalog.rows_of(ids))
    split = load_split(str(world), "train", whole.catalog)
    rows, scores = base_lists(index, load_split(str(world), "train", index.catalog), 8)
    wanted, wanted_scores = base_lists(whole, split, 8)
    assert np.allclose(scores, wanted_scores, atol=2e-6)
    assert [index.catalog.ids_at(r) for r in rows] == [whole.catalog.ids_at(r) for r in wanted]


def test_npy_fbin_and_shards_in_another_order(world, encoder, deployed, ids, index_folder, tmp_path):
    matrix = deployed[0]
    np.save(tmp_path / "items.npy", matrix)
    write_fbin(tmp_path / "items.fbin", matrix)
    (tmp_path / "shards").mkdir()
    cuts = [0, 3, 7, 11, 12, 13, 20, 21, 22, 23, 24, N]
    for shard, (start, stop) in enumerate(itertools.pairwise(cuts)):
        np.save(
            tmp_path / "shards" / f"items-{shard}.npy", matrix[start:stop]
        )  # items-10 comes after items-9
    for name in ("items.npy", "items.fbin", "shards"):
        index = imported(world, encoder, tmp_path / f"index-{name}", embeddings=tmp_path / name, ids=ids)
        check_same(index, deployed, index_folder, world)


def test_the_same_order_and_float16(world, encoder, index_folder, tmp_path):
    whole = open_index(index_folder)
    np.save(tmp_path / "items.npy", whole.embeddings.astype(np.float16))
    ids = write_ids(tmp_path / "ids.txt", whole.catalog.ids.to_pylist())
    index = imported(
        world, encoder, tmp_path / "index", embeddings=tmp_path / "items.npy", ids=ids, dtype="float16"
    )
    assert index.embeddings.dtype == np.float16
    assert np.array_equal(index.embeddings, whole.embeddings.astype(np.float16))


def test_embeddings_of_other_items_are_warned_of(world, encoder, index_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(build, "_PROBED", 32)
    monkeypatch.setattr(build, "_NEIGHBOURS", 8)
    index = open_index(index_folder)
    own, ids = np.array(index.embeddings), write_ids(tmp_path / "ids.txt", index.catalog.ids.to_pylist())
    given = {
        "own": own,
        "shifted": np.roll(own, 1, axis=0),
        "noise": np.random.default_rng(0).normal(size=own.shape),
    }
    for name, matrix in given.items():
        matrix = matrix / np.linalg.norm(matrix, axis=1, keepdims=True)
        np.save(tmp_path / f"{name}.npy", matrix.astype(np.float32))
        report = Reporter()
        imported(world, encoder, tmp_path / name, report, embeddings=tmp_path / f"{name}.npy", ids=ids)
        told = [text for text in report.warnings if "nearest to their own text" in text]
        assert len(told) == (name != "own"), (name, report.warnings)


def test_goes_on_after_a_kill(world, encoder, deployed, ids, index_folder, tmp_path, monkeypatch):
    monkeypatch.setattr("novelret.build._COPY_ROWS", 7)
    np.save(tmp_path / "items.npy", deployed[0])
    real, calls = np.linalg.norm, []

    def dies(*arguments, **options):
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return real(*arguments, **options)

    monkeypatch.setattr("novelret.index.np.linalg.norm", dies)
    with pytest.raises(KeyboardInterrupt):
        imported(world, encoder, tmp_path / "index", embeddings=tmp_path / "items.npy", ids=ids)
    assert not (tmp_path / "index").exists()
    index = imported(world, encoder, tmp_path / "index", embeddings=tmp_path / "items.npy", ids=ids)
    assert len(calls) == 4 + 3  # 3 chunks of 6 were on disk
    check_same(index, deployed, index_folder, world)


@pytest.mark.parametrize(
    "factory", ["Flat", "IVF3,Flat", "HNSW8,Flat", "SQ8,RFlat", "L2norm,Flat", "RR16,Flat"]
)
def test_exact_faiss_indexes(world, encoder, deployed, ids, tmp_path, factory):
    path = write_faiss(tmp_path / "deployed.faiss", deployed[0], factory)
    report = Reporter()
    index = imported(world, encoder, tmp_path / "index", report, faiss=path, ids=ids)
    assert index.catalog.ids.to_pylist() == deployed[1]
    if "L2norm" in factory or "RR" in factory:  # there and back, but for rounding
        assert np.allclose(index.embeddings, deployed[0], atol=1e-6)
    else:
        assert np.array_equal(index.embeddings, deployed[0])
    assert not [line for line in report.warnings if "reconstructions" in line]
    # What is deployed is searched: the lists are the file's own, as approximate as it is.
    split = load_split(str(world), "train", index.catalog)
    rows, _ = base_lists(index, split, 3)
    queries = np.stack([np.load(p) for p in index.folder.glob("cache/*/queries.npy")])[0]
    found = faiss.read_index(str(path)).search(queries, N)[1]
    excluded = split.excluded.padded(np.arange(len(split)))
    for row, theirs, left_out in zip(rows, found, excluded, strict=True):
        mine, theirs = row[row >= 0], theirs[(theirs >= 0) & ~np.isin(theirs, left_out)]
        assert mine.tolist() == theirs[: len(mine)].tolist()
    assert ("recall" in index.manifest.facts) == (factory != "Flat")


def test_an_idmap_names_its_items(world, encoder, deployed, tmp_path):
    matrix, item_ids = deployed
    labels = np.random.default_rng(1).permutation(1000)[:N]
    lines = [f"nothing {n}" for n in range(1000)]
    for label, item in zip(labels, item_ids, strict=True):
        lines[label] = item  # line n + 1 is the item that faiss calls n
    ids = write_ids(tmp_path / "ids.txt", lines)
    for number, factory in enumerate(("Flat", "IVF3,Flat")):
        inner = faiss.index_factory(D, factory, faiss.METRIC_INNER_PRODUCT)
        if not inner.is_trained:
            inner.train(matrix)
        index = faiss.IndexIDMap(inner)
        index.add_with_ids(matrix, labels)
        faiss.write_index(index, str(tmp_path / "deployed.faiss"))
        made = imported(
            world, encoder, tmp_path / f"index{number}", faiss=tmp_path / "deployed.faiss", ids=ids
        )
        assert made.catalog.ids.to_pylist() == item_ids
        assert np.array_equal(made.embeddings, matrix)
        if factory != "Flat":
            assert np.array_equal(made.faiss_index.search(matrix[:5], 1)[1][:, 0], np.arange(5))


def test_a_length_that_is_lost_is_warned_of_where_it_counts(world, encoder, deployed, ids, tmp_path):
    path = write_faiss(tmp_path / "deployed.faiss", 2 * deployed[0], "L2norm,Flat")
    SentenceTransformer(str(encoder), device="cpu", similarity_fn_name="dot").save(str(tmp_path / "dot"))
    report = Reporter()
    imported(world, tmp_path / "dot", tmp_path / "index", report, faiss=path, ids=ids)
    assert any("gives its vectors unit length, so item embeddings are" in line for line in report.warnings)


def test_a_blank_line_names_no_item(world, encoder, deployed, tmp_path, capsys):
    matrix, item_ids = deployed
    index = faiss.IndexIDMap(faiss.IndexFlatIP(D))
    index.add_with_ids(matrix, 2 * np.arange(N))
    path = tmp_path / "deployed.faiss"
    faiss.write_index(index, str(path))
    lines = [line for item in item_ids for line in (item, "")]  # every other label was deleted
    ids = write_ids(tmp_path / "ids.txt", [*lines, ""])
    made = imported(world, encoder, tmp_path / "index", faiss=path, ids=ids)
    assert made.catalog.ids.to_pylist() == item_ids
    write_ids(ids, [*lines[:6], "", *lines[7:]])
    line = fails(capsys, world, encoder, tmp_path, "--faiss", path, "--ids", ids)
    assert f"ids.txt:7: is blank, but has to name vector 6 of {path}" in line
    write_ids(ids, lines[:-2])
    line = fails(capsys, world, encoder, tmp_path, "--faiss", path, "--ids", ids)
    assert f"its last id is in line 77, but {path} has labels from 0 to 78" in line
    # Rows are numbered without gaps: there a blank line shifts what follows it.
    np.save(tmp_path / "items.npy", matrix)
    write_ids(ids, [*item_ids[:2], "", *item_ids[2:]])
    line = fails(capsys, world, encoder, tmp_path, "--embeddings", tmp_path / "items.npy", "--ids", ids)
    assert "ids.txt:3: is blank, but has to name vector 2 of" in line
    write_ids(ids, [*item_ids, ""])
    imported(world, encoder, tmp_path / "rows", embeddings=tmp_path / "items.npy", ids=ids)


@pytest.mark.parametrize("factory", ["PQ4x4", "SQ8", "IVF2,PQ4x4", "PCA12,Flat", "L2norm,SQ8"])
def test_codes_come_with_a_loud_warning(world, encoder, deployed, ids, tmp_path, factory):
    path = write_faiss(tmp_path / "deployed.faiss", deployed[0], factory)
    report = Reporter()
    index = imported(world, encoder, tmp_path / "index", report, faiss=path, ids=ids)
    assert any("reconstructions" in line and "--embeddings" in line for line in report.warnings)
    assert index.manifest.facts["imported"]["lossy"]
    truth = faiss.read_index(str(path))
    if hasattr(truth, "make_direct_map"):
        truth.make_direct_map()
    decoded = truth.reconstruct_n(0, N)
    decoded /= np.linalg.norm(decoded, axis=1, keepdims=True)
    assert np.allclose(index.embeddings, decoded, atol=1e-6)


def test_factory_measures_recall_and_keeps_search_parameters(world, encoder, tmp_path, capsys):
    command = [
        "index",
        "--data",
        str(world),
        "--model",
        str(encoder),
        "--device",
        "cpu",
        "--json",
        "--factory",
        "IVF4,Flat",
    ]
    recalls = []
    for name, more in (("one", []), ("all", ["--search-params", "nprobe=4,max_codes=1000"])):
        assert main([*command, *more, "--out", str(tmp_path / name)]) == 0
        captured = capsys.readouterr()
        recalls.append(json.loads(captured.out)["recall"]["recall"])
        assert f"IVF4,Flat: finds {recalls[-1]:.1%} of the exact top 40" in " ".join(captured.err.split())
    assert recalls[0] < 0.9 < recalls[1] == 1.0
    exact = open_index(tmp_path / "all")
    assert exact.manifest.facts["recall"] == {"k": 40, "recall": 1.0, "queries": 40}
    ivf = faiss.extract_index_ivf(exact.faiss_index)
    assert (ivf.nprobe, ivf.max_codes) == (4, 1000)  # of which faiss stores the first alone


def test_an_imported_faiss_index_is_searched_as_its_parameters_say(
    world, encoder, deployed, ids, tmp_path, capsys
):
    path = write_faiss(tmp_path / "deployed.faiss", deployed[0], "IVF8,Flat")
    found = []
    for more in ({}, {"search_params": "nprobe=8"}):
        out = tmp_path / f"index{len(found)}"
        index = imported(world, encoder, out, faiss=path, ids=ids, **more)
        found.append(index.manifest.facts["recall"]["recall"])
        assert faiss.extract_index_ivf(open_index(out).faiss_index).nprobe == (8 if more else 1)
    assert found[0] < found[1] == 1.0


def test_files_that_do_not_fit_are_named(world, encoder, deployed, ids, tmp_path, capsys):
    matrix, item_ids = deployed

    def refused(*arguments):
        return fails(capsys, world, encoder, tmp_path, *arguments)

    npy, fbin = tmp_path / "items.npy", tmp_path / "items.fbin"
    np.save(npy, matrix[:-1])
    assert f"ids.txt: {N} ids, but {npy} holds {N - 1} embeddings" in refused(
        "--embeddings", npy, "--ids", ids
    )
    np.save(npy, matrix)
    assert "--ids says which item each row is" in refused("--embeddings", npy)
    npy.write_bytes(npy.read_bytes()[:-5])
    assert "items.npy: not readable as .npy" in refused("--embeddings", npy, "--ids", ids)
    np.save(npy, matrix.astype(np.int32))
    assert "items.npy: holds int32" in refused("--embeddings", npy, "--ids", ids)
    np.save(npy, np.asfortranarray(matrix))
    assert "column by column" in refused("--embeddings", npy, "--ids", ids)
    np.save(npy, np.array([{}, {}], dtype=object), allow_pickle=True)
    assert "items.npy: not readable as .npy" in refused("--embeddings", npy, "--ids", ids)
    write_fbin(fbin, matrix, rows=N + 1)
    assert f"items.fbin: its header says {N + 1} x {D} float32" in refused("--embeddings", fbin, "--ids", ids)
    fbin.write_bytes(b"123")
    assert "items.fbin: no .fbin header" in refused("--embeddings", fbin, "--ids", ids)
    (tmp_path / "empty").mkdir()
    assert "holds no .npy or .fbin files" in refused("--embeddings", tmp_path / "empty", "--ids", ids)
    assert "no such file" in refused("--embeddings", tmp_path / "nowhere.npy", "--ids", ids)
    bad = matrix.copy()
    bad[17, 3] = np.nan
    np.save(npy, bad)
    assert "items.npy: row 17 holds values that are not finite" in refused("--embeddings", npy, "--ids", ids)
    np.save(npy, 2 * matrix)
    assert "items.npy: row 0 has length 2.0000, not 1" in refused("--embeddings", npy, "--ids", ids)
    np.save(npy, matrix[:, :8])
    assert "items.npy: 8 dimensions, but --model" in refused("--embeddings", npy, "--ids", ids)
    np.save(npy, matrix)
    write_ids(ids, [*item_ids[:-1], item_ids[0]])
    assert f"ids.txt: the id {item_ids[0]!r} repeats" in refused("--embeddings", npy, "--ids", ids)
    write_ids(ids, [*item_ids[:-1], "i99"])
    missing = item_ids[-1]
    line = refused("--embeddings", npy, "--ids", ids)
    assert "id 'i99' is not in the corpus" in line or f"item {missing!r} has no embedding" in line
    np.save(npy, np.concatenate([matrix, matrix[:1]]))
    write_ids(ids, [*item_ids, "zzz"])
    assert "ids.txt: id 'zzz' is not in the corpus" in refused("--embeddings", npy, "--ids", ids)
    np.save(npy, matrix[:-1])
    write_ids(ids, item_ids[:-1])
    assert f"item {missing!r} has no embedding" in refused("--embeddings", npy, "--ids", ids)
    ids.write_bytes(b"caf\xe9\n")
    assert "ids.txt:1: not UTF-8" in refused("--embeddings", npy, "--ids", ids)


def test_a_repeated_id_is_seen_across_stretches(world, encoder, deployed, tmp_path, monkeypatch, capsys):
    matrix, item_ids = deployed
    monkeypatch.setattr("novelret.deployed._IDS_AT_ONCE", 2)
    np.save(tmp_path / "items.npy", matrix)
    for repeated in sorted(item_ids)[1:5]:
        place, other = item_ids.index(repeated), sorted(item_ids)[-1]
        changed = [repeated if item == other else item for item in item_ids]
        assert changed.count(repeated) == 2, place
        ids = write_ids(tmp_path / "ids.txt", changed)
        line = fails(capsys, world, encoder, tmp_path, "--embeddings", tmp_path / "items.npy", "--ids", ids)
        assert f"the id {repeated!r} repeats" in line


def test_faiss_files_that_do_not_fit_are_named(world, encoder, deployed, ids, tmp_path, capsys):
    matrix = deployed[0]

    def refused(*arguments):
        return fails(capsys, world, encoder, tmp_path, *arguments)

    path = write_faiss(tmp_path / "deployed.faiss", matrix, "Flat", faiss.METRIC_L2)
    assert "faiss index of L2 distances, novelret compares inner products" in refused(
        "--faiss", path, "--ids", ids
    )
    path.write_bytes(b"not faiss at all")
    assert "deployed.faiss: not readable as a faiss index" in refused("--faiss", path, "--ids", ids)
    write_faiss(path, matrix, "IVF3,Flat")
    path.write_bytes(path.read_bytes()[:-200])
    assert "deployed.faiss: not readable as a faiss index" in refused("--faiss", path, "--ids", ids)
    write_faiss(path, matrix[:-2], "Flat")
    assert f"ids.txt: {N} ids, but {path} holds {N - 2} embeddings" in refused("--faiss", path, "--ids", ids)
    index = faiss.index_factory(D, "IVF3,Flat", faiss.METRIC_INNER_PRODUCT)
    index.train(matrix)
    index.add_with_ids(matrix, np.arange(N) + 5)
    faiss.write_index(index, str(path))
    assert f"its labels are not 0 to {N - 1}" in refused("--faiss", path, "--ids", ids)
    lists = faiss.OnDiskInvertedLists(3, 4 * D, str(tmp_path / "lists.ivfdata"))
    index = faiss.IndexIVFFlat(faiss.IndexFlatIP(D), D, 3, faiss.METRIC_INNER_PRODUCT)
    index.train(matrix)
    index.replace_invlists(lists)
    index.add(matrix)
    faiss.write_index(index, str(path))
    assert "its lists lie in another file" in refused("--faiss", path, "--ids", ids)
    write_faiss(path, np.tile(matrix, (4, 1)), "IVF3,PQ4x4fs")
    assert "cannot give its vectors back; pass them by --embeddings" in refused("--faiss", path, "--ids", ids)
    write_faiss(path, matrix, "Flat")
    assert "deployed.faiss (no --ids given): id '0' is not in the corpus" in refused(
        "--faiss", path
    )  # its labels are the ids, and no such items exist
    assert "--factory: a --faiss file is searched as it is" in refused(
        "--faiss", path, "--factory", "IVF2,Flat"
    )
    assert "give one" in refused("--faiss", path, "--embeddings", path)
    assert "--ids: names the rows" in refused("--ids", ids)
    assert "--search-params: belong to a --factory" in refused("--search-params", "nprobe=2")
    flat = ["--faiss", path, "--search-params", "nprobe=2"]
    assert "deployed.faiss is a flat index, which takes none" in refused(*flat)
    write_faiss(path, matrix, "IVF3,Flat")
    assert "nprobe=0: faiss does not take them for" in refused("--faiss", path, "--search-params", "nprobe=0")
    assert "--model is the query side; leave it out" in refused("--faiss", path, "--query-model", encoder)
    other = make_encoder(tmp_path / "other", dimension=8)
    assert "deployed.faiss: 16 dimensions, but --model" in fails(
        capsys, world, other, tmp_path, "--faiss", path, "--ids", ids
    )
    strange = faiss.read_index(str(path))
    strange.reset()
    strange.add_with_ids(matrix, 2 * np.arange(len(matrix)))
    strange.set_direct_map_type(faiss.DirectMap.Hashtable)
    faiss.write_index(strange, str(path))
    assert "its labels are not 0 to 39" in refused("--faiss", path, "--ids", ids)


def test_a_row_of_zeros_is_an_embedding_too(world, encoder, deployed, ids, tmp_path):
    matrix = deployed[0].copy()
    matrix[3] = 0
    np.save(tmp_path / "items.npy", matrix)
    index = imported(world, encoder, tmp_path / "index", embeddings=tmp_path / "items.npy", ids=ids)
    assert (np.linalg.norm(index.embeddings, axis=1) == 0).sum() == 1
