"""The work of the quality benchmark: one training with its figures on the test split, kept as one JSON file.

Runs in worker processes that live as long as the benchmark, so that libraries are imported once in each.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
from quality_figures import Place, at_equal_recall

from novelret import (
    EvalConfig,
    IndexConfig,
    LabelConfig,
    TrainConfig,
    UserError,
    build_index,
    build_labels,
    evaluate_models,
    train_model,
)
from novelret.artifacts import fingerprint_file, fingerprint_of, read_json, write_json
from novelret.train.validation import Point

Job = dict[str, Any]
Result = dict[str, Any]


# The recall of what is known counts what the deployed lists hold as well.
SOURCES = {"feedback": ("base-novel",), "known": ("base-novel", "base-top")}


def labels_folder(folder: Path, length: int, depth: int, recall_of: str) -> Path:
    """Where the labels of a set lie."""
    return folder / f"labels-{length}-{depth}{'-top' if recall_of == 'known' else ''}"


def check_data(folder: Path, data: Path) -> None:
    """Refuse to put a set's runs beside those of other data of the same name.

    Raises:
        SystemExit: the set's files are not those that the folder's runs were made from.
    """
    files = sorted(path for path in data.rglob("*") if path.is_file())
    found = fingerprint_of({str(path.relative_to(data)): fingerprint_file(path) for path in files})
    told = folder / "data.json"
    if told.is_file() and read_json(told)["fingerprint"] != found:
        raise SystemExit(f"{folder}: holds runs on other data than {data} holds now; give another OUT")
    write_json(told, {"data": str(data), "fingerprint": found})


def pool_of(jobs: int) -> ProcessPoolExecutor:
    """Worker processes of one thread each."""
    os.environ["OMP_NUM_THREADS"] = "1"  # inherited; read when a worker imports its libraries
    return ProcessPoolExecutor(jobs, mp_context=get_context("spawn"), initializer=_one_thread)


def _one_thread() -> None:
    import faiss
    import torch

    torch.set_num_threads(1)
    faiss.omp_set_num_threads(1)


def run_all(pool: ProcessPoolExecutor, work: Any, jobs: list[Job], what: str) -> list[Result]:
    """Results of all jobs, in their order; those found on disk are not repeated."""
    results: dict[int, Result] = {}
    waiting = {}
    for number, job in enumerate(jobs):
        path = Path(job["path"])
        if path.is_file():
            results[number] = read_json(path)
        else:
            waiting[pool.submit(work, job)] = number
    if waiting:
        print(f"{what}: {len(results)} of {len(jobs)} found, {len(waiting)} to do", flush=True)
    began = time.perf_counter()
    for done, future in enumerate(as_completed(waiting), 1):
        result = results[waiting[future]] = future.result()
        left = (time.perf_counter() - began) / done * (len(waiting) - done)
        print(f"  [{done}/{len(waiting)}, {left / 60:.0f} min left] {result['says']}", flush=True)
    return [results[number] for number in range(len(jobs))]


def prepare(job: Job) -> Result:
    """Index and labels of a data set, and the deployed model's own figures on the test split."""
    data, folder, began = job["data"], Path(job["folder"]), time.perf_counter()
    judge = f"file:{Path(data) / 'judgements.tsv'}"
    index = folder / "index"
    if not index.is_dir():
        build_index(IndexConfig(data, str(Path(data) / "deployed_model"), device="cpu"), index)
    base = {}
    for length, depth in job["lengths"]:
        labels = labels_folder(folder, length, depth, job["recall_of"])
        if not labels.is_dir():
            build_labels(
                LabelConfig(
                    data, str(index), judge, base_depth=length, depth=depth, missing="irrelevant",
                    sources=SOURCES[job["recall_of"]], device="cpu",
                ),
                labels,
            )  # fmt: skip
        base[str(length)] = _evaluate(data, index, judge, length, {}, folder)["base"]
    result = {
        "base": base,
        "index": read_json(index / "manifest.json")["fingerprint"],
        "says": f"{job['name']}: index, labels and the deployed model's figures "
        f"({time.perf_counter() - began:.0f} s)",
    }
    write_json(Path(job["path"]), result)
    return result


def run_piece(job: Job) -> Result:
    """One training; with "evaluate", also its figures on the test split. A kill loses at most the training.

    A job holds `path` (the JSON to write), `says` (its name), `train` (settings of TrainConfig), `work`
    (where the model lies until its figures are taken), `keep_models`, and `evaluate`: None, "chosen" or
    "along", with `length` (L) and `judge`.
    """
    path, work = Path(job["path"]), Path(job["work"]) / Path(job["path"]).stem
    result: Result = {"train": job["train"], "error": None, "seconds": {}}
    along = job["evaluate"] == "along"
    try:
        config = TrainConfig(**job["train"], keep=1_000 if along else 0, device="cpu")
        began = time.perf_counter()
        if not (work / "manifest.json").is_file():
            train_model(config, work)
            result["seconds"]["train"] = round(time.perf_counter() - began, 2)
        result["points"] = read_json(work / "validation.json")
        result["chosen"] = read_json(work / "manifest.json")["facts"]["chosen"]
        result["settings"] = asdict(config) | {"learning_rate": config.peak_learning_rate}
        if job["evaluate"]:
            began = time.perf_counter()
            figures, count = _figures(job, config, work, result)
            result |= figures
            took = time.perf_counter() - began
            result["seconds"] |= {"evaluate": round(took, 2), "checkpoints": count}
    except UserError as error:  # a method that breaks is a result too
        result["error"] = str(error)
    if not job["keep_models"]:
        shutil.rmtree(work, ignore_errors=True)
    result["says"] = f"{job['says']}: {_summary(result)}"
    write_json(path, result)
    return result


