"""What a training is made from, checked one against another, and what a process trains with."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from novelret import encode
from novelret.artifacts import fingerprint_file
from novelret.blocks import check_embeddings, read_rows
from novelret.data.split import Split, load_split
from novelret.errors import UserError
from novelret.index import (
    Index,
    base_lists,
    base_query_embeddings,
    finetuned_query_embeddings,
    load_finetuned,
    open_deployed,
    pooled_lists,
)
from novelret.label.judge import split_judge
from novelret.label.labels import join_labels, open_labels
from novelret.label.prompts import PROMPTS
from novelret.label.table import LabelTable, empty_table, make_table
from novelret.memory import memory_modules
from novelret.progress import Reporter
from novelret.train.config import (
    LIST_OBJECTIVES,
    TrainConfig,
    check_config,
    check_list_size,
    window_multiples,
)
from novelret.train.memorise import make_memory
from novelret.train.mirror import Mirror, find_mirror, with_mirror
from novelret.train.processes import Processes
from novelret.train.rewards import load_reward, reward_file
from novelret.train.states import Material, gather_material
from novelret.train.step import negative_ranks
from novelret.train.tower import Tower, adapter_tower, full_tower, lora_tower
from novelret.train.trust import weigh_labels
from novelret.train.validation import Validation, held_back_hashes, hold_back, known_pairs
from novelret.trained import training_of

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

_LIKE_COSINES = 3.0  # products of lengths up to which, and down to its inverse, temperatures suit
_SOME_ITEMS = 1_000  # whose lengths are looked at


@dataclass(frozen=True)
class Inputs:
    """What a training is made from.

    Attributes:
        indexes: of the deployed models, the one that is finetuned against first.
        split: all queries, with their feedback.
        labels: of these queries.
        judges: who gave them, one of each LABELS.
        fingerprints: of everything that goes in, by its name.
        mirror: the items that serve as queries too; None where none do.
    """

    indexes: list[Index]
    split: Split
    labels: LabelTable
    judges: list[str]
    fingerprints: dict[str, str]
    mirror: Mirror | None = None


@dataclass(frozen=True)
class Prepared:
    """What a process trains with; `held_back` counts the validation queries of all processes."""

    material: Material
    validation: Validation | None
    tower: Tower
    held_back: int


def open_inputs(config: TrainConfig, processes: Processes, report: Reporter) -> Inputs:
    """Read and check everything that goes in; the item matrix in the first process, which others wait for.

    Raises:
        UserError: something is missing, damaged or does not fit the rest.
    """
    indexes = open_deployed(config.indexes, config.data)
    index = indexes[0]
    check_config(config, len(index))
    split = load_split(
        config.data, config.split, index.catalog, ignore_identical_ids=config.ignore_identical_ids
    )
    check_list_size(config, len(index), split.excluded.longest)
    fingerprints = {"index": index.manifest.fingerprint, "split": split.fingerprint}
    fingerprints |= {f"index {n}": more.manifest.fingerprint for n, more in enumerate(indexes[1:], 2)}
    fingerprints |= {what: fingerprint_file(path) for what, path in _files(config).items()}
    table, judges = empty_table(len(index)), []
    if config.label_folders:
        several = [open_labels(Path(folder), *indexes) for folder in config.label_folders]
        for n, labels in enumerate(several, 1):
            fingerprints["labels" if n == 1 else f"labels {n}"] = labels.manifest.fingerprint
        table, judges = join_labels(several, split, index.catalog), [labels.judge for labels in several]
        table = table.without(split.excluded)
    if config.init:
        start = load_finetuned(config.init, index, processes.device)
        fingerprints["init"] = encode.fingerprint_encoder(start)
        _warn_of_start(config, start, split, report)
    _warn_of_window(config, report)
    if processes.is_first:  # where this fails the others, which wait for its search, are ended with it
        what = str(index.folder / "embeddings.npy")
        check_embeddings(index.embeddings, normalized=index.normalized, what=what)
    mirror = find_mirror(config, index.catalog, split, table, report)
    return Inputs(indexes, split, table, judges, fingerprints, mirror)


def _files(config: TrainConfig) -> dict[str, Path]:
    """Files that decide the result beside the artifacts, by what they are."""
    files = {}
    if config.judge is not None:
        kind, name = split_judge(config.judge)
        if kind == "file":
            files["judgements"] = Path(name)
        elif kind == "openai" and Path(config.prompt).is_file() and config.prompt not in PROMPTS:
            files["prompt file"] = Path(config.prompt)
    source = reward_file(config.reward)
    if source is not None:
        files["reward file"] = source
    return files


def prepare(
    config: TrainConfig, inputs: Inputs, fraction: float, processes: Processes, report: Reporter
) -> Prepared:
    """Find what this process trains with, while `fraction` of the queries is held back.

    Raises:
        UserError: no state has a reward, or the queries cannot be split like that.
    """
    index, whole, device = inputs.indexes[0], inputs.split, processes.device
    model = load_finetuned(config.init, index, device) if config.init else index.query_encoder(device)
    if not processes.is_first:
        processes.wait()  # the first one searches, the others read what it found
    found = _search(config, inputs, model, whole, device, report)
    mirror, mirrored = inputs.mirror, None
    if mirror is not None:
        mirrored = _search(config, inputs, model, mirror.split, device, report)
    is_weighed = config.trust and config.objective != "supervised" and len(inputs.labels) > 0
    deployed = None
    if is_weighed or not index.normalized:
        deployed = base_query_embeddings(index, whole, device=device, report=report)
    if deployed is not None and not index.normalized:
        _warn_of_temperature(config, index, deployed, report)
    if processes.is_first:
        processes.wait()
    train_rows, validation_rows = hold_back(whole, fraction, config.seed)
    # Plain supervised training must not see judgements, not even to mask false negatives;
    # on the held-back queries they still measure what a checkpoint is worth.
    labelled = train_rows[:0] if config.objective == "supervised" else train_rows
    material = gather_material(
        whole.subset(train_rows),
        _some(found.lists, train_rows),
        config.base_depth,
        _rows_of(inputs.labels, labelled, len(whole)),
        load_reward(config.reward),
        _some(found.pool, train_rows),
    )
    _check_rewards(config, material, 0 if inputs.labels is None else len(inputs.labels))
    if deployed is not None and is_weighed:
        material = weigh_labels(
            material, _some(deployed, train_rows), index.embeddings, config.seed, processes, report
        )
    own = material
    if mirror is not None and mirrored is not None:
        material = with_mirror(material, mirror, train_rows, mirrored.lists, mirrored.pool)
    mine = np.array_split(validation_rows, processes.size)[processes.rank]
    if found.embeddings is None:
        texts = [whole.query_texts[row] for row in mine]
        tower = _encoder_tower(config, model, material.split.query_texts, texts)
    else:
        of_train, memory = _some(found.embeddings, train_rows), None
        if config.tune == "memory":
            of_items = None if mirror is None else mirror.own[train_rows]
            memory = make_memory(own, of_train, index.embeddings, config.memory_size, config.seed, of_items)
        if mirrored is not None and mirrored.embeddings is not None:
            of_train = np.concatenate([of_train, mirrored.embeddings])
        tower = adapter_tower(model, of_train, found.embeddings[mine], device, memory, config.seed)
    validation = None
    if len(validation_rows):
        table = _rows_of(inputs.labels, mine, len(whole))
        split = whole.subset(mine)
        known = known_pairs(split, table, config.recall_of)
        pool = found.pool[mine]
        # T_L of the model that is finetuned against, searched as deep as the encoders will be.
        validation = Validation(split, known, pool[:, : config.base_depth], pool, table)
    return Prepared(material, validation, tower, len(validation_rows))


def _warn_of_window(config: TrainConfig, report: Reporter) -> None:
    window = window_multiples(config)
    last = round(window[1] * config.base_depth)
    if config.objective == "pg-ret" and config.loss == "boundary" and last > config.depth:
        first, end = negative_ranks(config)
        report.warn(
            f"--window {window[0]:g},{window[1]:g}: ends at rank {last}, beyond --depth {config.depth}; the "
            f"negatives are ranks {first + 1} to {end}, raise --depth for more"
        )


def _warn_of_temperature(config: TrainConfig, index: Index, queries: np.ndarray, report: Reporter) -> None:
    """Say where scores are dot products of a size that the temperatures, meant for cosines, do not suit."""
    some = np.linspace(0, len(index) - 1, min(len(index), _SOME_ITEMS)).astype(np.int64)
    lengths = (np.linalg.norm(rows, axis=1).mean() for rows in (queries, read_rows(index.embeddings, some)))
    scale = float(np.prod(list(lengths)))
    names = ("temperature", "sampling_temperature")
    as_it_comes = all(getattr(config, name) == getattr(TrainConfig, name) for name in names)
    if as_it_comes and not 1 / _LIKE_COSINES < scale < _LIKE_COSINES:
        alike = " ".join(
            f"--{name.replace('_', '-')} {getattr(TrainConfig, name) * scale:.2g}" for name in names
        )
        report.warn(
            f"{index.folder}: scores are dot products of vectors whose lengths multiply to {scale:.3g}; "
            f"temperatures are given for cosines, alike would be {alike}"
        )


def _warn_of_start(config: TrainConfig, start: SentenceTransformer, split: Split, report: Reporter) -> None:
    """Say where the model to start from knows queries that are held back now."""
    if memory_modules([*start]):
        report.warn(
            f"--init {config.init}: its memory may hold the training queries themselves, which then look "
            "better served than queries that it never saw; better start from the deployed encoder"
        )
    training = training_of(Path(str(config.init)))  # of a kept checkpoint, its MODEL's
    if training is None:
        return
    held_back = held_back_hashes(split, config.validation_fraction, config.seed)
    known = int(np.isin(held_back, training.trained_on()).sum())
    if known:
        report.warn(
            f"--init {config.init}: was trained on {known:,} of the {len(held_back):,} queries that are held "
            "back here, and looks better on them than it is; train it with --no-refit and the same --seed, "
            "--validation-fraction and queries, or begin with the deployed encoder"
        )


def _check_rewards(config: TrainConfig, material: Material, labels: int) -> None:
    """Refuse a training without a positive reward; `labels` are those of held-back queries as well."""
    if len(material.positives) or config.objective == "supervised":
        return
    draws_labelled = config.beta > 0 and config.draw != "plain" and config.objective not in LIST_OBJECTIVES
    without = ""
    if config.label_folders and not len(material.labels):
        raise UserError(
            f"--labels: hold no pair of the {len(material.split):,} training queries of split "
            f"{config.split}; "
            + (
                "what they hold is of held-back queries, so lower --validation-fraction"
                if labels
                else "were they made for another --split or --data?"
            )
        )
    if config.judge is not None or config.objective == "supervised-judged":
        if not draws_labelled:
            return
        without = "; or draw no labelled states (--draw plain, or --alpha and --gamma that add up to 1)"
    raise UserError(
        f"no labelled item beyond rank {config.base_depth} is relevant, so no state has a positive "
        "reward; label deeper base ranks (`novelret label --from base-novel --depth`), other sources "
        f"(--from random, --from model:MODEL) or more queries{without}"
    )


def _rows_of(table: LabelTable, rows: np.ndarray, n_queries: int) -> LabelTable:
    """The labels of some of the queries, renumbered to these."""
    new_row = np.full(n_queries, -1, dtype=np.int64)
    new_row[rows] = np.arange(len(rows))
    queries = new_row[table.query_rows]
    kept = queries >= 0
    grades = None if table.grades is None else table.grades[kept]
    return make_table(
        queries[kept], table.item_rows[kept], table.verdicts[kept], table.catalog_size, table.missing, grades
    )


@dataclass(frozen=True)
class _Found:
    """What the deployed models say of Q queries.

    Attributes:
        lists: (Q, depth) lists of the one that is finetuned against.
        pool: (Q, W) T_L, −1 padded.
        embeddings: (Q, d) float32 by the encoder that training starts from; None where it is trained.
    """

    lists: np.ndarray
    pool: np.ndarray
    embeddings: np.ndarray | None


def _search(
    config: TrainConfig,
    inputs: Inputs,
    model: SentenceTransformer,
    split: Split,
    device: str,
    report: Reporter,
) -> _Found:
    index, embeddings = inputs.indexes[0], None
    lists, _ = base_lists(index, split, min(config.depth, len(index)), device=device, report=report)
    pool = pooled_lists(inputs.indexes, split, config.base_depth, device=device, report=report)
    if config.tune in ("adapter", "memory"):
        if config.init:
            embeddings = finetuned_query_embeddings(model, index, split, device=device, report=report)
        else:
            embeddings = base_query_embeddings(index, split, device=device, report=report)
    return _Found(lists, pool, embeddings)


def _encoder_tower(
    config: TrainConfig, model: SentenceTransformer, texts: list[str], validation_texts: list[str]
) -> Tower:
    saving = config.gradient_checkpointing
    if config.tune == "full":
        return full_tower(model, texts, validation_texts, config.precision, gradient_checkpointing=saving)
    return lora_tower(
        model,
        texts,
        validation_texts,
        config.precision,
        rank=config.lora_rank,
        seed=config.seed,
        gradient_checkpointing=saving,
    )


def _some(array: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """Some rows of an array, or the array itself where they are all: it may be mapped, and large."""
    return array if len(rows) == len(array) else array[rows]
