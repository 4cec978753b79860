"""Ablations of the quality benchmark: "default-adapter" with one setting varied, at its own learning rate.

There it is called the default: what a memory adds to it is a method of its own. One of them, "whole", is of
the default as it comes.
Each writes OUT/ablation-SET-NAME.md, .csv and .svg (pip install matplotlib). Labels that a variant needs are
made from the true ones by a seeded draw; figures are always measured against the truth.
"""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
from quality import METHODS, OURS, Setting, spread
from quality_figures import flip_verdicts, t_interval
from quality_runs import Job, Result, run_all, run_piece

from novelret import LabelConfig, TrainConfig, build_labels, train_model
from novelret.artifacts import write_json

# Eq. 6 differs from Eq. 7 only where states are drawn that the judge calls irrelevant.
EQ6 = {"reward": "eq6", "negative_share": 0.5, "trust": False}
MEMORY = {"tune": "memory"}
WHOLE = METHODS[OURS] | {"refit": True}
RANDOM = {"catalog_negatives": 4_096}
# Ways to learn from a judge that errs: settings, and whether its yeses are asked about a second time.
REMEDIES: list[tuple[str, dict[str, Any], bool]] = [
    ("Eq. 7, as judged", {"trust": False}, False),
    ("Eq. 6, as judged", EQ6, False),
    ("Eq. 7, trust", {}, False),
    ("Eq. 7, yeses asked twice", {"trust": False}, True),
    ("Eq. 7, trust, asked twice", {}, True),
    ("Eq. 7, trust, with a memory", MEMORY, False),
]
# A yes earns 1 − e and a no −e, e the judge's rate of false positives, taken as measured without error: on
# average the reward of the true verdict (Natarajan et al., 2013). A reward's size is how often it is drawn.
CORRECTED = {"reward": "eq6", "draw": "states", "trust": False}
FALSE_POSITIVES, MISSES = (0.0, 0.02, 0.05, 0.2), (0.0, 0.4)
BOUGHT = (1_000, 3_000, 10_000, 30_000, 100_000)
# α and γ; β is the rest.
MIXTURES = ((0, 0.75), (0, 0.5), (0, 0.25), (0, 0.1), (0, 0), (0.25, 0.5))
TUNED = ("supervised", "conservative")
WHOLE_RATES = (2e-5, 1e-4)  # the program's own for whole encoders, and five times that
ALL_STATES = {"draw": "queries", "blends": 10}
# The default without one of its parts, and other methods with those that are not theirs alone.
PARTS: list[tuple[str, dict[str, Any]]] = [
    ("default", {}),
    ("one state a pass", {"draw": "states"}),
    ("no blends", {"blends": 1}),
    ("random negatives for feedback pairs", RANDOM),
    ("loss temperature 0.05", {"temperature": 0.05}),
    ("the list's top 5 as negatives", {"loss": "aggressive"}),
    ("the top item alone, no margin", {"loss": "conservative"}),
    ("the policy's own ranks around L", {"loss": "inclusion"}),
    ("the same, a quarter of feedback pairs", {"loss": "inclusion", "gamma": 0.25}),
    ("supervised-judged, all states, blends", METHODS["supervised-judged"] | ALL_STATES),
    ("supervised, blends", METHODS["supervised"] | {"blends": 10}),
    ("conservative as published, blends", METHODS["conservative"] | {"blends": 10}),
    ("aggressive as published, blends", METHODS["aggressive"] | {"blends": 10}),
]
SHOWN = ("RelevantNovel@50", "Novelty@50", "Recall@50", "Precision@10", "MergedDensity")


@dataclass(frozen=True)
class Variant:
    """One point of an ablation.

    Attributes:
        series: the line it belongs to.
        x: its place on that line, as text.
        settings: what differs from the default.
        labels: how its labels are made from the true ones; None for the true ones.
        starts_supervised: start from the supervised model of the same seed.
        evaluate: as for `run_piece`.
        rate: the learning rate; None for the program's own.
        corrected: draw judged irrelevant states as often as the labels' rate of false positives asks for.
    """

    series: str
    x: str
    settings: dict[str, Any] = field(default_factory=dict)
    labels: dict[str, Any] | None = None
    starts_supervised: bool = False
    evaluate: str = "along"
    rate: float | None = None
    corrected: bool = False


