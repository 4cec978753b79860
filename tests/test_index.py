"""Building an index: resumed after a kill, through faiss, in float16, with another query side."""

import os
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from threading import Event

import faiss
import numpy as np
import pytest
from sentence_transformers import SentenceTransformer

from novelret import encode
from novelret import index as index_module
from novelret.build import IndexConfig, build_index, make_matrix
from novelret.cache import _held
from novelret.data.source import fingerprint_part
from novelret.data.split import load_split
from novelret.errors import UserError
from novelret.index import base_lists, base_query_embeddings, open_index
from novelret.progress import Reporter
from tests.conftest import make_encoder


def build(world, encoder, out, **settings):
    return build_index(IndexConfig(str(world), str(encoder), device="cpu", **settings), out)


def test_goes_on_from_the_last_chunk_after_a_kill(world, encoder, index_folder, tmp_path, monkeypatch):
    real, calls = encode.encode_items, []

    def dies(model, texts, batch_size):
        calls.append(len(texts))
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(model, texts, batch_size)

    monkeypatch.setattr(encode, "encode_items", dies)
    with pytest.raises(KeyboardInterrupt):
        build(world, encoder, tmp_path / "index", batch_size=1)
    assert not (tmp_path / "index").exists()
    index = build(world, encoder, tmp_path / "index", batch_size=1)
    assert calls == [32, 8, 8]  # the first 32 items are not encoded again
    assert np.allclose(index.embeddings, open_index(index_folder).embeddings, atol=1e-6)


