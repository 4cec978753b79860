"""`novelret train`: finetune the query encoder of a deployed retriever against its frozen items.

MODEL/
  modules.json, …       the finetuned query encoder, a sentence-transformers folder
  README.md             model card
  log.jsonl             one line every so many steps; tensorboard/ holds the same
  frontier.parquet      every validated point; frontier.svg and curves.svg show the best
  checkpoints/step-N/   the best checkpoints (--keep)
  judgements.parquet    what was asked during training (--judge)
  queries.npy           hashes of the split's texts, so that eval can tell what was trained on
"""

from __future__ import annotations

import os
import shutil
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from novelret import encode
from novelret.artifacts import (
    Manifest,
    check_output,
    fingerprint_of,
    hash_texts,
    is_kind,
    open_output,
    read_json,
    read_manifest,
    write_config,
    write_json,
    write_manifest,
)
from novelret.data.split import Split, load_split
from novelret.errors import UserError
from novelret.evaluate.chart import Mark, scatter
from novelret.index import (
    Index,
    base_lists,
    base_query_embeddings,
    finetuned_query_embeddings,
    load_finetuned,
    open_deployed,
    pooled_lists,
)
from novelret.label.judge import make_judge, split_judge
from novelret.label.label import asked_like
from novelret.label.labels import join_labels, open_labels
from novelret.label.table import LabelTable, empty_table, make_table
from novelret.memory import memory_modules
from novelret.progress import Reporter
from novelret.train import checkpoint
from novelret.train.card import model_card
from novelret.train.choice import say_choice
from novelret.train.config import LIST_OBJECTIVES, TrainConfig, check_config
from novelret.train.curves import curves
from novelret.train.judging import Judging
from novelret.train.log import check_wandb, read_log
from novelret.train.loop import Run, run_steps, validate_blends
from novelret.train.matrix import open_matrix
from novelret.train.memorise import make_memory
from novelret.train.policy import check_embeddings
from novelret.train.processes import Processes, join
from novelret.train.rewards import load_reward
from novelret.train.states import Material, gather_material
from novelret.train.tower import Tower, adapter_tower, full_tower, lora_tower
from novelret.train.trust import weigh_labels
from novelret.train.validation import (
    Point,
    Validation,
    best_first,
    hold_back,
    keeps_budget,
    known_pairs,
    pareto,
    pareto_set,
    worth_showing,
)

_NOT_IDENTITY = ("data", "index", "labels", "init", "store", "device", "log_every", "micro_batch", "wandb")
_NOT_IDENTITY_OF_JUDGE = ("concurrency", "timeout", "rpm", "tpm", "max_requests", "max_cost", "price")


@dataclass(frozen=True)
class Trained:
    """What a run gave.

    Attributes:
        folder: the MODEL folder.
        chosen: the validation point of the saved weights; None without validation queries.
        points: every validation point, step 0 (the start) first.
    """

    folder: Path
    chosen: Point | None
    points: list[Point]


def train_model(
    config: TrainConfig, out: Path, *, force: bool = False, report: Reporter | None = None
) -> Trained:
    """Run a training and write the MODEL artifact; goes on from the last validation when it was killed.

    Under `torchrun`, all processes train together and the first one writes.

    Raises:
        UserError: unusable settings, data, labels or output; a loss that is no number.
    """
    check_output(out, force=force)
    check_wandb(config.wandb)
    if config.judge is not None:
        _check_judge(config)
    with join(encode.pick_device(config.device)) as processes:
        report = (report if processes.is_first else None) or Reporter()
        return _train(config, out, processes, force=force, report=report)


@dataclass(frozen=True)
class _Labels:
    table: LabelTable
    judges: list[str]


@dataclass(frozen=True)
class _Inputs:
    """What a training is made from, checked one against another; `fingerprints` by the name of each."""

    indexes: list[Index]
    split: Split
    labels: _Labels
    model: encode.SentenceTransformer
    fingerprints: dict[str, str]


@dataclass(frozen=True)
class _Prepared:
    """What a process trains with; `held_back` counts the validation queries of all processes."""

    material: Material
    validation: Validation | None
    tower: Tower
    held_back: int


