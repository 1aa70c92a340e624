"""TensorBoard scalars (pip install 'nanopre[tensorboard]')."""

from __future__ import annotations

from dataclasses import dataclass

from nanopre import UserError, hookimpl


@dataclass
class TensorBoard:
    """Write scalars for TensorBoard to the run's folder; needs the extra `tensorboard`."""

    folder: str = "tensorboard"  # in the run's folder

    @hookimpl
    def nanopre_run_start(self, run):
        self.writer = None
        if run.rank == 0:
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError:
                message = "loggers.tensorboard: TensorBoard is not installed; pip install 'nanopre[tensorboard]'."
                raise UserError(message) from None
            self.writer = SummaryWriter(run.dir / self.folder, purge_step=run.start_step + 1)

    @hookimpl
    def nanopre_step_end(self, run, step, metrics):
        self._write("train", step, metrics)

    @hookimpl
    def nanopre_evaluation_end(self, run, step, metrics):
        self._write("val", step, metrics)

    @hookimpl
    def nanopre_run_end(self, run, status):
        if self.writer:
            self.writer.close()

    def _write(self, part: str, step: int, metrics: dict[str, float]) -> None:
        if self.writer:
            for name, value in metrics.items():
                self.writer.add_scalar(f"{part}/{name}", value, step)


@hookimpl
def nanopre_loggers(register):
    register("tensorboard", TensorBoard)
