"""Processes that share a catalog find for their own queries what one process finds in all of it."""

import numpy as np
import torch

from novelret.row_lists import row_lists
from novelret.search import search_exact
from novelret.shard import Shard
from novelret.train.matrix import ItemMatrix
from novelret.train.processes import Processes
from novelret.train.shared_search import search_shared

K = 10
rng = np.random.default_rng(0)
# Of few values, so that most scores are shared by several items, and the ids decide.
ITEMS = rng.integers(-1, 2, (37, 5)).astype(np.float32)
QUERIES = rng.integers(-1, 2, (9, 5)).astype(np.float32)
QUERIES[4] = 0
ID_RANK = rng.permutation(37)
LEFT_OUT = [[], [3, 36], [], list(range(30)), [0, 20, 21], [7], [], [36], [1]]
EXCLUDED = row_lists(np.repeat(np.arange(9), [len(rows) for rows in LEFT_OUT]), np.concatenate(LEFT_OUT), 9)
PARTS = (0, 20, 37, 37)  # the last process holds none of the catalog
SHARES = (0, 5, 5, 9)  # the second one has no queries


def _one_of_three(rank, path, results):
    torch.distributed.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=3)
    items = ItemMatrix(ITEMS, ITEMS[PARTS[rank] : PARTS[rank + 1]], Shard(PARTS[rank]))
    mine = np.arange(SHARES[rank], SHARES[rank + 1])
    processes = Processes(rank, 3, "cpu")
    results[rank] = search_shared(items, processes, QUERIES[mine], K, ID_RANK, EXCLUDED.take(mine))
    torch.distributed.destroy_process_group()


def test_lists_are_those_of_one_process_ties_and_all(tmp_path):
    context = torch.multiprocessing.get_context("spawn")
    with context.Manager() as manager:
        results = manager.dict()
        workers = [
            context.Process(target=_one_of_three, args=(r, tmp_path / "rendezvous", results))
            for r in range(3)
        ]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join(120)
        assert [worker.exitcode for worker in workers] == [0, 0, 0]
        found = [results[rank] for rank in range(3)]
    assert [len(rows) for rows in found] == [5, 0, 4]
    whole, scores = search_exact(QUERIES, ITEMS, K, ID_RANK, EXCLUDED)
    assert (np.diff(np.delete(scores, 3, axis=0), axis=1) == 0).mean() > 0.5
    assert (whole[3] >= 0).sum() == 7
    assert np.array_equal(np.concatenate(found), whole)