def noise() -> Iterator[Variant]:
    for name, settings, twice in REMEDIES:
        for misses in MISSES:
            for share in FALSE_POSITIVES:
                if share or misses or not twice:  # asked again about what is right, a judge says the same
                    yield Variant(name, f"{share:g} / {misses:g}", settings, _noisy(share, misses, twice))
    for misses in MISSES:
        for share in FALSE_POSITIVES[1:]:  # without false positives a no earns nothing, as with Eq. 7
            labels = _noisy(share, misses, False)
            x = f"{share:g} / {misses:g}"
            yield Variant("rewards corrected by error rates", x, CORRECTED, labels, corrected=True)


def _noisy(false_positives: float, misses: float, twice: bool) -> dict[str, Any] | None:
    """Two answers err independently of each other, the best case for asking twice."""
    if not false_positives and not misses:
        return None
    return {"kind": "noise", "false_positives": false_positives, "misses": misses, "twice": twice}


def parts() -> Iterator[Variant]:
    for name, settings in PARTS:
        yield Variant("parts", name, settings)


def bought() -> Iterator[Variant]:
    """As many labels spent on all ranks of some queries, or on some ranks of any query."""
    for series, kind, settings in (
        ("all ranks of some queries", "bought", {}),
        ("pairs at random", "scattered", {}),
        ("pairs at random, with a memory", "scattered", MEMORY),
    ):
        for count in BOUGHT:
            yield Variant(series, f"{count:,}", settings, {"kind": kind, "count": count})
        yield Variant(series, "all", settings)


def negatives() -> Iterator[Variant]:
    for count in (1, 5, 20, 50):
        yield Variant("aggressive", str(count), METHODS["aggressive"] | {"negatives": count}, rate=3e-4)


def window() -> Iterator[Variant]:
    for multiples in ("0,1", "0.5,1.5", "0.7,1.3", "0.98,1.02", "1,2"):
        yield Variant("the policy's own list", multiples, {"loss": "inclusion", "window": multiples})
    for multiples in ("0,1", "0.2,1.8", "0.8,1.2", "1,2", "1,4", "2,4"):
        yield Variant("the deployed list", multiples, {"window": multiples})


def temperature() -> Iterator[Variant]:
    for tau in (0.02, 0.03, 0.05, 0.1):
        yield Variant("of the loss", f"{tau:g}", {"temperature": tau})
    for tau in (0.03, 0.1):
        mixture = {"alpha": 0.25, "gamma": 0.5}
        yield Variant("of the draw, α = 0.25", f"{tau:g}", mixture | {"sampling_temperature": tau})


def mixture() -> Iterator[Variant]:
    for alpha, gamma in MIXTURES:
        shares = {"alpha": float(alpha), "gamma": float(gamma)}
        yield Variant("α / β / γ", f"{alpha:g} / {1 - alpha - gamma:g} / {gamma:g}", shares)


def tune() -> Iterator[Variant]:
    """Whole encoders cost a transformer's pass forward and back: bf16, as one would on a GPU."""
    for method, settings in ((OURS, {}), *((name, METHODS[name]) for name in TUNED)):
        yield Variant(method, "adapter", settings)
        for rate in WHOLE_RATES:
            whole = settings | {"tune": "full", "precision": "bf16"}
            yield Variant(method, f"full, rate {rate:g}", whole, rate=rate)
    yield Variant(OURS, "memory", MEMORY)
    yield Variant(OURS, "lora", {"tune": "lora", "precision": "bf16"})


def start() -> Iterator[Variant]:
    yield Variant(OURS, "deployed")
    yield Variant(OURS, "supervised", starts_supervised=True)


