"""The demo's own command on the sample data, and the deployed model's published figures."""

from __future__ import annotations

import json

import pytest

from novelret.cli import main


def test_demo_brings_novel_items_at_no_loss_of_recall(tmp_path, capsys):
    assert main(["demo", "--out", str(tmp_path / "demo"), "--json", "--quiet"]) == 0
    models = json.loads(capsys.readouterr().out)["models"]
    # The figures in sample_data/README.md.
    assert models["base"]["Recall@50"] == pytest.approx(0.707, abs=0.001)
    assert models["base"]["Precision@10"] == pytest.approx(0.495, abs=0.001)
    assert models["base"]["Novelty@50"] == 0
    assert models["pg-ret"]["RelevantNovel@50"] > models["supervised"]["RelevantNovel@50"] > 0
    assert models["pg-ret"]["Recall@50"] >= models["base"]["Recall@50"]
    assert (tmp_path / "demo" / "report" / "report.html").is_file()
    # A second run replaces its own demo, and nothing else.
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("keep")
    assert main(["demo", "--out", str(tmp_path / "mine")]) == 2
    assert "holds something else than a demo" in capsys.readouterr().err
    (tmp_path / "demo" / ".novelret-demo").unlink()  # what a user made by the same commands is no demo
    assert main(["demo", "--out", str(tmp_path / "demo")]) == 2
    assert "holds something else than a demo" in capsys.readouterr().err


def test_a_demo_that_was_killed_goes_on(tmp_path, capsys, monkeypatch):
    def killed(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("novelret.build.encode_catalog", killed)
        assert main(["demo", "--out", str(tmp_path / "demo"), "--quiet"]) == 130
    monkeypatch.setattr("novelret.label.label.build_labels", killed)  # far enough
    assert main(["demo", "--out", str(tmp_path / "demo"), "--quiet"]) == 130
    assert (tmp_path / "demo" / "index" / "manifest.json").is_file()
