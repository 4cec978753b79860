"""Make the sample world: a small product search, its feedback and its ground truth, in BEIR's layout.

    python sample_data/make.py [--out DIR]

The same bytes every time. An item is a concept with attribute values; its title and description name
them with whichever words its seller fancied. A query asks for a concept (or for a need that several
concepts serve) with a constraint or two, in the shopper's words. Relevance is decided on concepts and
values, never on words. Feedback is what shoppers clicked among what a search engine showed them, and
that engine goes by words.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import re
import tomllib
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")

HERE = Path(__file__).parent
SEED = 20240614
N_ITEMS = 4000
SPLITS = {"base": 600, "train": 600, "test": 300}
# Where the clicks of a split come from: the share that came from browsing a category page instead of
# searching, and whether the engine of that time already knew some synonyms.
BROWSED = {"base": 0.06, "train": 0.15, "test": 0.15}
KNOWS_SYNONYMS = {"base": False, "train": True, "test": True}
SHOWN = 40  # results a shopper looks through
RELEVANT_RANGE = (8, 160)  # queries that fewer or more items answer are left out
WORD = re.compile(r"[a-z0-9']+")
FUNCTION_WORDS = frozenset(
    "a an and at for from in into my of on or out the to up with".split()  # noqa: SIM905
)


@dataclass(frozen=True)
class Item:
    """One product: what it is, and what its page says."""

    concept: str
    values: dict[str, frozenset[str]]
    title: str
    text: str


@dataclass(frozen=True)
class Query:
    """What a shopper wants (any of `concepts`, with every value in `wants`), and the words they typed."""

    text: str
    concepts: frozenset[str]
    wants: dict[str, str]


class Dice:
    """Random picks built on `random()` alone, the one call whose sequence Python promises to keep."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed).random

    def chance(self, probability: float) -> bool:
        """Whether an event of this probability happens."""
        return self._random() < probability

    def below(self, n: int) -> int:
        """A whole number from 0 to n - 1."""
        return int(self._random() * n)

    def pick(self, choices: Sequence[T]) -> T:
        """One of the choices, all alike."""
        return choices[self.below(len(choices))]

    def weighted(self, choices: Sequence[T], weights: Sequence[float]) -> T:
        """One of the choices, by weight."""
        mark = self._random() * sum(weights)
        for choice, weight in zip(choices, weights, strict=True):
            mark -= weight
            if mark < 0:
                return choice
        return choices[-1]

    def favour_first(self, choices: Sequence[T], steepness: float) -> T:
        """One of the choices, the earlier the likelier."""
        return self.weighted(choices, [(1 + n) ** -steepness for n in range(len(choices))])

    def shuffled(self, choices: Iterable[T]) -> list[T]:
        """All choices in random order."""
        left = list(choices)
        for n in range(len(left) - 1, 0, -1):
            other = self.below(n + 1)
            left[n], left[other] = left[other], left[n]
        return left


def words(text: str) -> set[str]:
    """The content words of a text, without a plural's s: what the lexical engine matches."""
    found = (word.removesuffix("'s") for word in WORD.findall(text.lower()))
    return {w[:-1] if len(w) > 3 and w.endswith("s") else w for w in found if w not in FUNCTION_WORDS}


# -- items ---------------------------------------------------------------------------------------


def draw_values(concept: dict[str, Any], axes: Iterable[str], dice: Dice) -> dict[str, frozenset[str]]:
    """The attribute values an item of the concept has; it may suit two uses, and has one of all else."""
    values = {}
    for axis in axes:
        if axis not in concept:
            continue
        own = {dice.favour_first(concept[axis], 0.4)}
        if axis == "use" and dice.chance(0.6):
            own.add(dice.pick(concept[axis]))
        values[axis] = frozenset(own)
    return values


def write_page(
    concept: dict[str, Any], values: dict[str, frozenset[str]], vocabulary: dict[str, Any], dice: Dice
) -> tuple[str, str]:
    """A title and a description in one seller's words.

    What the title leaves unsaid the description mostly says; about one attribute in ten is not written
    anywhere (it is in the photograph).
    """

    def say(axis: str, value: str) -> str:
        return dice.favour_first(vocabulary["values"][axis][value], 0.8)

    name = dice.favour_first(concept["names"], 0.8)
    said: dict[str, str] = {}
    sentences = []
    for axis, own in values.items():
        for value in sorted(own):
            spoken = say(axis, value)
            if dice.chance(0.2 if axis == "use" else 0.6):
                said[axis] = spoken
            elif dice.chance(0.75):
                frame = {
                    "use": "Suits {}",
                    "colour": "Comes in {}",
                    "material": "Made of {}",
                    "size": "A {} model",
                }
                sentences.append(frame.get(axis, "A {} line").format(spoken))
    front = [said[axis] for axis in ("audience", "size", "material") if axis in said]
    core = " ".join([*front, name])
    if "colour" in said:
        core = f"{said['colour']} {core}" if dice.chance(0.5) else f"{core} in {said['colour']}"
    if "use" in said:
        core += f" for {said['use']}"
    brand = dice.pick(vocabulary["brands"])
    noise = f" {dice.pick(vocabulary['title_noise'])}" if dice.chance(0.4) else ""
    title = f"{brand}{noise} {core}"
    traits = dice.shuffled(concept["traits"])[: 1 + dice.below(2)]
    sentences.extend(trait.capitalize() for trait in traits)
    # Some sellers repeat the product under another of its names, to be found by it.
    if dice.chance(0.1):
        sentences.append(f"Our favourite {dice.pick(concept['names'])}")
    return title, ". ".join(dice.shuffled(sentences)) + "."


