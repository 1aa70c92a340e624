"""Models and tokenizers to and from Hugging Face transformers.

    python -m nanopre.hf import HF_FOLDER runs/NAME      a folder of config.json, weights, tokenizer.json to a run
    python -m nanopre.hf export runs/NAME HF_FOLDER      a run to a folder for AutoTokenizer and AutoModelForCausalLM,
                                                         AutoModelForPreTraining (BERT) or AutoModelForSeq2SeqLM (T5);
                                                         of a fine-tuned BERT AutoModelForSequenceClassification
                                                         (classify) or AutoModelForQuestionAnswering (span_qa)

Both ways are exact: the same logits from the same token ids, the same ids from the same text. What has no counterpart
on the other side is refused; what is there for some objectives only, as BERT's heads, may be missing on either side.
Not of the model, and so not carried over: dropout, which an imported run begins without, and tokens that a Hugging Face
tokenizer adds around a text.
"""

from __future__ import annotations

import json
import pickle
import re
import sys
from collections.abc import Mapping
from dataclasses import MISSING, fields, replace
from pathlib import Path

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from nanopre import UserError, checkpoint, config as configs, distributed, saving
from nanopre.command_line import Parser, run_script
from nanopre.hf_families import (
    BERT,
    BERT_BY_HEAD,
    BERT_CLASSIFIER,
    BERT_READER,
    BERT_WITHOUT_PAIRS,
    FAMILIES,
    GPT2,
    OBJECTIVES,
    T5_GATED,
    Family,
)
from nanopre.hf_tokenizer import pair_template, read_tokenizer, write_tokenizer
from nanopre.model import ModelConfig, Transformer
from nanopre.tokenizer import Tokenizer

# ---------------------------------------------------------------------------------------------------------------------
# config.json


def family_of(hf_config: Mapping, where: str) -> Family:
    """The family of a config.json, which `where` names in the UserError about one that nanopre has not."""
    kind = hf_config.get("model_type")
    if not isinstance(kind, str) or kind not in FAMILIES:
        raise UserError(f"{where}: model_type is {json.dumps(kind)}; nanopre reads {', '.join(FAMILIES)}.")
    if kind == "t5" and str(hf_config.get("feed_forward_proj")).startswith("gated"):
        return T5_GATED
    return FAMILIES[kind]


def read_options(family: Family, hf_config: Mapping, where: str) -> tuple[dict[str, object], int]:
    """(options of our model family, longest sequence in tokens) from a config.json.

    Raises UserError where config.json asks for what nanopre does not compute, or lacks a size.
    """
    inner = {f"{key}.{k}": v for key, value in hf_config.items() if isinstance(value, dict) for k, v in value.items()}
    flat = {**hf_config, **inner}
    for key, accepted in family.fixed.items():
        if flat.get(key, accepted[0]) not in accepted:
            only = " or ".join(map(json.dumps, accepted))
            raise UserError(f"{where}: {key} = {json.dumps(flat[key])} is not supported; nanopre has {only} only.")
    options = dict(family.implied)
    for option, keys in {**family.options, "seq_len": (family.seq_len,)}.items():
        values = [flat[key] for key in keys if flat.get(key) is not None]
        if not values and option not in family.defaults:
            raise UserError(f"{where}: {keys[0]} is missing.")
        value = values[0] if values else family.defaults[option]
        if option in family.values:
            if value not in family.values[option]:
                only = " or ".join(map(json.dumps, family.values[option]))
                raise UserError(f"{where}: {keys[0]} = {json.dumps(value)} is not supported; nanopre has {only} only.")
            value = family.values[option][value]
        options[option] = value
    head_dim = hf_config.get("head_dim")
    if head_dim is not None and head_dim * options["n_heads"] != options["d_model"]:
        raise UserError(
            f"{where}: head_dim = {head_dim} is not supported; nanopre has hidden_size / num_attention_heads = "
            f"{options['d_model']} / {options['n_heads']} only."
        )
    return options, options.pop("seq_len")


