"""Every recipe names real options, in the file as in its header, and our own can be run from its first line."""

from __future__ import annotations

import json
import shlex
import shutil
from pathlib import Path

import pytest
import typer
import yaml

from novelret import recipe
from novelret.artifacts import Manifest, read_manifest, write_manifest
from novelret.cli import app, main
from novelret.cli.recipe import _check_inputs, _is_to_go_on
from novelret.errors import UserError
from novelret.evaluate.config import check_config as check_evaluation
from novelret.label.cost import find_price
from novelret.label.prompts import load_prompt, render
from novelret.label.tokens import token_counter
from novelret.train.config import TrainConfig, check_config
from tests.commands import fails
from tests.loopback import LoopbackJudge

CATALOG = 1_000_000
STAGES = ["index", "label", "train", "eval"]


def commands() -> dict:
    """Name → click command, subcommands as "convert orcas"."""
    found = {}
    for name, command in typer.main.get_command(app).commands.items():
        inner = getattr(command, "commands", None)
        found |= {f"{name} {sub}": c for sub, c in inner.items()} if inner else {name: command}
    return found


def test_all_of_the_papers_settings_are_there(capsys):
    assert main(["recipe", "ls", "--json"]) == 0
    listed = json.loads(capsys.readouterr().out)
    assert list(listed) == [
        "amazon-conservative", "default", "orcas-aggressive", "orcas-conservative",
        "query-keyword-aggressive", "query-keyword-conservative",
    ]  # fmt: skip
    length = {name: recipe.load(recipe.find(name), [])["train"].get("base-depth", 50) for name in listed}
    assert {name: n for name, n in length.items() if n != 50} == {
        "query-keyword-aggressive": 200, "query-keyword-conservative": 200,
    }  # fmt: skip
    for name in listed:
        if name != "default":
            train = recipe.load(recipe.find(name), [])["train"]
            assert train["loss"] == name.rpartition("-")[2]
            assert (train["reward"], train["batch-size"]) == ("eq7", 128)


@pytest.mark.parametrize("name", recipe.names())
def test_every_key_is_an_option_and_every_value_fits(name):
    stages = recipe.load(recipe.find(name), [])
    assert list(stages) == STAGES
    for stage, options in stages.items():
        command = commands()[stage]
        flags = {flag.lstrip("-"): parameter for parameter in command.params for flag in parameter.opts}
        assert set(options) <= set(flags), set(options) - set(flags)
        arguments = []
        for key, value in options.items():
            if isinstance(value, bool):
                arguments.append(f"--{key}" if value else f"--no-{key}")
                continue
            for one in value if isinstance(value, list) else [value]:
                arguments += [f"--{key}", str(one)]
        with command.make_context(stage, arguments):  # raises where a value is not of the option's type
            pass
    # What a stage reads is what the one before it made, and the settings pass the stages' own checks.
    index, label, train, evaluation = stages.values()
    assert label["index"] == train["index"] == evaluation["index"] == index["out"]
    assert train["labels"] == label["out"]
    assert evaluation["model"] == [f"new={train['out']}"]
    assert load_prompt(label["prompt"]).name == load_prompt(evaluation.get("prompt", "query-document")).name
    assert label["judge"] != evaluation["judge"]
    settings = {key.replace("-", "_"): value for key, value in train.items() if key != "out"}
    check_config(TrainConfig(**settings), CATALOG)
    cuts = tuple(int(k) for k in str(evaluation.get("k", "10,20,50")).split(","))
    given = {"models": tuple(evaluation["model"]), "judge": evaluation["judge"], "k": cuts}
    from novelret.evaluate.config import EvalConfig

    check_evaluation(EvalConfig("d", "i", base_depth=evaluation.get("base-depth", 50), **given), CATALOG)


