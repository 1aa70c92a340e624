"""plan.py fit and compare, as a user types them."""

from __future__ import annotations

import base64
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from conftest import run_script

import plan
from nanopre import UserError
from nanopre.planning.laws import Additive
from nanopre.planning.scaling import read_law
from nanopre.plugins import load_plugins

LAW = Additive(A=420.0, B=1800.0, E=1.75, alpha=0.34, beta=0.37)
PLUGINS = load_plugins()
PNG = b"\x89PNG\r\n\x1a\n"


@pytest.fixture
def points(tmp_path) -> str:
    """Budgets with sizes around the best, and a scatter of 0.2%, as a table with other names for its columns."""
    rng = np.random.default_rng(3)
    rows = ["size,tokens,nats"]
    for flops in (1e18, 1e19, 1e20):
        for n in LAW.allocate(flops).params * np.exp(np.linspace(-1.5, 1.5, 8)):
            d = flops / (6 * n)
            rows.append(f"{n:.0f},{d:.0f},{LAW.predict(n, d) * np.exp(0.002 * rng.standard_normal())}")
    path = tmp_path / "points.csv"
    path.write_text("\n".join(rows) + "\n")
    return str(path)


NAMES = ["--column", "params=size", "--column", "loss=nats"]


def printed(capsys, *arguments: str) -> str:
    plan.main(list(arguments))
    return capsys.readouterr().out


def refused(*arguments: str) -> str:
    with pytest.raises(UserError) as error:
        plan.main(list(arguments))
    assert "\n" not in str(error.value)
    return str(error.value)


def test_fit_prints_the_law_with_intervals_and_its_definition(points, capsys):
    out = printed(capsys, "fit", points, *NAMES, "--flops", "1e21", "--bootstrap", "30")
    assert out.startswith("parametric: 24 points of 24 runs: N ") and "C = 6 N D; least SUM of Huber(0.001)" in out
    for name, value in vars(LAW).items():
        estimate, low, high = map(float, re.search(rf"^  {name} +(\S+)  \[(\S+), (\S+)\]$", out, re.MULTILINE).groups())
        assert low <= estimate <= high and low < value * 1.3 and high > value * 0.7
    n, low, high = map(float, re.search(r"parameters +(\S+)  \[(\S+), (\S+)\]", out).groups())
    assert low < LAW.allocate(1e21).params < high and low < n < high
    assert "in brackets: 95% intervals of 30 resamples" in out and "objective" in out


def test_fit_as_json_and_as_a_file_of_a_law(points, tmp_path, capsys):
    law_file = tmp_path / "laws" / "mine.json"
    arguments = ["fit", points, *NAMES, "--flops=1e21", "--bootstrap=20", "--seed=4", "--json", f"--out={law_file}"]
    result = json.loads(printed(capsys, *arguments))
    allocation = result.pop("allocation")
    assert result == json.loads(law_file.read_text())
    assert set(result["estimates"]) == set(vars(LAW)) and len(result["bootstrap"]["alpha"]) == 20
    found = read_law(str(law_file), PLUGINS)
    assert found.law.allocate(1e21).params == allocation["params"]
    assert list(found.interval(lambda law: law.allocate(1e21).loss)) == allocation["intervals"]["loss"]


def test_options_of_an_analyzer(points, capsys):
    arguments = ["fit", points, *NAMES, "--analyzer=isoflop", "--bootstrap=0", "--json"]
    plain = json.loads(printed(capsys, *arguments))
    assert plain["options"] == {"budgets": [], "tolerance": 0.1} and plain["bootstrap"] == plain["intervals"] == {}
    close = json.loads(printed(capsys, *arguments, "--option", "isoflop.tolerance=1e-9", "--option=isoflop.budgets=[]"))
    assert close["options"]["tolerance"] == 1e-9
    with pytest.raises(UserError, match=r"found 0 \(24 points at budgets with fewer than 3 sizes\)"):
        plan.main([*arguments, "--option=isoflop.tolerance=1e-12"])