def _train(config: TrainConfig, out: Path, processes: Processes, *, force: bool, report: Reporter) -> Trained:
    inputs = _open_inputs(config, processes.device)
    index = inputs.indexes[0]
    settings = _identity(config, inputs.fingerprints)
    prepared = _prepare(config, inputs, processes, report)
    items = open_matrix(index.embeddings, processes.device)

    def run_in(folder: Path) -> tuple[list[Point], Point | None]:
        judging = None
        if config.judge is not None:
            judging = Judging(config, index, prepared.material.split, folder, processes, report)
        run = Run(
            config, prepared.tower, prepared.material, prepared.validation, index, items, folder, processes,
            judging, report,
        )  # fmt: skip
        points, steps = run_steps(run)
        validate_blends(run, points, steps)
        spent = judging.finish() if judging is not None else None
        order = best_first(points, config.max_recall_drop)
        chosen = order[0] if order else None
        if processes.is_first:
            if chosen is not None:
                say_choice(chosen, points, prepared.held_back, config, report)
            _write(run, folder, inputs, points, order, steps, spent)
        return points, chosen

    if processes.is_first:
        with open_output(out, fingerprint_of(settings), force=force, settings=settings) as folder:
            processes.wait()
            points, chosen = run_in(folder)
    else:
        processes.wait()
        points, chosen = run_in(out.with_name(out.name + ".partial"))
    processes.wait()
    return Trained(out, chosen, points)


def _open_inputs(config: TrainConfig, device: str) -> _Inputs:
    indexes = open_deployed(config.indexes, config.data)
    index = indexes[0]
    check_config(config, len(index))
    split = load_split(
        config.data, config.split, index.catalog, ignore_identical_ids=config.ignore_identical_ids
    )
    fingerprints = {"index": index.manifest.fingerprint, "split": split.fingerprint}
    fingerprints |= {f"index {n}": more.manifest.fingerprint for n, more in enumerate(indexes[1:], 2)}
    labels = _load_labels(config, indexes, split, fingerprints)
    model = load_finetuned(config.init, index, device) if config.init else index.query_encoder(device)
    if config.init:
        fingerprints["init"] = encode.fingerprint_encoder(model)
    check_embeddings(index.embeddings, normalized=index.normalized, what=str(index.folder / "embeddings.npy"))
    return _Inputs(indexes, split, labels, model, fingerprints)


def _prepare(config: TrainConfig, inputs: _Inputs, processes: Processes, report: Reporter) -> _Prepared:
    index, whole, device = inputs.indexes[0], inputs.split, processes.device
    if not processes.is_first:
        processes.wait()  # the first one searches, the others read what it found
    lists, _ = base_lists(index, whole, min(config.depth, len(index)), device=device, report=report)
    pool = pooled_lists(inputs.indexes, whole, config.base_depth, device=device, report=report)
    train_rows, validation_rows = hold_back(whole, config.validation_fraction, config.seed)
    # Plain supervised training must not see judgements, not even to mask false negatives;
    # on the held-back queries they still measure what a checkpoint is worth.
    labelled = train_rows[:0] if config.objective == "supervised" else train_rows
    material = gather_material(
        whole.subset(train_rows),
        lists[train_rows],
        config.base_depth,
        _rows_of(inputs.labels, labelled, len(whole)),
        load_reward(config.reward),
        pool[train_rows],
    )
    _check_rewards(config, material)
    _warn_of_other_split(config, inputs, report)
    mine = np.array_split(validation_rows, processes.size)[processes.rank]
    if memory_modules([*inputs.model]):
        report.warn(
            f"--init {config.init}: its memory may hold the training queries themselves, which then look "
            "better served than queries that it never saw; better start from the deployed encoder"
        )
    tower = _make_tower(config, inputs.model, whole, train_rows, mine, material, index, device, report)
    if processes.is_first:
        processes.wait()
    if config.trust and not config.objective.startswith("supervised") and len(material.labels):
        embeddings = base_query_embeddings(index, whole, device=device, report=report)[train_rows]
        material = weigh_labels(material, embeddings, index.embeddings, config.seed, processes, report)
    validation = None
    if len(validation_rows):
        table = _rows_of(inputs.labels, mine, len(whole))
        split = whole.subset(mine)
        known = known_pairs(split, table, config.recall_of)
        validation = Validation(split, known, lists[mine, : config.base_depth], pool[mine], table)
    return _Prepared(material, validation, tower, len(validation_rows))


