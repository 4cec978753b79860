"""What was chosen on held-back queries is trained anew on all of them."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file

from novelret.train import loop, trainer
from tests.train.test_memory import TUNE as MEMORY
from tests.train.test_memory import log_of, same_weights
from tests.train.test_trainer import ADAPTER, run, train


def trained_part(folder):
    """The weights behind the frozen encoder, of a map alone."""
    (path,) = folder.glob("*_Dense/model.safetensors")
    return load_file(path)["linear.weight"]


def facts_of(folder):
    return json.loads((folder / "manifest.json").read_text())["facts"]


@pytest.mark.parametrize("tune", [ADAPTER, MEMORY, ("--tune", "full", "--learning-rate", 1e-3)])
def test_it_is_what_training_on_all_queries_gives(command, capsys, tmp_path, tune):
    once = (*tune, "--blends", 1, "--eval-every", 20, "--steps", 20)
    found, _ = train(capsys, command, tmp_path / "refit", *once)
    assert found["chosen"]["step"] == 20
    train(capsys, command, tmp_path / "part", *once, "--no-refit")
    train(capsys, command, tmp_path / "all", *once, "--validation-fraction", 0)
    names = ("refit", "part", "all")
    assert same_weights(tmp_path / "refit", tmp_path / "all")
    assert not same_weights(tmp_path / "refit", tmp_path / "part")
    # What was seen on held-back queries is of the first training, whatever came after it.
    points = [json.loads((tmp_path / name / "validation.json").read_text()) for name in ("refit", "part")]
    assert points[0] == points[1]
    assert [facts_of(tmp_path / name)["refit"] for name in names] == [True, False, False]
    assert log_of(tmp_path / "refit") == log_of(tmp_path / "part")
    assert log_of(tmp_path / "refit" / "refit") == log_of(tmp_path / "all")
    assert "trained anew on all queries" in (tmp_path / "refit" / "README.md").read_text()
    assert not list((tmp_path / "refit").rglob("resume"))


def test_where_it_diverges_the_first_one_is_what_there_is(command, capsys, tmp_path, monkeypatch):
    arguments = (*ADAPTER, "--keep", 3)
    train(capsys, command, tmp_path / "part", *arguments, "--no-refit")
    real = loop.batch_loss

    def breaks(embeddings, here, batch, material, config, items, step):
        found = real(embeddings, here, batch, material, config, items, step)
        second = len(material.split) == 20
        return loop.StepLoss(found.loss * torch.nan, 0, 0) if second and step == 3 else found

    monkeypatch.setattr(loop, "batch_loss", breaks)
    found, err = train(capsys, command, tmp_path / "refit", *arguments)
    assert found["chosen"]["step"] > 0
    said = "step 3: the loss is nan, in the training on all queries; the model is the one that was chosen"
    assert said in " ".join(err.split())
    assert same_weights(tmp_path / "refit", tmp_path / "part")
    kept = [sorted(p.name for p in (tmp_path / name / "checkpoints").iterdir()) for name in ("refit", "part")]
    assert kept[0] == kept[1] != []
    for name in kept[0]:
        assert same_weights(
            tmp_path / "refit" / "checkpoints" / name, tmp_path / "part" / "checkpoints" / name
        )
    facts = facts_of(tmp_path / "refit")
    assert (facts["refit"], facts["checkpoints_refit"]) == (False, False)
    assert "trained anew" not in (tmp_path / "refit" / "README.md").read_text()
    assert not list((tmp_path / "refit").rglob("resume"))


def test_blends_and_kept_checkpoints_are_of_the_second_training(command, capsys, tmp_path):
    train(capsys, command, tmp_path / "refit", *ADAPTER, "--blends", 4, "--keep", 100)
    train(capsys, command, tmp_path / "all", *ADAPTER, "--validation-fraction", 0)
    end = trained_part(tmp_path / "all")
    points = json.loads((tmp_path / "refit" / "validation.json").read_text())
    shares = {point["share"] for point in points if point["step"] == points[-1]["step"]}
    assert shares == {0.25, 0.5, 0.75, 1.0}
    for share in shares:
        name = f"step-{points[-1]['step']}" + ("" if share == 1 else f"-share-{share:g}")
        there = trained_part(tmp_path / "refit" / "checkpoints" / name)
        assert there == pytest.approx(share * end, abs=1e-7)
    chosen = facts_of(tmp_path / "refit")["chosen"]
    mark = "" if chosen["share"] == 1 else f"-share-{chosen['share']:g}"
    kept = tmp_path / "refit" / "checkpoints" / f"step-{chosen['step']}{mark}"
    assert trained_part(tmp_path / "refit").equal(trained_part(kept))


def test_it_ends_at_the_step_that_was_chosen(command, capsys, tmp_path):
    hot = ("--tune", "adapter", "--learning-rate", 0.5, "--max-recall-drop", 0, "--blends", 1)
    found, err = train(capsys, command, tmp_path / "refit", *hot, "--steps", 40, "--eval-every", 4)
    step = found["chosen"]["step"]
    assert 0 < step < 40, err
    steps = [line["step"] for line in log_of(tmp_path / "refit" / "refit")]
    assert max(steps) == step
    assert max(line["step"] for line in log_of(tmp_path / "refit")) == 40


def test_nothing_is_trained_anew_where_the_start_is_kept(command, capsys, tmp_path):
    _, err = train(capsys, command, tmp_path / "model", "--tune", "adapter", "--learning-rate", 1e-9)
    assert facts_of(tmp_path / "model")["chosen"]["step"] == 0, err
    assert not facts_of(tmp_path / "model")["refit"]
    # Nor are these weights, where only others that are kept were trained.
    train(capsys, command, tmp_path / "kept", "--tune", "adapter", "--learning-rate", 1e-9, "--keep", 2)
    assert facts_of(tmp_path / "kept")["chosen"]["step"] == 0
    assert not facts_of(tmp_path / "kept")["refit"]
    assert "trained anew" not in (tmp_path / "kept" / "README.md").read_text()


def test_broken_off_it_goes_on_without_choosing_again(command, capsys, tmp_path, monkeypatch):
    how = (*MEMORY, "--blends", 1, "--eval-every", 2, "--log-every", 1)
    found, _ = train(capsys, command, tmp_path / "whole", *how)
    last = found["chosen"]["step"]
    assert last >= 4
    real, seen = loop.batch_loss, []

    def breaks(*arguments):
        seen.append(arguments[-1])
        if seen.count(last - 1) == 2:
            raise KeyboardInterrupt
        return real(*arguments)

    words = (*command, *how, "--out", tmp_path / "broken")
    monkeypatch.setattr(loop, "batch_loss", breaks)
    assert run(capsys, *words)[0] == 130
    monkeypatch.undo()
    assert (tmp_path / "broken.partial" / "refit").is_dir()

    def search(*_):
        raise AssertionError("had been chosen")

    monkeypatch.setattr(trainer, "_search", search)
    code, _, err = run(capsys, *words)
    assert (code, f"going on at step {last - 2} of {last}" in err) == (0, True), err
    assert same_weights(tmp_path / "whole", tmp_path / "broken")
    assert log_of(tmp_path / "whole" / "refit") == log_of(tmp_path / "broken" / "refit")
    assert facts_of(tmp_path / "whole") == facts_of(tmp_path / "broken")


def test_few_held_back_queries_are_not_worth_it(command, capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(trainer, "_LEAST_SHARE", 0.21)
    train(capsys, command, tmp_path / "model", *ADAPTER)
    assert facts_of(tmp_path / "model")["chosen"]["step"]
    assert not facts_of(tmp_path / "model")["refit"]


def test_a_judge_is_not_asked_about_a_second_training(command, world, capsys, tmp_path):
    judge = ("--alpha", 0.25, "--judge", f"file:{world / 'judgements.tsv'}", "--missing", "irrelevant")
    train(capsys, command, tmp_path / "model", *ADAPTER, *judge)
    assert not facts_of(tmp_path / "model")["refit"]


def test_kept_checkpoints_are_known_to_be_of_the_second_training(command, capsys, tmp_path):
    """Also where the chosen model is the start, which no training has touched."""
    train(
        capsys, command, tmp_path / "model", "--tune", "adapter", "--learning-rate", 1e-9, "--keep", 100,
        "--blends", 1,
    )  # fmt: skip
    assert facts_of(tmp_path / "model")["chosen"]["step"] == 0
    assert (tmp_path / "model" / "refit" / "log.jsonl").is_file()
    assert not facts_of(tmp_path / "model")["refit"]
    kept = next(path for path in (tmp_path / "model" / "checkpoints").iterdir() if path.name != "step-0")
    for start, warned in ((tmp_path / "model", False), (kept, True)):
        _, err = train(
            capsys, command, tmp_path / f"from-{warned}", "--tune", "adapter", "--init", start, "--steps", 2
        )
        assert ("looks better on them than it is" in " ".join(err.split())) == warned
