"""Evaluation beside its peers on the same cores: exact search against faiss Flat, metrics against ranx.

    python benchmarks/evaluation.py [--queries 10000] [--items 1000000] [--dimension 384] [--depth 200]
                                    [--metric-queries 10000] [--metric-depth 1000] [--skip-search]

Times are the best of several rounds taken in turn: seconds by the clock, and of processor time, which a busy
machine does not stretch (over all threads). Memory is how much the process's peak grew over one call, beyond
what it returns. The metrics' lists, feedback and deployed lists are random; ranx gets its own structures
ready-made and one evaluation beforehand, so that neither its conversion nor its compilation is counted.
"""

from __future__ import annotations

import argparse
import resource
import time
from collections.abc import Callable

import faiss
import numpy as np

from novelret.evaluate import metrics
from novelret.search import search_exact


def seconds(run: Callable[[], object]) -> tuple[float, float]:
    started, used = time.perf_counter(), time.process_time()
    run()
    return time.perf_counter() - started, time.process_time() - used


def peak() -> float:
    """The process's peak memory so far, in MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def best_of(runs: dict[str, Callable[[], object]], rounds: int) -> dict[str, tuple[float, float]]:
    taken: dict[str, list[tuple[float, float]]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            taken[name].append(seconds(run))
    best = {}
    print("| | s | processor s |\n| --- | ---: | ---: |")
    for name, times in taken.items():
        clock, processor = (min(of) for of in zip(*times, strict=True))
        best[name] = clock, processor
        print(f"| {name} | {clock:.2f} | {processor:.2f} |")
    return best


def search(options: argparse.Namespace) -> None:
    rng = np.random.default_rng(0)
    shape = (options.items, options.dimension)
    items = rng.standard_normal(shape, dtype=np.float32)
    items /= np.linalg.norm(items, axis=1, keepdims=True)
    queries = rng.standard_normal((options.queries, options.dimension), dtype=np.float32)
    queries /= np.linalg.norm(queries, axis=1, keepdims=True)
    id_rank = rng.permutation(options.items).astype(np.int32)
    flat = faiss.IndexFlatIP(options.dimension)
    flat.add(items)
    excluded = np.full((options.queries, 1), -1, dtype=np.int64)
    before = peak()
    search_exact(queries, items, options.depth, id_rank, excluded)
    grown = peak() - before
    returned = options.queries * options.depth * 16 / 2**20
    runs = {
        "faiss Flat": lambda: flat.search(queries, options.depth),
        "novelret": lambda: search_exact(queries, items, options.depth, id_rank, excluded),
    }
    print(
        f"\nsearch: {options.queries:,} queries x {options.items:,} items x {options.dimension} dimensions, "
        f"top {options.depth}, {faiss.omp_get_max_threads()} thread(s)"
    )
    taken = best_of(runs, options.rounds)
    clock, processor = (
        ours / theirs for ours, theirs in zip(*(taken[n] for n in ("novelret", "faiss Flat")), strict=True)
    )
    print(
        f"ratio {clock:.2f} ({processor:.2f}); peak memory grew by {grown - returned:.0f} MiB over the result"
    )


def metric_times(options: argparse.Namespace) -> None:
    import ranx

    count, depth, catalog = options.metric_queries, options.metric_depth, options.items
    rng = np.random.default_rng(1)
    # Lists without repetition: steps that share no factor with a catalog of a round number of items.
    steps = 10 * rng.integers(1, catalog // 10, (count, 1)) + 1
    rows = (rng.integers(0, catalog, (count, 1)) + steps * np.arange(depth)) % catalog
    base = rng.integers(0, catalog, (count, 200))
    feedback_queries = np.repeat(np.arange(count), 10)
    feedback_items = rng.integers(0, catalog, len(feedback_queries))
    feedback_items[::2] = rows[feedback_queries[::2], rng.integers(0, depth, len(feedback_queries[::2]))]
    pairs = np.unique(np.stack([feedback_queries, feedback_items], axis=1), axis=0)
    feedback_queries, feedback_items = pairs[:, 0].copy(), pairs[:, 1].copy()
    scores = np.linspace(1, 0, depth).tolist()
    qrels: dict[str, dict[str, int]] = {}
    for query, item in pairs.tolist():
        qrels.setdefault(str(query), {})[str(item)] = 1
    run = {str(q): dict(zip(map(str, row), scores, strict=True)) for q, row in enumerate(rows.tolist())}
    theirs, of = ranx.Run(run), ranx.Qrels(qrels)
    names = [f"{name}@{k}" for name in ("recall", "ndcg", "mrr") for k in (10, 100, depth)]
    ranx.evaluate(of, theirs, names)

    def ours() -> dict[str, float]:
        feedback = metrics.feedback_hits(rows, feedback_queries, feedback_items)
        found = {}
        for k in (10, 100, depth):
            found[f"recall@{k}"] = metrics.recall(*feedback, k).mean()
            found[f"ndcg@{k}"] = metrics.ndcg(*feedback, k).mean()
            found[f"mrr@{k}"] = metrics.reciprocal_rank(*feedback, k).mean()
        return found

    def novelty() -> list[np.ndarray]:
        new = metrics.novel(rows, base)
        return [metrics.novelty(new, k) for k in (10, 100, depth)]

    before = peak()
    ours()
    grown = peak() - before
    reference = ranx.evaluate(of, theirs, names)
    worst = max(abs(ours()[name] - reference[name]) for name in names)
    runs = {
        "ranx": lambda: ranx.evaluate(of, theirs, names),
        "novelret": ours,
        "novelret, Novelty": novelty,
    }
    print(f"\nmetrics: {count:,} queries x {depth:,} results, recall, nDCG and MRR at 10, 100 and {depth}")
    best_of(runs, options.rounds)
    print(f"largest difference from ranx {worst:.1e}; peak memory grew by {grown:.0f} MiB")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    for name, default in (
        ("queries", 10_000), ("items", 1_000_000), ("dimension", 384), ("depth", 200),
        ("metric-queries", 10_000), ("metric-depth", 1_000), ("rounds", 3),
    ):  # fmt: skip
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--skip-search", action="store_true")
    options = parser.parse_args()
    metric_times(options)
    if not options.skip_search:
        search(options)


if __name__ == "__main__":
    main()
