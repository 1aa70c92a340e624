"""The table of accelerators: what is shipped, what users add, and what is refused."""

from __future__ import annotations

import pytest
import tomli
from conftest import ROOT

from nanopre import UserError
from nanopre.accelerators import SHIPPED, accelerator, load, of_device

OWN = """
[mine]
device = "Mine 1"
memory_bytes = 16e9
peak_flops = 100e12
memory_bandwidth = 500e9
node_gpus = 4
node_bandwidth = 100e9
network_bandwidth = 10e9
"""


@pytest.fixture
def own(tmp_path):
    file = tmp_path / "own.toml"
    file.write_text(OWN)
    return file


def test_the_table_is_part_of_the_package():
    data = tomli.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]
    assert data == {"nanopre": [SHIPPED.name]} and SHIPPED.exists()


def test_names_of_devices_find_the_longest_whole_word():
    assert of_device("NVIDIA H100 80GB HBM3").peak_flops == 989e12
    assert of_device("NVIDIA H100 PCIe").peak_flops == 756e12
    assert of_device("NVIDIA GH200 480GB") == accelerator("gh200")
    assert of_device("NVIDIA A100-SXM4-80GB") == accelerator("a100")
    assert of_device("NVIDIA A100-SXM4-40GB") == accelerator("a100-40gb")
    assert of_device("NVIDIA L4") == accelerator("l4") and of_device("NVIDIA L40") is None


def test_users_add_their_own_and_replace_what_is_shipped(own):
    assert accelerator("mine", own).price == 0 and accelerator("h100", own) == accelerator("h100")
    own.write_text(OWN.replace("[mine]", "[h100]"))
    assert accelerator("h100", own).node_gpus == 4


@pytest.mark.parametrize(
    "name, change, message",
    [
        ("h10", ("", ""), "--gpu h10: no such accelerator; did you mean h100?"),
        ("mine", ("peak_flops = 100e12", "peak_flops = 0"), "mine: peak_flops = 0.0 must be above 0 and finite."),
        ("mine", ("peak_flops", "peak_flop"), "mine.peak_flop: unknown key; did you mean mine.peak_flops?"),
        ("mine", ("4", '"four"'), 'mine.node_gpus: is "four"; it must be a whole number.'),
        ("mine", ("[mine]\n", "mine = 1\n[other]\n"), "mine: is 1; it must be a section."),
    ],
)
def test_what_is_wrong_is_said_in_a_sentence(own, name, change, message):
    own.write_text(OWN.replace(*change, 1))
    with pytest.raises(UserError) as error:
        accelerator(name, own)
    assert str(error.value).endswith(message)


def test_a_ring_through_nodes_uses_the_cards_of_all_its_gpus():
    gpu = accelerator("h100")
    assert gpu.group_bandwidth(8) == gpu.node_bandwidth
    assert gpu.group_bandwidth(16) == 8 * gpu.network_bandwidth  # less than NVLink
    assert gpu.group_bandwidth(64, stride=8) == gpu.network_bandwidth  # a GPU in each node
    assert gpu.group_bandwidth(2, stride=4) == gpu.node_bandwidth
    assert all(a.group_bandwidth(2, 1) <= a.node_bandwidth for a in load().values())