def write_options(family: Family, config: ModelConfig) -> dict[str, object]:
    """The config.json of a model of ours, without the ids of special tokens."""
    values = {key: accepted[0] for key, accepted in family.fixed.items() if accepted[0] is not None}
    for option, keys in family.options.items():
        value = getattr(config, option)
        theirs_of = {ours: theirs for theirs, ours in family.values.get(option, {}).items()}
        values |= dict.fromkeys(keys, theirs_of.get(value, value))
    values[family.seq_len] = config.seq_len
    values |= dict.fromkeys(family.dropout, config.dropout)
    if config.positions == "rope":
        values["head_dim"] = config.head_dim
    hf_config = {"architectures": [family.architecture], "model_type": family.kind}
    for key, value in values.items():
        outer, _, inner = key.rpartition(".")
        (hf_config.setdefault(outer, {}) if outer else hf_config)[inner] = value
    return hf_config


def family_for(config: ModelConfig, where: str) -> Family:
    """The family that computes what a model of ours does. Raises UserError where transformers has none."""
    usual = {f.name: f.default for f in fields(ModelConfig) if f.default is not MISSING}
    usual |= {"n_kv_heads": config.n_heads, "dropout": config.dropout}
    if config.head_dim * config.n_heads == config.d_model:
        usual["d_head"] = config.d_head  # the usual width, in so many words
    differences = []
    for family in (*FAMILIES.values(), T5_GATED):
        wanted = usual | family.settings | ({"scale_logits": config.tie_embeddings} if family.kind == "t5" else {})
        choices = {name: [value] for name, value in wanted.items() if name not in family.options}
        choices |= {option: list(table.values()) for option, table in family.values.items()}
        differing = {name: values for name, values in choices.items() if getattr(config, name) not in values}
        if not differing:
            return family
        differences.append((family.kind, differing))
    kind, differing = min(differences, key=lambda pair: len(pair[1]))
    has = [f"{name} = {' or '.join(map(str, v))}, not {getattr(config, name)}" for name, v in differing.items()]
    sentence = f"no model of transformers computes what this one does; the nearest, {kind}, has {', '.join(has)}."
    raise UserError(f"{where}: {sentence}")


# ---------------------------------------------------------------------------------------------------------------------
# Weights


