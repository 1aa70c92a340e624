"""From measured runs to a law with its uncertainty: what plan.py and the analyzers of plugins/scaling/ share.

An analyzer (a plugin) has `fit(runs) -> law`. A `Fit` is a law with the laws of a bootstrap's resamples, from which comes
the interval of whatever the law says; it can be written to a file and read back.
"""

from __future__ import annotations

import dataclasses
import json
import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from nanopre import UserError
from nanopre.planning.laws import PUBLISHED, Law
from nanopre.planning.runs import Runs
from nanopre.plugins import Registry, nearest


@dataclass
class Fit:
    """A law, where it is from, and how sure it is."""

    law: Law
    name: str  # the analyzer's, or a published law's
    definition: str  # which parameters count, how FLOPs are counted, what is minimised: printed with every estimate
    options: dict[str, Any] = field(default_factory=dict)  # the analyzer's
    samples: list[Law] = field(default_factory=list)  # of a bootstrap; empty where there was none
    failed: int = 0  # resamples that could not be fitted
    notes: list[str] = field(default_factory=list)  # what the analyzer found besides

    def interval(self, value: Callable[[Law], float], level: float = 0.95) -> tuple[float, float] | None:
        """Between which numbers (or arrays) the value lies in `level` of the resamples, as
        `fit.interval(lambda law: law.allocate(1e21).params)`; None where there was no bootstrap."""
        if not self.samples:
            return None
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # of a value that no law knows, the interval is nan
            low, high = np.nanquantile([value(law) for law in self.samples], [(1 - level) / 2, (1 + level) / 2], axis=0)
        return low, high

    def estimates(self) -> dict[str, float]:
        return dataclasses.asdict(self.law)

    def to_dict(self) -> dict[str, Any]:
        """For JSON, which has no nan: what is not known is None."""
        names = list(self.estimates())
        intervals = {name: self.interval(lambda law, name=name: getattr(law, name)) for name in names}
        return plain({
            "analyzer": self.name,
            "options": self.options,
            "definition": self.definition,
            "estimates": self.estimates(),
            "intervals": {name: interval for name, interval in intervals.items() if interval},
            "bootstrap": {name: [getattr(law, name) for law in self.samples] for name in names} if self.samples else {},
            "failed": self.failed,
            "notes": self.notes,
        })  # fmt: skip


def plain(value: Any) -> Any:
    """The value as JSON can hold it: numbers of Python's, None for what is not finite."""
    if isinstance(value, dict):
        return {key: plain(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(inner) for inner in value]
    if isinstance(value, (float, np.floating)):
        return float(value) if math.isfinite(value) else None
    return value


def read_law(source: str, plugins: Registry, where: str = "--law") -> Fit:
    """A published law by its name, or the file that `plan.py fit --out FILE` wrote.

    Raises UserError, which starts with `where`, the flag that names it.
    """
    if source in PUBLISHED:
        law, definition = PUBLISHED[source]
        return Fit(law, source, definition)
    path = Path(source)
    try:
        table = json.loads(path.read_text(encoding="utf-8"))
        law = plugins.get("analyzer", table["analyzer"], f"{where} {path}").law

        def build(numbers: dict[str, float | None]) -> Law:
            return law(**{name: math.nan if number is None else float(number) for name, number in numbers.items()})

        estimated = build(table["estimates"])
        if not 0 < estimated.allocate(1e20).params < math.inf:
            raise ValueError("there is no best model by its estimates")
        columns = table["bootstrap"]
        samples = [build(dict(zip(columns, row, strict=True))) for row in zip(*columns.values(), strict=True)]
        return Fit(
            estimated,
            table["analyzer"],
            table["definition"],
            table["options"],
            samples,
            table["failed"],
            table["notes"],
        )
    except OSError:
        raise UserError(
            f"{where}: {source} is neither a published law nor a file of one; {nearest(source, list(PUBLISHED))}"
        ) from None
    except (ValueError, KeyError, TypeError, AttributeError, ArithmeticError) as error:
        raise UserError(f"{where}: {path} is not what plan.py fit --out writes ({type(error).__name__}: {error}).") from None


def fit(analyzer: Any, name: str, runs: Runs, bootstrap: int = 0, seed: int = 0) -> Fit:
    """The analyzer's law of the runs, with so many resamples of a bootstrap. Raises UserError where it can't be fitted."""
    law = analyzer.fit(runs)
    samples, failed = resample(analyzer, runs, law, bootstrap, seed)
    options = {f.name: getattr(analyzer, f.name) for f in dataclasses.fields(analyzer)}
    notes = list(analyzer.notes(runs, law)) if hasattr(analyzer, "notes") else []
    return Fit(law, name, analyzer.definition, options, samples, failed, notes)


def resample(analyzer: Any, runs: Runs, law: Law, count: int, seed: int = 0) -> tuple[list[Law], int]:
    """(laws, how many could not be fitted) of resamples that draw, with replacement, as many runs as there are.

    Whole runs are drawn: the points of one training curve are not independent. Points without a run are drawn singly.
    """
    rng = np.random.default_rng(seed)
    _, labels = np.unique(runs.run, return_inverse=True)
    members = np.split(np.argsort(labels, kind="stable"), np.cumsum(np.bincount(labels))[:-1])
    again = getattr(analyzer, "refit", None)
    laws: list[Law] = []
    for _ in range(count):
        drawn = runs[np.concatenate([members[i] for i in rng.integers(len(members), size=len(members))])]
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # what there is to say of the runs was said at the first fit
                laws.append(again(drawn, law) if again else analyzer.fit(drawn))
        except UserError:
            pass
    return laws, count - len(laws)
