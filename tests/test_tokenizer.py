"""Tokenizers: what goes in comes out, ids are where every objective expects them, GPT-2's are GPT-2's."""

from __future__ import annotations

import numpy as np
import pytest
import tiktoken
from conftest import SHARED
from hypothesis import given, settings, strategies as st

from nanopre import UserError
from nanopre.tokenizer import (
    GPT2_PATTERN,
    SPECIAL_TOKENS,
    Tokenizer,
    bpe_tokenizer,
    bytes_tokenizer,
    characters_tokenizer,
    gpt2_tokenizer,
)

GPT2_RANKS = SHARED / "tokenizers" / "gpt2.tiktoken"
TEXTS = ["def f(x):\n    return x + 1\n" * 20, "for i in range(1000):\n    print(f(i), 'naïve café')\n" * 20]


@pytest.fixture(scope="module")
def bpe() -> Tokenizer:
    return bpe_tokenizer(TEXTS, 400)


@settings(max_examples=200, deadline=None)
@given(text=st.text())
def test_bytes_and_bpe_give_any_text_back(bpe, text):
    for tokenizer in (bytes_tokenizer(), bpe):
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert ids.dtype == np.uint32
        assert tokenizer.bytes_per_token[ids].sum() == len(text.encode())
    assert bytes_tokenizer().encode(text).tolist() == list(text.encode())


@given(text=st.text(alphabet="aé漢𝄞\n "))
def test_each_character_is_one_token(text):
    tokenizer = characters_tokenizer(["aé漢𝄞", "\n "])
    ids = tokenizer.encode(text).tolist()
    assert ids == [sorted("aé漢𝄞\n ").index(c) for c in text]
    assert tokenizer.decode(ids) == text


def test_a_character_that_the_vocabulary_lacks_is_named():
    with pytest.raises(UserError, match=r"the character 'b' \(U\+0062\) is not among the vocabulary's 1"):
        characters_tokenizer(["a"]).encode("ab")


@pytest.mark.parametrize("make", [bytes_tokenizer, lambda: characters_tokenizer(["abc"]), lambda: bpe_tokenizer(TEXTS, 400)])
def test_special_tokens_follow_the_ordinary_ones_and_text_never_becomes_one(make):
    tokenizer = make()
    n = tokenizer.n_vocab - len(SPECIAL_TOKENS)
    assert [tokenizer.eot, tokenizer.pad, tokenizer.cls, tokenizer.sep, tokenizer.mask] == list(range(n, n + 5))
    assert tokenizer.sentinels.tolist() == list(range(n + 5, n + 105))
    assert tokenizer.token_bytes([tokenizer.sentinels[7]]) == b"<extra_id_7>"
    assert tokenizer.bytes_per_token[n:].sum() == 0
    if n >= 256:
        assert tokenizer.encode("<|endoftext|>[MASK]").max() < n


def test_a_trained_bpe_has_the_size_asked_for_and_packs_its_own_text(bpe):
    assert bpe.n_vocab == 400
    assert sorted(bpe.encoding._mergeable_ranks.values()) == list(range(295))
    assert len(bpe.encode(TEXTS[0])) < len(TEXTS[0]) / 1.5


def test_a_text_with_few_words_gives_fewer_tokens():
    assert bpe_tokenizer(["ab ab ab"], 4096).n_vocab < 400


def test_saved_and_loaded_it_is_the_same(bpe, tmp_path):
    for tokenizer in (bpe, bytes_tokenizer(), characters_tokenizer(["xyzé"])):
        tokenizer.save(tmp_path / "t.json")
        loaded = Tokenizer.load(tmp_path / "t.json")
        assert loaded.fingerprint == tokenizer.fingerprint
        assert loaded.encode("xyz").tolist() == tokenizer.encode("xyz").tolist()
    with pytest.raises(UserError, match="is not among the vocabulary"):
        loaded.encode("a")  # still a vocabulary of characters


def test_the_fingerprint_tells_vocabularies_apart(bpe):
    others = [bytes_tokenizer(), characters_tokenizer(["ab"]), characters_tokenizer(["ac"]), bpe_tokenizer(TEXTS, 399)]
    assert len({t.fingerprint for t in [bpe, *others]}) == 5


@pytest.mark.parametrize("content", ["", "{}", '{"name": "x", "pattern": "(", "tokens": []}', '{"tokens": 3}', "[1]"])
def test_a_file_that_is_no_tokenizer_is_named(tmp_path, content):
    (tmp_path / "t.json").write_text(content)
    with pytest.raises(UserError, match=r"t\.json: not a tokenizer that nanopre saved"):
        Tokenizer.load(tmp_path / "t.json")
    with pytest.raises(UserError, match=r"u\.json: can't be read \(No such file"):
        Tokenizer.load(tmp_path / "u.json")


@pytest.mark.skipif(not GPT2_RANKS.exists(), reason="GPT-2's ranks (shared/data/tokenizers/gpt2.tiktoken) are not here")
def test_gpt2_ids_are_gpt2s():
    tokenizer = gpt2_tokenizer(str(GPT2_RANKS))
    # Published ids: transformers' documentation of GPT2Tokenizer, and tiktoken's own README tests.
    assert tokenizer.encode("Hello world").tolist() == [15496, 995]
    assert tokenizer.encode(" Hello world").tolist() == [18435, 995]
    assert tokenizer.encode("hello world").tolist() == [31373, 995]
    assert tokenizer.eot == 50256
    # tiktoken's own slower pattern of the same words cuts the same pieces.
    plain = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"  # GPT-2's encoder.py
    theirs = tiktoken.Encoding("p", pat_str=plain, mergeable_ranks=tokenizer.encoding._mergeable_ranks, special_tokens={})

    @settings(max_examples=200, deadline=None)
    @given(text=st.text(alphabet=st.characters(codec="utf-8"), max_size=40))
    def same(text):
        assert tokenizer.encode(text).tolist() == theirs.encode(text)

    same()
    assert tokenizer.encoding._pat_str == GPT2_PATTERN


@pytest.mark.parametrize("content, message", [("aGk= 0\n", "has 1 tokens, GPT-2 has 50,256"), ("?? x\n", "is not a file")])
def test_a_wrong_file_of_ranks(tmp_path, content, message):
    (tmp_path / "ranks").write_text(content)
    with pytest.raises(UserError, match=f"tokenizer.path: .*/ranks {message}"):
        gpt2_tokenizer(str(tmp_path / "ranks"))
    with pytest.raises(UserError, match="tokenizer.path: .*nowhere can't be read"):
        gpt2_tokenizer(str(tmp_path / "nowhere"))


def test_without_a_network_gpt2_says_what_to_give(monkeypatch):
    def no_network(name):
        raise ConnectionError("no route")

    monkeypatch.setattr(tiktoken, "get_encoding", no_network)
    with pytest.raises(UserError, match="can't be downloaded .*set tokenizer.path to a gpt2.tiktoken file"):
        gpt2_tokenizer()
