"""A dense set: classes of things and what belongs to them, from WordNet's noun hierarchy.

    python benchmarks/sets/wordnet.py OUT [--packages FOLDER] [--no-model]

A query is a noun synset with a wide class below it; the items are all noun synsets. Feedback is what
lexicographers put directly below the query (at most 20, drawn); relevant is everything below it, at any
depth. Source: WordNet 3.0 (WordNet licence, Princeton University), Debian package wordnet-base, which
`apt-get download` fetches and which is unpacked without being installed.
"""

from __future__ import annotations

import collections
import re
import subprocess
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import layout

# Below 20 a class is no dense query; above 2,000 it is 'plant', 'artifact', 'entity'.
FEWEST, MOST, FEEDBACK = 20, 2000, 20
TITLE = """# wordnet: a dense real data set, in BEIR's layout

Which kinds and instances belong to a class? Query: a noun synset with 20 to 2,000 synsets below it. Items:
all noun synsets, as "lemma, lemma: gloss". Feedback: synsets directly below the query (at most 20 of them,
drawn). Judgements: all synsets below it; a pair that is not listed is not relevant. A query's id is its own
item's id: identical ids must be ignored when ranking. From WordNet 3.0 (WordNet licence)."""


@dataclass(frozen=True)
class Synset:
    """A line of data.noun: the item's text and the ids of the synsets directly above it."""

    text: str
    above: tuple[str, ...]


def synsets(lines: Iterable[str]) -> dict[str, Synset]:
    """The noun synsets of a data.noun file by their offset (wndb(5WN) describes the format)."""
    found = {}
    for line in lines:
        if line.startswith(" "):  # the licence
            continue
        head, _, gloss = line.partition(" | ")
        fields = head.split()
        n_words = int(fields[3], 16)
        lemmas = [word.replace("_", " ") for word in fields[4 : 4 + 2 * n_words : 2]]
        pointers = fields[5 + 2 * n_words :]
        above = [pointers[i + 1] for i in range(0, len(pointers), 4) if pointers[i] in ("@", "@i")]
        found[fields[0]] = Synset(f"{', '.join(lemmas)}: {definition(gloss)}", tuple(above))
    return found


def definition(gloss: str) -> str:
    """A gloss without its quoted examples."""
    return re.split(r';\s*"|^\s*"', gloss.strip(), maxsplit=1)[0].strip(" ;")


def directly_below(found: Mapping[str, Synset]) -> dict[str, set[str]]:
    """Hyponyms and instances of every synset that has any."""
    below = collections.defaultdict(set)
    for name, synset in found.items():
        for parent in synset.above:
            below[parent].add(name)
    return dict(below)


def all_below(root: str, below: Mapping[str, set[str]]) -> set[str]:
    """Every synset below ROOT, at any depth, without ROOT."""
    seen, open_ = set(), [root]
    while open_:
        new = below.get(open_.pop(), set()) - seen
        seen |= new
        open_.extend(new)
    return seen - {root}


def main() -> None:
    options = layout.arguments(__doc__, steps=100)
    (package,) = layout.debs(["wordnet-base"], options.packages)
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run(["dpkg-deb", "-x", package, folder], check=True)
        text = (Path(folder) / "usr/share/wordnet/data.noun").read_text(encoding="utf-8")
    found = synsets(text.splitlines())
    below = directly_below(found)
    relevant = {name: all_below(name, below) for name in below}
    relevant = {name: members for name, members in relevant.items() if FEWEST <= len(members) <= MOST}
    feedback = {name: layout.draw(below[name], FEEDBACK, name) for name in relevant}
    items = {name: synset.text for name, synset in found.items()}
    # Fewer queries than other sets have: the base split, which needs the least, gives way.
    splits = layout.split(relevant, train=0.48, test=0.26)
    layout.write(options.out, TITLE, items, splits, feedback, {q: sorted(m) for q, m in relevant.items()})
    if not options.no_model:
        import deployed  # heavy, and not needed for the data

        deployed.finetune(options.out, steps=options.steps)


if __name__ == "__main__":
    main()
