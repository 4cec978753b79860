"""`novelret recipe`: list, show, copy and run recipes."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import Annotated

import typer
import yaml
from rich.console import Console
from rich.table import Table

from novelret import recipe as recipes
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
        for stage, options in stages.items():
            out = options.get("out")
            if out is not None and Path(out).exists():
                if not quiet:
                    error_console().print(f"{stage}: {out} is there already", soft_wrap=True, markup=False)
                continue
            if not quiet:
                error_console().print(
                    f"\n$ novelret {stage} --config {name}", style="bold cyan", markup=False
                )
            code = main([stage, "--config", str(file), *(["--quiet"] if quiet else [])])
            if code:
                raise typer.Exit(code)
