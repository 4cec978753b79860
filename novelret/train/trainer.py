"""`novelret train`: finetune the query encoder of a deployed retriever against its frozen items.

A plain loop instead of a trainer framework: the batch of a step is a function of (seed, step), items are
never encoded, and what a checkpoint is worth is a ranking on held-back queries.
"""

from __future__ import annotations

import json
import math
import shutil
import time
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from novelret import encode
from novelret.artifacts import (
    Manifest,
    check_output,
    fingerprint_of,
    open_output,
    read_json,
    write_config,
    write_json,
    write_manifest,
)
from novelret.data.split import Split, load_split
from novelret.errors import UserError
from novelret.evaluate.chart import Mark, scatter
from novelret.index import Index, base_lists, base_query_embeddings, embed_queries, load_finetuned, open_index
from novelret.label.labels import open_labels
from novelret.label.table import LabelTable, make_table
from novelret.progress import Reporter
from novelret.train.card import model_card
from novelret.train.config import LIST_OBJECTIVES, TrainConfig, check_config
from novelret.train.policy import Items, check_embeddings, entropy
from novelret.train.rewards import load_reward
from novelret.train.sampler import Key, draw_with_replacement
from novelret.train.states import POLICY, SOURCES, Batch, Material, draw_batch, gather_material
from novelret.train.step import StepLoss, batch_loss
from novelret.train.tower import Tower, adapter_tower, full_tower
from novelret.train.validation import Point, Validation, choose, hold_back, mean_recall, measure