def _warn_of_other_split(config: TrainConfig, inputs: _Inputs, report: Reporter) -> None:
    """Say where the model to start from was trained on queries that are held back now."""
    if config.init is None or not is_kind(Path(config.init), "model"):
        return
    before = read_manifest(Path(config.init), "model")
    held_back = {name: before.config[name] for name in ("seed", "validation_fraction")}
    now = {name: getattr(config, name) for name in held_back}
    if before.inputs["split"] == inputs.split.fingerprint and held_back != now:
        report.warn(
            f"--init {config.init}: was trained with --seed {held_back['seed']} and --validation-fraction "
            f"{held_back['validation_fraction']}, so on some of the queries that are held back here, and "
            "looks better on them than it is; give the same two"
        )


def _check_judge(config: TrainConfig) -> None:
    """Refuse, before any work, a judge that cannot answer during training."""
    kind, _ = split_judge(str(config.judge))
    if kind == "openai-batch":
        raise UserError(
            f"--judge {config.judge}: batches are answered too late for training; use openai:MODEL"
        )
    if kind == "openai":
        make_judge(asked_like(config))  # a missing key, a bad prompt or price


def _identity(config: TrainConfig, inputs: dict[str, str]) -> dict[str, Any]:
    """What decides the result; a run is resumed only with the same."""
    left_out = _NOT_IDENTITY + _NOT_IDENTITY_OF_JUDGE
    return {name: value for name, value in asdict(config).items() if name not in left_out} | inputs


def _check_rewards(config: TrainConfig, material: Material) -> None:
    rewarded = config.objective in ("pg-ret", *LIST_OBJECTIVES) and config.judge is None
    if rewarded and len(material.positives) == 0:
        raise UserError(
            f"no labelled item beyond rank {config.base_depth} is relevant, so no state has a positive "
            "reward; label deeper base ranks (`novelret label --from base-novel --depth`), other sources "
            "(--from random, --from model:MODEL) or more queries"
        )


def _write(
    run: Run,
    folder: Path,
    inputs: _Inputs,
    points: list[Point],
    order: list[Point],
    steps: int,
    spent: dict[str, Any] | None,
) -> None:
    """The finished artifact, from the checkpoints of the run."""
    config, judges = run.config, inputs.labels.judges
    _save_checkpoints(run.tower, folder, order[: config.keep])
    chosen = order[0] if order else None
    if chosen is not None:
        checkpoint.load_weights(run.tower, folder, chosen.step, chosen.share, chosen.memory)
    finished = run.tower.finished()
    finished.save(str(folder), create_model_card=False)
    write_config(folder, config)
    write_json(folder / "validation.json", [asdict(point) for point in points])
    np.save(folder / "queries.npy", np.unique(hash_texts(inputs.split.query_texts)))
    card = model_card(
        config,
        run.index,
        judges,
        points,
        chosen,
        version("novelret"),
        own_modules=encode.has_own_modules(folder),
        has_memory=bool(memory_modules([*finished])),
    )
    (folder / "README.md").write_text(card, encoding="utf-8")
    picture = curves(read_log(folder), points, config.max_recall_drop)
    (folder / "curves.svg").write_text(picture, encoding="utf-8")
    if chosen is not None:
        _write_frontier(folder, points, chosen, config)
    shutil.rmtree(folder / "resume")
    facts = {
        "steps": steps,
        "chosen": None if chosen is None else asdict(chosen),
        "judges": list(dict.fromkeys([*judges, *([config.judge] if config.judge else [])])),
        "asked": spent,
        "false_positive_rate": run.material.floor,
        "mean_trust": float(run.material.trust.mean()) if len(run.material.trust) else None,
    }
    fingerprint = encode.fingerprint_encoder(finished)
    write_manifest(folder, Manifest("model", asdict(config), inputs.fingerprints, fingerprint, facts))