def _summary(result: Result) -> str:
    if result["error"]:
        return f"broke: {result['error']}"
    seconds = ", ".join(f"{name} {value:g}" for name, value in result["seconds"].items())
    point = result["chosen"]
    return (
        f"{name_of(point)}, validation relevant novel {point['relevant_novel']:.3f}, recall "
        f"{point['recall']:.4f} ({point['base_recall']:.4f}); {seconds}"
    )


def name_of(point: dict[str, Any]) -> str:
    """The name of a validation point, as its folder has it."""
    return Point(**point).name


def path_of(points: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Validation points as one path, of which any two neighbours lie on a line of weights.

    The checkpoints, then along the blends back to the start; then the lines with less and less of the memory,
    one from the start to the last step, the next one back.
    """
    shares = sorted({p.get("memory", 1) for p in points}, reverse=True)
    path = [p for p in points if p["share"] == p.get("memory", 1) == 1]
    for n, share in enumerate(shares):
        line = [p for p in points if p.get("memory", 1) == share and (p["share"] < 1 or share < 1)]
        line.sort(key=lambda p: p["share"], reverse=n % 2 == 0)
        path += line
        if line and n % 2 == 0:
            path.append(points[0])
    return path


def _figures(job: Job, config: TrainConfig, model: Path, found: Result) -> tuple[Result, int]:
    """Test figures at the chosen point and, where asked for, at equal recall along all of them."""
    length, chosen = job["length"], name_of(found["chosen"])
    if job["evaluate"] == "along":
        folders = {folder.name: folder for folder in (model / "checkpoints").iterdir()}
    else:
        folders = {chosen: model}
    is_deployed = config.init is None
    if is_deployed:
        folders.pop("step-0", None)  # no step done: the deployed encoder itself
    index = Path(config.indexes[0])
    steps = _evaluate(config.data, index, job["judge"], length, folders, model.parent)
    base = steps.pop("base")
    if is_deployed:
        steps["step-0"] = base
    result: Result = {"base": _without_queries(base), "at_chosen": steps[chosen]}
    if job["evaluate"] == "along":
        path = path_of(found["points"])
        order = [name_of(point) for point in path]
        at = [point["step"] * point["share"] for point in path]
        gain, recall = f"RelevantNovel@{length}", f"Recall@{length}"
        points = [(steps[step]["means"][recall], steps[step]["means"][gain]) for step in order]
        place = at_equal_recall(points, base["means"][recall])
        if place is None:  # nothing of it may be deployed
            place = Place(0.0, 0, 0, 0.0)
            order, at, steps = ["step-0"], [0.0], {"step-0": base}
        result["at_equal_recall"] = _between(steps[order[place.first]], steps[order[place.second]], place)
        result["at_equal_recall"]["step"] = at[place.first] + place.weight * (
            at[place.second] - at[place.first]
        )
        result["along"] = {step: _without_queries(figures) for step, figures in steps.items()}
    return result, len(folders)


def _between(first: Result, second: Result, place: Place) -> Result:
    """All figures linearly between two checkpoints."""

    def mix(a: Any, b: Any) -> Any:
        return (np.asarray(a) * (1 - place.weight) + np.asarray(b) * place.weight).tolist()

    return {
        kind: {name: mix(first[kind][name], second[kind][name]) for name in first[kind]}
        for kind in ("means", "per_query")
    }


def _without_queries(figures: Result) -> Result:
    return {"means": figures["means"]}


def cuts(length: int) -> tuple[int, ...]:
    """Cuts of the lists at one L."""
    return tuple(sorted({10, 20, 50, length}))


def tested(length: int) -> list[str]:
    """Metrics whose figures per query are kept for tests and ratios."""
    names = ["RelevantNovel@50", f"RelevantNovel@{length}", "Recall@50", "Precision@10", "MergedDensity"]
    return list(dict.fromkeys(names))


def _evaluate(
    data: str, index: Path, judge: str, length: int, models: dict[str, Path], work: Path
) -> dict[str, Result]:
    """Test figures by the name of a point, the deployed model's as "base"."""
    report = work / f"report-{os.getpid()}"
    config = EvalConfig(
        data=data, index=str(index), models=tuple(f"{name}={folder}" for name, folder in models.items()),
        judge=judge, missing="irrelevant", base_depth=length, k=cuts(length), device="cpu",
    )  # fmt: skip
    evaluation = evaluate_models(config, report, force=True)
    shutil.rmtree(report)
    return {
        name: {
            "means": {metric: round(value, 6) for metric, value in means.items()},
            "per_query": {
                metric: np.round(evaluation.per_query[name][metric], 6).tolist() for metric in tested(length)
            },
        }
        for name, means in evaluation.means.items()
    }


def identity(name: str, settings: dict[str, Any], inputs: list[str]) -> str:
    """A file name for a run: the same settings on the same data give the same one.

    Settings that are not named are the program's defaults, of today.
    """
    digest = fingerprint_of(settings, inputs)[:10]
    return f"{name}-{digest}".replace(" ", "_").replace(",", "").replace("/", "_")


def explicit(settings: dict[str, Any]) -> dict[str, Any]:
    """Every setting that decides a run whose settings are mostly the defaults: these may move."""
    return json.loads(json.dumps(asdict(TrainConfig(**settings))))