_ENTROPY_QUERIES = 16
_NOT_IDENTITY = ("data", "index", "labels", "init", "device", "log_every", "micro_batch")


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

    Raises:
        UserError: unusable settings, data, labels or output; a loss that is no number.
    """
    report = report or Reporter()
    check_output(out, force=force)
    index = open_index(config.index, config.data)
    check_config(config, len(index))
    device = encode.pick_device(config.device)
    whole = load_split(
        config.data, config.split, index.catalog, ignore_identical_ids=config.ignore_identical_ids
    )
    inputs = {"index": index.manifest.fingerprint, "split": whole.fingerprint}
    labels = _load_labels(config, index, whole, inputs)
    model = load_finetuned(config.init, index, device) if config.init else index.query_encoder(device)
    if config.init:
        inputs["init"] = encode.fingerprint_encoder(model)
    check_embeddings(index.embeddings, normalized=index.normalized, what=str(index.folder / "embeddings.npy"))
    settings = {k: v for k, v in asdict(config).items() if k not in _NOT_IDENTITY} | inputs
    lists, _ = base_lists(index, whole, min(config.depth, len(index)), device=device, report=report)
    train_rows, validation_rows = hold_back(whole, config.validation_fraction, config.seed)
    material = gather_material(
        whole.subset(train_rows),
        lists[train_rows],
        config.base_depth,
        # Plain supervised training must not see judgements, not even to mask false negatives;
        # on the held-back queries they still measure what a checkpoint is worth.
        _rows_of(labels, train_rows[:0] if config.objective == "supervised" else train_rows, len(whole)),
        load_reward(config.reward),
    )
    validation = _validation(whole, validation_rows, lists, labels, config)
    tower = _make_tower(config, model, whole, train_rows, validation_rows, index, device, report)
    with open_output(out, fingerprint_of(settings), force=force, settings=settings) as folder:
        points = _run(config, tower, material, validation, index, folder, device, report)
        chosen = None
        if validation is not None:
            base_recall = mean_recall(validation.base_rows, validation.split)
            chosen = choose(points, base_recall, config.max_recall_drop)
            _load_weights(tower, folder / "resume" / "best.safetensors")
            _say_choice(chosen, base_recall, config, report)
        finished = tower.finished()
        finished.save(str(folder), create_model_card=False)
        write_config(folder, config)
        facts = {
            "steps": config.steps,
            "chosen": None if chosen is None else asdict(chosen),
            "judge": labels.judge,
        }
        fingerprint = encode.fingerprint_encoder(finished)
        write_json(folder / "validation.json", [asdict(point) for point in points])
        card = model_card(config, index, labels.judge, points, chosen, version("novelret"))
        (folder / "README.md").write_text(card, encoding="utf-8")
        if validation is not None:
            (folder / "frontier.svg").write_text(_frontier(points, validation, config), encoding="utf-8")
        shutil.rmtree(folder / "resume", ignore_errors=True)
        write_manifest(folder, Manifest("model", asdict(config), inputs, fingerprint, facts))
    return Trained(out, chosen, points)


def _run(
    config: TrainConfig,
    tower: Tower,
    material: Material,
    validation: Validation | None,
    index: Index,
    folder: Path,
    device: str,
    report: Reporter,
) -> list[Point]:
    """The loop: steps, log lines, validations, and a place to resume from after each validation."""
    parameters = [p for p in tower.module.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=config.peak_learning_rate, weight_decay=config.weight_decay)
    items: Items = index.embeddings
    if device != "cpu":
        items = torch.from_numpy(np.array(items)).to(device)  # gathers and passes read it at every step
    (folder / "resume").mkdir(exist_ok=True)
    points = _resume(tower, optimizer, folder)
    first = points[-1].step if points else 0
    if first:
        report.note(f"going on at step {first} of {config.steps}")
    _cut_log(folder / "log.jsonl", first)

    def validate(step: int) -> None:
        if validation is not None:
            points.append(measure(validation, tower.embed_validation(), index, step, device))
            best = choose(points, mean_recall(validation.base_rows, validation.split), config.max_recall_drop)
            _save_resume(tower, optimizer, folder, points, is_best=best.step == step)

    if not points:
        validate(0)
    with report.bar(f"training {config.objective}", config.steps) as advance, _LogFile(folder) as log:
        advance(first)
        for step in range(first, config.steps):
            began = time.perf_counter()
            batch = draw_batch(material, config, step)
            batch, loss, norm = _step(config, tower, optimizer, batch, material, items, step)
            if step % config.log_every == 0 or step + 1 == config.steps:
                taken = time.perf_counter() - began
                line = _log_line(batch, loss, norm, config, step)
                line["entropy"] = _entropy(tower, batch, material, items, config)
                log(line | {"step_time": round(taken, 5)})
            advance(1)
            if (step + 1) % config.steps_between_validations == 0 or step + 1 == config.steps:
                validate(step + 1)
    return points


def _step(
    config: TrainConfig,
    tower: Tower,
    optimizer: torch.optim.Optimizer,
    batch: Batch,
    material: Material,
    items: Items,
    step: int,
) -> tuple[Batch, StepLoss, float]:
    """One optimizer step; micro-batches add up to the same loss and gradient."""
    batch = _draw_policy_states(config, tower, batch, material, items, step)
    size = config.micro_batch or config.batch_size
    total, feedback, states = 0.0, 0.0, 0.0
    for start in range(0, len(batch.queries), size):
        rows = slice(start, min(start + size, len(batch.queries)))
        part = batch_loss(tower.embed(batch.queries[rows]), rows, batch, material, config, items, step)
        if part.loss.requires_grad:
            torch.autograd.backward(part.loss)
        total, feedback, states = total + part.loss.item(), feedback + part.feedback, states + part.states
    if not math.isfinite(total):
        raise UserError(
            f"step {step}: the loss is {total}; the last validated checkpoint is kept. "
            "Lower --learning-rate or raise --temperature"
        )
    parameters = [p for p in tower.module.parameters() if p.grad is not None]
    norm = float(torch.nn.utils.clip_grad_norm_(parameters, config.max_grad_norm)) if parameters else 0.0
    for group in optimizer.param_groups:
        group["lr"] = learning_rate(config, step)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return batch, StepLoss(torch.tensor(total), feedback, states), norm


def _draw_policy_states(
    config: TrainConfig, tower: Tower, batch: Batch, material: Material, items: Items, step: int
) -> Batch:
    """Draw the α share's items from the current policy over the whole catalog, and look up their rewards."""
    places = np.flatnonzero(batch.sources == POLICY)
    if len(places) == 0 or config.objective in LIST_OBJECTIVES:
        return batch
    queries = batch.queries[places]
    with torch.no_grad():
        embeddings = tower.embed(queries)
        excluded = torch.from_numpy(material.split.excluded[queries]).to(embeddings.device)
        key = Key(config.seed, step, torch.from_numpy(places).to(embeddings.device))
        draw = draw_with_replacement(embeddings, items, 1, key, config.sampling_temperature, excluded)
    items, rewards = batch.items.copy(), batch.rewards.copy()
    items[places] = draw.rows[:, 0].cpu().numpy()
    rewards[places] = material.rewards(queries, items[places])
    return Batch(batch.queries, items, batch.sources, rewards)


