"""`train --judge`: ask about drawn policy states that have no label, while the step before is computed.

Answers go through the judgement store like those of `novelret label`. The states of a step are drawn one step
ahead, and its answers are waited for, so a run is the same however fast the judge is. What was asked is kept
in judgements/step-N.parquet, from which a run that was killed knows what it knew.
"""

from __future__ import annotations

import contextlib
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import replace
from pathlib import Path
from threading import Event
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from novelret.artifacts import read_json, read_manifest, write_json
from novelret.data.split import Split
from novelret.errors import UserError
from novelret.index import Index
from novelret.label.asking import NOTE, ask_and_write, say_failed
from novelret.label.candidates import Candidates
from novelret.label.cost import Caps
from novelret.label.judge import make_judge, same_judge, split_judge
from novelret.label.judges.file import file_table
from novelret.label.labels import READ, judgement_rows, table_of
from novelret.label.questions import Readings
from novelret.label.table import UNKNOWN, LabelTable, empty_table, join_tables, make_table
from novelret.progress import Reporter
from novelret.train.config import TrainConfig
from novelret.train.processes import Processes

_SILENT = 3  # steps in a row without any answer, of a judge that has answered before


class Judging:
    """Questions under way and answers so far. The first process asks, all get the answers."""

    def __init__(
        self,
        config: TrainConfig,
        index: Index,
        split: Split,
        folder: Path,
        processes: Processes,
        report: Reporter,
    ) -> None:
        """Take up what earlier runs asked (see `forget_after`).

        Args:
            config: with a judge.
            index: where item texts come from.
            split: the training queries, each once.
            folder: the MODEL folder.
            processes: who trains.
            report: told when the limit is reached.
        """
        assert config.judge is not None
        self.index, self.split, self.processes, self.report = index, split, processes, report
        self.folder = folder / "judgements"
        kind, name = split_judge(config.judge)
        self.asking = replace(config, **_as_labelled(config, report))
        self.file: LabelTable | None = None
        if kind == "file":
            self.file = file_table(
                Path(name),
                split.query_ids,
                index.catalog,
                self.asking.missing,
                report,
                threshold=self.asking.threshold,
            )
        self.judge = None
        if kind != "file" and processes.is_first:
            self.judge = make_judge(config.judge, self.asking, device=config.device)
        self.pairs: dict[int, tuple[np.ndarray, np.ndarray]] = {}
        self.futures: dict[int, Future[LabelTable]] = {}
        self.fresh: list[LabelTable] = []
        self.spent: dict[str, Any] = {"requests": 0, "cost": 0.0}
        self.silent = 0  # steps in a row of which no question got an answer
        self.readings = Readings()  # of all steps: one step's answers may be too few to tell
        self.said = ""  # what was last said of a stop; the same is said once in a process
        self.said_failed = False
        self.submitted: list[Future[LabelTable]] = []
        self.halt = Event()
        self.thread = ThreadPoolExecutor(1, "judging") if processes.is_first else None
        if processes.is_first:
            self.folder.mkdir(exist_ok=True)
            if (self.folder / "spent.json").is_file():
                self.spent = read_json(self.folder / "spent.json")
                self.readings.hopeless = self.spent.get("hopeless")

    def forget_after(self, first: int) -> LabelTable:
        """What was learnt before step `first`; files of later steps go (their answers are in the store)."""
        if self.processes.is_first:
            for path in self.folder.glob("step-*.parquet"):
                if int(path.stem.split("-")[1]) >= first:
                    path.unlink()
        self.processes.wait()
        files = sorted(self.folder.glob("step-*.parquet"))
        if not files:
            return self._empty()
        whole = pa.concat_tables(pq.read_table(path, columns=READ) for path in files).combine_chunks()
        return table_of(whole.to_batches(), self.split.query_ids, self.index.catalog, self.folder)

    def ask(self, step: int, queries: np.ndarray, items: np.ndarray) -> None:
        """Start to ask about unlabelled pairs of a step to come."""
        keys = np.unique(queries * np.int64(len(self.index)) + items)
        self.pairs[step] = keys // len(self.index), keys % len(self.index)
        if self.thread is not None:
            self.futures[step] = self.thread.submit(self._judge, step, *self.pairs[step])
            self.submitted = [future for future in self.submitted if not future.done()]
            self.submitted.append(self.futures[step])

    def answers(self, step: int) -> LabelTable:
        """Wait for a step's answers; the usable ones, by (training query row, catalog row)."""
        queries, items = self.pairs.pop(step)
        verdicts = np.full(len(queries), UNKNOWN, dtype=np.int8)
        grades = np.full(len(queries), np.nan, dtype=np.float32)
        if self.thread is not None:
            found = self.futures.pop(step).result()
            verdicts, grades = found.lookup(queries, items), found.lookup_grades(queries, items)
        verdicts, grades = (self.processes.from_first(array) for array in (verdicts, grades))
        table = make_table(queries, items, verdicts, len(self.index), grades=grades)
        if len(table):
            self.fresh.append(table)
        return table

    def take_fresh(self) -> LabelTable | None:
        """Answers since the last call, or None."""
        if not self.fresh:
            return None
        table = self._empty()
        for more in self.fresh:
            table = join_tables(table, more)
        self.fresh = []
        return table

    def finish(self) -> dict[str, Any]:
        """Put all judgements of the run into judgements.parquet; says what was spent."""
        self.close()
        if self.processes.is_first:
            files = sorted(self.folder.glob("step-*.parquet"))
            if files:
                tables = [pq.read_table(path) for path in files]
                with pq.ParquetWriter(self.folder.with_suffix(".parquet"), tables[0].schema) as writer:
                    for table in tables:
                        writer.write_table(table)
        return self.spent

    def close(self) -> None:
        """Drop what is not yet asked, and wait for the requests under way: their answers are paid for."""
        if self.thread is None:
            return
        self.halt.set()
        self.thread.shutdown(wait=False, cancel_futures=True)
        while under_way := [future for future in self.submitted if not future.done()]:
            with contextlib.suppress(KeyboardInterrupt):  # the folder is locked only as long as this lasts
                self.report.note("finishing the requests under way")
                wait(under_way)

    def _judge(self, step: int, queries: np.ndarray, items: np.ndarray) -> LabelTable:
        if len(queries) == 0:
            return self._empty()
        path = self.folder / f"step-{step:08d}.parquet"
        candidates = Candidates(queries, items, np.zeros(len(queries), dtype=np.int16), ("policy",))
        if self.file is not None:
            verdicts, grades = self.file.lookup(queries, items), self.file.lookup_grades(queries, items)
            columns = {"verdict": pa.array(verdicts), "grade": pa.array(grades)}
            every = np.arange(len(queries))
            pq.write_table(judgement_rows(self.index, self.split, candidates, every, columns), path)
            return make_table(queries, items, verdicts, len(self.index), grades=grades)
        assert self.judge is not None
        facts = ask_and_write(
            self.judge,
            self.index,
            self.split,
            candidates,
            self.asking.store_path,
            path,
            Reporter(),
            retry_unusable=False,
            send=self.readings.hopeless is None,
            may_be_empty=True,
            caps=Caps(
                _left(self.asking.max_requests, self.spent["requests"]),
                _left(self.asking.max_cost, self.spent["cost"]),
            ),
            halt=self.halt,
            readings=self.readings,
        )
        # What a killed run spent on this step was not known yet.
        self.spent["requests"] += facts["requests"] + facts["earlier"]["requests"]
        self.spent["cost"] += (facts["cost"] or 0.0) + facts["earlier"]["cost"]
        if self.readings.hopeless:
            self.spent["hopeless"] = self.readings.hopeless  # a run that goes on asks no more either
        write_json(self.folder / "spent.json", self.spent)
        (self.folder / NOTE).unlink(missing_ok=True)
        stopped = self.readings.hopeless or facts["stopped"]
        said = _say_stopped(stopped, self.readings) if stopped else self.said
        if said != self.said:
            self.said = said
            self.report.warn(f"step {step}: {said}")
        self._check_alive(facts, step)
        if facts["failed"] and not facts["stopped"] and not self.said_failed:
            self.said_failed = True
            self.report.warn(f"step {step}: {say_failed(facts)}; they count as not labelled")
        return self._answered(path, queries, items)

    def _check_alive(self, facts: dict[str, Any], step: int) -> None:
        """Stop where the judge has never answered, or no more: every step would wait for nothing."""
        silent = bool(facts["failed"]) and not facts["pairs"]
        self.silent = self.silent + 1 if silent else 0
        if self.silent >= (_SILENT if self.spent["requests"] else 1):
            raise UserError(
                f"step {step}: {say_failed(facts)}; see to the judge and run the same command again, it goes "
                "on from the last validation"
            )

    def _answered(self, path: Path, queries: np.ndarray, items: np.ndarray) -> LabelTable:
        """What a step's file says of its few pairs; to look ids up in the catalog takes a pass over that."""
        ids = [self.split.query_ids[row] for row in queries]
        place_of = {pair: n for n, pair in enumerate(zip(ids, self.index.catalog.ids_at(items), strict=True))}
        rows = pq.read_table(path, columns=READ).to_pylist()
        places = np.array([place_of[row["query_id"], row["item_id"]] for row in rows], dtype=np.int64)
        verdicts = np.array([row["verdict"] for row in rows], dtype=np.int8)
        grades = np.array([row["grade"] for row in rows], dtype=np.float32)
        return make_table(queries[places], items[places], verdicts, len(self.index), grades=grades)

    def _empty(self) -> LabelTable:
        return empty_table(len(self.index))