def queries() -> Iterator[Variant]:
    """What twice as many queries to train on bring; the rest is held back, of which 2,000 at most can be."""
    for series, settings, rate in (
        ("supervised", METHODS["supervised"], 3e-3),
        ("supervised, random negatives", METHODS["supervised-catalog"], 3e-3),
        ("default, random negatives", RANDOM, None),
        ("the same with a memory", RANDOM | MEMORY, None),
    ):
        for share in (0.4, 0.8):
            held_back = {"validation_fraction": round(1 - share, 1)}
            yield Variant(series, f"{share:.0%}", settings | held_back, rate=rate, evaluate="chosen")


def unknown() -> Iterator[Variant]:
    for name, settings in (("Eq. 7", {}), ("Eq. 6", EQ6)):
        yield Variant(name, "irrelevant", settings)
        yield Variant(name, "left out", settings, {"kind": "unknown"})


def whole() -> Iterator[Variant]:
    """The default as it comes, which takes several times as long as an adapter."""
    for count in BOUGHT:
        labels = {"kind": "scattered", "count": count}
        yield Variant("labels, pairs at random", f"{count:,}", WHOLE, labels, evaluate="chosen")
    for share, misses in ((0.02, 0.0), (0.05, 0.0), (0.2, 0.0)):
        labels = _noisy(share, misses, False)
        x = f"{share:g} / {misses:g}"
        yield Variant("false positives / misses", x, WHOLE, labels, evaluate="chosen")


ABLATIONS: dict[str, tuple[Callable[[], Iterator[Variant]], str]] = {
    "parts": (parts, "what differs"),
    "noise": (noise, "false positives / misses"),
    "labels": (bought, "labels bought"),
    "M": (negatives, "M, the base's top items contrasted with"),
    "window": (window, "ranks contrasted with, in multiples of L"),
    "temperature": (temperature, "temperature"),
    "mixture": (mixture, "shares of policy, base and feedback states"),
    "start": (start, "start from"),
    "unknown": (unknown, "pairs that the judge does not list"),
    "queries": (queries, "train queries learnt from"),
    "tune": (tune, "what is trained"),
    "whole": (whole, "labels"),
}

DEAR = ("tune", "whole")


def ablate(pool: ProcessPoolExecutor, setting: Setting, wanted: str, out: Path) -> None:
    """Run the ablations named, or all but the two dear ones, on one data set at one L."""
    names = [name for name in ABLATIONS if name not in DEAR] if wanted == "all" else wanted.split(",")
    for name in names:
        if name not in ABLATIONS:
            raise SystemExit(f"--ablations {name}: unknown; choose from {', '.join(ABLATIONS)} or all")
    for name in names:
        make, title = ABLATIONS[name]
        variants = list(make())
        seeds = range(setting.options.ablation_seeds)
        inputs = {}
        for variant in variants:
            for seed in seeds if variant.starts_supervised else range(1):
                for job in _inputs(setting, variant, seed):
                    inputs[job["path"]] = job
        run_all(pool, make_input, list(inputs.values()), f"ablation {name}, inputs")
        jobs = [_job(setting, name, variant, seed) for variant in variants for seed in seeds]
        results = run_all(pool, run_piece, jobs, f"ablation {name}")
        count = len(seeds)
        found = [results[n * count : (n + 1) * count] for n in range(len(variants))]
        report(setting, name, title, variants, found, out)


def _job(setting: Setting, name: str, variant: Variant, seed: int) -> Job:
    given = METHODS["default-adapter"] | variant.settings
    if variant.labels is not None:
        labels = _labels_folder(setting, variant.labels)
        given["labels"] = str(labels)
        if variant.corrected:
            given["negative_share"] = corrected_share(labels, variant.labels["false_positives"])
    if variant.starts_supervised:
        given["init"] = str(_init_folder(setting, seed))
    return setting.job(f"{name}-{variant.series}-{variant.x}", given, seed, variant.rate, variant.evaluate)


