"""What the scripts of this folder share: Debian packages in, a folder in BEIR's layout out."""

from __future__ import annotations

import argparse
import itertools
import json
import random
import statistics
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

SPLITS = ("base", "train", "test")


def arguments(doc: str | None, *, steps: int) -> argparse.Namespace:
    """The command line of every script here: OUT, --packages, --no-model and --steps."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--packages", type=Path, help="where .deb files are kept (default: OUT/packages)")
    parser.add_argument("--no-model", action="store_true", help="leave deployed_model/ out")
    parser.add_argument("--steps", type=int, default=steps, help="optimizer steps of the deployed model")
    options = parser.parse_args()
    options.packages = options.packages or options.out / "packages"
    return options


def debs(names: Sequence[str], folder: Path) -> list[Path]:
    """The .deb files of the packages, downloaded where FOLDER lacks them; nothing is installed.

    Raises:
        SystemExit: apt could not download them all.
    """
    folder.mkdir(parents=True, exist_ok=True)
    missing = [name for name in names if not list(folder.glob(f"{name}_*.deb"))]
    if missing and subprocess.run(["apt-get", "download", *missing], cwd=folder).returncode:
        raise SystemExit("apt-get download failed; run `apt-get update` on a Debian bookworm machine first")
    return [max(folder.glob(f"{name}_*.deb")) for name in names]


def draw(members: Iterable[str], most: int, key: str) -> list[str]:
    """At most so many of the members, sorted; the draw depends on KEY and the members alone."""
    ordered = sorted(members)
    return ordered if len(ordered) <= most else sorted(random.Random(key).sample(ordered, most))


def split(queries: Iterable[str], *, train: float, test: float) -> dict[str, list[str]]:
    """Queries shuffled by a fixed seed into base, train and test; the two shares are of all queries."""
    shuffled = sorted(queries)
    random.Random(0).shuffle(shuffled)
    held = round(test * len(shuffled))
    gathered = held + round(train * len(shuffled))
    return {"base": shuffled[gathered:], "train": shuffled[held:gathered], "test": shuffled[:held]}


def write(
    out: Path,
    title: str,
    items: Mapping[str, str],
    splits: Mapping[str, Sequence[str]],
    feedback: Mapping[str, Sequence[str]],
    relevant: Mapping[str, Sequence[str]],
) -> None:
    """Write the data files and README.md.

    Args:
        out: folder to make or fill.
        title: first lines of README.md: the name, and what the set is.
        items: text by item id.
        splits: query ids, each an item id, by split.
        feedback: item ids by query id.
        relevant: item ids by query id, for train and test queries; what is not listed is not relevant.
    """
    (out / "qrels").mkdir(parents=True, exist_ok=True)
    _lines(
        out / "corpus.jsonl", (json.dumps({"_id": i, "title": "", "text": items[i]}) for i in sorted(items))
    )
    queries = sorted(query for members in splits.values() for query in members)
    _lines(out / "queries.jsonl", (json.dumps({"_id": q, "text": items[q]}) for q in queries))
    for name in SPLITS:
        write_qrels(out / "qrels" / f"{name}.tsv", splits[name], feedback)
    write_qrels(out / "judgements.tsv", [*splits["train"], *splits["test"]], relevant)

    rows = [
        "| split | queries | feedback pairs | relevant per query: mean | median |",
        "| --- | --- | --- | --- | --- |",
    ]
    for name in SPLITS:
        pairs = sum(len(feedback[q]) for q in splits[name])
        judged = [len(relevant[q]) for q in splits[name]] if name != "base" else []
        spread = (
            f"{statistics.mean(judged):.1f} | {statistics.median(judged):.0f}" if judged else "not judged |"
        )
        rows.append(f"| {name} | {len(splits[name]):,} | {pairs:,} | {spread} |")
    table = "\n".join(rows)
    (out / "README.md").write_text(f"{title.strip()}\n\n{len(items):,} items.\n\n{table}\n", encoding="utf-8")
    print(table)


def write_qrels(path: Path, queries: Iterable[str], pairs: Mapping[str, Sequence[str]]) -> None:
    """Write the pairs of the queries given as BEIR's qrels, all of grade 1."""
    rows = (f"{query}\t{item}\t1" for query in queries for item in sorted(pairs[query]))
    _lines(path, itertools.chain(["query-id\tcorpus-id\tscore"], rows))


def _lines(path: Path, lines: Iterable[str]) -> None:
    with path.open("w", encoding="utf-8") as file:
        file.writelines(line + "\n" for line in lines)
