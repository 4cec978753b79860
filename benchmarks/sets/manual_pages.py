"""A sparse set: manual pages and the pages that their SEE ALSO sections name.

    python benchmarks/sets/manual_pages.py OUT [--packages FOLDER] [--no-model]

A query is a page; its feedback is what its author lists under SEE ALSO. Source: English manual pages of
230 packages of Debian bookworm (each under its package's own licence), which `apt-get download`
fetches (about 240 MB) and which are read without being installed.
"""

from __future__ import annotations

import collections
import gzip
import subprocess
import tarfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import layout
import roff

PACKAGES = Path(__file__).with_name("manual_pages.txt")
# A longer list names a whole suite, and a page more often named is a suite's front page.
LONGEST_LIST, MOST_POPULAR = 20, 100
MOST_RELEVANT, MAX_NAMES = 50, 4
TITLE = """# manual-pages: a sparse real data set, in BEIR's layout

Which pages should a reader of this manual page see also? Items and queries: manual pages, as "names:
description" from their NAME sections. Feedback: the pages that the query's author lists under SEE ALSO.
Judgements: these and the pages that list the query, at most 50 in all; a pair that is not listed is not
relevant. A query's id is its own item's id: identical ids must be ignored when ranking.
From packages of Debian bookworm, each page under its package's own licence."""


@dataclass
class Page:
    """A manual page: its text, the names it can be called by, and what its SEE ALSO names."""

    package: str
    section: str
    text: str
    names: list[str]
    references: list[tuple[str, str]]


def manual_files(deb: Path) -> dict[str, str]:
    """Source of every English manual page of a package, by file name such as 'man3/printf.3'.

    A link, whether of the file system or of roff, becomes a source of '.so man3/target.3'.
    """
    files = {}
    with (
        subprocess.Popen(["dpkg-deb", "--fsys-tarfile", deb], stdout=subprocess.PIPE) as unpack,
        tarfile.open(fileobj=unpack.stdout, mode="r|") as archive,
    ):
        for member in archive:
            path = PurePosixPath(member.name)
            if not path.match("./usr/share/man/man?/*"):
                continue
            name = f"{path.parent.name}/{path.name.removesuffix('.gz')}"
            if member.issym() or member.islnk():
                target = PurePosixPath(member.linkname)
                folder = target.parent.name if "man" in target.parent.name else path.parent.name
                files[name] = f".so {folder}/{target.name.removesuffix('.gz')}"
            elif (file := archive.extractfile(member)) is not None:
                raw = file.read()
                raw = gzip.decompress(raw) if path.suffix == ".gz" else raw
                try:
                    files[name] = raw.decode("utf-8")
                except UnicodeDecodeError:
                    files[name] = raw.decode("latin-1")
    return files


def pages(package: str, files: Mapping[str, str]) -> dict[str, Page]:
    """The pages of a package by item id, 'package/printf.3'; links add names to the page they lead to."""
    found: dict[str, Page] = {}
    first: dict[str, Page] = {}  # some packages ship a copy of a page under each of its names
    for name, source in sorted(files.items()):
        if target(source):
            continue
        names, description = roff.names_and_description(source)
        stem, _, section = PurePosixPath(name).name.rpartition(".")
        if not description or source in first:
            continue
        shown = list({n.lower(): n for n in reversed(names)}.values())[::-1]
        if not {stem.lower(), stem.partition(".")[0].lower()} & {n.lower() for n in names}:
            shown.insert(0, stem)
        found[f"{package}/{stem}.{section}"] = first[source] = Page(
            package,
            section,
            text=f"{', '.join(shown[:MAX_NAMES])}: {description}",
            names=list(dict.fromkeys([*names, stem])),
            references=roff.references(source),
        )
    for name in sorted(files):
        end, steps = name, 0
        while (link := target(files.get(end, ""))) and steps < 5:
            end, steps = link, steps + 1
        page = first.get(files.get(end, ""))
        alias = PurePosixPath(name).name.rpartition(".")[0]
        if page and alias not in page.names:
            page.names.append(alias)
    return found


def target(source: str) -> str:
    """'man3/printf.3' where the source only leads there, else ''."""
    for line in source.splitlines():
        if line.startswith(".so "):
            path = PurePosixPath(line[4:].strip().removesuffix(".gz"))
            return f"{path.parent.name or 'man' + path.suffix[1:2]}/{path.name}"
        if line.strip() and not line.startswith(('.\\"', "'\\\"")):
            break
    return ""


def texts(catalog: Mapping[str, Page]) -> tuple[dict[str, str], dict[str, str]]:
    """Item texts, each once, and for every page the item that stands for its text."""
    first: dict[str, str] = {}
    stands = {}
    for item, page in sorted(catalog.items()):
        stands[item] = first.setdefault(page.text, item)
    return {item: text for text, item in first.items()}, stands


def listed(catalog: Mapping[str, Page], stands: Mapping[str, str]) -> dict[str, list[str]]:
    """The items that each item's SEE ALSO names, where they are in the catalog.

    A name that several pages bear is taken as the one of the same package, then of the very section.
    """
    bearers = collections.defaultdict(list)
    for item, page in sorted(catalog.items()):
        for name in page.names:
            bearers[name, page.section[0]].append(item)
    found: dict[str, dict[str, None]] = collections.defaultdict(dict)
    for item, page in sorted(catalog.items()):
        for name, section in page.references:
            candidates = bearers.get((name, (section or page.section)[0]), [])
            if not section:  # a bare word: only a neighbour's name is believed
                candidates = [c for c in candidates if catalog[c].package == page.package]
            if candidates:
                best = min(
                    candidates,
                    key=lambda c: (catalog[c].package != page.package, catalog[c].section != section, c),
                )
                if stands[best] != stands[item]:
                    found[stands[item]][stands[best]] = None
    return {item: list(names) for item, names in found.items() if len(names) <= LONGEST_LIST}


def main() -> None:
    options = layout.arguments(__doc__, steps=40)
    names = PACKAGES.read_text(encoding="utf-8").split()
    catalog: dict[str, Page] = {}
    for name, deb in zip(names, layout.debs(names, options.packages), strict=True):
        catalog |= pages(name, manual_files(deb))
    items, stands = texts(catalog)
    lists = listed(catalog, stands)
    popularity = collections.Counter(item for members in lists.values() for item in members)
    feedback = {q: [i for i in members if popularity[i] < MOST_POPULAR] for q, members in lists.items()}
    feedback = {q: sorted(members) for q, members in feedback.items() if members}

    relevant = {q: dict.fromkeys(members) for q, members in feedback.items()}
    for item, members in sorted(lists.items()):
        for query in members:
            if query in relevant:
                relevant[query][item] = None
    judged = {q: list(members)[:MOST_RELEVANT] for q, members in relevant.items()}

    splits = layout.split(feedback, train=0.28, test=0.12)
    layout.write(options.out, TITLE, items, splits, feedback, judged)
    if not options.no_model:
        import deployed  # heavy, and not needed for the data

        deployed.finetune(options.out, steps=options.steps)


if __name__ == "__main__":
    main()
