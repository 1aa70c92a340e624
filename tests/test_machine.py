"""What the machine decides, and what of it the config can set."""

from __future__ import annotations

import pytest
import torch
from conftest import read_log

import train
from nanopre import UserError, machine
from nanopre.config import Train
from nanopre.model import Attention
from nanopre.plugins import load_plugins


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("n, words", [(1, "cpu, 1 thread;"), (3, "cpu, 3 threads;")])
def test_threads_of_a_cpu(n, words, monkeypatch):
    monkeypatch.setattr(machine.os, "cpu_count", lambda: 3)
    assert machine.choose(Train(device="cpu", threads=n)).reason.startswith(words)
    assert torch.get_num_threads() == n
    with pytest.raises(UserError, match="^train.threads = 4: more than the 3 processors of this machine.$"):
        machine.choose(Train(device="cpu", threads=4))


@pytest.mark.parametrize(
    "attention, products, words",
    [("auto", True, "attention by products (faster here)"), ("fused", False, "fused attention;"),
     ("products", True, "attention by products;")],
)  # fmt: skip
def test_every_attention_of_a_model_is_as_it_was_chosen(attention, products, words):
    here = machine.choose(Train(device="cpu", attention=attention))
    model = load_plugins().get("model", "t5", "test")(d_model=16, n_heads=2, d_ff=16, n_layers=1).build(64, 8)
    here.choose_attention(model)
    chosen = [layer.products for layer in model.modules() if isinstance(layer, Attention)]
    assert words in here.reason and chosen == 3 * [products]  # the encoder's, the decoder's, and from one to the other


def test_compiling_on_a_cpu_takes_a_compiler(monkeypatch):
    monkeypatch.setenv("CXX", "/nowhere/g++")
    with pytest.raises(UserError, match='^train.compile = "on": there is no C.. compiler here; .*, or take "off".$'):
        machine.choose(Train(device="cpu", compile="on"))
    assert machine.choose(Train(device="cpu")).reason.endswith("; not compiled (takes long here)")
    assert machine.choose(Train(device="cpu", compile="off")).reason.endswith("; not compiled")


@pytest.mark.parametrize("name", ["gpu", "mps", "xla:0"])
def test_a_device_that_is_not_there_is_one_short_sentence(name, monkeypatch):
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    with pytest.raises(UserError) as error:
        machine.choose_device(name, "--device")
    assert str(error.value).startswith(f'--device = "{name}": no ') and len(str(error.value)) < 120


def test_freed_memory_is_kept_unless_the_config_says_no(monkeypatch):
    called = []
    monkeypatch.setattr(machine, "keep_freed_memory", lambda: called.append(True))
    assert "freed memory" not in machine.choose(Train(device="cpu", keep_freed_memory=False)).reason and not called
    assert "freed memory kept" in machine.choose(Train(device="cpu")).reason and called


def test_either_attention_trains_to_the_same_losses(tiny, tmp_path):
    for kernel in ("fused", "products"):
        train.main([*tiny, f"--name={kernel}", f"--train.attention={kernel}"])
    fused, products = (read_log(tmp_path / "runs" / kernel)[0] for kernel in ("fused", "products"))
    assert [line["loss"] for line in fused] == pytest.approx([line["loss"] for line in products], rel=1e-5)