def _entropy(tower: Tower, batch: Batch, material: Material, items: Items, config: TrainConfig) -> float:
    """Mean entropy of the policy over the whole catalog, in nats, on a few of the batch's queries."""
    some = batch.queries[:: max(1, len(batch.queries) // _ENTROPY_QUERIES)][:_ENTROPY_QUERIES]
    with torch.no_grad():
        embeddings = tower.embed(some)
        excluded = torch.from_numpy(material.split.excluded[some]).to(embeddings.device)
        values = entropy(embeddings, items, config.temperature, excluded)
    return round(float(values.mean()), 4)


def learning_rate(config: TrainConfig, step: int) -> float:
    """Linear rise over the warm-up steps, then linear fall to 0: a function of the step alone."""
    rise = max(1, round(config.warmup * config.steps))
    scale = (step + 1) / rise if step < rise else (config.steps - step) / max(1, config.steps - rise)
    return config.peak_learning_rate * scale


def _log_line(batch: Batch, loss: StepLoss, norm: float, config: TrainConfig, step: int) -> dict[str, object]:
    known = ~np.isnan(batch.rewards)
    rewards = batch.rewards[known]
    by_source = {}
    for source, name in enumerate(SOURCES):
        of_source = batch.sources == source
        if of_source.any():
            rewarded = known & of_source & (np.nan_to_num(batch.rewards) != 0)
            by_source[f"rewarded/{name}"] = round(float(rewarded.sum() / of_source.sum()), 4)
            by_source[f"unknown/{name}"] = round(float((~known & of_source).sum() / of_source.sum()), 4)
    return {
        "step": step + 1,
        "loss": round(loss.loss.item(), 6),
        "loss/feedback": round(loss.feedback, 6),
        "loss/states": round(loss.states, 6),
        "reward": round(float(rewards.mean()), 4) if len(rewards) else None,
        "reward_std": round(float(rewards.std()), 4) if len(rewards) else None,
        **by_source,
        "grad_norm": round(norm, 6),
        "learning_rate": learning_rate(config, step),
    }


class _LogFile:
    """Append log lines to log.jsonl; whole lines only, at once."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "log.jsonl"

    def __enter__(self) -> _LogFile:
        self.file = self.path.open("a", encoding="utf-8")
        return self

    def __call__(self, line: dict[str, object]) -> None:
        self.file.write(json.dumps(line) + "\n")
        self.file.flush()

    def __exit__(self, *_: object) -> None:
        self.file.close()


def _cut_log(path: Path, step: int) -> None:
    """Drop the lines after the step that the run goes on from."""
    if path.is_file():
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
        path.write_text("".join(line for line in lines if json.loads(line)["step"] <= step), encoding="utf-8")


def _save_resume(
    tower: Tower, optimizer: torch.optim.Optimizer, folder: Path, points: list[Point], *, is_best: bool
) -> None:
    """Write weights, optimizer moments and points; the rename of points.json last makes it count."""
    resume, step = folder / "resume", points[-1].step
    weights = {name: tensor.detach().cpu().contiguous() for name, tensor in _trained(tower).items()}
    moments = {
        f"{number}/{name}": value.cpu().contiguous()
        for number, state in optimizer.state_dict()["state"].items()
        for name, value in state.items()
    }
    save_file(weights, resume / f"weights-{step}.safetensors")
    save_file(moments, resume / f"moments-{step}.safetensors")
    if is_best:
        shutil.copyfile(resume / f"weights-{step}.safetensors", resume / "best.tmp")
        (resume / "best.tmp").replace(resume / "best.safetensors")
    write_json(resume / "points.json", [asdict(point) for point in points])
    for old in resume.glob("*-*.safetensors"):
        if old.stem.split("-")[1] != str(step):
            old.unlink()


def _resume(tower: Tower, optimizer: torch.optim.Optimizer, folder: Path) -> list[Point]:
    resume = folder / "resume"
    if not (resume / "points.json").is_file():
        return []
    points = [Point(**point) for point in read_json(resume / "points.json")]
    step = points[-1].step
    _load_weights(tower, resume / f"weights-{step}.safetensors")
    state: dict[int, dict[str, Tensor]] = {}
    for name, value in load_file(resume / f"moments-{step}.safetensors").items():
        number, _, key = name.partition("/")
        state.setdefault(int(number), {})[key] = value
    optimizer.load_state_dict(optimizer.state_dict() | {"state": state})
    return points


def _trained(tower: Tower) -> dict[str, Tensor]:
    return {name: p for name, p in tower.module.named_parameters() if p.requires_grad}


def _load_weights(tower: Tower, path: Path) -> None:
    weights = load_file(path)
    with torch.no_grad():
        for name, parameter in _trained(tower).items():
            parameter.copy_(weights[name])


def _frontier(points: list[Point], validation: Validation, config: TrainConfig) -> str:
    """Every validated checkpoint: relevant novel items against recall, the deployed recall dashed."""
    marks = [Mark(f"step {point.step}", point.recall, point.relevant_novel) for point in points]
    length = config.base_depth
    line_at = mean_recall(validation.base_rows, validation.split)
    return scatter(marks, f"Recall@{length}", f"RelevantNovel@{length}", line_at=line_at)


@dataclass(frozen=True)
class _Labels:
    table: LabelTable
    judge: str | None


def _load_labels(config: TrainConfig, index: Index, split: Split, inputs: dict[str, str]) -> _Labels:
    if config.labels is None:
        none = np.empty(0, dtype=np.int64)
        return _Labels(make_table(none, none, none.astype(np.int8), len(index)), None)
    labels = open_labels(Path(config.labels), index)
    inputs["labels"] = labels.manifest.fingerprint
    return _Labels(labels.table(split.query_ids, index.catalog), str(labels.manifest.config["judge"]))


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


def _validation(
    whole: Split, rows: np.ndarray, lists: np.ndarray, labels: _Labels, config: TrainConfig
) -> Validation | None:
    if len(rows) == 0:
        return None
    table = _rows_of(labels, rows, len(whole))
    return Validation(whole.subset(rows), lists[rows, : config.base_depth], table)


def _make_tower(
    config: TrainConfig,
    model: encode.SentenceTransformer,
    whole: Split,
    train_rows: np.ndarray,
    validation_rows: np.ndarray,
    index: Index,
    device: str,
    report: Reporter,
) -> Tower:
    if config.tune == "full":
        texts = whole.query_texts
        return full_tower(
            model, [texts[r] for r in train_rows], [texts[r] for r in validation_rows], config.precision
        )
    if config.init:
        embeddings = embed_queries(model, whole.query_texts, report)
    else:
        embeddings = base_query_embeddings(index, whole, device=device, report=report)
    return adapter_tower(model, embeddings[train_rows], embeddings[validation_rows], device)


def _say_choice(chosen: Point, base_recall: float, config: TrainConfig, report: Reporter) -> None:
    if chosen.recall < base_recall * (1 - config.max_recall_drop) - 1e-12:
        report.warn(
            f"no checkpoint keeps recall within {config.max_recall_drop:.1%} of the deployed "
            f"{base_recall:.4f}; step {chosen.step} loses least"
        )
    elif chosen.step == 0:
        report.warn(
            f"every later checkpoint loses more than {config.max_recall_drop:.1%} of the deployed recall "
            f"{base_recall:.4f} on the held-back queries, or brings nothing: the saved encoder is the one it "
            "started from. Lower --learning-rate, try --tune adapter, or raise --max-recall-drop"
        )
    report.note(
        f"chosen: step {chosen.step} of {config.steps}, on the held-back queries: novelty "
        f"{chosen.novelty:.2f}, relevant novel {chosen.relevant_novel:.3f}, recall {chosen.recall:.4f} "
        f"(deployed {base_recall:.4f})"
    )
