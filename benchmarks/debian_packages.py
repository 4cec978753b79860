"""The main job on the debian-packages data set: every objective from the same start, tuned alike.

    python benchmarks/debian_packages.py DATA OUT [--tune adapter] [--steps 400]

DATA is the data set's folder (58K items, its deployed model and judgements inside). Each objective gets
the same number of steps and the same grid of learning rates; the rate is chosen on queries held back from
the train split, the table is measured once on the test split. Finished runs in OUT are not repeated.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

GRIDS = {"adapter": (1e-4, 3e-4, 1e-3, 3e-3), "full": (5e-6, 2e-5, 5e-5)}
OBJECTIVES = {
    "supervised": ["--objective", "supervised"],
    "supervised-judged": ["--objective", "supervised-judged"],
    "conservative": ["--objective", "pg-ret", "--loss", "conservative"],
    "aggressive": ["--objective", "pg-ret", "--loss", "aggressive"],
    "boundary": ["--objective", "pg-ret", "--loss", "boundary"],
}


def novelret(*arguments: str | Path) -> dict:
    command = [sys.executable, "-m", "novelret", *map(str, arguments), "--json"]
    print("$ novelret", *arguments, flush=True)
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--tune", default="adapter", choices=sorted(GRIDS))
    parser.add_argument("--steps", type=int, default=400)
    options = parser.parse_args()
    data, out = options.data, options.out
    index, labels, judge = out / "index", out / "labels", f"file:{data / 'judgements.tsv'}"
    common = ["--data", data, "--index", index]
    if not index.is_dir():
        novelret("index", "--data", data, "--model", data / "deployed_model", "--out", index)
    if not labels.is_dir():
        novelret(
            "label", *common, "--split", "train", "--judge", judge, "--missing", "irrelevant",
            "--base-depth", "50", "--depth", "400", "--out", labels,
        )  # fmt: skip
    chosen, note = {}, {}
    for name, arguments in OBJECTIVES.items():
        kept = {}
        # Where no checkpoint of any rate keeps the recall budget, show what the method does without one.
        for budget in ("0.01", "1"):
            tried = {}
            for rate in GRIDS[options.tune]:
                model = out / f"{options.tune}-{options.steps}-{name}-{rate:g}-{budget}"
                if not model.is_dir():
                    novelret(
                        "train", *common, "--split", "train", "--labels", labels, *arguments,
                        "--tune", options.tune, "--steps", options.steps, "--learning-rate", rate,
                        "--max-recall-drop", budget, "--out", model,
                    )  # fmt: skip
                point = json.loads((model / "manifest.json").read_text())["facts"]["chosen"]
                tried[model] = (point["relevant_novel"], point["novelty"])
                kept[model] = f"{rate:g}" + ("" if budget != "1" else ", no recall budget")
                print(model.name, {k: round(v, 4) for k, v in point.items()}, flush=True)
            best = max(tried, key=lambda model: tried[model])
            if tried[best][0] > 0:
                break
        chosen[name], note[name] = best, kept[best]
    models = [part for name, model in chosen.items() for part in ("--model", f"{name}={model}")]
    report = novelret(
        "eval", *common, "--split", "test", *models, "--judge", judge, "--missing", "irrelevant",
        "--base-depth", "50", "--k", "10,20,50", "--out", out / f"report-{options.tune}", "--force",
    )  # fmt: skip
    columns = ("Novelty@10", "Novelty@50", "RelevantNovel@50", "Recall@50", "Precision@10", "MergedDensity")
    print(f"\n| model ({options.tune}, {options.steps} steps) | lr |", " | ".join(columns), "|")
    print("| --- " * (len(columns) + 2) + "|")
    for name, means in report["models"].items():
        print(f"| {name} | {note.get(name, '–')} |", " | ".join(f"{means[c]:.3f}" for c in columns), "|")


if __name__ == "__main__":
    main()