def _save_checkpoints(tower: Tower, folder: Path, points: list[Point]) -> None:
    """Whole encoders of some points; an adapter's frozen files lie once on disk, linked into each."""
    shutil.rmtree(folder / "checkpoints", ignore_errors=True)  # of a run that was killed here
    first: Path | None = None
    for point in points:
        checkpoint.load_weights(tower, folder, point.step, point.share, point.memory)
        path = folder / "checkpoints" / point.name
        finished = tower.finished()
        if first is None or not tower.frozen:
            finished.save(str(path), create_model_card=False)
            first = path
            continue
        folders = [module["path"] for module in read_json(first / "modules.json")]
        own = dict(list(zip(folders, finished, strict=True))[tower.frozen :])
        shutil.copytree(first, path, copy_function=_link, ignore=shutil.ignore_patterns(*own))
        for place, module in own.items():
            (path / place).mkdir()
            module.save(str(path / place))


def _link(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:  # not every file system can
        shutil.copy2(source, target)


def _write_frontier(folder: Path, points: list[Point], chosen: Point, config: TrainConfig) -> None:
    """Every validated point; drawn are the checkpoints and the best blends, the deployed recall dashed."""
    columns: dict[str, list[Any]] = {
        name: [getattr(point, name) for point in points] for name in Point.__dataclass_fields__
    }
    columns["within_budget"] = [keeps_budget(point, config.max_recall_drop) for point in points]
    columns["pareto"] = pareto(points)
    columns["chosen"] = [point is chosen for point in points]
    pq.write_table(pa.table(columns), folder / "frontier.parquet")
    best = pareto_set(points)
    marks = [
        Mark(point.name, point.recall, point.relevant_novel, point in best)
        for point in worth_showing(points, chosen)
    ]
    length = config.base_depth
    titles = (f"Recall@{length}", f"RelevantNovel@{length}")
    picture = scatter(marks, *titles, line_at=chosen.base_recall)
    (folder / "frontier.svg").write_text(picture, encoding="utf-8")


def _load_labels(config: TrainConfig, indexes: list[Index], split: Split, inputs: dict[str, str]) -> _Labels:
    if not config.label_folders:
        return _Labels(empty_table(len(indexes[0])), [])
    several = [open_labels(Path(folder), *indexes) for folder in config.label_folders]
    for n, labels in enumerate(several, 1):
        inputs["labels" if n == 1 else f"labels {n}"] = labels.manifest.fingerprint
    table = join_labels(several, split, indexes[0].catalog)
    return _Labels(table, [labels.judge for labels in several])


def _rows_of(labels: _Labels, rows: np.ndarray, n_queries: int) -> LabelTable:
    """The labels of some of the queries, renumbered to these."""
    table = labels.table
    new_row = np.full(n_queries, -1, dtype=np.int64)
    new_row[rows] = np.arange(len(rows))
    queries = new_row[table.query_rows]
    kept = queries >= 0
    grades = None if table.grades is None else table.grades[kept]
    return make_table(
        queries[kept], table.item_rows[kept], table.verdicts[kept], table.catalog_size, table.missing, grades
    )


def _make_tower(
    config: TrainConfig,
    model: encode.SentenceTransformer,
    whole: Split,
    train_rows: np.ndarray,
    validation_rows: np.ndarray,
    material: Material,
    index: Index,
    device: str,
    report: Reporter,
) -> Tower:
    if config.tune in ("full", "lora"):
        texts = (
            [whole.query_texts[row] for row in train_rows],
            [whole.query_texts[row] for row in validation_rows],
        )
        saving = config.gradient_checkpointing
        if config.tune == "full":
            return full_tower(model, *texts, config.precision, gradient_checkpointing=saving)
        return lora_tower(
            model,
            *texts,
            config.precision,
            rank=config.lora_rank,
            seed=config.seed,
            gradient_checkpointing=saving,
        )
    if config.init:
        embeddings = finetuned_query_embeddings(model, index, whole, device=device, report=report)
    else:
        embeddings = base_query_embeddings(index, whole, device=device, report=report)
    memory = None
    if config.tune == "memory":
        memory = make_memory(
            material, embeddings[train_rows], index.embeddings, config.memory_size, config.seed
        )
    return adapter_tower(
        model, embeddings[train_rows], embeddings[validation_rows], device, memory, config.seed
    )