def _inputs(setting: Setting, variant: Variant, seed: int) -> Iterator[Job]:
    """Jobs that make what a variant is trained from."""
    common = {"data": setting.data, "index": str(setting.folder / "index"), "length": setting.length}
    if variant.labels is not None:
        folder = _labels_folder(setting, variant.labels)
        yield common | {
            "path": f"{folder}.json", "folder": str(folder), "make": variant.labels, "depth": setting.depth,
            "true": str(setting.labels),
        }  # fmt: skip
    if variant.starts_supervised:
        folder = _init_folder(setting, seed)
        # The same seed holds back the same queries, so that the start has not seen them either.
        train = setting.train(METHODS["supervised"], seed, 1e-3)
        yield common | {
            "path": f"{folder}.json",
            "folder": str(folder),
            "make": {"kind": "start"},
            "train": train,
        }


def corrected_share(labels: Path, false_positives: float) -> float:
    """Share of the corrected rewards' size that noes have, in labels of which every pair is judged."""
    verdicts = pq.read_table(labels / "judgements.parquet", columns=["verdict"])["verdict"].to_numpy()
    yes = float((verdicts > 0).mean())
    of_noes = false_positives * (1 - yes)
    return round(of_noes / (of_noes + (1 - false_positives) * yes), 4)


def _labels_folder(setting: Setting, make: dict[str, Any]) -> Path:
    name = "-".join(f"{value:g}" if isinstance(value, float) else str(value) for value in make.values())
    return setting.folder / f"{setting.labels.name}-{name}"


def _init_folder(setting: Setting, seed: int) -> Path:
    return setting.folder / f"start-supervised-{setting.length}-{setting.options.steps}-s{seed}"


def make_input(job: Job) -> Result:
    """Labels or a starting model of a variant."""
    folder, make = Path(job["folder"]), job["make"]
    if make["kind"] == "start":
        if not folder.is_dir():
            train_model(TrainConfig(**job["train"], device="cpu"), folder)
    elif not folder.is_dir():
        judgements = Path(f"{folder}.tsv")
        write_judgements(Path(job["true"]) / "judgements.parquet", judgements, make)
        build_labels(
            LabelConfig(
                job["data"], job["index"], f"file:{judgements}", base_depth=job["length"], depth=job["depth"],
                missing="irrelevant" if make["kind"] == "noise" else "unknown", device="cpu",
            ),
            folder,
        )  # fmt: skip
        judgements.unlink()
    result = {"says": folder.name}
    write_json(Path(job["path"]), result)
    return result


def write_judgements(true: Path, out: Path, make: dict[str, Any], seed: int = 0) -> None:
    """A judgement file from the true labels of some pairs.

    "noise": each verdict is wrong with the given shares; only what is called relevant is listed.
    "bought": all pairs of queries drawn at random, until there are `count` of them; both verdicts are listed.
    "scattered": `count` pairs drawn at random, likewise; what `novelret label --per-query` asks about.
    "unknown": what is relevant is listed, and nothing else.
    """
    pairs = pq.read_table(true, columns=["query_id", "item_id", "verdict"])
    relevant = pairs["verdict"].to_numpy() > 0
    if make["kind"] == "noise":
        rates = make["false_positives"], make["misses"]
        said = flip_verdicts(relevant, *rates, seed)
        if make["twice"]:  # only what was called relevant is asked about again
            said &= flip_verdicts(relevant, *rates, seed + 1)
        kept = said
    elif make["kind"] == "bought":
        said = relevant
        _, query = np.unique(pairs["query_id"].to_numpy(zero_copy_only=False), return_inverse=True)
        order = np.random.default_rng(seed).permutation(int(query.max()) + 1)
        # Pairs in the order in which their queries are drawn; the last query may be cut short.
        kept = np.zeros(len(query), dtype=bool)
        kept[np.argsort(np.argsort(order)[query], kind="stable")[: make["count"]]] = True
    elif make["kind"] == "scattered":
        said = relevant
        kept = np.zeros(len(pairs), dtype=bool)
        kept[np.random.default_rng(seed).permutation(len(pairs))[: make["count"]]] = True
    else:
        said = kept = relevant
    listed = pa.table(
        {
            "query-id": pairs["query_id"].filter(pa.array(kept)),
            "corpus-id": pairs["item_id"].filter(pa.array(kept)),
            "score": pa.array(said[kept].astype(np.int8)),
        }
    )
    options = pyarrow.csv.WriteOptions(delimiter="\t", quoting_style="none")
    pyarrow.csv.write_csv(listed, out, options)