def make_items(vocabulary: dict[str, Any], dice: Dice) -> list[Item]:
    """The catalog, in no particular order; some concepts are four times as common as others."""
    concepts = vocabulary["concept"]
    share = [0.5 + 1.5 * dice.below(1000) / 1000 for _ in concepts]
    items = []
    for _ in range(N_ITEMS):
        concept = dice.weighted(concepts, share)
        values = draw_values(concept, vocabulary["values"], dice)
        items.append(Item(concept["name"], values, *write_page(concept, values, vocabulary, dice)))
    return items


# -- queries and ground truth --------------------------------------------------------------------


def phrase_query(name: str, wants: dict[str, str], vocabulary: dict[str, Any], dice: Dice) -> str:
    """A query for the name with what is wanted, in one shopper's words."""
    spoken = {axis: dice.pick(vocabulary["values"][axis][value]) for axis, value in wants.items()}
    front = [spoken[axis] for axis in ("size", "audience", "colour", "material") if axis in spoken]
    # "for her" goes behind the noun, "kids" before it.
    behind = [part for part in front if part.startswith("for ")]
    text = " ".join([*[part for part in front if part not in behind], name, *behind])
    if "use" in spoken:
        text += f" for {spoken['use']}"
    if dice.chance(0.25):
        text = f"{dice.pick(vocabulary['query_noise'])} {text}"
    return text


def draw_query(
    vocabulary: dict[str, Any], by_name: dict[str, Any], popularity: Counter[str], dice: Dice
) -> Query:
    """A query for one concept, or now and then for a need."""
    if dice.chance(0.1):
        need = dice.pick(vocabulary["need"])
        concepts, names = need["concepts"], need["names"]
        # A need reads well with an occasion ("lighting for students"), not with a colour or a material.
        axes = ["use"]
        n_wants = 1
        choices = {"use": sorted({use for concept in concepts for use in by_name[concept]["use"]})}
    else:
        concept = by_name[dice.weighted(list(by_name), [popularity[name] for name in by_name])]
        concepts, names = [concept["name"]], concept["names"]
        if "slang" in concept and dice.chance(0.12):
            names = concept["slang"]
        axes = [axis for axis in vocabulary["values"] if axis in concept]
        n_wants = dice.weighted([0, 1, 2], [0.2, 0.65, 0.15])
        choices = {axis: concept[axis] for axis in axes}
    wanted = dice.shuffled(axes)[:n_wants]
    wants = {axis: dice.pick(choices[axis]) for axis in wanted}
    return Query(phrase_query(dice.pick(names), wants, vocabulary, dice), frozenset(concepts), wants)


def is_relevant(query: Query, item: Item) -> bool:
    """The world's ground truth."""
    return item.concept in query.concepts and all(
        value in item.values.get(axis, ()) for axis, value in query.wants.items()
    )


def make_queries(
    vocabulary: dict[str, Any], items: Sequence[Item], dice: Dice
) -> tuple[list[Query], list[list[int]]]:
    """Distinct queries, and for each the rows of all items that answer it."""
    by_name = {concept["name"]: concept for concept in vocabulary["concept"]}
    rows: dict[str, list[int]] = defaultdict(list)
    for row, item in enumerate(items):
        rows[item.concept].append(row)
    popularity = Counter(item.concept for item in items)
    queries: dict[str, Query] = {}
    relevant: list[list[int]] = []
    while len(queries) < sum(SPLITS.values()):
        query = draw_query(vocabulary, by_name, popularity, dice)
        answers = sorted(
            row for concept in query.concepts for row in rows[concept] if is_relevant(query, items[row])
        )
        if query.text not in queries and RELEVANT_RANGE[0] <= len(answers) <= RELEVANT_RANGE[1]:
            queries[query.text] = query
            relevant.append(answers)
    return list(queries.values()), relevant


# -- feedback ------------------------------------------------------------------------------------


