"""What pre-training is worth: the same model fine-tuned from pre-trained weights and from scratch, over three seeds.

    python benchmarks/finetuning.py --init runs/NAME --polarity FOLDER --sick-train FILE --sick-test FILE
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import statistics
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.convergence import train  # noqa: E402


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--init", required=True, help="the run of a pre-trained encoder")
    parser.add_argument("--polarity", help="the folder of rt-polarity.pos and rt-polarity.neg")
    parser.add_argument("--sick-train", help="SICK_train.txt")
    parser.add_argument("--sick-test", help="SICK_test_annotated.txt")
    parser.add_argument("--lr", type=float, default=1e-3, help="peak, of both (default: 1e-3)")
    parser.add_argument("--seeds", type=int, default=3)
    a = parser.parse_args()

    tasks = {}
    if a.polarity:
        tasks["polarity"] = [f"--data.corpus.path={a.polarity}"]
    if bool(a.sick_train) != bool(a.sick_test):
        parser.error("--sick-train and --sick-test go together")
    if a.sick_train:
        tasks["sick"] = [f"--data.corpus={a.sick_train}", f"--data.val_corpus={a.sick_test}"]
    if not tasks:
        parser.error("name the data of a task: --polarity FOLDER, or --sick-train FILE --sick-test FILE")
    file = ROOT / "benchmarks" / "results" / f"finetuning-{datetime.date.today()}.json"
    for task, data in tasks.items():
        for start, weights in (("pre-trained", "true"), ("from scratch", "false")):
            overrides = [*data, f"--init_from={a.init}", f"--init_weights={weights}", f"--optimizer.lr={a.lr}"]
            runs = [train(f"finetune-{task}", overrides, seed) for seed in range(1, a.seeds + 1)]
            accuracy = [run["accuracy"] for run in runs]
            print(f"{task}, {start}: accuracy {statistics.mean(accuracy):.3f} ({min(accuracy):.3f} to {max(accuracy):.3f}), "
                  f"macro F1 {statistics.mean(run['macro_f1'] for run in runs):.3f}", flush=True)  # fmt: skip
            about = {"date": str(datetime.date.today()), "torch": torch.__version__, "python": platform.python_version()}
            results = json.loads(file.read_text())["rows"] if file.exists() else {}
            results[f"{task}, {start}"] = {"lr": a.lr, "runs": runs}
            file.write_text(json.dumps({**about, "rows": results}, indent=1) + "\n")
    print(f"written: {file.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
