"""log.jsonl in the run's folder: one line for each step and each evaluation. Every run has it."""

from __future__ import annotations

import json
from contextlib import suppress
from dataclasses import dataclass

from nanopre import UserError, hookimpl


@dataclass
class JsonLines:
    """Write {"step", "loss", ...} and {"step", "val_loss", ...} lines to log.jsonl in the run's folder."""

    @hookimpl
    def nanopre_run_start(self, run):
        self.file = None
        if run.rank == 0:
            path = run.dir / "log.jsonl"
            # A run that resumes writes its steps anew: what was logged after the checkpoint goes.
            lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.exists() else []
            kept = [line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= run.start_step]
            path.write_text("".join(kept), encoding="utf-8")
            self.file = open(path, "a", buffering=1, encoding="utf-8")

    @hookimpl
    def nanopre_step_end(self, run, step, metrics):
        self._write({"step": step, **metrics})

    @hookimpl
    def nanopre_evaluation_end(self, run, step, metrics):
        self._write({"step": step, **{f"val_{name}": value for name, value in metrics.items()}})

    @hookimpl
    def nanopre_run_end(self, run, status):
        if self.file:
            with suppress(OSError):  # it writes what could not be written once more, which has been told
                self.file.close()

    def _write(self, record: dict) -> None:
        if self.file:
            try:
                self.file.write(json.dumps(record) + "\n")
            except OSError as error:
                raise UserError(f"{self.file.name}: can't be written ({error.strerror}).") from None


@hookimpl
def nanopre_loggers(register):
    register("jsonl", JsonLines)
