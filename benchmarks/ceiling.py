"""What any query encoder could bring, the items being frozen: a vector for each query, fitted to the answers.

    python benchmarks/ceiling.py DATA INDEX [--L 50] [--queries 500] [--steps 150]

DATA holds judgements.tsv and the split `test`; INDEX is of its deployed model (`quality.py` leaves one in
OUT/NAME/index). For every test query a vector of unit length is fitted by gradient ascent on the number of
its relevant novel items within the top L, knowing all judgements, from two starts: the deployed embedding and
the mean of its relevant items. The best list met on the way counts. No encoder that maps texts to vectors
can do better than the best vectors can; the fit may miss those, so what is printed is a ceiling from below.

Prints means over the queries: the relevant items that the deployed list lacks, and how many of them the two
starts and the fitted vector find.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import normalize

from novelret import EvalConfig
from novelret.blocks import rows_to_tensor, top_k
from novelret.evaluate.gather import gather
from novelret.evaluate.metrics.novelty import novel
from novelret.index import base_query_embeddings
from novelret.progress import Reporter

AT_ONCE = 64  # queries
TEMPERATURES = (0.1, 0.02)  # from the first to the last step
RATE = 0.03


def fit(
    start: Tensor, wanted: list[np.ndarray], items: Tensor, excluded: Tensor, k: int, steps: int
) -> Tensor:
    """(B, steps + 1) wanted items within each query's top k, at the start and after each step of the ascent.

    Args:
        start: (B, d) unit vectors.
        wanted: for each query the catalog rows of its relevant novel items.
        items: (N, d).
        excluded: (B, E) catalog rows that are never listed, −1 padded.
        k: L.
        steps: of Adam.
    """
    vectors = start.clone().requires_grad_()
    optimizer = torch.optim.Adam([vectors], lr=RATE)
    group = torch.from_numpy(np.repeat(np.arange(len(wanted)), [len(rows) for rows in wanted]))
    rows = torch.from_numpy(np.concatenate(wanted))
    found = torch.zeros(len(start), steps + 1)
    for step in range(steps + 1):
        unit = normalize(vectors, dim=1)
        best, _ = top_k(unit, items, k + 1, excluded)
        inside = (best[group, :k] == rows[:, None]).any(dim=1)
        found[:, step] = torch.bincount(group, weights=inside.float(), minlength=len(start))
        threshold = torch.where(inside, best[group, k], best[group, k - 1])
        temperature = TEMPERATURES[0] * (TEMPERATURES[1] / TEMPERATURES[0]) ** (step / steps)
        margin = (unit[group] * (items[rows] - items[threshold])).sum(dim=1) / temperature
        loss = torch.expm1(-torch.exp(margin.clamp(max=30.0)))  # minus the chance of being within the top k
        optimizer.zero_grad()
        loss.sum().backward()
        optimizer.step()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("index", type=Path)
    parser.add_argument("--L", dest="length", type=int, default=50)
    parser.add_argument(
        "--queries", type=int, default=500, help="drawn from the test split; all if it has fewer"
    )
    parser.add_argument("--steps", type=int, default=150)
    options = parser.parse_args()
    gathered = gather(
        EvalConfig(
            str(options.data), str(options.index), judge=f"file:{options.data / 'judgements.tsv'}",
            missing="irrelevant", base_depth=options.length, device="cpu",
        ),
        Reporter(),
    )  # fmt: skip
    split, k = gathered.split, options.length
    assert gathered.known is not None
    nobody = np.empty(0, dtype=np.int64)
    query, item = gathered.known.without(split.excluded).relevant_and(nobody, nobody)
    is_novel = novel(item[:, None], gathered.pool[query])[:, 0]
    relevant, wanted = (
        np.split(item[kept], np.searchsorted(query[kept], np.arange(1, len(split))))
        for kept in (np.ones_like(is_novel), is_novel)
    )
    drawn = np.random.default_rng(0).permutation(len(split))[: options.queries]
    fitted = [row for row in drawn if len(wanted[row])]
    items = rows_to_tensor(gathered.index.embeddings, torch.zeros(1))
    deployed = torch.from_numpy(np.array(base_query_embeddings(gathered.index, split)))
    found = {"the deployed vector": 0.0, "mean of the relevant items": 0.0, "fitted vector": 0.0}
    for first in range(0, len(fitted), AT_ONCE):
        rows = fitted[first : first + AT_ONCE]
        means = torch.stack([items[torch.from_numpy(relevant[row])].mean(dim=0) for row in rows])
        excluded = torch.from_numpy(split.excluded[rows])
        of_rows = [wanted[row] for row in rows]
        runs = [
            fit(normalize(start, dim=1), of_rows, items, excluded, k, options.steps)
            for start in (deployed[rows], means)
        ]
        for name, run in zip(found, runs, strict=False):
            found[name] += run[:, 0].sum().item()
        found["fitted vector"] += torch.cat(runs, dim=1).amax(dim=1).sum().item()
        print(f"{first + len(rows)} of {len(fitted)} queries", file=sys.stderr, flush=True)
    print(f"| {options.data.name}: {len(drawn)} test queries | relevant novel items in the top {k} |")
    print("| --- | --- |")
    print(f"| all that the deployed list lacks | {sum(len(wanted[row]) for row in drawn) / len(drawn):.2f} |")
    for name, total in found.items():
        print(f"| {name} | {total / len(drawn):.2f} |")


if __name__ == "__main__":
    main()
