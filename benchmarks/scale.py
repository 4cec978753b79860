"""A generated catalog through the whole chain, as a user would run it: time and memory of every stage.

    python benchmarks/scale.py OUT --items 10000000

Items are three words each out of 20,000, embedded as the sum of the words' random vectors plus noise, in
float16 shards on disk; queries are two words. Items that share an even-numbered word with the query are
called relevant, and even words have something in common that an adapter can learn. Every stage is a command
of its own whose resident memory is sampled: "anonymous" is what it allocated, "resident" adds the pages of
memory-mapped files, which the system takes back when it needs them. A stage that is done is not repeated,
and one that was killed goes on where it was.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

WORDS, SHARD, SEED = 20_000, 1_000_000, 0
DEPTH, BASE_DEPTH = 200, 50


def word_vectors(dimension: int) -> np.ndarray:
    rng = np.random.default_rng(SEED)
    vectors = rng.standard_normal((WORDS, dimension)).astype(np.float32)
    vectors[::2] += 0.3 * rng.standard_normal(dimension).astype(np.float32)
    return vectors


def generate(out: Path, items: int, dimension: int, queries: int) -> None:
    """Write data/, shards/, ids.txt, words.npy and the query encoder."""
    rng = np.random.default_rng(SEED + 1)
    vectors = word_vectors(dimension)
    (out / "data" / "qrels").mkdir(parents=True, exist_ok=True)
    (out / "shards").mkdir(exist_ok=True)
    words = np.lib.format.open_memmap(out / "words.npy", "w+", np.int32, (items, 3))
    with (out / "data" / "corpus.jsonl").open("w") as corpus, (out / "ids.txt").open("w") as ids:
        for shard, start in enumerate(range(0, items, SHARD)):
            some = rng.integers(WORDS, size=(min(SHARD, items - start), 3), dtype=np.int32)
            words[start : start + len(some)] = some
            embeddings = vectors[some].sum(axis=1)
            embeddings += 0.7 * rng.standard_normal(embeddings.shape, dtype=np.float32)
            embeddings /= np.linalg.norm(embeddings, axis=1, keepdims=True)
            np.save(out / "shards" / f"items-{shard}.npy", embeddings.astype(np.float16))
            for row, (a, b, c) in enumerate(some.tolist(), start):
                corpus.write(f'{{"_id": "item-{row}", "title": "", "text": "w{a} w{b} w{c}"}}\n')
            ids.writelines(f"item-{row}\n" for row in range(start, start + len(some)))
    pairs = rng.integers(WORDS, size=(queries, 2))
    with (out / "data" / "queries.jsonl").open("w") as file:
        for query, (a, b) in enumerate(pairs.tolist()):
            file.write(json.dumps({"_id": f"q{query}", "text": f"w{a} w{b}"}) + "\n")
    np.save(out / "queries.npy", pairs)
    # Feedback: an item that holds one of the query's words.
    by_word = {int(w): row for row, w in enumerate(words[:SHARD, 0].tolist())}
    test = max(1, queries // 10)
    for name, rows in (("test", range(test)), ("train", range(test, queries))):
        with (out / "data" / "qrels" / f"{name}.tsv").open("w") as file:
            file.write("query-id\tcorpus-id\tscore\n")
            for query in rows:
                item = by_word.get(int(pairs[query, 0]), int(rng.integers(min(items, SHARD))))
                file.write(f"q{query}\titem-{item}\t1\n")
    save_encoder(vectors, out / "encoder")


def save_encoder(vectors: np.ndarray, folder: Path) -> None:
    import torch
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import StaticEmbedding
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace

    tokenizer = Tokenizer(WordLevel({f"w{n}": n for n in range(WORDS)}, unk_token="w0"))
    tokenizer.pre_tokenizer = Whitespace()
    module = StaticEmbedding(tokenizer, embedding_weights=torch.from_numpy(vectors))
    SentenceTransformer(modules=[module], device="cpu").save(str(folder), create_model_card=False)


def judge(out: Path) -> None:
    """Compute the deployed lists of both splits and write a judgement for every item in them."""
    from novelret.data.split import load_split
    from novelret.index import base_lists, open_index

    index = open_index(out / "index")
    words, pairs = np.load(out / "words.npy", mmap_mode="r"), np.load(out / "queries.npy")
    with (out / "judgements.tmp").open("w") as file:
        for name in ("train", "test"):
            split = load_split(str(out / "data"), name, index.catalog)
            rows, _ = base_lists(index, split, DEPTH)
            for query_id, found in zip(split.query_ids, rows, strict=True):
                pair = pairs[int(query_id[1:])]
                shared = np.isin(words[found], pair[pair % 2 == 0]).any(axis=1)
                for item, relevant in zip(found.tolist(), shared.tolist(), strict=True):
                    file.write(f"{query_id}\titem-{item}\t{int(relevant)}\n")
    (out / "judgements.tmp").rename(out / "judgements.tsv")


def run_stage(name: str, made: Path, command: list[str]) -> dict[str, object]:
    """Run one command, sampling its memory; skipped where its output exists."""
    if made.exists():
        return {"stage": name, "seconds": None}
    began, resident, anonymous = time.perf_counter(), 0, 0
    process = subprocess.Popen(command)
    while process.poll() is None:
        try:
            status = Path(f"/proc/{process.pid}/status").read_text()
        except OSError:
            break
        rss = {line.split(":")[0]: int(line.split()[1]) for line in status.splitlines() if line[:3] == "Rss"}
        anonymous = max(anonymous, rss.get("RssAnon", 0))
        resident = max(resident, sum(rss.values()))
        time.sleep(0.2)
    if process.wait() != 0:
        sys.exit(f"{name}: exit code {process.returncode}; the same command goes on from there")
    return {
        "stage": name,
        "seconds": round(time.perf_counter() - began, 1),
        "anonymous_gib": round(anonymous / 2**20, 2),
        "resident_gib": round(resident / 2**20, 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--items", type=int, default=10_000_000)
    parser.add_argument("--dimension", type=int, default=128)
    parser.add_argument("--queries", type=int, default=10_000)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--only", choices=("generate", "judge"), help=argparse.SUPPRESS)
    given = parser.parse_args()
    out: Path = given.out
    out.mkdir(parents=True, exist_ok=True)
    if given.only == "generate":
        generate(out, given.items, given.dimension, given.queries)
        (out / "generated").touch()
        return
    if given.only == "judge":
        judge(out)
        return
    again = [sys.executable, __file__, str(out), "--items", str(given.items)]
    again += ["--dimension", str(given.dimension), "--queries", str(given.queries), "--only"]
    novelret = [sys.executable, "-m", "novelret"]
    data = ["--data", str(out / "data")]
    common = [*data, "--index", str(out / "index"), "--device", "cpu"]
    judged = ["--judge", f"file:{out / 'judgements.tsv'}", "--missing", "irrelevant"]
    stages = [
        ("generate", "generated", [*again, "generate"]),
        ("index", "index", [
            *novelret, "index", *data, "--embeddings", str(out / "shards"), "--ids", str(out / "ids.txt"),
            "--model", str(out / "encoder"), "--dtype", "float16", "--device", "cpu",
        ]),
        ("deployed lists", "judgements.tsv", [*again, "judge"]),
        ("label", "labels", [*novelret, "label", *common, *judged, "--depth", str(DEPTH)]),
        ("train", "model", [
            *novelret, "train", *common, "--labels", str(out / "labels"), "--tune", "adapter", "--no-refit",
            "--alpha", "0.25", "--gamma", "0.25", "--depth", str(DEPTH),
            "--steps", str(given.steps), "--eval-every", str(max(1, given.steps // 4)),
            "--validation-fraction", "0.02", "--log-every", "20",
        ]),
        ("eval", "report", [
            *novelret, "eval", *common, *judged, "--model", f"new={out / 'model'}", "--k", "10,50",
        ]),
    ]  # fmt: skip
    figures = out / "figures.jsonl"
    for name, made, command in stages:
        target = ["--out", str(out / made)] if command[: len(novelret)] == novelret else []
        figure = run_stage(name, out / made, [*command, *target])
        if figure["seconds"] is not None:
            with figures.open("a") as file:
                file.write(json.dumps({"items": given.items, "queries": given.queries, **figure}) + "\n")
    print("| stage | seconds | anonymous GiB | resident GiB |\n| --- | --- | --- | --- |")
    for line in figures.read_text().splitlines():
        row = json.loads(line)
        print(f"| {row['stage']} | {row['seconds']} | {row['anonymous_gib']} | {row['resident_gib']} |")


if __name__ == "__main__":
    main()