def test_points_that_are_left_out(points, capsys):
    arguments = ["fit", points, *NAMES, "--bootstrap=0"]
    assert printed(capsys, *arguments, "--drop-highest=5").startswith("parametric: 19 points of 19 runs")
    table = Path(points).read_text().splitlines()
    labelled = [table[0] + ",run"] + [f"{line},{i % 6}" for i, line in enumerate(table[1:])]
    Path(points).write_text("\n".join(labelled))
    assert printed(capsys, *arguments, "--last").startswith("parametric: 6 points of 6 runs")


def test_compare_has_a_row_for_every_law(points, tmp_path, capsys):
    folder, page = tmp_path / "figures", tmp_path / "report.html"
    out = printed(
        capsys, "compare", points, *NAMES, "--flops=1e21", "--bootstrap=4", f"--figures={folder}", f"--report={page}"
    )
    rows = {line.split()[0]: line for line in out.splitlines() if line}
    fitted = ["envelope", "isoflop", "kaplan", "parametric"]
    for name in fitted:
        n = float(rows[name].split()[1])
        assert n == pytest.approx(LAW.allocate(1e21).params, rel=1.0), name
    assert "needs runs that repeat data" in rows["data_constrained"] and "--option inference_aware" in rows["inference_aware"]
    assert re.search(r"the laws differ by a factor of [0-9.]+ in parameters: \w+ says", out)
    assert sorted(file.name for file in folder.iterdir()) == sorted(f"{name}.png" for name in ["compare", *fitted])
    assert all(file.read_bytes().startswith(PNG) for file in folder.iterdir())
    check_page(page.read_text(), images=len(fitted) + 1)


def check_page(text: str, images: int) -> None:
    """A page that is whole by itself: every image is inside, and nothing is loaded from elsewhere."""
    sources, tags = [], []

    class Reader(HTMLParser):
        def handle_starttag(self, tag, attributes):
            assert tag not in ("link", "script", "iframe")
            tags.append(tag)
            sources.extend(value for name, value in attributes if name in ("src", "href"))

    Reader().feed(text)
    assert len(sources) == images == tags.count("img")
    for source in sources:
        kind, data = source.split(",", 1)
        assert kind == "data:image/png;base64" and base64.b64decode(data, validate=True).startswith(PNG)
    assert "nats a token" in text and "95% intervals" in text and "FLOPs" in text and "url(" not in text


def test_compare_as_json_says_why_a_law_has_no_fit(points, capsys):
    result = json.loads(printed(capsys, "compare", points, *NAMES, "--bootstrap=0", "--json"))
    assert result["flops"] == pytest.approx(1e21, rel=1e-6)  # ten times the largest run's
    laws = result["laws"]
    assert list(laws["data_constrained"]) == ["reason"] and "bootstrap" not in laws["parametric"]
    assert laws["isoflop"]["allocation"]["params"] == pytest.approx(LAW.allocate(1e21).params, rel=0.5)


THIRD_PARTY = '''
from dataclasses import dataclass
import numpy as np
from nanopre import hookimpl
from nanopre.planning.laws import Allocation


@dataclass
class Ratio:
    tokens_a_parameter: float

    def allocate(self, flops):
        params = (flops / 6 / self.tokens_a_parameter) ** 0.5
        return Allocation(params, self.tokens_a_parameter * params, flops * np.nan)


@dataclass
class BestRatio:
    """The tokens a parameter of the run with the least loss, whatever the budget."""

    factor: float = 1.0

    law = Ratio
    definition = "N: params; C = 6 N D"

    def fit(self, runs):
        best = np.argmin(runs.loss)
        return Ratio(self.factor * runs.tokens[best] / runs.params[best])


@hookimpl
def nanopre_analyzers(register):
    register("best_ratio", BestRatio)
'''


def test_an_analyzer_of_a_third_party_is_one_file(points, tmp_path, capsys):
    (tmp_path / "ratio.py").write_text(THIRD_PARTY)
    page, law_file = tmp_path / "page.html", tmp_path / "ratio.json"
    flags = ["--plugins", f"{tmp_path}/ratio.py", "--option=best_ratio.factor=2", "--flops=6e20", "--bootstrap=10"]
    arguments = ["fit", points, *NAMES, *flags, "--analyzer=best_ratio", f"--report={page}", f"--out={law_file}"]
    out = printed(capsys, *arguments)
    assert "tokens_a_parameter" in out and "N: params; C = 6 N D" in out
    check_page(page.read_text(), images=1)  # it has no draw of its own: the figure of the budget alone
    plugins = load_plugins([tmp_path / "ratio.py"])
    found = read_law(str(law_file), plugins)
    n, d, loss = found.law.allocate(6e20)
    assert found.options == {"factor": 2.0} and n * d == pytest.approx(1e20) and np.isnan(loss)
    assert f"analyzer best_ratio  ({tmp_path / 'ratio.py'})\n" in plugins.describe()
    assert re.search(r"^best_ratio +\S", printed(capsys, "compare", points, *NAMES, *flags), re.MULTILINE)


