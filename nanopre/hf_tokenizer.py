"""tokenizer.json of Hugging Face to and from ours: byte-level BPE with the same ids."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise

from nanopre import UserError
from nanopre.tokenizer import CHARACTER_PATTERN, GPT2_PATTERN, SPECIAL_TOKENS, LibraryTokenizer, Tokenizer

# Patterns that their regular expressions (Oniguruma) write another way than ours.
THEIRS = {CHARACTER_PATTERN: r"[\s\S]"}
OURS = {theirs: ours for ours, theirs in THEIRS.items()}


def byte_characters() -> dict[int, str]:
    """Byte-level BPE writes each byte as one printable character: itself where it is one in Latin-1, else one of those
    from U+0100 on (encoder.py of Radford et al., 2019)."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {byte: chr(256 + i) for i, byte in enumerate(others)}


def merges_of(ranks: Mapping[bytes, int]) -> list[tuple[bytes, bytes]]:
    """The merges that made the tokens, in order, from the tokens alone: with the merges of lower rank, a token's own
    bytes come to two parts, and these are what its merge joined. Tokens that no merge makes are left out."""
    merges = []
    for token, own_rank in sorted(ranks.items(), key=lambda item: item[1]):
        parts = [token[i : i + 1] for i in range(len(token))]
        while len(parts) > 2:
            rank, i = min((ranks.get(a + b, own_rank), i) for i, (a, b) in enumerate(pairwise(parts)))
            if rank >= own_rank:
                break
            parts[i : i + 2] = [parts[i] + parts[i + 1]]
        if len(parts) == 2 and parts[0] in ranks and parts[1] in ranks:
            merges.append((parts[0], parts[1]))
    return merges


def write_tokenizer(tokenizer: Tokenizer | LibraryTokenizer, n_vocab: int) -> dict[str, object]:
    """tokenizer.json of transformers for the first `n_vocab` ids: byte-level BPE that gives text the same ids, or what
    was read from there.

    Unlike ours, it reads the name of a special token in a text as that token.
    """
    if isinstance(tokenizer, LibraryTokenizer):
        return tokenizer.table
    pattern, ranks, character = tokenizer.encoding._pat_str, tokenizer.encoding._mergeable_ranks, byte_characters()
    specials = dict(zip(SPECIAL_TOKENS, range(tokenizer.eot, n_vocab), strict=False))

    def spell(token: bytes) -> str:
        return "".join(character[byte] for byte in token)

    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    pre_tokenizer = {**byte_level, "use_regex": True}
    if pattern != GPT2_PATTERN:
        regex = {"Regex": THEIRS.get(pattern, pattern)}
        split = {"type": "Split", "pattern": regex, "behavior": "Isolated", "invert": False}
        pre_tokenizer = {"type": "Sequence", "pretokenizers": [split, {**byte_level, "use_regex": False}]}
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False) | {"special": True}
    return {
        "version": "1.0",
        "added_tokens": [{"id": i, "content": name, **flags} for name, i in specials.items()],
        "normalizer": None,
        "pre_tokenizer": pre_tokenizer,
        "post_processor": None,
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            "ignore_merges": True,  # as in tiktoken, a piece that is a token as a whole is that token
            "vocab": {spell(token): rank for token, rank in ranks.items()} | specials,
            "merges": [[spell(a), spell(b)] for a, b in merges_of(ranks)],
        },
    }


def pair_template(name: Mapping[int, str], cls: int, sep: int) -> dict[str, object]:
    """The post_processor of a tokenizer.json that makes [CLS] A [SEP] of a text and [CLS] A [SEP] B [SEP] of two, the
    second segment from B on. name: of the special tokens' ids."""

    def special(token: int, segment: int) -> dict:
        return {"SpecialToken": {"id": name[token], "type_id": segment}}

    single = [special(cls, 0), {"Sequence": {"id": "A", "type_id": 0}}, special(sep, 0)]
    return {
        "type": "TemplateProcessing",
        "single": single,
        "pair": [*single, {"Sequence": {"id": "B", "type_id": 1}}, special(sep, 1)],
        "special_tokens": {name[i]: {"id": name[i], "ids": [i], "tokens": [name[i]]} for i in (cls, sep)},
    }


