"""An embedding API as the query side: cached, batched, only what stands behind it tuned, its faults one line each."""

from __future__ import annotations

import hashlib
import json
import re

import numpy as np
import pytest
import torch
from sentence_transformers.base.modules import Dense, Normalize
from torch.nn.functional import normalize

from novelret import encode
from novelret.cli import main
from novelret.embedding_api import ApiEmbedding, _key, embed_texts
from novelret.errors import UserError
from novelret.index import open_index
from novelret.memory import read_memory
from novelret.train import prepare
from novelret.train.memorise import make_memory
from tests import commands
from tests.loopback import LoopbackJudge, send

D = 24


def embedding(text: str, dimension: int = D) -> list[float]:
    """Words add up, so texts that share one are similar."""
    vector = np.zeros(dimension)
    for word in text.split():
        seed = int.from_bytes(hashlib.blake2b(word.encode(), digest_size=4).digest(), "big")
        vector += np.random.default_rng(seed).standard_normal(dimension)
    return (vector / np.linalg.norm(vector)).tolist()


class LoopbackEmbeddings(LoopbackJudge):
    """Speaks /v1/embeddings; `dimension` may be changed to play an endpoint whose model was exchanged."""

    def __init__(self, faults: list[str] | None = None, dimension: int = D) -> None:
        super().__init__(faults)
        self.dimension = dimension
        self.short = False
        self.longest: int | None = None  # characters of a text; with a longer one a request is refused

    def answer(self, request, body, fault) -> None:
        if fault is not None:
            super().answer(request, {"messages": [{"content": '"a" "b"'}]}, fault)
            return
        if self.longest is not None and max(map(len, body["input"])) > self.longest:
            send(request, 400, json.dumps({"error": {"message": "maximum context length exceeded"}}))
            return
        with self.lock:
            self.billed.update(body["input"])
        dimension = body.get("dimensions", self.dimension)
        data = [
            {"object": "embedding", "index": n, "embedding": embedding(text, dimension)}
            for n, text in enumerate(body["input"])
        ]
        if self.short:
            data.pop()
        data.reverse()  # the protocol orders by index, not by place
        usage = {"prompt_tokens": 1, "total_tokens": 1}
        send(
            request, 200, json.dumps({"object": "list", "data": data, "model": body["model"], "usage": usage})
        )


@pytest.fixture
def api(monkeypatch, tmp_path):
    with LoopbackEmbeddings() as server:
        monkeypatch.setenv("OPENAI_BASE_URL", server.url)
        monkeypatch.setenv("OPENAI_API_KEY", "sk-secret-of-the-test")
        monkeypatch.setenv("NOVELRET_EMBEDDINGS", str(tmp_path / "cache" / "embeddings.sqlite"))
        monkeypatch.setattr("novelret.embedding_api._RETRIES", 2)
        yield server


def fails(capsys, *arguments) -> str:
    """The one line of a user's error, which never shows the key."""
    said = commands.fails(capsys, *arguments)
    assert "sk-secret" not in said
    return said


def test_texts_are_asked_for_once_in_batches(api, monkeypatch):
    monkeypatch.setattr("novelret.embedding_api._AT_ONCE", 7)
    texts = [f"text {n}" for n in range(40)] + ["text 3"]
    found = embed_texts(texts, "m", None, None)
    assert np.allclose(found, [embedding(text) for text in texts], atol=1e-6)
    assert len(api.seen) == 6
    assert set(api.billed.values()) == {1}
    again = embed_texts([*texts[::-1], "new"], "m", None, D)
    assert np.array_equal(again[:-1], found[::-1])
    assert len(api.seen) == 7
    embed_texts(texts, "another model", None, None)
    assert len(api.seen) == 13  # another model's embeddings are others


def test_other_credentials_in_the_url_are_the_same_endpoint(api, monkeypatch):
    embed_texts(["a text"], "m", None, None)
    monkeypatch.setenv("OPENAI_BASE_URL", api.url.replace("http://", "http://user:rotated@"))
    embed_texts(["a text"], "m", None, None)
    assert set(api.billed.values()) == {1}
    keys = set()
    for url in (
        "",
        "https://api.openai.com/v1",
        "https://api.openai.com/v1/",
        "https://u:p@api.openai.com/v1",
        "https://api.openai.com/v1/ \n",
    ):
        monkeypatch.setenv("OPENAI_BASE_URL", url)
        keys.add(_key("m", None, "a text"))
    assert len(keys) == 1


