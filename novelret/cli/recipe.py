"""`novelret recipe`: list, show, copy and run recipes."""

from __future__ import annotations

import math
import shutil
import tempfile
from pathlib import Path
from typing import Annotated, Any

import typer
import yaml
from rich.console import Console
from rich.table import Table

from novelret import recipe as recipes
from novelret.artifacts import MANIFEST, read_json
from novelret.cli.options import ForceOption, JsonOption, QuietOption, error_console, show_result
from novelret.errors import UserError

EXAMPLES = """
[bold]examples:[/]

  novelret recipe ls

  novelret recipe cp orcas-conservative my.yaml

  novelret recipe run default --set data=my-data --set index.model=my-encoder --set train.steps=800
"""

app = typer.Typer(
    help="The papers' settings and our defaults, as files that `--config` takes.",
    no_args_is_help=True,
    rich_markup_mode="rich",
)

NameArgument = Annotated[str, typer.Argument(help="A recipe's name, or a file of your own.")]


@app.command("ls")
def list_recipes(as_json: JsonOption = False) -> None:
    """List all recipes."""
    found = {name: recipes.summary(recipes.find(name)) for name in recipes.names()}

    def render(console: Console) -> None:
        table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
        for name, text in found.items():
            table.add_row(f"[bold]{name}[/]", text)
        console.print(table)

    show_result(found, as_json=as_json, render=render)


@app.command()
def show(name: NameArgument) -> None:
    """Print a recipe."""
    typer.echo(recipes.find(name).read_text(encoding="utf-8"), nl=False)


@app.command()
def cp(
    name: NameArgument,
    file: Annotated[Path, typer.Argument(help="Where to copy it.")],
    force: ForceOption = False,
) -> None:
    """Copy a recipe to edit it."""
    source = recipes.find(name)
    try:
        if file.is_dir():
            file = file / source.name
        if file.exists() and not force:
            raise UserError(f"{file}: exists already; give another name, or --force to replace it")
        shutil.copyfile(source, file)
    except OSError as error:  # shutil's own, like that of a copy onto itself, say it without a strerror
        raise UserError(f"{file}: cannot be written ({error.strerror or error}); copy it elsewhere") from None


@app.command()
def run(
    name: NameArgument,
    overrides: Annotated[
        list[str] | None,
        typer.Option("--set", help="STAGE.OPTION=VALUE, or OPTION=VALUE for all stages that have it."),
    ] = None,
    quiet: QuietOption = False,
) -> None:
    """Run a recipe's stages in order; those whose output exists are skipped."""
    from novelret.cli import main

    stages = recipes.load(recipes.find(name), overrides or [])
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "recipe.yaml"
        file.write_text(yaml.safe_dump(stages, sort_keys=False, allow_unicode=True), encoding="utf-8")
        for stage in stages:  # all of them before any, as what one stage pays for is spent
            _check_options(name, stage, file)
        ran = None
        for stage, options in stages.items():
            out = None if options.get("out") is None else Path(options["out"])
            if out is not None and out.exists() and not _cap_was_raised(out, options):
                _check_is_current(stage, out, options, ran)
                if not quiet:
                    error_console().print(f"{stage}: {out} is there already", soft_wrap=True, markup=False)
                continue
            ran = stage
            if not quiet:
                error_console().print(
                    f"\n$ novelret {stage} --config {name}", style="bold cyan", markup=False
                )
            code = main([stage, "--config", str(file), *(["--quiet"] if quiet else [])])
            if code:
                raise typer.Exit(code)


def _check_options(name: str, stage: str, file: Path) -> None:
    """Refuse a stage or options of it that the command line does not know.

    Raises:
        UserError: says so.
    """
    from novelret.cli import app as whole

    commands = getattr(typer.main.get_command(whole), "commands", {})
    if stage not in commands:
        raise UserError(f"recipe {name}: {stage!r} is no command of novelret; see `novelret --help`")
    try:
        commands[stage].make_context(stage, ["--config", str(file)])
    except UserError as error:
        raise UserError(str(error).replace(str(file), f"recipe {name}")) from None
    except typer.BadParameter as error:
        raise UserError(f"recipe {name}, {stage}: {error.format_message()}") from None


_CAPS = ("max-cost", "max-requests")


def _cap_was_raised(out: Path, options: dict[str, Any]) -> bool:
    """Whether an output stopped at a cap that the recipe has raised since; its stage then goes on."""
    before = read_json(out / MANIFEST) if (out / MANIFEST).is_file() else {}
    facts = before.get("facts") or {}
    of_asking = facts.get("asked") if before.get("kind") == "report" else facts
    stopped = str((of_asking or {}).get("stopped") or "")
    caps = [(name, before["config"].get(name.replace("-", "_"))) for name in _CAPS if f"--{name} " in stopped]
    return any(then is not None and (options.get(name) or math.inf) > then for name, then in caps)


def _check_is_current(stage: str, out: Path, options: dict[str, Any], ran: str | None) -> None:
    """Refuse an output that is not what the recipe would make now.

    Raises:
        UserError: an earlier stage ran again, or settings differ.
    """
    if ran is not None:
        raise UserError(f"{stage}: {out} was made before {ran} ran; remove it, to have it made again")
    path = out / "config.yaml"
    before = yaml.safe_load(path.read_text(encoding="utf-8")) if path.is_file() else {}
    changed = []
    for name, value in options.items():
        then = before.get(name.replace("-", "_"))
        # Lists and what the output does not name are written in another form there.
        is_told = name not in (*_CAPS, "price") and then is not None and not isinstance(then, list)
        if is_told and str(then) != str(value) and then != value:
            changed.append(f"{name} {then} → {value}")
    if changed:
        raise UserError(
            f"{stage}: {out} was made with other settings ({', '.join(changed)}); remove it, to have it made "
            f"again, or keep it with another --set {stage}.out=…"
        )
