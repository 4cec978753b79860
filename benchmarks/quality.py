"""The quality benchmark: every method from the same start, on the same labels, tuned alike, at equal recall.

    python benchmarks/quality.py OUT --data NAME=FOLDER [--data …] [--methods …] [--seeds 5] [--jobs 2]
        [--L 50,200] [--chosen-only] [--max-recall-drop 0] [--recall-of known] [--ablations noise,labels,…]

FOLDER is in BEIR's layout with qrels/train.tsv and qrels/test.tsv, judgements.tsv and deployed_model/ inside.
Of every method a residual adapter on the deployed query encoder is tuned, with the same number of queries
embedded (steps × batch 128). The default's has a memory in front, and what it chose it trains anew on all
queries: "default-no-refit", "default-adapter" (neither), "supervised-memory", "supervised-refit" and
"conservative-refit" show what these are worth; "supervised-judged-noes" contrasts pairs with what labels call
irrelevant, "judged-noes-as-default" too, with all else of the default; "default-inclusion" contrasts with the
policy's own list instead of the deployed one, a quarter of its batch being feedback pairs; "default-catalog"
and "supervised-catalog" contrast feedback pairs with random items. The learning rate of the others' methods
is chosen from one grid on queries held back from the train split (seed 1000, not used later), our own are run
as they come.
Then each seed trains at that rate and is measured on the test split: at the checkpoint that its own held-back
queries choose without any loss of recall, and, at the first L, at equal recall: where the line through its
checkpoints has most relevant novel items at no less than the deployed model's recall on the test split. That
place is found on the test split, for every method alike.

Prints the tables, writes OUT/results.md, results.csv and results.json. Each finished run is one JSON file in
OUT/NAME/runs and is not repeated while its settings, index and labels stay the same; a run of a default moves
with the defaults.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import json
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from quality_figures import at_equal_recall, ratio_interval, t_interval
from quality_runs import (
    Job,
    Result,
    check_data,
    explicit,
    identity,
    labels_folder,
    path_of,
    pool_of,
    prepare,
    run_all,
    run_piece,
)

RATES = (3e-4, 1e-3, 3e-3, 1e-2)
TUNING_SEED = 1_000
BATCH = 128
# Every setting by name, so that these stay what they are when the program's defaults move.
NAMED = {
    "reward": "eq7", "alpha": 0.0, "gamma": 0.5, "draw": "states", "negative_share": 0.0,
    "negatives": 5, "catalog_negatives": 0, "hard_negatives": 0, "list_size": 50, "window": "1,2",
    "temperature": 0.05, "sampling_temperature": 0.05, "support": None, "schedule": "linear", "warmup": 0.1,
    "weight_decay": 0.0, "max_grad_norm": 1.0, "patience": 0, "blends": 1, "trust": False, "refit": False,
    "mirror": "never",
}  # fmt: skip
# As published and this project's others; "steps" counts in units of --steps. Three epochs against ten.
METHODS: dict[str, dict[str, Any]] = {
    "supervised": NAMED | {"objective": "supervised"},
    "supervised-long": NAMED | {"objective": "supervised", "steps": 10 / 3},
    "supervised-catalog": NAMED | {"objective": "supervised", "catalog_negatives": 4_096},
    "supervised-judged": NAMED | {"objective": "supervised-judged"},
    "supervised-judged-hard": NAMED | {"objective": "supervised-judged", "hard_negatives": 5},
    "supervised-judged-noes": NAMED | {"objective": "supervised-judged", "judged_negatives": 20},
    # The default in all but its loss; of feedback alone it does not tell by itself whether items are queries.
    "judged-noes-as-default": {"objective": "supervised-judged", "judged_negatives": 20, "tune": "memory"},
    "supervised-as-default": {"objective": "supervised", "tune": "memory"},
    "supervised-as-default-mirror": {"objective": "supervised", "tune": "memory", "mirror": "always"},
    "conservative": NAMED | {"objective": "pg-ret", "loss": "conservative"},
    "aggressive": NAMED | {"objective": "pg-ret", "loss": "aggressive"},
    "reinforce": NAMED | {"objective": "reinforce"},
    "v-pg": NAMED | {"objective": "v-pg"},
    # On debian's held-back queries CA-PG does better at this temperature, which is ours, than at 0.05, and
    # supervised finetuning and conservative PG-Ret do worse.
    "ca-pg": NAMED | {"objective": "ca-pg", "temperature": 0.03},
    "supervised-memory": NAMED
    | {"objective": "supervised", "tune": "memory", "memory_size": 10_000, "blends": 10},
    "supervised-refit": NAMED | {"objective": "supervised", "refit": True},
    "conservative-refit": NAMED | {"objective": "pg-ret", "loss": "conservative", "refit": True},
    # As the default, which learns of items as queries where relevance goes both ways.
    "supervised-mirror": NAMED | {"objective": "supervised", "mirror": "always"},
    "ca-pg-mirror": NAMED | {"objective": "ca-pg", "temperature": 0.03, "mirror": "auto"},
    "default-no-mirror": {"objective": "pg-ret", "tune": "memory", "mirror": "never"},
    "default-adapter": {"objective": "pg-ret", "refit": False},
    "default-no-refit": {"objective": "pg-ret", "tune": "memory", "refit": False},
    "default-inclusion": {"objective": "pg-ret", "tune": "memory", "loss": "inclusion", "gamma": 0.25},
    "default-catalog": {"objective": "pg-ret", "tune": "memory", "catalog_negatives": 4_096},
    "default": {"objective": "pg-ret", "tune": "memory"},
    "whole-encoder": {"objective": "pg-ret", "tune": "full", "refit": False},
    "supervised-whole": NAMED | {"objective": "supervised", "tune": "full", "blends": 10},
}
# Half an hour a run on a CPU, and at rates of its own, --rates 5e-5; and as long as the default, at its 1e-3.
ON_REQUEST = (
    "whole-encoder",
    "supervised-whole",
    "judged-noes-as-default",
    "supervised-as-default",
    "supervised-as-default-mirror",
)
# An exact draw of lists from the whole catalog makes a step of the first two cost ten times another's.
FIRST_L_ONLY = ("reinforce", "v-pg", "supervised-memory", "supervised-refit", "conservative-refit")
OURS = "default"
UNTUNED = tuple(name for name in METHODS if name.startswith(OURS))
COLUMNS = (
    "Novelty@10", "Novelty@20", "Novelty@50", "RelevantNovel@20", "RelevantNovel@50", "Recall@50",
    "Precision@10", "MergedDensity", "MergedCoverage",
)  # fmt: skip


class Setting:
    """One data set at one L: where its runs lie and what they have in common."""

    def __init__(self, options: argparse.Namespace, name: str, data: str, length: int, depth: int) -> None:
        self.options, self.name, self.data, self.length, self.depth = options, name, data, length, depth
        self.folder = options.out / name
        self.labels = labels_folder(self.folder, length, depth, options.recall_of)
        self.is_first = length == options.lengths[0][0]
        self.along = self.is_first and not options.chosen_only
        self.judge = f"file:{Path(data) / 'judgements.tsv'}"
        self.base: Result = {}

    def train(self, settings: dict[str, Any], seed: int, rate: float | None) -> dict[str, Any]:
        """TrainConfig's settings of one run."""
        steps = round(self.options.steps * settings.get("steps", 1))
        return {
            **settings, "data": self.data, "index": str(self.folder / "index"),
            "labels": settings.get("labels", str(self.labels)), "tune": settings.get("tune", "adapter"),
            "steps": steps, "batch_size": BATCH, "learning_rate": rate, "seed": seed,
            "base_depth": self.length, "depth": self.depth,
            "validation_fraction": settings.get("validation_fraction", 0.2),
            "eval_every": max(1, steps // 10), "max_recall_drop": self.options.max_recall_drop,
            "recall_of": self.options.recall_of, "log_every": 100,
        }  # fmt: skip

    def job(self, method: str, settings: dict[str, Any], seed: int, rate: float | None, evaluate: Any) -> Job:
        """One run. `evaluate` as for `run_piece`."""
        train = self.train(settings, seed, rate)
        known = train if NAMED.keys() <= settings.keys() else explicit(train)
        # Artifacts stand for their paths, so that OUT may be moved.
        paths = {"data", "index", "labels", "init"}
        deciding = {key: value for key, value in known.items() if key not in paths} | {
            key: Path(str(train[key])).name for key in ("labels", "init") if train.get(key)
        }
        speed = "own rate" if rate is None else f"{rate:g}"
        name = f"{method}-L{self.length}-{speed}-s{seed}"
        stem = identity(name, deciding, [self.fingerprint, str(evaluate)])
        return {
            "path": str(self.folder / "runs" / f"{stem}.json"), "says": f"{self.name} {name}",
            "train": train, "work": str(self.options.out / "work"), "evaluate": evaluate,
            "length": self.length, "judge": self.judge, "keep_models": self.options.keep_models,
        }  # fmt: skip

    def measured(self, methods: list[str]) -> list[str]:
        """Methods that run at this L."""
        return [method for method in methods if self.is_first or method not in FIRST_L_ONLY]

    @property
    def fingerprint(self) -> str:
        """Of the index and the labels."""
        labels = json.loads((self.labels / "manifest.json").read_text())["fingerprint"]
        return json.loads((self.folder / "index" / "manifest.json").read_text())["fingerprint"] + labels


def worth_on_validation(result: Result, max_recall_drop: float) -> tuple[float, float, float]:
    """What a learning rate is chosen by: relevant novel items that are labelled, within the recall budget.

    Those of the chosen checkpoint; of equal ones, those of the frontier where the budget ends; where nothing
    keeps the budget, those of the frontier where a tenth more of the recall is lost.
    """
    if result["error"]:
        return (-1.0, -1.0, -1.0)
    points = result["points"]
    base = points[0]["base_recall"]
    budget = base * (1 - max_recall_drop)
    path = [(point["recall"], point["relevant_novel"]) for point in path_of(points)]

    def frontier(recall: float) -> float:
        place = at_equal_recall(path, recall)
        return 0.0 if place is None else place.gain

    kept = result["chosen"]["recall"] >= budget - 1e-12
    chosen = result["chosen"]["relevant_novel"] if kept else 0.0
    return chosen, frontier(budget), frontier(budget - 0.1 * base)


def choose_rates(
    pool: ProcessPoolExecutor, settings: list[Setting], methods: list[str]
) -> dict[tuple[str, int, str], float]:
    """Learning rate of each method, by (set, L, method); where there is only one, nothing is tried."""
    keys = [
        (s, m, rate)
        for s in settings
        for m in s.measured(methods)
        if m not in UNTUNED
        for rate in s.options.rates
    ]
    if all(len(s.options.rates) == 1 for s in settings):
        return {(s.name, s.length, m): rate for s, m, rate in keys}
    # What is trained anew after the choice has no part in it.
    jobs = [s.job(m, METHODS[m] | {"refit": False}, TUNING_SEED, rate, None) for s, m, rate in keys]
    results = run_all(pool, run_piece, jobs, "learning rates")
    best: dict[tuple[str, int, str], tuple[tuple[float, ...], float]] = {}
    for (s, m, rate), result in zip(keys, results, strict=True):
        key = (s.name, s.length, m)
        worth = worth_on_validation(result, s.options.max_recall_drop)
        # Where nothing separates two rates, the gentler one.
        best[key] = max(best.get(key, ((-2.0,), 0.0)), (worth, -rate))
    return {key: -rate for key, (_, rate) in best.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--data", action="append", required=True, metavar="NAME=FOLDER")
    usual = ",".join(name for name in METHODS if name not in ON_REQUEST)
    parser.add_argument(
        "--methods", default=usual, help=f"comma-separated; default: all but {', '.join(ON_REQUEST)}"
    )
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--jobs", type=int, default=2, help="worker processes of one thread each")
    parser.add_argument("--L", dest="lengths", default="50,200", help="equal recall is measured at the first")
    parser.add_argument(
        "--chosen-only", action="store_true", help="leave equal recall out: a fifth of the time"
    )
    parser.add_argument("--depth", default="400,800", help="deepest labelled base rank of each L")
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--rates", default=",".join(f"{rate:g}" for rate in RATES))
    parser.add_argument(
        "--max-recall-drop",
        type=float,
        default=0.0,
        help="recall a chosen checkpoint may lose, relative",
    )
    parser.add_argument("--recall-of", default="feedback", help="what that recall counts; or known")
    parser.add_argument("--ablations", default="", help="comma-separated, on the first data set; or 'all'")
    parser.add_argument("--ablation-seeds", type=int, default=3)
    parser.add_argument("--keep-models", action="store_true")
    options = parser.parse_args()
    depths = [int(depth) for depth in options.depth.split(",")]
    lengths = [int(length) for length in options.lengths.split(",")]
    if len(lengths) != len(depths):
        parser.error(f"--L {options.lengths}, --depth {options.depth}: give a depth for each L")
    options.lengths = list(zip(lengths, depths, strict=True))
    options.rates = [float(rate) for rate in options.rates.split(",")]
    methods = [method for method in options.methods.split(",") if method]
    unknown = [method for method in methods if method not in METHODS]
    if unknown:
        parser.error(f"--methods {','.join(unknown)}: unknown; choose from {', '.join(METHODS)}")
    options.out.mkdir(parents=True, exist_ok=True)
    named = dict(pair.split("=", 1) for pair in options.data)
    with pool_of(options.jobs) as pool:
        settings = prepared(pool, options, named)
        rates = choose_rates(pool, settings, methods)
        runs = run_seeds(pool, settings, methods, rates)
        write(options.out, settings, runs, rates)
        if options.ablations:
            from quality_ablations import ablate

            ablate(pool, settings[0], options.ablations, options.out)
    with contextlib.suppress(OSError):  # another benchmark may be at work there
        (options.out / "work").rmdir()


def prepared(pool: ProcessPoolExecutor, options: argparse.Namespace, named: dict[str, str]) -> list[Setting]:
    """Every data set at every L, indexed and labelled."""
    for name, data in named.items():
        (options.out / name / "runs").mkdir(parents=True, exist_ok=True)
        check_data(options.out / name, Path(data))
    sizes = "-".join([*(f"{length}-{depth}" for length, depth in options.lengths), options.recall_of])
    jobs = [
        {
            "path": str(options.out / name / f"base-{sizes}.json"), "name": name, "data": data,
            "folder": str(options.out / name), "lengths": options.lengths, "recall_of": options.recall_of,
        }
        for name, data in named.items()
    ]  # fmt: skip
    done = run_all(pool, prepare, jobs, "indexes and labels")
    settings = [
        Setting(options, name, data, length, depth)
        for name, data in named.items()
        for length, depth in options.lengths
    ]
    base = dict(zip(named, done, strict=True))
    for setting in settings:
        setting.base = base[setting.name]["base"][str(setting.length)]
    return settings


def run_seeds(
    pool: ProcessPoolExecutor,
    settings: list[Setting],
    methods: list[str],
    rates: dict[tuple[str, int, str], float],
) -> dict[tuple[str, int, str], list[Result]]:
    """Runs of every seed at the chosen rate, of our own methods at theirs, by (set, L, method)."""
    jobs, keys = [], []
    for s in settings:
        for name in s.measured(methods):
            rate = rates.get((s.name, s.length, name))
            for seed in range(s.options.seeds):
                jobs.append(s.job(name, METHODS[name], seed, rate, "along" if s.along else "chosen"))
                keys.append((s.name, s.length, name))
    runs: dict[tuple[str, int, str], list[Result]] = {}
    for key, result in zip(keys, run_all(pool, run_piece, jobs, "seeds"), strict=True):
        runs.setdefault(key, []).append(result)
    return runs


def write(
    out: Path,
    settings: list[Setting],
    runs: dict[tuple[str, int, str], list[Result]],
    rates: dict[tuple[str, int, str], float],
) -> None:
    """The tables, and every figure behind them."""
    text, rows = [], []
    for s in settings:
        mine = {
            name: found for (of, length, name), found in runs.items() if (of, length) == (s.name, s.length)
        }
        shown = {name: rates.get((s.name, s.length, name)) for name in mine}
        for name, found in mine.items():
            shown[name] = shown[name] or next(
                (r["settings"]["learning_rate"] for r in found if r.get("settings")), None
            )
        lacks = lacking(s)
        places = ["at_chosen", "at_equal_recall"] if s.along else ["at_chosen"]
        for place in places:
            title = {"at_chosen": "at the chosen checkpoint", "at_equal_recall": "at equal recall"}[place]
            whole = {name: [r for r in found if r["error"] is None] for name, found in mine.items()}
            broken = {name: len(mine[name]) - len(found) for name, found in whole.items()}
            whole = {name: found for name, found in whole.items() if found}
            text.append(f"### {s.name}, L = {s.length}, {title}\n")
            text.append(f"The deployed list lacks {lacks:.2f} relevant items a test query.\n")
            text.append(table(s, whole, shown, place, broken))
            ours = next((name for name in (OURS, "default-no-refit") if name in whole), None)
            if ours is not None and len(whole) > 1:
                title = f"Relevant novel items, {ours} over the others, {title}:\n"
                text += [title, ratios(s, whole, place, ours)]
        rows += csv_rows(s, mine)
    (out / "results.md").write_text("\n".join(text), encoding="utf-8")
    print("\n".join(["", *text]), flush=True)
    figures = {
        f"{name}/L{length}/{method}": [
            {key: value for key, value in result.items() if key not in ("says", "settings")}
            for result in found
        ]
        for (name, length, method), found in runs.items()
    }
    for found in figures.values():
        for place in (result.get(place) for result in found for place in ("at_chosen", "at_equal_recall")):
            if place:
                place.pop("per_query", None)
    (out / "results.json").write_text(json.dumps(figures), encoding="utf-8")
    with (out / "results.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["set", "L", "method", "learning_rate", "seed", "place", "step", "metric", "value"])
        writer.writerows(rows)


def columns_at(length: int) -> list[str]:
    """Metrics shown; beyond 50 also the figures at L itself."""
    more = [f"Novelty@{length}", f"RelevantNovel@{length}", f"Recall@{length}"] if length != 50 else []
    return [*COLUMNS, *more]


def table(
    s: Setting,
    runs: dict[str, list[Result]],
    rates: dict[str, float | None],
    place: str,
    broken: dict[str, int],
) -> str:
    """Mean ± half width of the 95 % interval over seeds, of every method."""
    columns = columns_at(s.length)
    lines = [
        "| method | lr | step | " + " | ".join(columns) + " | seconds |",
        "| --- " * (len(columns) + 4) + "|",
        "| base | – | – | " + " | ".join(f"{s.base['means'].get(c, 0):.3f}" for c in columns) + " | – |",
    ]
    for name, found in runs.items():
        steps = [
            r["chosen"]["step"] * r["chosen"]["share"] if place == "at_chosen" else r[place]["step"]
            for r in found
        ]
        cells = [spread([r[place]["means"][column] for r in found]) for column in columns]
        seconds = [r["seconds"]["train"] for r in found if "train" in r["seconds"]]
        took = f"{np.mean(seconds):.0f}" if seconds else "–"
        note = f" ({broken[name]} of {broken[name] + len(found)} seeds broke)" if broken[name] else ""
        rate = "–" if rates[name] is None else f"{rates[name]:g}"
        lines.append(
            f"| {name}{note} | {rate} | {np.mean(steps):.0f} | " + " | ".join(cells) + f" | {took} |"
        )
    lines += [f"| {name} | – | broke with every seed |" for name, count in broken.items() if name not in runs]
    return "\n".join(lines) + "\n"


def lacking(s: Setting) -> float:
    """Relevant items a test query that the deployed top L lacks: what nothing can exceed."""
    queries = {row[0] for row in _rows(Path(s.data) / "qrels" / "test.tsv")}
    judged = _rows(Path(s.data) / "judgements.tsv")
    relevant = sum(row[0] in queries and float(row[-1]) > 0 for row in judged)
    return relevant / len(queries) - float(s.base["means"]["MergedDensity"])


def _rows(path: Path) -> list[list[str]]:
    lines = path.read_text(encoding="utf-8").splitlines()[1:]
    return [line.split("\t") for line in lines]


def spread(values: list[float]) -> str:
    mean, half = t_interval(values)
    return f"{mean:.3f}" if np.isnan(half) else f"{mean:.3f} ± {half:.3f}"


def ratios(s: Setting, runs: dict[str, list[Result]], place: str, ours: str) -> str:
    """One method's relevant novel items over each other method's, and paired tests over queries.

    The tests are of these trained models: they take the seeds' mean, and know of no other seeds. At equal
    recall there are neither tests nor intervals: the place is found on the queries that they would resample.
    """
    from novelret.evaluate.significance import holm, randomization_tests

    metrics = list(dict.fromkeys(["RelevantNovel@50", f"RelevantNovel@{s.length}"]))
    tested = [*metrics, "Recall@50", "Precision@10", "MergedDensity"]
    others = [name for name in runs if name != ours]
    is_tested = place == "at_chosen"

    def figures(other: str, metric: str) -> tuple[np.ndarray, np.ndarray]:
        """(seeds, queries) of the one and of the other method, for the seeds that both finished."""
        mine, theirs = ({run["train"]["seed"]: run for run in runs[name]} for name in (ours, other))
        both = sorted(mine.keys() & theirs.keys())
        values = [[of[seed][place]["per_query"][metric] for seed in both] for of in (mine, theirs)]
        return np.array(values[0]), np.array(values[1])

    def difference(other: str, metric: str) -> np.ndarray:
        mine, theirs = figures(other, metric)
        return np.asarray(mine.mean(axis=0) - theirs.mean(axis=0))

    differences = np.stack([difference(name, m) for name in others for m in tested], axis=1)
    p = holm(randomization_tests(differences).reshape(len(others), len(tested)))
    lines = [
        "| other | "
        + " | ".join(f"{m} ratio (95 % interval)" if is_tested else f"{m} ratio" for m in metrics)
        + " | "
        + " | ".join(f"{m} difference (p)" if is_tested else f"{m} difference" for m in tested)
        + " |",
        "| --- " * (1 + len(metrics) + len(tested)) + "|",
    ]
    for row, name in enumerate(others):
        cells = []
        for metric in metrics:
            ratio, low, high = ratio_interval(*figures(name, metric))
            cells.append(f"{ratio:.2f} ({low:.2f} to {high:.2f})" if is_tested else f"{ratio:.2f}")
        means = np.nanmean(differences, axis=0).reshape(len(others), len(tested))[row]
        cells += [
            f"{mean:+.3f} ({value:.4f})" if is_tested else f"{mean:+.3f}"
            for mean, value in zip(means, p[row], strict=True)
        ]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def csv_rows(s: Setting, runs: dict[str, list[Result]]) -> list[list[Any]]:
    rows: list[list[Any]] = [
        [s.name, s.length, "base", "", "", "deployed", "", metric, value]
        for metric, value in s.base["means"].items()
    ]
    for name, found in runs.items():
        for seed, result in enumerate(found):
            if result["error"]:
                continue
            rate = result["settings"]["learning_rate"]
            places = [
                ("at_chosen", result["chosen"]["step"] * result["chosen"]["share"], result["at_chosen"]),
                *(("along", step, figures) for step, figures in result.get("along", {}).items()),
            ]
            if "at_equal_recall" in result:
                places.append(
                    ("at_equal_recall", result["at_equal_recall"]["step"], result["at_equal_recall"])
                )
            rows += [
                [s.name, s.length, name, rate, seed, place, step, metric, value]
                for place, step, figures in places
                for metric, value in figures["means"].items()
            ]
    return rows


if __name__ == "__main__":
    main()