def test_a_kill_before_the_index_has_its_name_loses_no_embeddings(world, encoder, tmp_path, monkeypatch):
    def dies(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("novelret.build.write_manifest", dies)
        with pytest.raises(KeyboardInterrupt):
            build(world, encoder, tmp_path / "index")
    monkeypatch.setattr(encode, "encode_items", lambda *_: pytest.fail("encoded again"))
    index = build(world, encoder, tmp_path / "index")
    assert len(index) == 40
    assert not (index.folder / "progress.json").exists()


def test_float16_halves_the_matrix_and_keeps_the_lists(world, encoder, index_folder, tmp_path):
    half, whole = build(world, encoder, tmp_path / "half", dtype="float16"), open_index(index_folder)
    assert half.embeddings.dtype == np.float16
    split = load_split(str(world), "train", whole.catalog)
    a, b = base_lists(half, split, 5)[0], base_lists(whole, split, 5)[0]
    assert (a == b).mean() > 0.9


@pytest.mark.parametrize("factory", ["IVF2,Flat", "HNSW8"])
def test_a_faiss_factory_is_searched(world, encoder, index_folder, tmp_path, factory):
    index, exact = build(world, encoder, tmp_path / "index", factory=factory), open_index(index_folder)
    split = load_split(str(world), "train", exact.catalog)
    rows, scores = base_lists(index, split, 3)
    found = (rows >= 0) & (rows == base_lists(exact, split, 3)[0])
    assert found.mean() > 0.4  # approximate, but the same items with the same scores
    assert np.allclose(scores[found], base_lists(exact, split, 3)[1][found], atol=2e-6)


@pytest.mark.parametrize(
    "wrong",
    [
        {"factory": "IFV2,Flat"},
        {"factory": "IDMap,Flat"},
        {"factory": "IVF0,Flat"},
        {"factory": "HNSW8_PQ4", "search_params": None},  # faiss makes an index of L2 distances of it
        {"factory": "PCA8,HNSW8_PQ4", "search_params": None},
        {"search_params": "nprobe=many"},
        {"search_params": "nprobe=0"},
        {"search_params": "nprobe=-3"},
    ],
)
def test_what_faiss_does_not_take_is_refused_before_anything_is_encoded(
    world, encoder, tmp_path, monkeypatch, wrong
):
    monkeypatch.setattr(encode, "encode_items", lambda *_: pytest.fail("encoded"))
    with pytest.raises(UserError, match=r"faiss does not|leave it out|holds a 0|Euclidean distances alone"):
        build(world, encoder, tmp_path / "index", **({"factory": "IVF2,Flat"} | wrong))
    assert not (tmp_path / "index.partial").exists()


def test_an_index_by_distances_that_lies_there_already_is_refused(world, encoder, tmp_path):
    index = build(world, encoder, tmp_path / "index", factory="HNSW8")
    wrong = faiss.index_factory(16, "HNSW8", faiss.METRIC_L2)
    wrong.add(np.array(index.embeddings))
    faiss.write_index(wrong, str(index.folder / "items.faiss"))
    with pytest.raises(UserError, match="ranks by Euclidean distances instead of inner products"):
        open_index(tmp_path / "index").search(np.ones((1, 16), np.float32), 3)


def test_what_overflows_in_float16_is_refused_where_it_is_encoded(world, encoder, tmp_path, monkeypatch):
    real = encode.encode_items
    monkeypatch.setattr(encode, "encode_items", lambda *given: real(*given) * np.float32(1e6))
    with pytest.raises(UserError, match=r"items 0 to .*: embedding 0 is not finite; .* overflows in float16"):
        build(world, encoder, tmp_path / "index", dtype="float16")


def test_where_no_place_can_be_reserved_zeros_are_written(tmp_path, monkeypatch):
    """As on macOS."""
    monkeypatch.delattr(os, "posix_fallocate", raising=False)
    monkeypatch.setattr("novelret.build._ZEROS", 100)
    matrix = make_matrix(tmp_path / "m.npy", (7, 5), "float32")
    assert (tmp_path / "m.npy").stat().st_blocks * 512 >= matrix.nbytes
    matrix[:] = 1
    matrix.flush()
    assert np.array_equal(np.load(tmp_path / "m.npy"), np.ones((7, 5), np.float32))


@pytest.mark.parametrize("queries", [None, "", "{}\n"])
def test_a_catalog_without_queries_is_indexed_by_faiss(world, encoder, tmp_path, queries):
    shutil.copytree(world, tmp_path / "data")
    (tmp_path / "data" / "queries.jsonl").unlink()
    if queries is not None:
        (tmp_path / "data" / "queries.jsonl").write_text(queries)
    index = build(tmp_path / "data", encoder, tmp_path / "index", factory="HNSW8")
    assert index.faiss_index.ntotal == 40
    assert "recall" not in index.manifest.facts


def test_what_faiss_does_not_add_to_is_the_users_error(world, encoder, tmp_path):
    with pytest.raises(UserError, match=r"takes no items .* the embeddings are kept"):
        build(world, encoder, tmp_path / "index", factory="PCA8,IDMap,Flat")


def test_another_factory_takes_what_is_encoded(world, encoder, tmp_path, monkeypatch):
    with pytest.raises(UserError, match="40 items are too few to train it; give another"):
        build(world, encoder, tmp_path / "index", factory="IVF64,Flat")
    real = build(world, encoder, tmp_path / "whole", factory="IVF2,Flat")
    monkeypatch.setattr(encode, "encode_items", lambda *_: pytest.fail("encoded again"))
    index = build(world, encoder, tmp_path / "index", factory="IVF2,Flat")
    assert index.manifest.fingerprint == real.manifest.fingerprint


@pytest.mark.parametrize("distance", ["euclidean", "manhattan"])
def test_what_compares_by_a_distance_is_refused(world, encoder, tmp_path, distance):
    other = tmp_path / "other"
    SentenceTransformer(str(encoder), device="cpu", similarity_fn_name=distance).save(str(other))
    for model, query_model in ((other, None), (encoder, str(other))):
        with pytest.raises(UserError, match=f"other: compares by {distance} distance"):
            build(world, model, tmp_path / "index", query_model=query_model)


def test_another_query_side_is_kept(world, encoder, tmp_path):
    other = make_encoder(tmp_path / "other", seed=5)
    index = build(world, encoder, tmp_path / "index", query_model=str(other))
    assert encode.fingerprint_encoder(index.query_encoder()) == encode.fingerprint_encoder(
        encode.load_encoder(other)
    )
    items = encode.load_encoder(index.folder / "item_encoder")
    assert np.allclose(
        encode.encode_items(items, index.catalog.texts_at([7]), 1), index.embeddings[7], atol=1e-6
    )


def test_whatever_decides_an_embedding_is_part_of_an_encoders_identity(encoder):
    def changed(change):
        model = encode.load_encoder(encoder)
        change(model)
        return encode.fingerprint_encoder(model)

    def shorten(model):
        model.max_seq_length = 3

    same = changed(lambda model: encode.encode_queries(model, ["buy red", "buy"]))
    others = [
        changed(lambda model: model.prompts.update(query="q: ")),
        changed(lambda model: setattr(model[1], "pooling_mode", "cls")),
        changed(lambda model: setattr(model[0].model.config, "hidden_act", "relu")),
        changed(lambda model: model.tokenizer.add_tokens(["blueish"])),
        changed(lambda model: model[0].model.pooler.dense.bias.data.add_(1)),
        changed(shorten),
        changed(lambda model: setattr(model, "similarity_fn_name", "dot")),  # whether it is normalised
    ]
    assert same == encode.fingerprint_encoder(encode.load_encoder(encoder))
    assert len({same, *others}) == 8


def test_a_corpus_that_nobody_touched_is_hashed_once(world, encoder, tmp_path, monkeypatch):
    data = shutil.copytree(world, tmp_path / "data")
    folder = tmp_path / "index"
    build(data, encoder, folder)
    hashed = []

    def counted(of, part):
        hashed.append(part)
        return fingerprint_part(of, part)

    monkeypatch.setattr(index_module, "fingerprint_part", counted)
    monkeypatch.setattr(index_module, "_SETTLED", 1e9)
    open_index(folder, str(data))
    assert not (folder / "cache" / "corpus.json").exists()  # written to just now, it may be so again
    monkeypatch.setattr(index_module, "_SETTLED", -1.0)
    for _ in range(3):
        open_index(folder, str(data))
    assert len(hashed) == 2
    (folder / "cache" / "corpus.json").write_text("[broken")
    open_index(folder, str(data))
    assert len(hashed) == 3
    corpus = data / "corpus.jsonl"
    before = corpus.stat()
    corpus.write_bytes(corpus.read_bytes()[::-1])  # as long as before, and its time set back
    os.utime(corpus, ns=(before.st_atime_ns, before.st_mtime_ns))
    with pytest.raises(UserError, match="its corpus is not the one"):
        open_index(folder, str(data))


def test_base_lists_are_searched_once(world, encoder, tmp_path, monkeypatch):
    index = build(world, encoder, tmp_path / "index")
    split = load_split(str(world), "train", index.catalog)
    first = base_lists(index, split, 12)
    monkeypatch.setattr("novelret.index.search_exact", lambda *_, **__: pytest.fail("searched again"))
    again = base_lists(index, split, 5)
    assert (again[0] == first[0][:, :5]).all()
    assert (again[1] == first[1][:, :5]).all()


def test_more_feedback_leaves_the_lists_as_they_are(world, encoder, tmp_path, monkeypatch):
    data = tmp_path / "data"
    shutil.copytree(world, data)
    index = build_index(IndexConfig(str(data), str(encoder), device="cpu"), tmp_path / "index")
    before = base_lists(index, load_split(str(data), "train", index.catalog), 7)
    lines = (data / "qrels" / "train.tsv").read_text().splitlines(keepends=True)
    (data / "qrels" / "train.tsv").write_text("".join(lines[:-1]))
    split = load_split(str(data), "train", index.catalog)
    monkeypatch.setattr(index_module, "embed_queries", None)  # neither embedded nor searched again
    assert np.array_equal(base_lists(index, split, 7)[0], before[0])
    assert len(list((index.folder / "cache").iterdir())) == 1
    # What is left out changes them.
    (data / "excluded").mkdir()
    (data / "excluded" / "train.tsv").write_text(
        f"query-id\tcorpus-id\tscore\n{split.query_ids[0]}\ti00\t1\n"
    )
    other = load_split(str(data), "train", index.catalog)
    assert other.searched != split.searched


def test_what_a_kill_left_in_the_cache_is_passed_over(world, encoder, tmp_path):
    index = build(world, encoder, tmp_path / "index")
    split = load_split(str(world), "train", index.catalog)
    first = base_lists(index, split, 12)
    (cache,) = (index.folder / "cache").iterdir()
    dead = subprocess.Popen(["true"])
    dead.wait()
    names = (f"rows-99.npy.{dead.pid}.tmp", f"queries.npy.{os.getpid()}.tmp", "rows-99.tmp.npy", "rows-.npy")
    for name in names:
        (cache / name).write_bytes(b"half")
    assert np.array_equal(base_lists(index, split, 5)[0], first[0][:, :5])
    base_lists(index, split, 13)  # what a dead process left is cleared away where something is written
    assert [(cache / name).exists() for name in names] == [False, True, True, True]


def test_lists_go_on_after_a_kill(world, encoder, tmp_path, monkeypatch):
    index = build(world, encoder, tmp_path / "index")
    split = load_split(str(world), "train", index.catalog)
    rows, scores = base_lists(index, split, 7)
    (cache,) = (index.folder / "cache").iterdir()
    for path in cache.glob("*-7.npy"):
        path.unlink()
    monkeypatch.setattr("novelret.index._QUERIES_ON_CPU", 3)
    real, searched = index_module.search_exact, []

    def dies_at_the_third(queries, *arguments, **settings):
        searched.append(len(queries))
        if len(searched) == 3:
            raise KeyboardInterrupt
        return real(queries, *arguments, **settings)

    monkeypatch.setattr(index_module, "search_exact", dies_at_the_third)
    with pytest.raises(KeyboardInterrupt):
        base_lists(index, split, 7)
    (partial,) = cache.glob("scores-*.partial")
    partial.write_bytes(partial.read_bytes()[:-60])  # half of a list does not count
    again, scores_again = base_lists(index, split, 7)
    assert searched == [3, 3, 3] + [3] * 5 + [1]  # of twenty queries the first four were kept
    assert np.array_equal(again, rows)
    assert np.array_equal(scores_again, scores)
    assert sorted(path.name for path in cache.iterdir()) == ["queries.npy", "rows-7.npy", "scores-7.npy"]


def test_processes_wait_for_the_one_that_searches(world, encoder, tmp_path, monkeypatch):
    index = build(world, encoder, tmp_path / "index")
    split = load_split(str(world), "train", index.catalog)
    real, searched, notes = index_module.search_exact, [], []
    second = ThreadPoolExecutor(1)
    waiting = Event()

    class Told(Reporter):
        def note(self, text):
            notes.append(text)
            waiting.set()

    def begins_another(*arguments, **settings):
        if not searched:
            searched.append(second.submit(base_lists, index, split, 7, report=Told()))
            waiting.wait(30)
        else:
            searched.append("again")
        return real(*arguments, **settings)

    monkeypatch.setattr(index_module, "search_exact", begins_another)
    rows, _ = base_lists(index, split, 7)
    assert np.array_equal(searched[0].result()[0], rows)
    assert len(searched) == 1
    assert "waiting" in notes[0]


def test_a_file_that_was_removed_while_it_was_waited_for_is_made_anew(tmp_path):
    path, waiting = tmp_path / "rows-7.npy.partial", Event()

    class Told(Reporter):
        def note(self, _):
            waiting.set()

    def take():
        with _held(path, Told()) as file:
            return os.path.samestat(os.fstat(file.fileno()), path.stat())

    with ThreadPoolExecutor(1) as second:
        with _held(path, Reporter()):
            taken = second.submit(take)
            assert waiting.wait(30)
            path.unlink()  # a full disk
        assert taken.result(30)


@pytest.mark.parametrize("writable", [True, False])
def test_lists_found_part_by_part_are_the_same(world, encoder, tmp_path, monkeypatch, writable):
    index = build(world, encoder, tmp_path / "index")
    split = load_split(str(world), "train", index.catalog)
    rows, scores = base_lists(index, split, 7)
    shutil.rmtree(index.folder / "cache")
    monkeypatch.setattr("novelret.index._QUERIES_ON_CPU", 3)
    if not writable:
        (index.folder / "cache").write_text("in the way")
    again, scores_again = base_lists(index, split, 7)
    assert np.array_equal(again, rows)
    assert np.array_equal(scores_again, scores)
    assert (index.folder / "cache").is_dir() == writable
    # What the cache has no room for is held by the run, which neither searches nor encodes it again.
    for name in ("search", "query_encoder"):
        monkeypatch.setattr(type(index), name, None)
    for depth in (7, 4):
        assert np.array_equal(base_lists(index, split, depth)[0], rows[:, :depth])
    assert len(base_query_embeddings(index, split)) == len(split)


def test_no_query_has_an_embedding_of_the_right_width(encoder):
    """As in a process that no held-back query falls to."""
    model = encode.load_encoder(encoder)
    assert encode.encode_queries(model, []).shape == (0, model.get_embedding_dimension())


def test_mended_data_may_be_indexed_where_broken_data_failed(world, encoder, tmp_path):
    data = tmp_path / "data"
    data.mkdir()
    lines = (world / "corpus.jsonl").read_text()
    (data / "corpus.jsonl").write_text(lines + "{}\n")
    with pytest.raises(UserError, match="no _id"):
        build(data, encoder, tmp_path / "index")
    (data / "corpus.jsonl").write_text(lines)
    assert len(build(data, encoder, tmp_path / "index")) == 40


def test_lists_that_depend_on_how_many_are_asked_for_are_searched_as_deep(world, encoder, tmp_path):
    """An index that ranks anew as many candidates as are asked for finds better ones when asked for more."""
    config = IndexConfig(str(world), str(encoder), factory="PCA2,SQ4,RFlat", device="cpu")
    index = build_index(config, tmp_path / "index")
    split = load_split(str(world), "train", index.catalog)
    deep, _ = base_lists(index, split, 12)
    lists, _ = base_lists(index, split, 4)
    searched, _ = index.search(base_query_embeddings(index, split), 4, split.excluded)
    assert (lists == searched).all()
    assert (lists != deep[:, :4]).any()
    assert (base_lists(index, split, 12)[0] == deep).all()
