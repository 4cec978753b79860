"""What is evaluated: inputs read and checked, then every list searched."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from torch.nn import Module

from novelret import adapted, encode
from novelret.artifacts import (
    fingerprint_file,
)
from novelret.data.split import Split, load_split
from novelret.evaluate.config import BASE, EvalConfig, check_config
from novelret.evaluate.human import check_overlap
from novelret.evaluate.human_sample import read_sample
from novelret.evaluate.trec import read_run
from novelret.evaluate.weights import load_weights
from novelret.index import (
    Index,
    base_lists,
    base_query_embeddings,
    finetuned_query_embeddings,
    load_finetuned,
    open_deployed,
    pooled_lists,
)
from novelret.label.candidates import Candidates
from novelret.label.judge import Judge, make_judge, same_judge, split_judge
from novelret.label.judges.file import file_table
from novelret.label.table import LabelTable, empty_table
from novelret.membership import pairs_in, sorted_union
from novelret.memory import memory_modules
from novelret.progress import Reporter
from novelret.trained import MIRRORED, QUERIES, hash_queries, training_of


@dataclass(frozen=True)
class Gathered:
    """What is evaluated: inputs read and checked, and every list searched.

    Attributes:
        index: the deployed system.
        split: queries and held-out feedback.
        models: model name → its folder.
        found: name → rows and scores, the base first and max(L, K) deep.
        pool: (Q, W) int64, T_L: the top-L lists of all deployed models, −1 padded.
        known: verdicts that need no asking; None where an LLM judges.
        judge: that LLM, ready to be asked.
        people: human verdicts, where given.
        weights: (Q,) query frequencies, where given.
        inputs: fingerprints of everything that went in.
    """

    index: Index
    split: Split
    models: dict[str, str]
    found: dict[str, tuple[np.ndarray, np.ndarray | None]]
    pool: np.ndarray
    known: LabelTable | None
    judge: Judge | None
    people: LabelTable | None
    weights: np.ndarray | None
    inputs: dict[str, str]


def gather(config: EvalConfig, report: Reporter, *, sends: bool = True) -> Gathered:
    """Read and check everything, then search; what is wrong is said before hours of searching.

    `sends` is off where the judge will not be asked, for which it needs no key.
    """
    indexes = open_deployed(config.indexes, config.data)
    index = indexes[0]
    models, runs = check_config(config, len(index))
    split = load_split(
        config.data, config.split, index.catalog, ignore_identical_ids=config.ignore_identical_ids
    )
    device = encode.pick_device(config.device)
    inputs = {"index": index.manifest.fingerprint, "split": split.fingerprint}
    inputs |= {f"index {n}": more.manifest.fingerprint for n, more in enumerate(indexes[1:], 2)}
    inputs |= {what: fingerprint_file(path) for what, path in _files(config, runs).items()}
    weights = load_weights(config.data, split.query_ids, Path(config.weights) if config.weights else None)
    known = _known_verdicts(config, index, split, report)
    judge = None
    if known is None:
        judge = make_judge(str(config.judge), config, device=device, wait=config.wait, sends=sends)
    people = None
    if config.human is not None:
        sample = Path(config.human)
        people = read_sample(sample, split.query_ids, index.catalog, config.human_threshold, report)
    longest = max(config.k)
    read = {
        name: read_run(Path(path), split, index.catalog, longest, index.id_rank)
        for name, path in runs.items()
    }
    deployed = index.query_encoder(device) if models else None
    # A matrix is small and stays loaded from here on; whole encoders and memories are loaded again in turn.
    adapters: dict[str, list[Module]] = {}
    for name, path in models.items():
        model = load_finetuned(path, index, device)
        inputs[f"model {name}"] = encode.fingerprint_encoder(model)
        behind = adapted.modules_behind(model, deployed)
        if behind is not None and not memory_modules(behind):
            adapters[name] = behind
        _warn_of_training(name, path, config, split, report)
    # As deep as the models' where it matters how many are asked for; else once, deep enough for T_L too.
    depth = longest if index.faiss_index is not None else max(longest, config.base_depth)
    found: dict[str, tuple[np.ndarray, np.ndarray | None]] = {}
    found[BASE] = base_lists(index, split, depth, device=device, report=report)
    pool = pooled_lists(indexes, split, config.base_depth, device=device, report=report)
    for name, path in models.items():
        if name in adapters:
            embeddings = adapted.embed_behind(
                adapters[name],
                base_query_embeddings(index, split, device=device, report=report),
                normalized=index.normalized,
                device=device,
            )
        else:
            model = load_finetuned(path, index, device)
            embeddings = finetuned_query_embeddings(model, index, split, device=device, report=report)
        what = f"top lists of {name}"
        found[name] = index.search(
            embeddings, longest, split.excluded, device=device, report=report, what=what
        )
    for name, rows in read.items():
        found[name] = rows, None
        short = int((rows[:, -1] < 0).sum())
        if short:
            report.warn(
                f"{runs[name]}: fewer than {longest} items for {short} of the {len(split)} queries (none for "
                f"{int((rows[:, 0] < 0).sum())}); what is not there counts as not found"
            )
    if people is not None:
        check_overlap(Path(str(config.human)), people, [rows for rows, _ in found.values()])
    return Gathered(index, split, models, found, pool, known, judge, people, weights, inputs)


def _files(config: EvalConfig, runs: dict[str, str]) -> dict[str, Path]:
    """Files that go in beside the artifacts, by what they are."""
    files = {f"run {name}": Path(path) for name, path in runs.items()}
    if config.judge is not None and config.judge.startswith("file:"):
        files["judgements"] = Path(split_judge(config.judge)[1])
    files |= {
        what: Path(path) for what, path in (("human", config.human), ("weights", config.weights)) if path
    }
    return files


def _known_verdicts(config: EvalConfig, index: Index, split: Split, report: Reporter) -> LabelTable | None:
    """Verdicts that need no asking: a file's, or none without a judge; None where an LLM judges."""
    if config.judge is None:
        return empty_table(len(index))
    kind, name = split_judge(config.judge)
    if kind == "file":
        return file_table(
            Path(name), split.query_ids, index.catalog, config.missing, report, threshold=config.threshold
        )
    return None


