"""`cross-encoder:MODEL` with a tiny random model: verdicts held against its own scores, nothing scored twice."""

from __future__ import annotations

import json

import numpy as np
import pyarrow.parquet as pq
import pytest

from novelret.cli import main
from novelret.label.judges import cross_encoder as judge_module
from tests.conftest import COLOURS, THINGS, make_encoder


def make_cross_encoder(folder, labels=1, seed=0):
    import torch
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace
    from tokenizers.processors import TemplateProcessing
    from transformers import BertConfig, BertForSequenceClassification, PreTrainedTokenizerFast

    torch.manual_seed(seed)
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "buy", *COLOURS, *THINGS]
    tokenizer = Tokenizer(WordLevel({word: n for n, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = Whitespace()
    tokenizer.post_processor = TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
    )
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]",
        model_max_length=32,
    ).save_pretrained(folder)  # fmt: skip
    config = BertConfig(
        vocab_size=len(words), hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
        max_position_embeddings=32, initializer_range=0.5, num_labels=labels,
    )  # fmt: skip
    BertForSequenceClassification(config).save_pretrained(folder)
    return folder


@pytest.fixture
def arguments(world, index_folder, tmp_path):
    model = make_cross_encoder(tmp_path / "cross")
    return [
        "label", "--data", world, "--index", index_folder, "--judge", f"cross-encoder:{model}", "--device", "cpu",
        "--base-depth", 3, "--depth", 9, "--store", tmp_path / "store.sqlite",
    ]  # fmt: skip


def label(capsys, *arguments):
    code = main([*map(str, arguments), "--json", "--quiet"])
    captured = capsys.readouterr()
    return code, (json.loads(captured.out) if captured.out else None), captured.err


def rows_of(folder):
    return pq.read_table(folder / "judgements.parquet").to_pylist()


def test_verdicts_are_the_models_scores_against_a_threshold(arguments, world, tmp_path, capsys):
    from sentence_transformers import CrossEncoder

    code, facts, err = label(capsys, *arguments, "--out", tmp_path / "labels", "--threshold", 0.4)
    assert code == 0, err
    rows = rows_of(tmp_path / "labels")
    assert facts["pairs"] == facts["requests"] == len(rows) == 120
    assert facts["cost"] == 0
    texts = {}
    for name in ("corpus", "queries"):
        for line in (world / f"{name}.jsonl").open():
            texts[json.loads(line)["_id"]] = json.loads(line)["text"]
    model = CrossEncoder(str(tmp_path / "cross"), device="cpu")
    expected = model.predict([(texts[r["query_id"]], texts[r["item_id"]]) for r in rows], batch_size=1)
    assert np.abs(expected - [r["grade"] for r in rows]).max() < 1e-5
    clear = np.abs(expected - 0.4) > 1e-4
    verdicts = np.array([r["verdict"] for r in rows])
    assert (verdicts == (expected >= 0.4))[clear].all()
    assert 0 < verdicts.sum() < 120


def test_a_cap_holds_and_a_higher_one_goes_on(arguments, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("novelret.label.judges.cross_encoder._AT_ONCE", 16)
    code, facts, err = label(capsys, *arguments, "--out", tmp_path / "a", "--max-requests", 50)
    assert (code, facts["requests"], facts["pairs"]) == (0, 50, 50)
    assert "--max-requests 50 reached; 70 pairs are not judged" in " ".join(err.split())
    code, facts, _ = label(capsys, *arguments, "--out", tmp_path / "a", "--max-requests", 51)
    assert (code, facts["requests"], facts["pairs"]) == (0, 1, 51)


@pytest.mark.parametrize("bad", [("--base-depth", -5), ("--max-requests", -3), ("--max-cost", -1)])
def test_settings_without_sense_are_refused(arguments, tmp_path, capsys, bad):
    code, _, err = label(capsys, *arguments, "--out", tmp_path / "a", *bad)
    assert (code, f"{bad[0]} {bad[1]}: must be at least" in err) == (2, True)


def test_no_pair_is_scored_twice_and_another_threshold_is_free(arguments, tmp_path, capsys, monkeypatch):
    label(capsys, *arguments, "--out", tmp_path / "a", "--threshold", 0.4)
    code, facts, _ = label(capsys, *arguments, "--depth", 11, "--out", tmp_path / "b", "--threshold", 0.4)
    assert (code, facts["requests"], facts["already_known"]) == (0, 40, 120)
    threshold = np.mean(sorted({row["grade"] for row in rows_of(tmp_path / "b")})[20:22])
    code, facts, _ = label(capsys, *arguments, "--out", tmp_path / "c", "--reparse", "--threshold", threshold)
    assert (code, facts["requests"]) == (0, 0)
    rows = rows_of(tmp_path / "c")
    assert all(row["verdict"] == (row["grade"] >= threshold) for row in rows)
    assert {row["verdict"] for row in rows} == {0, 1}
    # Other weights at the same path are another judge.
    make_cross_encoder(tmp_path / "cross", seed=1)
    code, facts, _ = label(capsys, *arguments, "--out", tmp_path / "d")
    assert (code, facts["requests"]) == (0, 120)


def test_what_is_scored_before_a_kill_is_kept(arguments, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(judge_module, "_AT_ONCE", 30)
    real, calls = judge_module.CrossEncoder.predict, []

    def predict(self, pairs, **options):
        calls.append(len(pairs))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(self, pairs, **options)

    monkeypatch.setattr(judge_module.CrossEncoder, "predict", predict)
    code, _, _ = label(capsys, *arguments, "--out", tmp_path / "labels")
    assert (code, calls) == (130, [30, 30, 30])
    assert not (tmp_path / "labels").exists()
    code, facts, _ = label(capsys, *arguments, "--out", tmp_path / "labels")
    assert (code, facts["already_known"], facts["requests"], facts["pairs"]) == (0, 60, 60, 120)


def test_a_plan_and_bad_models(arguments, tmp_path, capsys):
    code, plan, _ = label(capsys, *arguments, "--plan")
    assert (code, plan["to_ask"], plan["cost"], list(plan["example"][0])) == (0, 120, 0, ["query", "item"])
    make_cross_encoder(tmp_path / "three", labels=3)
    bad = {
        "three": "gives 3 scores",
        "no": "holds no cross-encoder",
        "encoder": "is no cross-encoder but BertModel",
    }
    make_encoder(tmp_path / "encoder")
    for model, words in [(tmp_path / name, words) for name, words in bad.items()]:
        code, _, err = label(capsys, *arguments, "--judge", f"cross-encoder:{model}", "--out", tmp_path / "x")
        assert (code, len(err.strip().splitlines())) == (2, 1), err
        assert words in err


def test_eval_takes_a_cross_encoder(arguments, world, index_folder, tmp_path, capsys):
    code, found, err = label(
        capsys, "eval", "--data", world, "--index", index_folder, "--judge", arguments[6], "--base-depth", 3,
        "--k", "2,5", "--store", tmp_path / "store.sqlite", "--device", "cpu", "--out", tmp_path / "report",
    )  # fmt: skip
    assert code == 0, err
    assert found["models"]["base"]["Judged@5"] == 1
