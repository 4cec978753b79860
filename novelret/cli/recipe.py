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
from novelret.artifacts import MANIFEST, is_kind, read_json
from novelret.cli.eval import parse_cuts
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
    path = recipes.find(name)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not readable as text ({error})") from None
    typer.echo(text, nl=False)


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
        there = {
            stage: out for stage, options in stages.items() if (out := _output_there(options)) is not None
        }
        for stage, out in there.items():
            _check_settings(stage, out, file)
        ran = None
        for stage in stages:
            out = there.get(stage)
            if out is not None:
                _check_inputs(stage, out, file, ran)
                if not quiet:
                    error_console().print(f"{stage}: {out} is there already", soft_wrap=True, markup=False)
                continue
            ran = stage
            if not quiet:
                error_console().print(
                    f"\n$ {_as_typed(stage, stages[stage])}",
                    style="bold cyan",
                    markup=False,
                    highlight=False,
                    soft_wrap=True,
                )
            code = main([stage, "--config", str(file), *(["--quiet"] if quiet else [])])
            if code:
                raise typer.Exit(code)


def _check_options(name: str, stage: str, file: Path) -> None:
    """Refuse a stage or options of it that the command line does not know.

    Raises:
        UserError: says so.
    """
    if stage not in _commands():
        raise UserError(f"recipe {name}: {stage!r} is no command of novelret; see `novelret --help`")
    try:
        _settings(stage, file)
    except UserError as error:
        raise UserError(str(error).replace(str(file), f"recipe {name}")) from None
    except typer.BadParameter as error:
        raise UserError(f"recipe {name}, {stage}: {error.format_message()}") from None


def _as_typed(stage: str, options: dict[str, Any]) -> str:
    """A stage of a recipe as a command for the shell, with all that was set."""
    from novelret.evaluate.provenance import command_line

    turned_off = {flag for option in _commands()[stage].params for flag in option.secondary_opts}
    said = {
        name: value
        for name, value in options.items()
        if value is not False or f"--no-{name}" in turned_off  # the others are off as long as nobody asks
    }
    return command_line(stage, said, {})


def _commands() -> dict[str, Any]:
    from novelret.cli import app as whole

    commands: dict[str, Any] = getattr(typer.main.get_command(whole), "commands", {})
    return commands


def _settings(stage: str, file: Path, *more: str) -> dict[str, Any]:
    """All options of a stage by a recipe or by an output's config.yaml, as the command takes them."""
    params: dict[str, Any] = _commands()[stage].make_context(stage, ["--config", str(file), *more]).params
    return params


_CAPS = ("max-cost", "max-requests")
_NOT_OF_THE_OUTPUT = {
    "config", "out", "force", "quiet", "as_json", "plan", "store", "concurrency", "timeout", "rpm", "tpm",
    "max_cost", "max_requests", "price",
}  # fmt: skip


def _is_to_go_on(out: Path, options: dict[str, Any]) -> bool:
    """Whether an output stopped at a cap that the recipe has raised since, or before all was asked."""
    from novelret.label.asking import gave_up

    before = read_json(out / MANIFEST) if (out / MANIFEST).is_file() else {}
    facts = before.get("facts") or {}
    of_asking = facts.get("asked") if before.get("kind") == "report" else facts
    if gave_up(of_asking):
        return True
    stopped = str((of_asking or {}).get("stopped") or "")
    caps = [(name, before["config"].get(name.replace("-", "_"))) for name in _CAPS if f"--{name} " in stopped]
    now = {name: math.inf if options.get(name) is None else float(options[name]) for name, _ in caps}
    return any(then is not None and now[name] > then for name, then in caps)


def _output_there(options: dict[str, Any]) -> Path | None:
    """A stage's output where it lies there, and is not to be gone on with."""
    out = None if options.get("out") is None else Path(options["out"])
    return out if out is not None and out.exists() and not _is_to_go_on(out, options) else None


def _check_inputs(stage: str, out: Path, file: Path, ran: str | None) -> None:
    """Refuse an output that was made from other artifacts than lie there now.

    Raises:
        UserError: one was made anew since, by this run or by another.
    """
    from novelret.evaluate.config import named_model

    if not (out / MANIFEST).is_file():
        if ran is not None:  # a file of its own, which does not say what it was made from
            raise UserError(f"{stage}: {out} was made before {ran} ran; remove it, to have it made again")
        return
    made_from = read_json(out / MANIFEST).get("inputs", {}).values()
    settings = _settings(stage, file)
    named = [settings.get(option) or [] for option in ("index", "labels", "models", "init")]
    folders = [str(each) for given in named for each in (given if isinstance(given, list) else [given])]
    folders += [str(source).removeprefix("yes:") for source in settings.get("sources") or []]
    for folder in dict.fromkeys(Path(named_model(folder)[1]) for folder in folders):
        if not any(is_kind(folder, kind) for kind in ("index", "labels", "model")):
            continue  # an encoder of somebody else's
        there = read_json(folder / MANIFEST)
        fits = {there["fingerprint"], *there["facts"].get("ancestors", ())}
        if fits.isdisjoint(made_from):
            raise UserError(f"{stage}: {out} was made before {folder} was; remove it, to have it made again")


def _check_settings(stage: str, out: Path, file: Path) -> None:
    """Refuse an output that was made with other settings than the recipe's.

    Raises:
        UserError: names them.
    """
    path = out / "config.yaml"
    if not path.is_file():
        return  # export's and the like, which hold no settings
    try:
        before = _settings(stage, path, "--out", str(out))
    except (UserError, typer.BadParameter) as error:
        raise UserError(
            f"{stage}: {out} was made with settings that are none any more ({error}); remove it, to have it "
            "made again"
        ) from None
    # What is left to the program was put in by it: whether that is what it was then cannot be told.
    now = {name: value for name, value in _settings(stage, file).items() if value not in (None, [], ())}
    if "k" in now:  # cuts, which an output holds in ascending order
        now["k"] = parse_cuts(now["k"])
    flags = {str(option.name): option.opts[0].lstrip("-") for option in _commands()[stage].params}
    changed = [
        f"{flags[name]} {_shown(before[name])} → {_shown(value)}"
        for name, value in now.items()
        if name not in _NOT_OF_THE_OUTPUT and _shown(before[name]) != _shown(value)
    ]
    if changed:
        raise UserError(
            f"{stage}: {out} was made with other settings ({', '.join(changed)}); remove it, to have it made "
            f"again, or keep it with another --set {stage}.out=…"
        )


def _shown(value: Any) -> str:
    """A value as the command line has it: cuts and lists are one text, numbers have one spelling."""
    if isinstance(value, list | tuple):
        return ",".join(map(str, value))
    return str(value).strip("[]()").replace(", ", ",")
