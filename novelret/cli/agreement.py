"""`novelret agreement`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.markup import escape

from novelret.cli.options import ConfigOption, JsonOption, QuietOption, reporter, show_result
from novelret.progress import shown

if TYPE_CHECKING:
    from novelret.label.agreement import Agreement

EXAMPLES = """
[bold]examples:[/]

  novelret agreement --labels runs/labels --human people.tsv

  novelret agreement --labels runs/labels --data my-data --human graded.tsv --threshold 2 --show 30 --json
"""
_LONGEST = 200  # characters of a text on the screen; --json gives all


def agreement(
    labels: Annotated[Path, typer.Option(help="LABELS made by `novelret label`.")],
    human: Annotated[Path, typer.Option(help="People's judgements: qrels, tab-separated or TREC's.")],
    data: Annotated[
        str | None, typer.Option(help="Where the texts are. (default: what the labels were made from)")
    ] = None,
    threshold: Annotated[
        float | None,
        typer.Option(help="Lowest human score that counts as relevant. (default: anything above 0)"),
    ] = None,
    show: Annotated[int, typer.Option(help="How many disagreements to show with texts.")] = 10,
    seed: Annotated[int, typer.Option(help="Decides the bootstrap's resamples.")] = 0,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
    config: ConfigOption = None,
) -> None:
    """Hold a judge's verdicts against people's: how far can the labels be trusted?"""
    from dataclasses import asdict

    from novelret.label.agreement import measure_agreement

    found = measure_agreement(
        labels, human, data=data, threshold=threshold, show=show, seed=seed, report=reporter(quiet)
    )
    show_result(asdict(found), as_json=as_json, render=lambda console: _render(console, found))


def _render(console: Console, found: Agreement) -> None:
    console.print(
        f"[bold]{escape(found.judge)}[/] beside people: {found.pairs:,} pairs of {found.queries:,} queries "
        f"(not judged: {found.not_judged:,}, unusable answers: {found.unusable:,})"
    )
    for name, value in found.figures.items():
        interval = found.intervals[name]
        ends = f"  [dim]95 % interval {interval[0]:.3f} to {interval[1]:.3f}[/]" if interval else ""
        console.print(f"  {name:<10} {'–' if value is None else f'{value:.3f}'}{ends}", highlight=False)
    cells = found.confusion
    console.print()
    console.print(f"  {'':<16}{'people: yes':>14}{'people: no':>14}")
    console.print(f"  {'judge: yes':<16}{cells['yes-yes']:>14,}{cells['yes-no']:>14,}")
    console.print(f"  {'judge: no':<16}{cells['no-yes']:>14,}{cells['no-no']:>14,}")
    if found.disagreements:
        console.print("\nthe worst disagreements:")
    for one in found.disagreements:
        console.print(
            f"  judge {'yes' if one.judge else 'no'}, people {one.human:g}  "
            f"[dim]{shown(one.query_id)} / {shown(one.item_id)}[/]",
            highlight=False,
        )
        said = [] if one.answer is None else [("answer", one.answer)]
        for name, text in [("query", one.query), ("item", one.item), *said]:
            console.print(f"    {name}: {shown(_shorten(text))}", highlight=False, soft_wrap=True)


def _shorten(text: str) -> str:
    """Any text, on one line that fits a screen."""
    plain = " ".join(text.split())
    return plain if len(plain) <= _LONGEST else plain[: _LONGEST - 1] + "…"
