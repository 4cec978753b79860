"""A set as queries of free text have it: what is known of train queries holds no test query as an item.

    python benchmarks/sets/strangers.py SET OUT

In the sets here queries are items of the catalog, and train feedback on such an item tells what goes with it;
of a query of free text none does. Feedback and judgements of train queries on items that are test queries are
dropped; train queries that have no feedback left stay, as unclicked ones. What test queries are measured by
stays whole. Items, test feedback and the deployed model are SET's own, as links.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

import shown


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("set", type=Path)
    parser.add_argument("out", type=Path)
    options = parser.parse_args()
    write(options.set, options.out)


def write(data: Path, out: Path) -> None:
    """Fill OUT."""
    queries = {line.split("\t")[0] for line in _lines(data / "qrels" / "test.tsv")}
    feedback: dict[str, list[str]] = {}
    for line in _lines(data / "qrels" / "train.tsv"):
        query, item, grade = line.split("\t")
        known = feedback.setdefault(query, [])
        if float(grade) > 0 and item not in queries:
            known.append(item)
    shown.write(data, out, feedback)
    train = feedback.keys()
    path = out / "judgements.tsv"
    path.unlink()  # a link
    with path.open("w", encoding="utf-8") as file:
        file.write("query-id\tcorpus-id\tscore\n")
        for line in _lines(data / "judgements.tsv"):
            query, item = line.split("\t")[:2]
            if query not in train or item not in queries:
                file.write(f"{line}\n")


def _lines(path: Path) -> Iterator[str]:
    with path.open(encoding="utf-8") as file:
        next(file)
        for line in file:
            yield line.rstrip("\n")


if __name__ == "__main__":
    main()
