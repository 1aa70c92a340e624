"""What pre-training is worth: the same model fine-tuned from three starts, over three seeds.

    python benchmarks/finetuning.py --init runs/NAME --polarity FOLDER --sick-train FILE --sick-test FILE

From scratch; from the pre-trained encoder; and from the encoder that has gone on with its own objective on the texts of the
task's training examples, without their labels (Gururangan et al., 2020, "task-adaptive pre-training"). Each start is shown
at the peak learning rate that is the best for it.
"""

from __future__ import annotations

import datetime
import json
import platform
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.convergence import train  # noqa: E402
from nanopre import checkpoint, config as configs, examples  # noqa: E402
from nanopre.command_line import Parser, at_least, positive, run_script  # noqa: E402


def main(argv: list[str]) -> None:
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--init", required=True, help="the run of a pre-trained encoder")
    parser.add_argument("--polarity", help="the folder of rt-polarity.pos and rt-polarity.neg")
    parser.add_argument("--sick-train", help="SICK_train.txt")
    parser.add_argument("--sick-test", help="SICK_test_annotated.txt")
    parser.add_argument("--steps", type=at_least(1), default=300, help="of fine-tuning (default: 300, about an epoch)")
    parser.add_argument("--optimizer", default="muon", help="of fine-tuning (default: muon)")
    parser.add_argument("--lr", type=positive, nargs="+", default=[1e-3, 3e-3], help="peaks to try (default: 1e-3 3e-3)")
    parser.add_argument("--adapt-steps", type=at_least(1), default=1500, help="on the task's texts (default: 1500)")
    parser.add_argument("--seeds", type=at_least(1), default=3)
    a = parser.parse_args(argv)

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
        with tempfile.TemporaryDirectory() as folder:
            starts = {
                "from scratch": [f"--init_from={a.init}", "--init_weights=false"],
                "pre-trained": [f"--init_from={a.init}"],
                "pre-trained, then on the task's texts": [f"--init_from={adapt(task, data, a.init, a.adapt_steps, folder)}"],
            }
            for start, flags in starts.items():
                tried = {}
                for lr in a.lr:
                    optimizer = f'--optimizer={{name = "{a.optimizer}", lr = {lr}, weight_decay = 0.01}}'
                    overrides = [*data, *flags, optimizer, f"--train.steps={a.steps}"]
                    tried[lr] = [train(f"finetune-{task}", overrides, seed) for seed in range(1, a.seeds + 1)]
                best = max(tried, key=lambda lr: statistics.mean(run["accuracy"] for run in tried[lr]))
                accuracy, f1 = ([run[key] for run in tried[best]] for key in ("accuracy", "macro_f1"))
                spread = f"{min(accuracy):.3f} to {max(accuracy):.3f}"
                print(f"{task}, {start}: accuracy {statistics.mean(accuracy):.3f} ({spread}), "
                      f"macro F1 {statistics.mean(f1):.3f}, lr {best:g}", flush=True)  # fmt: skip
                about = {"date": str(datetime.date.today()), "torch": torch.__version__, "python": platform.python_version()}
                results = json.loads(file.read_text())["rows"] if file.exists() else {}
                results[f"{task}, {start}"] = {"optimizer": a.optimizer, "steps": a.steps, "best_lr": best, "runs": tried}
                file.write_text(json.dumps({**about, "rows": results}, indent=1) + "\n")
    print(f"written: {file.relative_to(ROOT)}")


def adapt(task: str, data: list[str], init: str, steps: int, folder: str) -> Path:
    """Go on with the encoder's objective on the texts of the task's training examples, each a document: of a pair, A and B
    are its two sentences. The new run's folder."""
    inherited = [*data, f"--init_from={init}"]
    config, plugins = configs.load(ROOT / "configs" / f"finetune-{task}.toml", inherited, checkpoint.read_config)
    columns = examples.prepare(config, plugins, checkpoint.read_tokenizer(init)).train.columns
    texts = [columns[name] for name in config.objective.columns() if name != config.objective.label]
    corpus = Path(folder) / "texts.jsonl"
    corpus.write_text("\n".join(json.dumps({"text": ". ".join(text)}) for text in zip(*texts, strict=True)))
    flags = [f"--init_from={init}", f"--data.corpus={corpus}", f"--data.cache_dir={folder}/cache", f"--out_dir={folder}"]
    command = [sys.executable, ROOT / "train.py", ROOT / "configs" / "mlm-adapt.toml", *flags, f"--train.steps={steps}"]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, cwd=ROOT)
    return Path(folder) / "mlm-adapt"


if __name__ == "__main__":
    run_script("finetuning.py", main)
