"""Examples: reading records with columns, sharing them out, and what is said about those that are not right."""

from __future__ import annotations

import gzip
import json
import lzma

import numpy as np
import pytest
from conftest import SHARED
from hypothesis import given, settings, strategies as st

from nanopre import UserError, config as configs
from nanopre.examples import Examples, pick, prepare, read_file, split
from nanopre.tokenizer import bytes_tokenizer

RECORDS = [{"text": f'text "{i}" é', "label": "yes" if i % 2 else "no", "more": i} for i in range(40)]


def load(tmp_path, corpus, columns=("text", "label"), there=None, **sections):
    """The corpus that an objective with these columns gets, by the tokenizer that is `there` or the one configured."""
    data = {"corpus": corpus, "cache_dir": str(tmp_path / "cache"), **sections.pop("data", {})}
    table = {"data": data, "tokenizer": {"name": "bytes"}, **sections}
    config, registry = configs.from_dict(table, "test.toml")

    class Objective:
        def columns(self):
            return list(columns)

    config.objective = Objective()
    return prepare(config, registry, there, progress=False)


def write(path, records=RECORDS) -> str:
    """The records as a file of the kind that its name says."""
    kind = path.name.removesuffix(".gz").removesuffix(".xz")
    if kind.endswith(".jsonl"):
        lines = [json.dumps(record) for record in records]
    else:
        lines = ["\t".join(records[0]), *("\t".join(map(str, record.values())) for record in records)]
    unpacked = gzip.open if path.suffix == ".gz" else lzma.open if path.suffix == ".xz" else open
    with unpacked(path, "wt", encoding="utf-8") as stream:
        stream.write("\n".join(lines) + "\n")
    return str(path)


def texts(*parts: Examples) -> list[tuple[str, ...]]:
    return [record for part in parts for record in zip(*part.columns.values(), strict=True)]


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.jsonl.xz", "a.ndjson", "a.tsv", "a.tsv.gz", "a.txt", "a.txt.xz"])
def test_every_format_gives_the_same_records(tmp_path, name):
    if name == "a.ndjson":
        (tmp_path / name).write_bytes((tmp_path / write(tmp_path / "b.jsonl")).read_bytes())
    else:
        write(tmp_path / name)
    corpus = load(tmp_path, str(tmp_path / name), ("label", "text", "more"))
    assert list(corpus.train.columns) == ["label", "text", "more"]
    expected = [(r["label"], r["text"], str(r["more"])) for r in RECORDS]
    assert sorted(texts(corpus.train, corpus.val)) == sorted(expected)


def test_a_table_as_others_write_it(tmp_path):
    """A byte order mark, Windows' line ends, empty lines, quotes that are part of the text, empty fields."""
    file = tmp_path / "t.tsv"
    file.write_bytes(b'\xef\xbb\xbftext\tlabel\r\n"one\tyes\r\n\r\n\tno\r\n')
    assert list(read_file(str(file), ["text", "label"])) == [('"one', "yes"), ("", "no")]


def test_numbers_and_truth_values_are_texts_as_json_writes_them():
    row = {"a": 1, "b": 2.5, "c": True, "d": "x"}
    assert pick(row, ["d", "c", "b", "a"], "f", 1) == ("x", "true", "2.5", "1")


@pytest.mark.parametrize(
    "name, content, sentence",
    [
        ("a.jsonl", '{"text": "x", "label": "y"}\n{"text": "x", "lable": "y"}',
         'a.jsonl:2: has no column "label", which the objective reads; did you mean lable?'),
        ("a.jsonl", '{"text": "x"}', 'a.jsonl:1: has no column "label", which the objective reads; there are text.'),
        ("a.jsonl", '{"text": "x", "label": null}', 'a.jsonl:1: the column "label" is null, not a text.'),
        ("a.jsonl", '\n{"text": ["x"], "label": "y"}', 'a.jsonl:2: the column "text" is ["x"], not a text.'),
        ("a.jsonl", '{"text": "\\ud800", "label": "y"}', "a.jsonl:1: the text has half of a surrogate pair"),
        ("a.jsonl", '["x", "y"]', "a.jsonl:1: is not a record with named columns."),
        ("a.jsonl", '{"text": "x", "label": "y"}\n{"text', "a.jsonl:2: not a line of JSON ("),
        ("a.tsv", "text\tlabels\nx\ty\n", 'a.tsv:2: has no column "label", which the objective reads; did you mean labels?'),
        ("a.tsv", "text\tlabel\nx\ty\nx\n", "a.tsv:3: has 1 fields; line 1 names 2 columns."),
        ("a.txt", "text\tlabel\nx\ty\tz\n", "a.txt:2: has 3 fields; line 1 names 2 columns."),
        ("a.tsv", b"text\tlabel\n\xff\ty\n", "a.tsv:2: not UTF-8."),
        ("a.tsv", "text\tlabel\n", "data.corpus: there is no example in it."),
        ("a.csv", "text,label\n", "a.csv: examples are read from .jsonl, and from .tsv and .txt with the columns'"),
        ("a.jsonl.gz", "no", "a.jsonl.gz: the compressed file is damaged ("),
    ],
)  # fmt: skip
def test_what_is_wrong_is_named(tmp_path, name, content, sentence):
    file = tmp_path / name
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError) as error:
        load(tmp_path, str(file))
    assert str(error.value).removeprefix(f"{tmp_path}/").startswith(sentence)


def test_a_corpus_that_is_no_examples_is_refused(tmp_path):
    with pytest.raises(UserError, match="the dataset stdlib is running text; the objective learns from examples"):
        load(tmp_path, "stdlib")
    with pytest.raises(UserError, match="no file matches"):
        load(tmp_path, str(tmp_path / "*.tsv"))