@pytest.mark.parametrize("name", [name for name in recipe.names() if name != "default"])
def test_the_cap_of_eval_is_enough_for_all_that_it_asks_about(name):
    """For the test splits that the converters make, each list without an item of another."""
    options = recipe.load(recipe.find(name), [])["eval"]
    queries = {"amazon": 11_000, "orcas": 8_500, "query-keyword": 6_200}[name.rpartition("-")[0]]
    text = {"amazon": " ".join(["six products of ten words each, as long as titles are"] * 6)}
    query = text.get(name.rpartition("-")[0], "how long does it take to get a passport")
    messages = render(load_prompt(options["prompt"]), query, "Passport processing times, a title")
    model = options["judge"].partition(":")[2]
    price, answer = find_price(model, None), 150 if options["prompt"] == "user-product" else 2
    pairs = queries * (options["base-depth"] + max(map(int, options["k"].split(","))))
    assert price.of(token_counter(model).count(messages), answer) * pairs <= options["max-cost"]


@pytest.mark.parametrize("name", recipe.names())
def test_the_header_s_commands_are_real(name):
    header = [line for line in recipe.find(name).read_text().splitlines() if line.startswith("#")]
    given = [
        shlex.split(line.removeprefix("#").strip()) for line in header if line.startswith("#   novelret ")
    ]
    assert len(given) >= 6
    known = commands()
    for words in given:
        command = " ".join(words[1:3]) if " ".join(words[1:3]) in known else words[1]
        rest = words[1 + len(command.split()) :]
        flags = {flag for parameter in known[command].params for flag in parameter.opts}
        assert {word for word in rest if word.startswith("--")} <= flags
        if "--config" in rest:
            assert rest[rest.index("--config") + 1] == f"{name}.yaml"
    assert any(words[1:4] == ["recipe", "run", name] for words in given)
    stages = [words[1] for words in given if "--config" in words]
    assert stages == ["index", "label", "label", "train", "eval"]


@pytest.mark.parametrize(("ancestors", "fits"), [(["b", "a"], True), (["b"], False)])
def test_labels_fit_an_index_that_was_appended_to_since(tmp_path, ancestors, fits):
    of_labels, of_index = (Manifest(kind, {}, {}, kind) for kind in ("labels", "index"))
    of_labels.inputs["index"], of_index.facts["ancestors"] = "a", ancestors
    for manifest in (of_labels, of_index):
        (tmp_path / manifest.kind).mkdir()
        write_manifest(tmp_path / manifest.kind, manifest)
    label = {"data": "d", "index": str(tmp_path / "index"), "judge": "file:j", "out": "labels"}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump({"label": label}))
    check = ("label", tmp_path / "labels", tmp_path / "recipe.yaml", None)
    if fits:
        _check_inputs(*check)
    else:
        with pytest.raises(UserError, match="was made before"):
            _check_inputs(*check)


def sets(given: dict) -> list[str]:
    return [word for key, value in given.items() for word in ("--set", f"{key}={value}")]