def read_tokenizer(data: Mapping, eos: int | None, where: str) -> Tokenizer | LibraryTokenizer:
    """Our tokenizer from the content of a tokenizer.json, which `where` names: the same ids for the same text.

    WordPiece and Unigram stay with the library that made them. Of byte-level BPE, `eos` is the id that ends a text where
    no token is called <|endoftext|>. Not carried over: special tokens but this one, tokens around a text, and a
    normalizer to NFC, which changes next to no text. Raises UserError for any other kind, for ids in another order than
    ours, and for what tiktoken can't express.
    """

    def refuse(problem: str) -> UserError:
        return UserError(f"{where}: {problem}; give a run's tokenizer.json with --tokenizer.")

    model, normalizer = data["model"], data.get("normalizer")
    if model.get("type") in ("WordPiece", "Unigram"):
        return LibraryTokenizer(data, where)
    if model.get("type", "BPE") != "BPE" or model.get("byte_fallback"):
        raise refuse("neither byte-level BPE, WordPiece nor Unigram, the kinds that nanopre reads")
    if normalizer not in (None, {"type": "NFC"}):
        raise refuse(f"normalizer {normalizer['type']} is not supported")
    pattern = split_pattern(data.get("pre_tokenizer") or {})
    if pattern is None:
        raise refuse("pre_tokenizer is not supported")

    added = {token["content"]: token["id"] for token in data["added_tokens"]}
    byte_of = {character: byte for byte, character in byte_characters().items()}
    try:
        token_of = {name: bytes(byte_of[c] for c in name) for name in model["vocab"] if name not in added}
    except KeyError as error:
        raise refuse(f"a token has {error}, which stands for no byte") from None
    ranks = {token: model["vocab"][name] for name, token in token_of.items()}
    end = added.get(SPECIAL_TOKENS[0], eos if eos in added.values() else len(ranks))
    if sorted(ranks.values()) != list(range(len(ranks))) or end != len(ranks):
        raise refuse(f"its {len(ranks)} ordinary tokens do not come first, or the end of text (id {end}) not right after")
    is_characters = pattern == CHARACTER_PATTERN and not any(bytes([byte]) in ranks for byte in range(128, 256))
    if not is_characters and any(bytes([byte]) not in ranks for byte in range(256)):
        raise refuse("not every byte is a token")

    # tiktoken merges whatever gives a token, the lowest id first, and takes a piece that is a token as a whole. The
    # listed merges must mean the same: theirs are these, in this order, and no token is without one.
    listed = [merge.split(" ") if isinstance(merge, str) else merge for merge in model["merges"]]
    merges = [(token_of.get(a, b""), token_of.get(b, b"")) for a, b in listed]
    order = [ranks.get(a + b, -1) for a, b in merges]
    unmade = {token for token in ranks if len(token) > 1} - {a + b for a, b in merges}
    if order != sorted(order) or not set(merges_of(ranks)) <= set(merges) or unmade and not model.get("ignore_merges"):
        raise refuse("the merges do not come in the order of the tokens' ids")
    try:
        return Tokenizer.build("chars" if is_characters else "bpe", pattern, ranks)
    except ValueError as error:
        raise refuse(f"tiktoken can't read the pattern {pattern} ({error})") from None


def split_pattern(pre_tokenizer: Mapping) -> str | None:
    """The pattern of the pieces that a byte-level pre_tokenizer cuts a text into; None for any other pre_tokenizer."""
    match pre_tokenizer:
        case {"type": "ByteLevel", "add_prefix_space": False}:
            return GPT2_PATTERN if pre_tokenizer.get("use_regex", True) else None
        case {
            "type": "Sequence",
            "pretokenizers": [
                {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False},
                {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False},
            ],
        } if "$" not in pattern:  # the end of a line over there, of the text here
            return OURS.get(pattern, pattern)
    return None