class Engine:
    """The search that shoppers used: idf-weighted shared words, titles counting double.

    Given synonyms, it also matches words of the same meaning, for less: a stand-in for the deployed
    dense model, which learned part of them.
    """

    def __init__(self, items: Sequence[Item], synonyms: dict[str, set[str]] | None = None) -> None:
        self._synonyms = synonyms or {}
        self._postings: dict[str, list[tuple[int, float]]] = defaultdict(list)
        for row, item in enumerate(items):
            title = words(item.title)
            page = title | words(item.text)
            # A long page matches by chance; its words count for a little less.
            length = math.sqrt(len(page))
            for word in sorted(page):
                self._postings[word].append((row, (2.0 if word in title else 1.0) / length))
        self._idf = {word: math.log(1 + len(items) / len(rows)) for word, rows in self._postings.items()}

    def search(self, text: str, dice: Dice) -> list[int]:
        """The rows shown for a query, best first; the rest of a real engine's signals are noise here."""
        weight: dict[str, float] = {}
        for word in sorted(words(text)):
            weight[word] = 1.0
            for other in sorted(self._synonyms.get(word, ())):
                weight.setdefault(other, 0.4)
        scores: dict[int, float] = defaultdict(float)
        for word, boost in weight.items():
            for row, count in self._postings.get(word, ()):
                scores[row] += boost * count * self._idf[word]
        # Rounded, so that the last digit of a platform's log decides nothing.
        noisy = {
            row: round(score * (0.85 + 0.3 * dice.below(1000) / 1000), 6) for row, score in scores.items()
        }
        return sorted(noisy, key=lambda row: (-noisy[row], row))[:SHOWN]


def known_synonyms(vocabulary: dict[str, Any], dice: Dice) -> dict[str, set[str]]:
    """Words of the same meaning; of all pairs of names, the half that the deployed model picked up."""
    groups = [concept["names"] for concept in vocabulary["concept"]]
    groups += [names for axis in vocabulary["values"].values() for names in axis.values()]
    synonyms: dict[str, set[str]] = defaultdict(set)
    for names in groups:
        for n, one in enumerate(names):
            for other in names[:n]:
                if dice.chance(0.5):
                    only_one, only_other = words(one) - words(other), words(other) - words(one)
                    for word in only_one:
                        synonyms[word] |= only_other
                    for word in only_other:
                        synonyms[word] |= only_one
    return synonyms


def clicks(shown: Sequence[int], relevant: Sequence[int], browsed: float, dice: Dice) -> list[int]:
    """What one query's shoppers clicked: high up, mostly relevant; a share found by browsing instead."""
    answers = set(relevant)
    appeal = {row: (1 + rank) ** -0.4 * (1.0 if row in answers else 0.05) for rank, row in enumerate(shown)}
    clicked: list[int] = []
    for _ in range(2 + dice.below(5)):
        left = [row for row in appeal if row not in clicked]
        if dice.chance(browsed) or not left:
            row = dice.pick(relevant)
        else:
            row = dice.weighted(left, [appeal[row] for row in left])
        if row not in clicked:
            clicked.append(row)
    return clicked


# -- files ---------------------------------------------------------------------------------------


def write_rows(path: Path, rows: Iterable[dict[str, str]]) -> None:
    """JSON lines, the same bytes on every platform."""
    path.write_bytes("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode())


def write_pairs(path: Path, pairs: Iterable[tuple[str, str]]) -> None:
    """Query and item ids as BEIR's qrels."""
    lines = ["query-id\tcorpus-id\tscore\n", *(f"{query}\t{item}\t1\n" for query, item in pairs)]
    path.write_bytes("".join(lines).encode())


def make(out: Path) -> None:
    """Make every file of the world in a folder."""
    vocabulary = tomllib.loads((HERE / "vocabulary.toml").read_text(encoding="utf-8"))
    items = make_items(vocabulary, Dice(SEED))
    queries, relevant = make_queries(vocabulary, items, Dice(SEED + 1))
    item_ids = [f"p{row:04d}" for row in range(len(items))]
    query_ids = [f"q{row:04d}" for row in range(len(queries))]

    (out / "qrels").mkdir(parents=True, exist_ok=True)
    write_rows(
        out / "corpus.jsonl",
        ({"_id": i, "title": item.title, "text": item.text} for i, item in zip(item_ids, items, strict=True)),
    )
    write_rows(
        out / "queries.jsonl",
        ({"_id": q, "text": query.text} for q, query in zip(query_ids, queries, strict=True)),
    )
    dice = Dice(SEED + 2)
    engines = {False: Engine(items), True: Engine(items, known_synonyms(vocabulary, dice))}
    order = dice.shuffled(range(len(queries)))
    rows_of: dict[str, list[int]] = {}
    for split, size in SPLITS.items():
        rows_of[split], order = sorted(order[:size]), order[size:]
        engine = engines[KNOWS_SYNONYMS[split]]
        pairs = []
        for row in rows_of[split]:
            shown = engine.search(queries[row].text, dice)
            clicked = clicks(shown, relevant[row], BROWSED[split], dice)
            pairs += [(query_ids[row], item_ids[item]) for item in clicked]
        write_pairs(out / "qrels" / f"{split}.tsv", pairs)
    # The judge knows only the queries that are finetuned on and evaluated.
    judged = sorted(rows_of["train"] + rows_of["test"])
    write_pairs(
        out / "judgements.tsv", ((query_ids[row], item_ids[item]) for row in judged for item in relevant[row])
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Make the sample world.")
    parser.add_argument("--out", type=Path, default=HERE, help="folder to write to")
    make(parser.parse_args().out)
