"""Weights & Biases (pip install 'nanopre[wandb]')."""

from __future__ import annotations

import uuid
from dataclasses import dataclass

from nanopre import UserError, config, hookimpl


@dataclass
class WandB:
    """Send metrics to Weights & Biases; needs the extra `wandb` and a login, or mode = "offline"."""

    project: str = "nanopre"
    mode: str = "online"  # "offline" keeps the data in the run's folder

    @hookimpl
    def nanopre_run_start(self, run):
        self.run = None
        if run.rank == 0:
            try:
                import wandb
            except ImportError:
                raise UserError("loggers.wandb: wandb is not installed; pip install 'nanopre[wandb]'.") from None
            id_file = run.dir / "wandb_id"  # so that a resumed run goes on with its own, and no two folders share one
            if not id_file.exists():
                id_file.write_text(uuid.uuid4().hex, encoding="utf-8")
            self.run = wandb.init(
                project=self.project,
                name=run.dir.name,
                id=id_file.read_text(encoding="utf-8"),
                resume="allow",
                dir=run.dir,
                mode=self.mode,
                config=config.to_dict(run.config),
            )

    @hookimpl
    def nanopre_step_end(self, run, step, metrics):
        self._write("train", step, metrics)

    @hookimpl
    def nanopre_evaluation_end(self, run, step, metrics):
        self._write("val", step, metrics)

    @hookimpl
    def nanopre_run_end(self, run, status):
        if self.run:
            self.run.finish(exit_code=int(status == "failed"))

    def _write(self, part: str, step: int, metrics: dict[str, float]) -> None:
        if self.run:
            self.run.log({f"{part}/{name}": value for name, value in metrics.items()}, step=step)


@hookimpl
def nanopre_loggers(register):
    register("wandb", WandB)
