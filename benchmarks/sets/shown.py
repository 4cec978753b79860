"""A set as a click log has it: of the train feedback, only what the deployed model itself showed.

    python benchmarks/sets/shown.py SET OUT [--index INDEX] [--length 50]

Novel items have no clicks. Train feedback on items outside the deployed top L is dropped; train queries that
have none left stay, as unclicked ones. Items, judgements, test feedback and the deployed model are SET's own,
as links. INDEX is an index of SET, if there is one.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import layout

from novelret import IndexConfig, build_index
from novelret.data.split import load_split
from novelret.index import base_lists, open_index

SHARED = ("corpus.jsonl", "queries.jsonl", "judgements.tsv", "deployed_model", "qrels/test.tsv")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("set", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--index", type=Path)
    parser.add_argument("--length", type=int, default=50, help="L, how many items were shown")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = options.index or Path(scratch) / "index"
        if options.index is None:
            build_index(IndexConfig(str(options.set), str(options.set / "deployed_model")), folder)
        shown = shown_feedback(options.set, folder, options.length)
    write(options.set, options.out, shown)


def shown_feedback(data: Path, index_folder: Path, length: int) -> dict[str, list[str]]:
    """Item ids of the train feedback within the deployed top L, by id of each train query."""
    index = open_index(index_folder)
    split = load_split(str(data), "train", index.catalog, ignore_identical_ids=True)
    lists, _ = base_lists(index, split, length)
    shown: dict[str, list[str]] = {query_id: [] for query_id in split.query_ids}
    for query, item in zip(split.feedback_queries, split.feedback_items, strict=True):
        if item in lists[query]:
            shown[split.query_ids[query]].append(index.catalog.ids_at([item])[0])
    return shown


def write(data: Path, out: Path, shown: dict[str, list[str]]) -> None:
    """Fill OUT: the train feedback given, everything else linked to DATA."""
    (out / "qrels").mkdir(parents=True)
    for name in SHARED:
        (out / name).symlink_to((data / name).resolve())
    layout.write_qrels(out / "qrels" / "train.tsv", sorted(shown), shown)
    unclicked = sorted(query_id for query_id, items in shown.items() if not items)
    (out / "unclicked").mkdir()
    (out / "unclicked" / "train.tsv").write_text("".join(f"{line}\n" for line in ["query-id", *unclicked]))
    pairs = sum(map(len, shown.values()))
    print(f"{len(shown):,} train queries ({len(unclicked):,} unclicked), {pairs:,} feedback pairs")


if __name__ == "__main__":
    main()