def test_what_came_before_a_failure_is_kept(api, monkeypatch):
    monkeypatch.setattr("novelret.embedding_api._AT_ONCE", 5)
    monkeypatch.setattr("novelret.embedding_api._CONCURRENCY", 1)
    api.faults.extend([None, None, "401"])
    texts = [f"text {n}" for n in range(20)]
    with pytest.raises(UserError, match=r"openai:m: .*Incorrect API key"):
        embed_texts(texts, "m", None, None)
    billed = sum(api.billed.values())
    assert billed >= 10
    embed_texts(texts, "m", None, None)
    assert set(api.billed.values()) == {1}


def test_a_text_that_is_refused_is_named_and_the_others_are_kept(api, monkeypatch):
    monkeypatch.setattr("novelret.embedding_api._CONCURRENCY", 1)
    api.longest = 100
    texts = [f"text {n}" for n in range(40)]
    too_long = [*texts[:30], "a tale without an end " * 10, *texts[30:]]
    for _ in range(2):
        with pytest.raises(UserError, match="refuses the text that begins 'a tale without an end") as caught:
            embed_texts(too_long, "m", None, None)
        assert "maximum context length exceeded" in str(caught.value)
        assert "run the same command again" not in str(caught.value)
    assert len(api.seen) < 20
    assert len(api.billed) >= 30
    assert embed_texts(texts, "m", None, None).shape == (40, D)
    assert set(api.billed.values()) == {1}


def test_only_faults_that_pass_ask_to_run_again(api):
    for fault, passes in (("401", False), ("500", True)):
        api.faults.extend([fault] * 3)
        with pytest.raises(UserError) as caught:
            embed_texts(["a text"], "m", None, None)
        assert ("run the same command again" in str(caught.value)) == passes
        api.faults.clear()


def test_keys_are_checked_and_no_secret_is_told(api, world, tmp_path, capsys, monkeypatch):
    index = ["index", "--data", world, "--model", "openai:m", "--out", tmp_path / "index"]
    url = api.url.replace("http://", "http://user:hunter2@") + "?api-key=s3cr3t"
    monkeypatch.setenv("OPENAI_BASE_URL", url)
    api.faults.append("401")  # tells the header that it got
    line = fails(capsys, *index)
    assert "Incorrect API key provided: Basic ***" in line
    assert f"{api.url}: " in line
    assert not any(secret in line for secret in ("hunter2", "s3cr3t", "dXNlcjpodW50ZXIy"))
    monkeypatch.setenv("OPENAI_BASE_URL", "localhost:80")
    assert "OPENAI_BASE_URL is no URL" in fails(capsys, *index)
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret-\x07")
    assert "characters that no HTTP header can carry" in fails(capsys, *index)
    monkeypatch.setenv("OPENAI_BASE_URL", api.url)
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret-of-the-test\n")
    assert embed_texts(["a text"], "m", None, None).shape == (1, D)


@pytest.mark.parametrize("fault", ["429", "429-retry-after", "500", "cut"])
def test_passing_faults_are_tried_again(api, fault):
    api.faults.append(fault)
    assert embed_texts(["a text"], "m", None, None).shape == (1, D)


@pytest.mark.parametrize("fault", ["401", "400", "malformed", "html", "empty"])
def test_other_faults_are_one_line_without_the_key(api, world, tmp_path, capsys, fault):
    api.faults.extend([fault] * 9)
    line = fails(capsys, "index", "--data", world, "--model", "openai:m", "--out", tmp_path / "index")
    assert "openai:m: " in line
    assert api.url in line or fault == "400"
    assert not (tmp_path / "index").exists()


def test_no_key_and_missing_embeddings_are_named(api, world, tmp_path, capsys, monkeypatch):
    api.short = True
    line = fails(capsys, "index", "--data", world, "--model", "openai:m", "--out", tmp_path / "index")
    assert "1 texts were sent, 0 embeddings came back" in line or "malformed answer" in line
    monkeypatch.delenv("OPENAI_API_KEY")
    line = fails(capsys, "index", "--data", world, "--model", "openai:m", "--out", tmp_path / "index")
    assert "OPENAI_API_KEY is not set" in line