# ---------------------------------------------------------------------------------------------------------------------
# Splitting


@settings(max_examples=100)
@given(st.lists(st.integers(0, 20), min_size=1, max_size=60), st.sampled_from([0.0, 0.05, 0.3, 0.99]))
def test_every_record_is_on_one_side_with_its_copies(numbers, val_fraction):
    records = [(str(number),) for number in numbers]
    train, val = split(records, val_fraction)
    assert sorted(train + val) == sorted(records) and not set(train) & set(val)
    if val_fraction == 0:
        assert not val
    elif len(set(numbers)) > 1:
        assert train and val
    order = {record: i for i, record in enumerate(records)}
    assert [order[r] for r in dict.fromkeys(reversed(train))][::-1] == sorted({order[r] for r in train})


def test_the_split_is_fixed_and_of_the_size_that_is_asked_for(tmp_path):
    records = [(str(i),) for i in range(10_000)]
    train, val = split(records, 0.1)
    assert abs(len(val) - 1000) < 4.4 * 30  # standard error 30
    assert set(split(records[:5000], 0.1)[1]) == set(val) & set(records[:5000])  # others do not move a record
    assert [v for (v,) in split(records[:60], 0.1)[1]] == ["3", "6", "20", "28"]


def test_val_corpus_is_the_validation(tmp_path):
    train, val = write(tmp_path / "a.tsv"), write(tmp_path / "b.jsonl", RECORDS[:7])
    corpus = load(tmp_path, train, data={"val_corpus": val})
    assert len(corpus.train) == 40 and len(corpus.val) == 7
    assert sorted(texts(corpus.val)) == sorted((r["text"], r["label"]) for r in RECORDS[:7])
    with pytest.raises(UserError, match='b.jsonl:1: has no column "other"'):
        load(tmp_path, write(tmp_path / "a.tsv", [{"other": "x"}]), ("other",), data={"val_corpus": val})


# ---------------------------------------------------------------------------------------------------------------------
# Tokens


def test_tokens_are_the_texts_one_after_the_other():
    examples = Examples({"text": ["ab", "", "c"], "label": ["x", "yy", ""]}, bytes_tokenizer())
    tokens, starts = examples.tokens("text")
    assert (bytes(tokens.tolist()), starts.tolist(), tokens.dtype) == (b"abc", [0, 2, 2, 3], np.int64)
    assert len(examples) == 3 and examples.n_tokens == 6
    empty = Examples({"text": []}, bytes_tokenizer())
    assert len(empty) == empty.n_tokens == 0 and empty.tokens("text")[1].tolist() == [0]


def test_the_fingerprint_is_that_of_content_columns_and_tokenizer(tmp_path):
    file = write(tmp_path / "a.jsonl")
    first = load(tmp_path, file).fingerprint
    assert load(tmp_path, write(tmp_path / "copy.tsv")).fingerprint == first  # the same records in another file
    changed = [{**RECORDS[0], "text": "other"}, *RECORDS[1:]]
    others = [
        load(tmp_path, write(tmp_path / "b.jsonl", changed)),
        load(tmp_path, file, ("text",)),
        load(tmp_path, file, data={"val_fraction": 0.5}),
        load(tmp_path, file, tokenizer={"name": "chars"}),
    ]
    assert len({other.fingerprint for other in others} | {first}) == 5
    assert load(tmp_path, file, seed=1).fingerprint == first


def test_a_tokenizer_is_trained_on_the_training_texts_unless_there_is_one(tmp_path):
    file = write(tmp_path / "a.jsonl", [{"text": f"wonderful number {i}", "label": "no"} for i in range(30)])
    val = write(tmp_path / "val.jsonl", [{"text": "unheard " * 50, "label": "no"}])
    sections = {"data": {"val_corpus": val}, "tokenizer": {"name": "bpe", "vocab_size": 420}}
    trained = load(tmp_path, file, **sections).tokenizer
    assert len(trained.encode(" number")) == 1 and len(trained.encode("unheard")) > 3
    there = bytes_tokenizer()
    assert load(tmp_path, file, there=there, **sections).tokenizer is there


# ---------------------------------------------------------------------------------------------------------------------
# Real data


@pytest.mark.skipif(not (SHARED / "finetune").is_dir(), reason="needs the shared data")
def test_real_sets(tmp_path):
    folder = SHARED / "finetune"
    polarity = {"name": "sentence_polarity", "path": str(folder / "sentence_polarity")}
    corpus = load(tmp_path, polarity, ("sentence", "label"), data={"val_fraction": 0.1})
    assert len(corpus.train) + len(corpus.val) == 10_662
    assert abs(len(corpus.val) - 1066) < 4.4 * 31
    assert 150 < corpus.val.columns["label"][:400].count("positive") < 250  # a fair part, whatever the files' order
    labels = corpus.train.columns["label"] + corpus.val.columns["label"]
    assert {label: labels.count(label) for label in set(labels)} == {"positive": 5331, "negative": 5331}
    sick = load(
        tmp_path, str(folder / "SICK_train.txt"), ("sentence_A", "sentence_B", "entailment_judgment"),
        data={"val_corpus": str(folder / "SICK_test_annotated.txt")},
    )  # fmt: skip
    assert (len(sick.train), len(sick.val)) == (4500, 4927)
    assert set(sick.train.columns["entailment_judgment"]) == {"NEUTRAL", "ENTAILMENT", "CONTRADICTION"}


def test_the_dataset_says_where_it_is_from(tmp_path):
    with pytest.raises(UserError, match="rt-polarity.pos can't be read .* --data.corpus.path=FOLDER"):
        load(tmp_path, {"name": "sentence_polarity", "path": str(tmp_path)}, ("sentence", "label"))
