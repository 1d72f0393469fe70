"""Runs of the LoRA+ grid and their results, kept in a file and never repeated."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Iterable
from pathlib import Path

from benchmarks.lora_plus.pair_tasks import pair_task
from benchmarks.lora_plus.report import Results
from benchmarks.lora_plus.settings import GridSettings
from benchmarks.lora_plus.tasks import embedded_task, file_task
from benchmarks.lora_plus.training import Outcome, Run, Task, train_once
from dschat.errors import UserError


class Bench:
    """Runs what has no result yet, and keeps every result in a file as soon as it is there."""

    def __init__(self, settings: GridSettings):
        self.settings = settings
        folder = Path(settings.output_dir)
        self.file = folder / "results.jsonl"
        folder.mkdir(parents=True, exist_ok=True)
        self.results: Results = {}
        if self.file.is_file():
            self._read()
        else:
            self.file.write_text(json.dumps(settings.shared()) + "\n", encoding="utf-8")
        self._task: Task | None = None

    def _read(self) -> None:
        text = self.file.read_text(encoding="utf-8")
        lines = text.splitlines(keepends=True)
        if lines and not lines[-1].endswith("\n"):  # cut off in mid-line when it was stopped
            text = "".join(lines := lines[:-1])
            self.file.write_text(text, encoding="utf-8")
        head, *records = (json.loads(line) for line in lines)
        for name, value in self.settings.shared().items():
            if head.get(name) != value:
                raise UserError(
                    f"{self.file} holds runs with {name} {head.get(name)}, not {value}: "
                    "give another --output_dir"
                )
        for record in records:
            curve = tuple((step, loss) for step, loss in record["curve"])
            outcome = Outcome(record["loss"], curve, record.get("accuracy"))
            self.results[Run(**record["run"])] = outcome

    def _load(self) -> Task:
        """The task, made when the first run needs it."""
        if self._task is None:
            s, work = self.settings, Path(self.settings.output_dir)
            if s.task == "embedded":
                self._task = embedded_task(work, s.preset.max_seq_len)
            else:
                load = file_task if s.task == "hh" else pair_task
                where = (s.model_name_or_path, s.data_path)
                self._task = load(s.task, *where, s.preset.max_seq_len, work)
        return self._task

    def run(self, title: str, runs: Iterable[Run]) -> None:
        """Train every run that has no result yet."""
        todo = [run for run in runs if run not in self.results]
        begun = time.perf_counter()
        for run in todo:
            task = self._load()
            start = time.perf_counter()
            outcome = train_once(task, run, self.settings.rank, self.settings.preset.batch_size)
            seconds = time.perf_counter() - start
            record = {"run": dataclasses.asdict(run), "loss": outcome.loss}
            record |= {"curve": outcome.curve, "accuracy": outcome.accuracy}
            record |= {"seconds": round(seconds, 2)}
            with self.file.open("a", encoding="utf-8") as file:
                file.write(json.dumps(record) + "\n")
            self.results[run] = outcome
        seconds = time.perf_counter() - begun
        print(f"{title}: {len(todo)} runs, {seconds:.0f} s", flush=True)