def test_a_model_can_be_asked_for_shorter_embeddings(api):
    model = encode.load_encoder("openai:text-embedding-3-small@8")
    assert model.get_embedding_dimension() == 8
    assert {body.get("dimensions") for body in api.seen} == {8}
    whole = encode.load_encoder("openai:text-embedding-3-small")
    assert encode.fingerprint_encoder(model) != encode.fingerprint_encoder(whole)
    named = encode.load_encoder("openai:nomic@home")
    assert api.seen[-1]["model"] == "nomic@home"
    assert named.get_embedding_dimension() == D


def test_the_whole_chain_in_front_of_imported_embeddings(api, world, tmp_path, capsys, monkeypatch):
    """Items are somebody's .npy file, queries come from the API, an adapter is trained, evaluated and saved."""
    corpus = [json.loads(line) for line in (world / "corpus.jsonl").read_text().splitlines()]
    np.save(tmp_path / "items.npy", np.array([embedding(row["text"]) for row in corpus], dtype=np.float32))
    (tmp_path / "ids.txt").write_text("".join(row["_id"] + "\n" for row in corpus))
    index = tmp_path / "index"
    judge = ["--judge", f"file:{world / 'judgements.tsv'}", "--missing", "irrelevant"]
    common = ["--data", world, "--index", index, "--device", "cpu"]
    train = ["train", *common, "--labels", tmp_path / "labels", "--base-depth", 3, "--depth", 12, "--steps", 20,
             "--batch-size", 16, "--learning-rate", 0.02, "--max-recall-drop", 1, "--validation-fraction", 0.2]  # fmt: skip
    commands = [
        ["index", "--data", world, "--embeddings", tmp_path / "items.npy", "--ids", tmp_path / "ids.txt",
         "--model", "openai:text-embedding-3-small", "--out", index, "--device", "cpu"],
        ["label", *common, *judge, "--base-depth", 3, "--depth", 12, "--out", tmp_path / "labels"],
        [*train, "--tune", "adapter", "--out", tmp_path / "model"],
        [*train, "--tune", "memory", "--out", tmp_path / "memory"],
        ["eval", *common, *judge, "--model", f"new={tmp_path / 'model'}",
         "--model", f"memory={tmp_path / 'memory'}", "--base-depth", 3, "--k", "2,5", "--out", tmp_path / "report"],
    ]  # fmt: skip
    memories = []

    def keep(*parts):
        memories.append(make_memory(*parts))
        return memories[-1]

    monkeypatch.setattr(prepare, "make_memory", keep)
    for command in commands:
        assert main([*map(str, command), "--quiet"]) == 0, capsys.readouterr().err
    metrics = json.loads((tmp_path / "report" / "metrics.json").read_text())
    assert "new" in json.dumps(metrics)
    # Every query of both splits was asked for once, by whichever command came first, and no item ever was.
    queries = {json.loads(line)["text"] for line in (world / "queries.jsonl").read_text().splitlines()}
    assert set(api.billed) == queries | {"dimension"}
    assert set(api.billed.values()) == {1}
    # The saved encoder is the API with an adapter behind it, and moves queries by that adapter alone.
    model = encode.load_encoder(tmp_path / "model")
    assert [type(module) for module in model][:2] == [ApiEmbedding, Dense]
    text = next(iter(queries))
    base = np.array(embedding(text), dtype=np.float32)
    moved = base + model[1].linear.weight.detach().numpy() @ base
    assert np.allclose(encode.encode_queries(model, [text])[0], moved / np.linalg.norm(moved), atol=1e-5)
    assert np.abs(model[1].linear.weight.detach().numpy()).max() > 1e-3
    # So is the API with a memory, whose keys are embeddings that were paid for already, or of items.
    remembering = encode.load_encoder(tmp_path / "memory")
    assert [type(module) for module in remembering] == [
        ApiEmbedding,
        Normalize,
        Dense,
        Dense,
        Dense,
        Normalize,
    ]
    paid = torch.tensor([embedding(text) for text in api.billed])
    items = torch.from_numpy(np.array(open_index(index).embeddings, dtype=np.float32))
    known = normalize(torch.cat([paid, items])).numpy()
    assert len(memories) == 2  # the second one is trained on all queries
    for memory in memories:
        assert (memory.keys.numpy() @ known.T).max(axis=1) == pytest.approx(1, abs=1e-5)
    assert len(memories[-1].keys) == len(read_memory(remembering[2], remembering[3]).keys)
    assert not np.allclose(encode.encode_queries(remembering, [text])[0], base, atol=1e-3)
    # Nothing that was written holds the key.
    for path in tmp_path.rglob("*"):
        assert not path.is_file() or b"sk-secret" not in path.read_bytes(), path
    # Whoever serves the API's embeddings elsewhere needs the matrix alone.
    assert (
        main(
            [
                "export",
                "--model",
                str(tmp_path / "model"),
                "--format",
                "npz",
                "--out",
                str(tmp_path / "a.npz"),
            ]
        )
        == 0
    )
    with np.load(tmp_path / "a.npz") as file:
        assert np.allclose(base @ file["matrix"], moved, atol=1e-5)
    capsys.readouterr()
    assert "ONNX takes transformers" in fails(
        capsys, "export", "--model", tmp_path / "model", "--format", "onnx", "--out", tmp_path / "onnx"
    )
    line = fails(capsys, *train, "--tune", "full", "--out", tmp_path / "full")
    assert "--tune full: the query encoder is an embedding API; use --tune adapter or memory" in line
    line = fails(capsys, *train, "--tune", "lora", "--out", tmp_path / "lora")
    assert "--tune lora: ApiEmbedding is no transformer; use --tune adapter or memory" in line