def read_weights(folder: Path) -> dict[str, Tensor]:
    """All tensors of a folder by their names there, from one file or the shards that an index names, safetensors first.

    Raises UserError that names the file which is missing or damaged.
    """
    for name in ("model.safetensors", "pytorch_model.bin"):
        index = folder / f"{name}.index.json"
        if index.is_file():
            files = sorted(set(read_json(index).get("weight_map", {}).values()))
        elif (folder / name).is_file():
            files = [name]
        else:
            continue
        tensors = {}
        for file in files:
            try:
                if name.endswith(".bin"):
                    tensors |= torch.load(folder / file, map_location="cpu", weights_only=True)
                else:
                    tensors |= safetensors.torch.load_file(folder / file)
            except FileNotFoundError:
                raise UserError(f"{folder / file}: missing, though {index.name} names it.") from None
            except (safetensors.SafetensorError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
                problem = str(error).splitlines()[0]
                raise UserError(f"{folder / file}: not a whole file of weights ({problem}).") from None
        return tensors
    raise UserError(f"{folder}: has neither model.safetensors nor pytorch_model.bin, nor an index of their shards.")


def module_names(family: Family, config: ModelConfig) -> dict[tuple[str, ...], str]:
    """The family's modules for each block of a model, ours: theirs."""
    table, n = {}, config.n_layers
    for ours, theirs in family.modules.items():
        for i in range(n if "{i}" in theirs else config.n_decoder_layers if "{j}" in theirs else 1):
            table[tuple(name.format(i=i, j=n + i, last=n - 1) for name in ours)] = theirs.format(i=i, j=i)
    return table


def from_hf(
    family: Family, tensors: Mapping[str, Tensor], config: ModelConfig, where: str = "weights"
) -> dict[str, Tensor]:
    """The state dict of a model of ours, in float32, from transformers' tensors by name.

    Raises UserError for a tensor that has no place in it.
    """
    ours_of = {theirs: ours for ours, theirs in module_names(family, config).items()}
    roots = {theirs.partition(".")[0] for theirs in family.modules.values()}
    state = {}
    for name, tensor in tensors.items():
        if re.search(family.ignored, name):
            continue
        # A checkpoint of the model without its head leaves the prefix out.
        full = name if name.partition(".")[0] in roots else family.prefix + name
        for pattern, now in family.aliases.items():
            full = re.sub(pattern, now, full)
        module, _, kind = full.rpartition(".")
        ours = ours_of.get(module)
        if ours is None:
            raise UserError(
                f"{where}: the tensor {name} has no place in nanopre's {family.model} with the sizes of config.json."
            )
        if kind == "weight" and module.endswith(family.transposed):
            tensor = tensor.T
        for part_name, part in zip(ours, tensor.float().chunk(len(ours)), strict=True):
            state[f"{part_name}.{kind}"] = part
    if config.tie_embeddings and "embed.tokens.weight" in state:
        embedding = state["embed.tokens.weight"]
        if not torch.equal(state.setdefault("head.proj.weight", embedding), embedding):
            output = family.modules["head.proj",]
            raise UserError(f"{where}: {output}.weight is not the token embedding, though config.json ties the two.")
    return state


def to_hf(family: Family, state: Mapping[str, Tensor], config: ModelConfig, where: str) -> dict[str, Tensor]:
    """transformers' tensors by name from the state dict of our model. GPT-2 over there always has biases: those that
    ours lacks are zeros. Raises UserError for a tensor that transformers' model has no place for."""
    state, tensors = dict(state), {}
    if family is GPT2:
        for name, tensor in list(state.items()):
            module, _, kind = name.rpartition(".")
            if kind == "weight" and not module.startswith("embed.") and module != "head.proj":
                state.setdefault(f"{module}.bias", torch.zeros(len(tensor)))
    if config.tie_embeddings:
        state.pop("head.proj.weight", None)
    for ours, theirs in module_names(family, config).items():
        for kind in ("weight", "bias"):
            parts = [state.pop(name) for part in ours if (name := f"{part}.{kind}") in state]
            if parts:
                tensor = torch.cat(parts)
                flip = kind == "weight" and theirs.endswith(family.transposed)
                tensors[f"{theirs}.{kind}"] = (tensor.T if flip else tensor).contiguous()
    if state:
        raise UserError(f"{where}: {min(state)} has no place in {family.architecture} of transformers.")
    return tensors


def without_mup(state: Mapping[str, Tensor], config: ModelConfig) -> tuple[dict[str, Tensor], ModelConfig]:
    """The state dict and settings of a model without muP that computes the same: the scale of the logits goes into the last
    norm, since the output projection may be the embedding, and that of the scores into the queries."""
    state, plain = dict(state), replace(config, mup_base_width=0)
    if config.mup_base_width:
        factors = {
            r"head\.norm\.": config.logit_scale / plain.logit_scale,
            r"blocks\.\d+\.attn\.q\.": config.attention_scale * config.head_dim**0.5,
        }
        for pattern, factor in factors.items():
            state |= {name: tensor * factor for name, tensor in state.items() if re.match(pattern, name)}
    return state, plain


def fill(model: Transformer, state: Mapping[str, Tensor], optional: str, where: str) -> list[str]:
    """Load the state dict into a model that has its first weights. Weights that match the pattern `optional` may be
    missing on either side; returns what there is to say about them.

    Raises UserError that names the first other tensor which is missing, or one that is of another shape.
    """
    weights = model.state_dict()
    missing, unused = ([name for name in a if name not in b] for a, b in ((weights, state), (state, weights)))
    if needed := [name for name in missing if not re.match(optional, name)]:
        raise UserError(f"{where}: there are no weights for {needed[0]}.")
    if extra := [name for name in unused if not re.match(optional, name)]:
        raise UserError(f"{where}: there are weights for {min(extra)}, which config.json's sizes leave out.")
    for name, tensor in weights.items():
        if name in state and state[name].shape != tensor.shape:
            raise UserError(
                f"{where}: the weights for {name} have the shape {tuple(state[name].shape)}; config.json's sizes give "
                f"{tuple(tensor.shape)}."
            )
    model.load_state_dict({**weights, **{name: tensor for name, tensor in state.items() if name in weights}})
    notes = {"there are no weights for {}: they start anew": missing, "the objective has no use for {}": unused}
    return [
        note.format(", ".join(dict.fromkeys(name.rpartition(".")[0] for name in found)))
        for note, found in notes.items()
        if found
    ]


# ---------------------------------------------------------------------------------------------------------------------
# Whole folders


def import_model(source: str | Path, run_dir: str | Path, tokenizer_file: str | Path | None = None) -> Path:
    """Make a run, with one checkpoint at step 0, of a folder in the format of transformers. Returns the checkpoint.

    `tokenizer_file`: a tokenizer.json of a nanopre run, in place of the folder's own. Raises UserError.
    """
    source, run_dir = Path(source), Path(run_dir)
    if run_dir.exists():
        raise UserError(f"{run_dir}: is there already; choose the name of a new run.")
    where = str(source / "config.json")
    hf_config = read_json(source / "config.json")
    family = family_of(hf_config, where)
    options, seq_len = read_options(family, hf_config, where)
    if tokenizer_file:
        tokenizer = Tokenizer.load(Path(tokenizer_file))
    else:
        tokenizer_file, eos = source / "tokenizer.json", hf_config.get("eos_token_id")
        data = read_json(tokenizer_file)
        try:
            tokenizer = read_tokenizer(data, eos[0] if isinstance(eos, list) else eos, str(tokenizer_file))
        except (KeyError, TypeError, AttributeError) as error:
            problem = f"{type(error).__name__}: {error}"
            raise UserError(f"{tokenizer_file}: not in the format of the package tokenizers ({problem}).") from None
    # Of nanopre's own vocabularies special tokens may lie beyond the embedding, but for the end of text.
    last = tokenizer.eot if isinstance(tokenizer, Tokenizer) else tokenizer.n_vocab - 1
    if last >= (rows := options["vocab_size"]):
        raise UserError(f"{tokenizer_file}: its ids go up to {last}, beyond the vocab_size of {rows} in {where}.")
    table = {
        "name": run_dir.name,
        "out_dir": str(run_dir.parent),
        "model": {"name": family.model, **options},
        "objective": {"name": OBJECTIVES[family.kind]},
        "tokenizer": {"name": "bpe", "vocab_size": max(361, tokenizer.n_vocab)},  # the run's tokenizer.json is what counts
        "train": {"seq_len": seq_len},
    }
    config, registry = configs.from_dict(table, where)
    model = distributed.build_model(config, tokenizer)
    state = from_hf(family, read_weights(source), model.config, str(source))
    if notes := fill(model, state, family.optional, str(source)):
        print(f"nanopre.hf: {source}: {'; '.join(notes)}.", file=sys.stderr)
    saving.create_run(run_dir, config, tokenizer)
    info = {"imported_from": str(source), "config": configs.to_dict(config), "plugins": registry.versions()}
    return saving.save(run_dir, 0, [model], [], info)


def export_model(run: str | Path, folder: str | Path) -> None:
    """Write a run's latest checkpoint, or the one given, as a new folder for transformers' Auto classes.

    Raises UserError.
    """
    folder = Path(folder)
    opened = checkpoint.open_run(run)
    tokenizer = opened.tokenizer
    state, config = without_mup(opened.model.state_dict(), opened.model.config)
    family = family_for(config, str(run))
    if family is BERT:
        head = opened.model.head
        family = BERT_BY_HEAD.get((*head.outputs, *(["pooler"] if head.pooler else [])), BERT_WITHOUT_PAIRS)
    tensors = to_hf(family, state, config, str(run))
    if folder.exists():
        raise UserError(f"{folder}: is there already; choose a new folder.")
    try:
        folder.mkdir(parents=True)
    except OSError as error:
        raise UserError(f"{folder}: the folder can't be made ({error.strerror}).") from None
    safetensors.torch.save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})

    # Special tokens that the embedding has no rows for, which an import can leave, are not exported.
    n_vocab = min(tokenizer.n_vocab, config.vocab_size)
    tokenizer_json = write_tokenizer(tokenizer, n_vocab)
    special = {token["id"]: token["content"] for token in tokenizer_json["added_tokens"]}
    ids = dict(bos=tokenizer.eot, eos=tokenizer.eot) if tokenizer.eot != tokenizer.sep else {}
    ids = {role: i for role, i in {**ids, "pad": tokenizer.pad}.items() if i in special}
    roles = ids | dict(cls=tokenizer.cls, sep=tokenizer.sep, mask=tokenizer.mask)
    named = {f"{role}_token": special[i] for role, i in roles.items() if i in special}
    if unknown := tokenizer_json["model"].get("unk_token"):
        named["unk_token"] = unknown
    tokenizer_config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **named,
        "additional_special_tokens": [name for name in special.values() if name not in named.values()],
        "model_max_length": config.seq_len,
        "clean_up_tokenization_spaces": False,
    }
    if family in (BERT_CLASSIFIER, BERT_READER):  # they are called with texts
        tokenizer_json = {**tokenizer_json, "post_processor": pair_template(special, tokenizer.cls, tokenizer.sep)}
        tokenizer_config["model_input_names"] = ["input_ids", "token_type_ids", "attention_mask"]
    if config.architecture == "encoder-decoder":
        ids["decoder_start"] = tokenizer.pad
    ids = {f"{role}_token_id": i for role, i in ids.items()}
    if family is BERT_CLASSIFIER:
        ids["id2label"] = dict(enumerate(opened.config.objective.labels))
        ids["label2id"] = {label: i for i, label in ids["id2label"].items()}
    # As in sample.py, the rows that only pad the vocabulary are never chosen.
    generation = {**ids, "suppress_tokens": list(range(n_vocab, config.vocab_size))}
    files = {
        "config.json": write_options(family, config) | ids,
        "generation_config.json": {key: value for key, value in generation.items() if value != []},
        "tokenizer.json": tokenizer_json,
        "tokenizer_config.json": tokenizer_config,
    }
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def read_json(file: Path) -> dict:
    """The object of a JSON file. Raises UserError."""
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{file}: can't be read as JSON ({getattr(error, 'strerror', None) or error}).") from None
    if not isinstance(data, dict):
        raise UserError(f"{file}: is no JSON object, with names and values in braces.")
    return data


def main(argv: list[str]) -> None:
    parser = Parser(prog="python -m nanopre.hf", description="Models from and to Hugging Face.")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    command = commands.add_parser("import", help="make a run of a folder in the format of transformers")
    command.add_argument("source", metavar="HF_FOLDER", help="a folder of config.json, weights and tokenizer.json")
    command.add_argument("run", metavar="RUN", help="the new run's folder: runs/NAME")
    command.add_argument("--tokenizer", metavar="FILE", help="tokenizer.json of a run, in place of HF_FOLDER's own")
    command = commands.add_parser("export", help="make a folder in the format of transformers of a run")
    command.add_argument("run", metavar="RUN", help="a run's folder (its latest checkpoint) or one checkpoint's")
    command.add_argument("folder", metavar="HF_FOLDER", help="the new folder")
    a = parser.parse_args(argv)
    if a.command == "import":
        print(f"Imported to {import_model(a.source, a.run, a.tokenizer)}; try: python sample.py {a.run} --prompt TEXT")
    else:
        export_model(a.run, a.folder)
        print(f"Exported to {a.folder}")


if __name__ == "__main__":
    run_script("nanopre.hf", main)
