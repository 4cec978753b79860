"""report.html: what it says, that it is self-contained and escaped, and that its commands make it again."""

from __future__ import annotations

import html
import json
import re
import shlex
import shutil
from html.parser import HTMLParser

import numpy as np
import pytest

from novelret.build import IndexConfig, build_index
from novelret.cli import main
from novelret.evaluate.breakdown import by_length, by_overlap, recall_spread, spread
from novelret.evaluate.config import EvalConfig
from novelret.evaluate.evaluate import evaluate_models
from novelret.trained import model_of
from tests.conftest import make_encoder

EVIL = "<script>alert(1)</script> & 'sofa'"


@pytest.fixture(scope="module")
def evaluated(world, encoder, tmp_path_factory):
    """An evaluation of two models with everything that a report can show, every text hostile."""
    folder = tmp_path_factory.mktemp("report")
    data = folder / "data"
    shutil.copytree(world, data)
    queries = [json.loads(line) for line in (data / "queries.jsonl").read_text().splitlines()]
    for n, query in enumerate(queries):
        query["weight"] = 40 - n
        query["text"] += f" {EVIL}" if n % 3 else f" please now {EVIL}"
    (data / "queries.jsonl").write_text("".join(json.dumps(query) + "\n" for query in queries))
    items = [json.loads(line) for line in (data / "corpus.jsonl").read_text().splitlines()]
    for item in items:
        item["title"] = EVIL
    (data / "corpus.jsonl").write_text("".join(json.dumps(item) + "\n" for item in items))
    build_index(IndexConfig(str(data), str(encoder), device="cpu"), folder / "index")
    models = [f"m{seed}={make_encoder(folder / f'm{seed}', seed=seed)}" for seed in (3, 4)]
    config = EvalConfig(
        str(data), str(folder / "index"), models=tuple(models), judge=f"file:{data}/judgements.tsv",
        missing="irrelevant", human=str(data / "judgements.tsv"), base_depth=5, k=(2, 6), max_recall_drop=1.0,
        merge_budget=3, human_sample=10, device="cpu",
    )  # fmt: skip
    return evaluate_models(config, folder / "report"), folder


class Reader(HTMLParser):
    """Collects tags, and addresses that a browser would fetch."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.fetched: list[str] = []

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.fetched += [value for name, value in attrs if name in ("src", "href", "srcset", "data")]


def test_it_is_self_contained_and_escaped(evaluated):
    page = (evaluated[1] / "report" / "report.html").read_text()
    reader = Reader()
    reader.feed(page)
    assert not reader.tags & {"script", "img", "iframe", "object", "form"}
    assert reader.fetched == ["data:,"]
    assert "url(" not in page
    assert "@import" not in page
    assert html.escape(EVIL) in page
    assert "alert(1)</script>" not in page


def test_it_shows_what_a_launch_is_decided_on(evaluated):
    evaluation, folder = evaluated
    page = (folder / "report" / "report.html").read_text()
    for heading in ("Summary", "Between the models", "Corrected by human labels", "Novelty against recall", "As deployed", "By query frequency",
                    "How queries differ", "By length of the query", "By overlap of the top 6", "Side by side",
                    "Where these figures come from"):  # fmt: skip
        assert heading in page
    assert f"<b>{evaluation.frontier.selected}</b> brings most" in page
    assert "at most 3 per query" in page
    assert page.count("class='warning'") == len(evaluation.warnings) >= 1  # k = 6 is beyond L = 5
    figure = evaluation.human["m3"]["RelevantNovel@6"]
    assert f"{figure.low:.2f} – {figure.high:.2f}" in page
    svgs = re.findall(r"<svg.*?</svg>", page)
    assert len(svgs) == 2
    pareto = sum(point.pareto_novelty for point in evaluation.frontier.points)
    assert svgs[0].count('class="ring"') == pareto
    assert all(f">{name}</text>" in svgs[0] for name in ("base", "m3", "m4"))  # named, not only coloured
    for fingerprint in evaluation.inputs.values():
        assert fingerprint in page


def test_its_commands_make_it_again(evaluated, tmp_path, capsys):
    evaluation, folder = evaluated
    page = (folder / "report" / "report.html").read_text()
    lines = [html.unescape(line) for line in re.findall(r"<pre><code>(.*?)</code></pre>", page)]
    assert [line.split()[1] for line in lines] == ["index", "eval"]
    for line in lines:
        words = shlex.split(line)
        assert words.pop(0) == "novelret"
        words[words.index("--out") + 1] = str(tmp_path / words[0])
        assert main([*words, "--quiet"]) == 0
    capsys.readouterr()
    again = json.loads((tmp_path / "eval" / "metrics.json").read_text())
    assert again["models"] == evaluation.means
    manifests = [
        json.loads((path / "manifest.json").read_text()) for path in (folder / "index", tmp_path / "index")
    ]
    assert manifests[0]["fingerprint"] == manifests[1]["fingerprint"]


def test_groups_against_brute_force(evaluated):
    evaluation, _ = evaluated
    words = [len(text.split()) for text in evaluation.split.query_texts]
    seen = 0
    for group in by_length(evaluation):
        low, _, high = group.label.removesuffix(" words").partition("–")
        kept = [q for q, n in enumerate(words) if int(low) <= n <= int(high or low)]
        figures, base = evaluation.per_query[group.model], evaluation.per_query["base"]
        change = [figures["Recall@6"][q] - base["Recall@6"][q] for q in kept]
        assert group.queries == len(kept)
        assert group.gain == pytest.approx(np.mean([figures["RelevantNovel@6"][q] for q in kept]))
        assert group.recall_change == pytest.approx(np.mean(change))
        assert group.lost == pytest.approx(np.mean([value < 0 for value in change]))
        seen += len(kept)
    assert seen == 2 * len(words)  # every query in one group of each model
    overlaps = by_overlap(evaluation)
    assert sum(group.queries for group in overlaps) == 2 * len(words)
    first = next(group for group in overlaps if group.model == "m3")
    top = evaluation.lists["m3"].rows
    shared = [
        len(set(row) & set(base)) / 6
        for row, base in zip(top.tolist(), evaluation.lists["base"].rows.tolist(), strict=True)
    ]
    low, _, high = first.label.removesuffix(" %").partition("–")
    assert first.queries == sum(int(low) <= round(100 * share) <= int(high or low) for share in shared)


def test_spreads_are_shares_of_all_queries(evaluated):
    evaluation, _ = evaluated
    for model in ("m3", "m4"):
        shares = dict(spread(evaluation, model))
        counts = evaluation.per_query[model]["RelevantNovel@6"]
        assert sum(shares.values()) == pytest.approx(1)
        assert shares["0"] == pytest.approx((counts == 0).mean())
        change = evaluation.per_query[model]["Recall@6"] - evaluation.per_query["base"]["Recall@6"]
        lower, same, higher = recall_spread(evaluation, model)
        assert (lower, same, higher) == pytest.approx(
            ((change < 0).mean(), (change == 0).mean(), (change > 0).mean())
        )


def test_a_kept_checkpoint_is_made_again_by_its_models_command(tmp_path):
    kept = tmp_path / "model" / "checkpoints" / "step-4"
    kept.mkdir(parents=True)
    assert model_of(kept) == tmp_path / "model"
    assert model_of(tmp_path / "model") == tmp_path / "model"
    (kept / "manifest.json").write_text("{}")  # an artifact of its own
    assert model_of(kept) == kept
