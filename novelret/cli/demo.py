"""`novelret demo`: the whole chain on the sample data, offline."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from novelret.cli.options import JsonOption, QuietOption, error_console, reporter, show_result

EXAMPLES = """
[bold]examples:[/]

  novelret demo

  novelret demo --out /tmp/novelret-demo
"""

BASE_DEPTH = 50


def demo(
    out: Annotated[Path, typer.Option(help="Where the artifacts go; replaced if a demo made it.")] = Path(
        "demo"
    ),
    data: Annotated[
        Path | None, typer.Option(help="The sample data. (default: sample_data/ of the checkout)")
    ] = None,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Run index, label, train and eval on the sample data: offline, no API key, a minute or two."""
    from novelret.artifacts import writable
    from novelret.build import IndexConfig, build_index
    from novelret.cli.eval import render
    from novelret.errors import UserError
    from novelret.evaluate.config import EvalConfig
    from novelret.evaluate.evaluate import evaluate_models
    from novelret.label.label import LabelConfig, build_labels
    from novelret.train.config import TrainConfig
    from novelret.train.trainer import train_model

    data = data or Path(__file__).parents[2] / "sample_data"
    if not (data / "deployed_model").is_dir():
        raise UserError(f"{data}: no sample data; run the demo from a checkout of novelret, or pass --data")
    marker = out / ".novelret-demo"
    if out.is_file() or (out.exists() and any(out.iterdir()) and not marker.is_file()):
        raise UserError(f"{out}: holds something else than a demo; choose another --out")
    with writable(out):
        out.mkdir(parents=True, exist_ok=True)
        marker.touch()
    report = reporter(quiet)
    names = {"index": out / "index", "labels": out / "labels", "report": out / "report"}
    judge = f"file:{data / 'judgements.tsv'}"

    def say(*words: object) -> None:
        if not quiet:
            command = escape(shlex.join(["novelret", *map(str, words)]))
            error_console().print(f"\n[bold cyan]$ {command}[/]", soft_wrap=True, highlight=False)

    say("index", "--data", data, "--model", data / "deployed_model", "--out", names["index"])
    build_index(
        IndexConfig(str(data), str(data / "deployed_model"), device="cpu"),
        names["index"],
        force=True,
        report=report,
    )
    common = ("--data", data, "--index", names["index"])
    say(
        "label",
        *common,
        "--judge",
        judge,
        "--missing",
        "irrelevant",
        "--out",
        names["labels"],
    )
    build_labels(
        LabelConfig(str(data), str(names["index"]), judge, missing="irrelevant", device="cpu"),
        names["labels"],
        force=True,
        report=report,
    )
    models = {}
    for objective in ("supervised", "pg-ret"):
        models[objective] = out / objective
        options = ("--objective", objective)
        say("train", *common, "--labels", names["labels"], *options, "--out", models[objective])
        train_model(
            TrainConfig(
                str(data),
                str(names["index"]),
                labels=str(names["labels"]),
                objective=objective,
                device="cpu",
            ),
            models[objective],
            force=True,
            report=report,
        )
    given = tuple(f"{name}={path}" for name, path in models.items())
    flags = [word for model in given for word in ("--model", model)]
    say("eval", *common, *flags, "--judge", judge, "--missing", "irrelevant", "--out", names["report"])
    evaluation = evaluate_models(
        EvalConfig(
            str(data),
            str(names["index"]),
            models=given,
            judge=judge,
            missing="irrelevant",
            base_depth=BASE_DEPTH,
            device="cpu",
        ),
        names["report"],
        force=True,
        report=report,
    )
    result = {"report": str(names["report"] / "report.html"), "models": evaluation.means}
    show_result(result, as_json=as_json, render=lambda console: render(console, evaluation, names["report"]))