def _as_labelled(config: TrainConfig, report: Reporter) -> dict[str, Any]:
    """How answers were read for LABELS of the same judge, so that one answer means the same in both.

    Nothing where the settings say it themselves, or another prompt is used. Of a file also what a pair means
    that it does not list.
    """
    kind, _ = split_judge(str(config.judge))
    for folder in config.label_folders:
        made = read_manifest(Path(folder), "labels").config
        if not same_judge(made["judge"], str(config.judge)):
            continue
        if kind.startswith("openai") and made["prompt"] != config.prompt:
            report.warn(
                f"--judge asks with --prompt {config.prompt}, which {folder} was not labelled with; give "
                f"--prompt {made['prompt']} to ask alike"
            )
            continue
        taken = []
        if config.answer is None and config.threshold is None:
            taken += ["answer", "threshold"]
        if kind == "file" and config.missing == "unknown":
            taken.append("missing")
        return {name: made[name] for name in taken}
    return {}


def _say_stopped(stopped: str, readings: Readings) -> str:
    if stopped != readings.hopeless and not stopped.startswith("--"):
        return f"not all was asked, {stopped}; the next steps try again"
    why = "--max-requests or --max-cost is reached" if stopped.startswith("--") else stopped
    return f"no more questions are asked, {why}; policy states without a label are left out from here on"


def _left(limit: Any, spent: Any) -> Any:
    return None if limit is None else max(0, limit - spent)