def test_our_defaults_run_from_the_first_line(world, encoder, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    judge = f"file:{world / 'judgements.tsv'}"
    given = {
        "data": world, "index.model": encoder, "judge": judge, "label.base-depth": 3, "label.depth": 12,
        "train.base-depth": 3, "train.depth": 12, "train.steps": 5, "eval.base-depth": 3, "eval.k": "5,2",
        "label.missing": "irrelevant", "eval.missing": "irrelevant", "train.validation-fraction": 0.2,
    }  # fmt: skip
    command = ["recipe", "run", "default", *sets(given)]
    assert main(command) == 0, capsys.readouterr().err
    captured = capsys.readouterr()
    shown = [shlex.split(line[2:]) for line in captured.err.splitlines() if line.startswith("$ ")]
    assert [words[:2] for words in shown] == [["novelret", stage] for stage in STAGES]
    assert main([*shown[2][1:], "--out", "pasted"]) == 0, capsys.readouterr().err
    pasted, made = (
        json.loads((tmp_path / folder / "manifest.json").read_text())["fingerprint"]
        for folder in ("pasted", "runs/default/model")
    )
    assert pasted == made
    report = json.loads((tmp_path / "runs" / "default" / "report" / "metrics.json").read_text())
    assert "new" in json.dumps(report)
    assert main(command) == 0
    assert capsys.readouterr().err.count("is there already") == 4
    # Other settings are not passed over in silence, and before any stage runs.
    shutil.move(tmp_path / "runs" / "default" / "labels", tmp_path / "labels")
    assert main([*command, "--set", "train.steps=6"]) == 2
    capsys.readouterr()
    assert not (tmp_path / "runs" / "default" / "labels").exists()
    shutil.move(tmp_path / "labels", tmp_path / "runs" / "default" / "labels")
    assert main([*command, "--set", "train.steps=6"]) == 2
    assert "was made with other settings (steps 5 → 6)" in " ".join(capsys.readouterr().err.split())
    for setting, words in {
        "eval.k=2": "k 2,5 → 2",
        "eval.model=[new=elsewhere]": "model new=runs/default/model → new=elsewhere",
        "label.from=[base-top]": "from base-novel → base-top",
    }.items():
        assert main([*command, "--set", setting]) == 2
        assert words in " ".join(capsys.readouterr().err.split())
    given.pop("eval.base-depth")
    assert main(["recipe", "run", "default", *sets(given)]) == 2
    assert "base-depth 3 → 50" in " ".join(capsys.readouterr().err.split())
    # A number has one value, however it is spelled.
    spelled = ["train.learning-rate=1e-3", "train.out=b", "eval.out=c", "eval.model=[new=b]"]
    spelled = [word for setting in spelled for word in ("--set", setting)]
    assert main([*command, *spelled]) == 0, capsys.readouterr().err
    assert main([*command, *spelled]) == 0
    assert capsys.readouterr().err.count("is there already") == 6
    # Nor is a report that was made of another model.
    manifest = json.loads((tmp_path / "b" / "manifest.json").read_text())
    (tmp_path / "b" / "manifest.json").write_text(json.dumps(manifest | {"fingerprint": "another"}))
    assert main([*command, *spelled]) == 2
    assert "eval: c was made before b was; remove it" in " ".join(capsys.readouterr().err.split())
    # A stage that fails stops the rest.
    assert main([*command, "--set", "train.out=elsewhere", "--set", "train.loss=none"]) == 2
    assert "--loss none: unknown" in capsys.readouterr().err


def test_show_and_copy(tmp_path, capsys):
    assert main(["recipe", "show", "orcas-aggressive"]) == 0
    shown = capsys.readouterr().out
    assert main(["recipe", "cp", "orcas-aggressive", str(tmp_path / "my.yaml")]) == 0
    assert (tmp_path / "my.yaml").read_text() == shown
    assert yaml.safe_load(shown)["train"]["negatives"] == 5
    assert "exists already" in fails(capsys, "recipe", "cp", "default", tmp_path / "my.yaml")
    assert main(["recipe", "show", str(tmp_path / "my.yaml")]) == 0
    capsys.readouterr()
    (tmp_path / "latin.yaml").write_bytes(b"index:\n  data: caf\xe9\n")
    assert "latin.yaml: not readable as text" in fails(capsys, "recipe", "show", tmp_path / "latin.yaml")


def test_what_is_no_recipe_is_one_line(tmp_path, capsys):
    assert "nothing: no such recipe or file; choose from" in fails(capsys, "recipe", "show", "nothing")
    assert "expected STAGE.OPTION=VALUE" in fails(capsys, "recipe", "run", "default", "--set", "steps")
    assert "has no stage 'tarin'" in fails(capsys, "recipe", "run", "default", "--set", "tarin.steps=1")
    assert "no stage of default.yaml names 'steps'" in fails(
        capsys, "recipe", "run", "default", "--set", "steps=1"
    )
    for value in ("data=[x", "train.steps=a: b: c"):
        assert "the value is not readable as YAML" in fails(
            capsys, "recipe", "run", "default", "--set", value
        )
    (tmp_path / "bad.yaml").write_text("- a list")
    assert "expected stages" in fails(capsys, "recipe", "run", tmp_path / "bad.yaml")


def test_every_stage_is_checked_before_the_first_runs(world, encoder, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    given = ["recipe", "run", "default", "--set", f"data={world}", "--set", f"index.model={encoder}", "--set"]
    said = fails(capsys, *given, "train.stepz=5")
    assert "recipe default: unknown option 'stepz' for `novelret train`" in said
    assert "as_json" not in said
    assert "indexs" not in said
    assert "steps: 'many': Input should be a valid integer" in fails(capsys, *given, "train.steps=many")
    (tmp_path / "mine.yaml").write_text("lable:\n  depth: 3\n")
    assert "recipe mine.yaml: 'lable' is no command" in fails(capsys, "recipe", "run", "mine.yaml")
    assert [path.name for path in tmp_path.iterdir()] == ["mine.yaml"]


@pytest.mark.parametrize(
    ("now", "goes_on"), [("1e2", True), (30, True), (None, True), (25, False), (0, False)]
)
def test_a_cap_is_a_number_however_yaml_reads_it(tmp_path, now, goes_on):
    facts = {"stopped": "--max-cost 25 reached"}
    manifest = {"kind": "labels", "config": {"max_cost": 25.0}, "facts": facts}
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    assert _is_to_go_on(tmp_path, {"max-cost": now}) == goes_on


@pytest.mark.parametrize("cap", ["max-requests", "max_requests"])
def test_a_raised_cap_goes_on_and_what_follows_is_made_again(
    cap, world, encoder, index_folder, tmp_path, capsys, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OPENAI_API_KEY", "k")
    monkeypatch.setenv("NOVELRET_STORE", str(tmp_path / "store.sqlite"))
    stages = {
        "label": {
            "data": str(world), "index": str(index_folder), "judge": "openai:tiny", "prompt": "query-keyword",
            "base-depth": 3, "depth": 9, cap: 60, "out": "labels",
        },
        "train": {
            "data": str(world), "index": str(index_folder), "labels": "labels", "base-depth": 3, "depth": 9,
            "steps": 2, "out": "model",
        },
    }  # fmt: skip
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(stages))
    with LoopbackJudge() as server:
        monkeypatch.setenv("OPENAI_BASE_URL", server.url)
        for _ in range(2):
            assert main(["recipe", "run", "mine.yaml"]) == 0, capsys.readouterr().err
            assert len(server.seen) == 60
        capsys.readouterr()
        assert main(["recipe", "run", "mine.yaml", "--set", f"label.{cap}=90"]) == 2
        assert len(server.seen) == 90
        again = ["recipe", "run", "mine.yaml", "--set", f"label.{cap}=90"]
        said = "train: model was made before labels was; remove it"
        assert said in " ".join(capsys.readouterr().err.split())
        # And once more, when no stage has run: the artifacts say so.
        assert said in fails(capsys, *again, "--quiet")
        assert len(server.seen) == 90
        shutil.rmtree("model")
        for _ in range(2):
            assert main(again) == 0, capsys.readouterr().err
        # A judge that was given up midway ends the recipe, which goes on from there.
        shutil.rmtree("model")
        shutil.rmtree("labels")
        server.always = "400"
        more = [*again, "--set", "label.depth=20", "--set", f"label.{cap}=1000"]
        assert main(more) == 1, capsys.readouterr().err
        assert not Path("model").exists()
        server.always = None
        assert main(more) == 0, capsys.readouterr().err
        assert read_manifest(Path("labels"), "labels").facts["stopped"] is None