def report(
    setting: Setting, name: str, title: str, variants: list[Variant], found: list[list[Result]], out: Path
) -> None:
    """The ablation's table, figures and chart."""
    lines = [
        f"### ablation: {name} ({setting.name}, L = {setting.length}, {len(found[0])} seeds)\n",
        "| series | " + title + " | place | " + " | ".join(SHOWN) + " | seconds of training |",
        "| --- " * (len(SHOWN) + 4) + "|",
    ]
    rows = []
    for variant, results in zip(variants, found, strict=True):
        whole = [result for result in results if result["error"] is None]
        broken = len(results) - len(whole)
        if broken:
            first = next(result["error"] for result in results if result["error"])
            lines.append(f"| {variant.series} | {variant.x} | {broken} of {len(results)} broke: {first} |")
        for place in ("at_chosen", "at_equal_recall"):
            if not whole or place not in whole[0]:
                continue
            cells = [spread([result[place]["means"][metric] for result in whole]) for metric in SHOWN]
            seconds = np.mean([result["seconds"].get("train", np.nan) for result in whole])
            lines.append(
                f"| {variant.series} | {variant.x} | {place[3:].replace('_', ' ')} | "
                + " | ".join(cells)
                + f" | {seconds:.0f} |"
            )
            for seed, result in enumerate(whole):
                for metric, value in result[place]["means"].items():
                    rows.append([variant.series, variant.x, place, seed, metric, value])
    text = "\n".join(lines) + "\n"
    print("\n" + text, flush=True)
    (out / f"ablation-{setting.name}-{name}.md").write_text(text, encoding="utf-8")
    with (out / f"ablation-{setting.name}-{name}.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["series", "x", "place", "seed", "metric", "value"])
        writer.writerows(rows)
    draw(
        title,
        variants,
        found,
        setting.base["means"]["Recall@50"],
        out / f"ablation-{setting.name}-{name}.svg",
    )


def draw(
    title: str, variants: list[Variant], found: list[list[Result]], base_recall: float, path: Path
) -> None:
    """Relevant novel items at equal recall, and recall at the chosen checkpoint, with 95 % intervals."""
    try:
        import matplotlib
    except ImportError:
        print(f"{path} is not drawn: pip install matplotlib")
        return
    matplotlib.use("svg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(11, 5))
    ticks = list(dict.fromkeys(variant.x for variant in variants))
    markers = "osv^Dx*P"
    line = "-" if all(tick[0].isdigit() for tick in ticks) else ""  # names have no order
    panels = (
        ("at_equal_recall", "RelevantNovel@50", "at equal recall"),
        ("at_chosen", "Recall@50", "at the chosen checkpoint"),
    )
    for axis, (wished, metric, where) in zip(axes, panels, strict=True):
        place = wished if any(wished in r for results in found for r in results) else "at_chosen"
        for number, series in enumerate(dict.fromkeys(variant.series for variant in variants)):
            points = []
            for variant, results in zip(variants, found, strict=True):
                values = [r[place]["means"][metric] for r in results if r["error"] is None and place in r]
                if variant.series == series and values:
                    points.append((ticks.index(variant.x), *t_interval(values)))
            if points:
                x, mean, half = zip(*points, strict=True)
                axis.errorbar(
                    x, mean, yerr=np.nan_to_num(half), marker=markers[number % len(markers)], capsize=3,
                    label=series, linestyle=line,
                )  # fmt: skip
        slanted = {"rotation": 50, "ha": "right", "fontsize": 8} if len(ticks) > 5 else {}
        axis.set_xticks(range(len(ticks)), ticks, **slanted)
        suffix = where if place == wished else "at the chosen checkpoint"
        axis.set(xlabel=title, ylabel=f"{metric}, {suffix}")
    axes[1].axhline(base_recall, linestyle="--", color="grey", label="deployed")
    axes[0].set_ylim(bottom=0)
    axes[1].legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path)
    pyplot.close(figure)
