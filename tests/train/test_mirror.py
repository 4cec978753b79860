"""Items as training queries: when, which, and with what is known of them."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pyarrow.parquet as pq
import pytest

from novelret.artifacts import hash_texts
from novelret.cli import main
from novelret.data.split import load_split, make_split, plain_texts
from novelret.index import open_index
from novelret.label.labels import open_labels
from novelret.label.table import RELEVANT, UNKNOWN, make_table
from novelret.progress import Reporter
from novelret.train import batches, prepare
from novelret.train.config import LIST_OBJECTIVES, TrainConfig
from novelret.train.memorise import make_memory
from novelret.train.mirror import Mirror, find_mirror, goes_both_ways, reverse_verdicts, with_mirror
from novelret.train.rewards import load_reward
from novelret.train.states import BASE, FEEDBACK, POLICY, draw_batch, gather_material
from novelret.trained import MIRRORED, QUERIES, training_of
from tests.commands import fails, run
from tests.conftest import make_world, write_jsonl, write_qrels
from tests.rows import from_padded
from tests.train.conftest import SHORT
from tests.train.test_memory import same_weights
from tests.train.test_refit import facts_of

Q, N, L, DEPTH = 20, 60, 4, 12


@pytest.fixture
def rng():
    return np.random.default_rng(3)


def some_split(rng, own):
    """Queries that are items but for a few, each with some feedback."""
    queries, items = np.repeat(np.arange(len(own)), 4), rng.integers(0, N, 4 * len(own))
    kept = own[queries] != items
    ids = [f"i{row}" if row >= 0 else f"q{n}" for n, row in enumerate(own)]
    return make_split("train", ids, ["x"] * len(own), queries[kept], items[kept], from_padded(own[:, None]))


def some_labels(rng, own):
    queries, items = np.repeat(np.arange(len(own)), 15), rng.integers(0, N, 15 * len(own))
    kept = own[queries] != items
    return make_table(queries[kept], items[kept], rng.integers(-1, 2, kept.sum()), N)


@pytest.fixture
def own(rng):
    rows = rng.permutation(N)[:Q]
    rows[[4, 11]] = -1
    return rows


def some_material(rng, own):
    lists = np.stack([rng.permutation(N)[:DEPTH] for _ in own])
    material = gather_material(some_split(rng, own), lists, L, some_labels(rng, own), load_reward("eq7"))
    trust = rng.random(len(material.positives)).astype(np.float32)
    return replace(material, trust=trust, floor=0.25)


def some_mirror(rng, own, material):
    known = material.labels.relevant_and(material.split.feedback_queries, material.split.feedback_items)[1]
    rows = np.unique(known)[::2]
    none = np.empty(0, dtype=np.int64)
    split = make_split(
        "train", [f"i{row}" for row in rows], ["y"] * len(rows), none, none, from_padded(rows[:, None])
    )
    lists = np.stack([rng.permutation(N)[:DEPTH] for _ in rows])
    return Mirror(split, rows, own), lists


def test_reversed_feedback_is_counted_where_it_is_judged(rng, own):
    split, labels = some_split(rng, own), some_labels(rng, own)
    counts = [0, 0]
    for query, item in zip(split.feedback_queries, split.feedback_items, strict=True):
        for other in np.flatnonzero(own == item):
            if own[query] >= 0 and other != query:
                (verdict,) = labels.lookup(np.array([other]), own[query : query + 1])
                counts[0] += verdict == RELEVANT
                counts[1] += verdict != UNKNOWN
    assert reverse_verdicts(split, labels, own) == tuple(counts)
    assert counts[1] > counts[0] > 0


@pytest.mark.parametrize(
    ("relevant", "judged", "both"),
    [(0, 0, False), (3, 3, False), (4, 4, True), (0, 86, False), (58, 100, False), (60, 100, True)],
)
def test_relevance_goes_both_ways_where_most_of_it_surely_does(relevant, judged, both):
    assert goes_both_ways(relevant, judged) is both
    if judged:  # by hand (Wilson, 1927)
        z, share = 1.959964, relevant / judged
        middle = share + z * z / (2 * judged)
        width = z * np.sqrt(share * (1 - share) / judged + z * z / (4 * judged * judged))
        assert ((middle - width) / (1 + z * z / judged) > 0.5) == both


def test_what_is_known_of_items_is_what_queries_know_turned_round(rng, own):
    rows = np.flatnonzero(own % 3 != 0)  # of a larger split, in which the others are held back
    of_all = np.full(40, -1)
    of_all[rows * 2] = own[rows]
    material = some_material(rng, own[rows])
    mirror, lists = some_mirror(rng, of_all, material)
    grown = with_mirror(material, mirror, rows * 2, lists, lists[:, :L])

    count, split = len(rows), material.split
    feedback = set(zip(split.feedback_queries.tolist(), split.feedback_items.tolist(), strict=True))
    known = feedback | {
        (q, i)
        for q in range(count)
        for i in range(N)
        if material.labels.lookup(np.array([q]), np.array([i]))[0] == RELEVANT
    }
    place = {row: count + n for n, row in enumerate(mirror.rows.tolist())}
    trained = set(own[rows].tolist())
    turned = {
        (place[i], int(own[rows[q]])): (q, i)
        for q, i in known
        if i in place and i not in trained and own[rows[q]] >= 0
    }
    assert len(turned) > 20
    found = set(zip(grown.split.feedback_queries.tolist(), grown.split.feedback_items.tolist(), strict=True))
    assert found == feedback | {pair for pair, before in turned.items() if before in feedback}
    assert grown.split.query_ids == [*split.query_ids, *mirror.split.query_ids]
    ours, theirs = np.split(grown.positives, [len(material.positives)])
    assert (ours == material.positives).all()
    top = {n + count: set(row[:L].tolist()) for n, row in enumerate(lists)}
    assert set(map(tuple, theirs.tolist())) == {(m, z) for m, z in turned if z not in top[m]}
    before = np.array([turned[m, z] for m, z in theirs.tolist()])
    assert (grown.trust == np.concatenate([material.trust, material.trust_of(*before.T)])).all()
    assert len(set(grown.trust[len(ours) :].tolist())) > 5
    assert (grown.base_rows[count:] == lists).all()
    assert grown.split.excluded.rows[-len(mirror.rows) :].tolist() == mirror.rows.tolist()
    assert (grown.real, grown.floor) == (count, 0.25)


def test_half_of_the_passes_are_of_items_and_policy_states_are_of_queries(rng, own):
    material = some_material(rng, own)
    mirror, lists = some_mirror(rng, own, material)
    grown = with_mirror(material, mirror, np.arange(Q), lists, lists[:, :L])
    settings = {
        "batch_size": 24,
        "base_depth": L,
        "depth": DEPTH,
        "labels": "x",
        "alpha": 0.25,
        "gamma": 0.25,
    }
    for draw in ("queries", "states"):
        for step in range(5):
            batch = draw_batch(grown, TrainConfig("data", "index", draw=draw, **settings), step)
            passes = {s: np.unique(batch.passes[batch.sources == s]) for s in (FEEDBACK, BASE, POLICY)}
            mirrored = {s: (batch.queries_of(passes[s]) >= Q).sum() for s in passes}
            assert mirrored == {FEEDBACK: 3, BASE: 6, POLICY: 0}
            alone = draw_batch(material, TrainConfig("data", "index", draw=draw, **settings), step)
            assert (alone.queries < Q).all()
    of_lists = TrainConfig("data", "index", **settings | {"objective": LIST_OBJECTIVES[0], "alpha": 0.0})
    batch = draw_batch(grown, of_lists, 0)
    assert (batch.queries[batch.sources == POLICY] >= Q).sum() == 9


@pytest.fixture(scope="module")
def mutual(tmp_path_factory, encoder):
    """The tiny world with items for queries: what goes with an item is mutual. Data, INDEX and LABELS."""
    folder = tmp_path_factory.mktemp("mutual")
    data = make_world(folder / "data")
    for part in ("qrels/train.tsv", "qrels/test.tsv", "judgements.tsv"):
        text = (data / part).read_text()
        (data / part).write_text("query" + text.removeprefix("query").replace("q", "i"))
    lines = [json.loads(line) for line in (data / "queries.jsonl").read_text().splitlines()]
    # One of them has no text of a query of its own.
    write_jsonl(
        data / "queries.jsonl",
        [line | {"_id": "i" + line["_id"][1:]} for line in lines if line["_id"] != "q39"],
    )
    test = data / "qrels" / "test.tsv"
    write_qrels(test, [pair for pair in pairs_of(test) if pair[0] != "i39"])
    made(["index", "--data", data, "--model", encoder, "--out", folder / "index"])
    label(data, folder)
    return folder


def pairs_of(path):
    return [tuple(line.split("\t")) for line in path.read_text().splitlines()[1:]]


def label(data, folder, depth=30):
    command = ["label", "--data", data, "--index", folder / "index", "--judge", f"file:{data}/judgements.tsv",
               "--missing", "irrelevant", "--base-depth", 3, "--depth", depth, "--from", "base-novel", "--from", "base-top",
               "--out", folder / "labels"]  # fmt: skip
    made(command)


def made(command):
    assert main([str(part) for part in [*command, "--quiet"]]) == 0


def train(capsys, folder, out, *more):
    """What a training says."""
    code, _, said = run(
        capsys, "train", "--data", folder / "data", "--index", folder / "index", "--labels", folder / "labels",
        *SHORT, "--validation-fraction", 0, "--out", out, *more,
    )  # fmt: skip
    assert code == 0, said
    return said


@pytest.mark.parametrize("tune", ["memory", "full"])
def test_items_are_trained_on_where_judged_feedback_shows_that_relevance_is_mutual(
    mutual, capsys, tmp_path, tune
):
    for mirror in ("auto", "always", "never"):
        said = train(capsys, mutual, tmp_path / mirror, "--tune", tune, "--mirror", mirror)
        assert ("items as queries, too" in said) is (mirror != "never")
        assert ("go both ways" in said) is (mirror == "auto")
        assert (facts_of(tmp_path / mirror)["items_as_queries"] > 10) is (mirror != "never")
        card = (tmp_path / mirror / "README.md").read_text()
        assert ("items as queries" in card) is (mirror != "never")
    assert same_weights(tmp_path / "auto", tmp_path / "always")
    assert not same_weights(tmp_path / "auto", tmp_path / "never")
    # An evaluation on these items says so.
    for mirror in ("auto", "never"):
        words = ["eval", "--data", mutual / "data", "--index", mutual / "index", "--split", "test", "--k", 3,
                 "--base-depth", 3, "--model", f"m={tmp_path / mirror}", "--out", tmp_path / f"r-{mirror}"]  # fmt: skip
        code, _, err = run(capsys, *words)
        assert (code, "queries as items, by pairs known the other way round" in err) == (0, mirror == "auto")


@pytest.mark.parametrize("gamma", [0, 0.5, 1])
def test_those_that_stood_in_for_queries_are_known_and_no_others(
    mutual, capsys, tmp_path, monkeypatch, gamma
):
    """Most queries are held back, whose pairs are not turned round where nothing is trained anew."""
    drawn = set()

    def keep(material, config, step):
        batch = draw_batch(material, config, step)
        drawn.update(material.split.query_texts[row] for row in batch.queries if row >= material.real)
        return batch

    monkeypatch.setattr(batches, "draw_batch", keep)
    train(capsys, mutual, tmp_path / "model", "--mirror", "always", "--gamma", gamma, "--steps", 40,
          "--validation-fraction", 0.7, "--no-refit")  # fmt: skip
    training = training_of(tmp_path / "model")
    assert set(training.hashes(MIRRORED)) == set(hash_texts(plain_texts(sorted(drawn))))
    assert 0 < len(drawn) < facts_of(tmp_path / "model")["items_as_queries"]
    index = open_index(mutual / "index")
    queries = load_split(str(mutual / "data"), "train", index.catalog).query_texts
    assert set(training.hashes(QUERIES)) == set(hash_texts(plain_texts(queries)))  # held back or not


def test_a_memory_knows_that_a_query_goes_with_its_items_where_they_are_trained_on(
    mutual, capsys, tmp_path, monkeypatch
):
    given = []

    def keep(*parts):
        given.append(parts[-1])
        return make_memory(*parts)

    monkeypatch.setattr(prepare, "make_memory", keep)
    for mirror in ("never", "auto"):
        train(capsys, mutual, tmp_path / mirror, "--mirror", mirror)
    catalog = open_index(mutual / "index").catalog
    split = load_split(str(mutual / "data"), "train", catalog)
    without, rows = given
    assert without is None
    assert rows.tolist() == catalog.rows_of(split.query_ids).tolist()
    assert (rows >= 0).all()


def test_a_judge_of_policy_states_is_asked_about_the_queries_themselves(mutual, capsys, tmp_path):
    judgements = mutual / "data" / "judgements.tsv"
    folder = tmp_path / "few"  # labels, which leave most of what is drawn to the judge
    folder.mkdir()
    for name in ("data", "index"):
        (folder / name).symlink_to(mutual / name)
    label(folder / "data", folder, depth=5)
    train(capsys, folder, tmp_path / "model", "--mirror", "always", "--alpha", 0.5, "--gamma", 0.25, "--judge", f"file:{judgements}",
          "--missing", "irrelevant")  # fmt: skip
    assert facts_of(tmp_path / "model")["items_as_queries"] > 10
    relevant = {pair[:2] for pair in pairs_of(judgements) if float(pair[2]) > 0}
    rows = pq.read_table(tmp_path / "model" / "judgements.parquet").to_pylist()
    said = {(row["query_id"], row["item_id"]): row["verdict"] for row in rows}
    assert {pair: int(pair in relevant) for pair in said} == said
    assert 1 in said.values()


def test_they_are_not_where_it_goes_one_way(mutual, capsys, tmp_path):
    folder = tmp_path / "world"
    (folder / "data").mkdir(parents=True)
    for path in (mutual / "data").iterdir():
        (folder / "data" / path.name).symlink_to(path)
    (folder / "index").symlink_to(mutual / "index")
    (folder / "data" / "judgements.tsv").unlink()
    (folder / "data" / "qrels").unlink()
    for part in ("judgements.tsv", "qrels/train.tsv", "qrels/test.tsv"):
        pairs = pairs_of(mutual / "data" / part)
        write_qrels(folder / "data" / part, [pair for pair in pairs if pair[0] < pair[1]])
    label(folder / "data", folder)
    assert "items as queries" not in train(capsys, folder, tmp_path / "auto")
    assert facts_of(tmp_path / "auto")["items_as_queries"] == 0
    train(capsys, folder, tmp_path / "never", "--mirror", "never")
    assert same_weights(tmp_path / "auto", tmp_path / "never")


def test_plain_supervised_training_sees_no_judgement_of_items_either(mutual, capsys, tmp_path):
    assert "items as queries" not in train(capsys, mutual, tmp_path / "auto", "--objective", "supervised")
    for name, labels in (("with", ("--labels", mutual / "labels")), ("without", ())):
        command = ("train", "--data", mutual / "data", "--index", mutual / "index", *labels, *SHORT,
                   "--objective", "supervised", "--mirror", "always", "--validation-fraction", 0,
                   "--out", tmp_path / name)  # fmt: skip
        code, _, said = run(capsys, *command)
        assert (code, "--mirror always" in said) == (0, True)
    assert same_weights(tmp_path / "with", tmp_path / "without")


def test_queries_that_are_no_items_have_none(world, index_folder, labels, capsys, tmp_path):
    command = ("train", "--data", world, "--index", index_folder, "--labels", labels, *SHORT)
    code, _, said = run(capsys, *command, "--out", tmp_path / "auto")
    assert (code, "items as queries" in said) == (0, False)
    said = fails(capsys, *command, "--mirror", "always", "--out", tmp_path / "always")
    assert said.startswith("error: --mirror always: no item")
    said = fails(capsys, *command, "--mirror", "perhaps", "--out", tmp_path / "x")
    assert "--mirror perhaps: unknown; choose from auto, always, never" in said


def test_an_item_is_asked_for_as_the_queries_file_has_it_and_no_more_serve_than_are_drawn(mutual):
    index = open_index(mutual / "index")
    data = str(mutual / "data")
    split = load_split(data, "train", index.catalog)
    table = open_labels(mutual / "labels", index).table(split, index.catalog)
    config = TrainConfig(data, str(mutual / "index"), labels=str(mutual / "labels"))
    mirror = find_mirror(config, index.catalog, split, table, Reporter())
    known = table.relevant_and(split.feedback_queries, split.feedback_items)[1]
    assert mirror.rows.tolist() == sorted(set(known.tolist()))
    assert mirror.split.query_ids == index.catalog.ids_at(mirror.rows)
    texts = dict(zip(mirror.split.query_ids, mirror.split.query_texts, strict=True))
    assert texts.pop("i39") == "black rug"
    assert all(text.startswith("buy ") for text in texts.values())
    few = TrainConfig(data, str(mutual / "index"), labels=str(mutual / "labels"), steps=2, batch_size=9)
    drawn = find_mirror(few, index.catalog, split, table, Reporter())
    assert len(drawn.rows) == 9
    assert set(drawn.rows.tolist()) < set(mirror.rows.tolist())