def test_how_many_queries_will_be_billed_is_said_before(api, world, tmp_path, capsys):
    corpus = [json.loads(line) for line in (world / "corpus.jsonl").read_text().splitlines()]
    np.save(tmp_path / "items.npy", np.array([embedding(row["text"]) for row in corpus], dtype=np.float32))
    (tmp_path / "ids.txt").write_text("".join(row["_id"] + "\n" for row in corpus))
    index = ["index", "--data", world, "--embeddings", tmp_path / "items.npy", "--ids", tmp_path / "ids.txt",
             "--model", "openai:m", "--out"]  # fmt: skip
    label = ["label", "--data", world, "--judge", f"file:{world / 'judgements.tsv'}", "--missing", "irrelevant",
             "--base-depth", 3, "--depth", 12, "--index"]  # fmt: skip
    said = []
    for n, split in enumerate(("train", "test", "train")):
        assert main([*map(str, index), str(tmp_path / f"index{n}"), "--quiet"]) == 0
        api.billed.clear()
        folders = [tmp_path / f"index{n}", "--split", split, "--out", tmp_path / f"labels{n}"]
        assert main([*map(str, label), *map(str, folders)]) == 0
        err = " ".join(capsys.readouterr().err.split())
        said.append(re.findall(r"([0-9,]+) queries will be embedded by an API, which bills them", err))
        assert said[-1] == ([str(len(api.billed))] if api.billed else [])
    assert [len(note) for note in said] == [1, 1, 0]  # the last one's were paid for before


def test_an_endpoint_that_changed_its_model_is_refused(api, world, tmp_path, capsys):
    made = commands.run(
        capsys, "index", "--data", world, "--model", "openai:m", "--out", tmp_path / "index", "--quiet"
    )
    assert made[0] == 0
    assert open_index(tmp_path / "index").dimension == D
    api.dimension = 8
    arguments = ["search", "--data", world, "--index", tmp_path / "index", "never asked before"]
    assert f"openai:m: gives 8 dimensions, expected {D}" in fails(capsys, *arguments, "--base-depth", 5)


def test_a_cache_that_is_none_is_named(api, tmp_path, monkeypatch, world, capsys):
    (tmp_path / "text").write_text("no database" * 100)
    monkeypatch.setenv("NOVELRET_EMBEDDINGS", str(tmp_path / "text"))
    line = fails(capsys, "index", "--data", world, "--model", "openai:m", "--out", tmp_path / "index")
    assert "cannot be used as a cache of embeddings" in line