def candidates_of(gathered: Gathered) -> Candidates:
    """Every (query, item) pair of every list, once."""
    size = len(gathered.index)
    pairs = np.empty(0, dtype=np.int64)
    for rows in (gathered.pool, *(rows for rows, _ in gathered.found.values())):
        pairs = sorted_union(pairs, pairs_in(rows, size))  # one after another: most are in several
    return Candidates(pairs // size, pairs % size, np.zeros(len(pairs), dtype=np.int16), ("eval",))


def _number(some: np.ndarray) -> str:
    return "all" if some.all() else f"{int(some.sum()):,}"


def _warn_of_training(name: str, path: str, config: EvalConfig, split: Split, report: Reporter) -> None:
    """Say what of its training makes a model look better than it is."""
    training = training_of(Path(path))
    if training is None:
        return
    texts = hash_queries(split.query_texts)
    seen = np.isin(texts, training.hashes(QUERIES))
    if seen.any():
        report.warn(
            f"{name} was trained on {_number(seen)} of these {len(split):,} "
            "queries, so its figures say little of others; evaluate on queries that it has not seen"
        )
    mirrored = ~seen & np.isin(texts, training.hashes(MIRRORED))
    if mirrored.any():
        report.warn(
            f"{name} was trained on {_number(mirrored)} of these {len(split):,} queries as items, by pairs "
            "known the other way round: its figures hold where these are known of the queries served, too, "
            "and say little of others (train with --mirror never to see)"
        )
    if config.judge is None or config.judge.startswith("file:"):
        return
    if any(same_judge(judge, config.judge) for judge in training.judges):
        report.warn(
            f"{name} was trained on labels of {config.judge}, which now judges it; "
            "another, stronger judge would be fairer"
        )