def test_without_the_file_its_law_can_not_be_read(points, tmp_path):
    (tmp_path / "law.json").write_text(json.dumps({"analyzer": "best_ratio"}))
    with pytest.raises(UserError) as error:
        read_law(str(tmp_path / "law.json"), PLUGINS)
    assert str(error.value).startswith(f'--law {tmp_path / "law.json"}: there is no analyzer "best_ratio"; choose from ')
    (tmp_path / "law.json").write_text("{}")
    with pytest.raises(UserError, match="law.json is not what plan.py fit --out writes"):
        read_law(str(tmp_path / "law.json"), PLUGINS)
    with pytest.raises(UserError, match="chinchila-3 is neither a published law nor a file of one; did you mean chinchilla-3?"):
        read_law("chinchila-3", PLUGINS)


@pytest.mark.parametrize(
    "arguments, sentence",
    [
        (["--analyzer=parametrik"], '--analyzer: there is no analyzer "parametrik"; did you mean parametric?'),
        (["--option=isoflop.tolerance=0.1"], "--option isoflop.tolerance=0.1: it must be like parametric.KEY=VALUE, with the "),
        (["--analyzer=envelope", "--option=envelope.bims=3"], "--option envelope.bims: unknown key; did you mean envelope."),
        (["--analyzer=envelope", "--option=envelope.bins=1"], "--option envelope: bins = 1 must be at least 2."),
        (["--analyzer=envelope", "--option=envelope.method=hall"], '--option envelope.method: is "hall"; did you mean hull?'),
        (["--option=parametric"], "--option parametric: it must be like parametric.KEY=VALUE, with the name of parametric."),
        (["--analyser=kaplan"], "--analyser: not an option; did you mean --analyzer?"),
        (["--column=size"], "--column size: it must be like params=N, nanopre's name first."),
        (["--column=parms=size"], "--column parms=size: there is no column parms; did you mean params?"),
        (["--drop-highest=24"], "--drop-highest 24: the runs have 24 points."),
        (["--flops=0"], "argument --flops: 0 must be above 0 and finite; see --help."),
        (["--flops=lots"], "argument --flops: invalid number value: 'lots'; see --help."),
        (["--bootstrap=-1"], "argument --bootstrap: -1 must be at least 0; see --help."),
        (["--bootstrap=0", "--out=/dev/null/law.json"], "/dev/null/law.json: can't be written ("),
        (["--plugins=nothing.py"], "--plugins: no such file or folder: nothing.py."),
        (["--analyzer=data_constrained"], "data_constrained needs runs that repeat data (unique_tokens below tokens); "),
    ],
)
def test_what_is_refused(points, arguments, sentence, monkeypatch):
    monkeypatch.setattr(plan, "load_plugins", lambda paths, where: load_plugins(paths, where) if paths else PLUGINS)
    assert refused("fit", points, *NAMES, *arguments).startswith(sentence)


def test_a_mistake_is_one_sentence_and_exit_2(points):
    run = run_script("plan.py", "fit", points)
    assert run.returncode == 2 and run.stdout == ""
    assert run.stderr == (
        f"plan.py: {points}, line 2: there is no column params; choose from nats, size, tokens. (--column params=...)\n"
    )


def test_training_loads_neither_scipy_nor_matplotlib():
    code = "import sys, train; train.main(['--list-plugins']); sys.exit(str({'scipy', 'matplotlib'} & set(sys.modules)))"
    run = run_script("-c", code)
    assert run.stderr == "set()\n" and "analyzer parametric  (plugins/scaling/parametric.py)" in run.stdout
