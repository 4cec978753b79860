"""The same as the command line, in ten lines of Python."""

import subprocess
import sys


def test_the_chain_as_functions(world, encoder, tmp_path):
    from novelret import (
        EvalConfig,
        IndexConfig,
        LabelConfig,
        TrainConfig,
        build_index,
        build_labels,
        evaluate_models,
        train_model,
    )

    data, judge = str(world), f"file:{world}/judgements.tsv"
    index, labels, model = (str(tmp_path / name) for name in ("index", "labels", "model"))
    build_index(IndexConfig(data, str(encoder)), tmp_path / "index")
    build_labels(
        LabelConfig(data, index, judge, missing="irrelevant", base_depth=3, depth=12), tmp_path / "labels"
    )
    settings = TrainConfig(data, index, labels=labels, tune="adapter", base_depth=3, depth=12, steps=5)
    trained = train_model(settings, tmp_path / "model")
    found = evaluate_models(
        EvalConfig(data, index, models=(f"new={model}",), base_depth=3, k=(3,)), tmp_path / "report"
    )
    assert trained.folder == tmp_path / "model"
    assert set(found.means) == {"base", "new"}
    card = (tmp_path / "model" / "README.md").read_text()
    assert "40 items, 16 dimensions" in card
    assert "* `tune`: adapter" in card
    assert (tmp_path / "model" / "frontier.svg").read_text().startswith("<svg xmlns=")


def test_importing_novelret_loads_nothing_heavy():
    code = "import novelret, novelret.cli, sys; print(any(m in sys.modules for m in ('torch', 'transformers', 'faiss')))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
