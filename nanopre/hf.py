"""Models and tokenizers to and from Hugging Face transformers.

    python -m nanopre.hf import HF_FOLDER runs/NAME      a folder of config.json, weights, tokenizer.json to a run
    python -m nanopre.hf export runs/NAME HF_FOLDER      a run to a folder for AutoModelForCausalLM and AutoTokenizer

Both ways are exact: the same logits from the same token ids, the same ids from the same text. What has no counterpart
on the other side is refused. Not of the model, and so not carried over: dropout, which an imported run begins without,
and tokens that a Hugging Face tokenizer adds around a text.
"""

from __future__ import annotations

import argparse
import json
import pickle
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from nanopre import UserError, checkpoint, config as configs
from nanopre.hf_tokenizer import read_tokenizer, write_tokenizer
from nanopre.model import ModelConfig, Transformer
from nanopre.tokenizer import Tokenizer

# ---------------------------------------------------------------------------------------------------------------------
# Families: what corresponds to what


@dataclass(frozen=True)
class Family:
    """One architecture of transformers in terms of ours. A further family is a further table."""

    model: str  # our model family's name in the config
    architecture: str  # transformers' class
    options: dict[str, tuple[str, ...]]  # our option: its keys in config.json; the first that is there counts
    seq_len: str  # the key in config.json of the longest sequence
    defaults: dict[str, object]  # what an option is whose keys config.json may lack or set to null
    fixed: dict[str, tuple]  # key: the values that mean what nanopre computes; the first is also what its absence means
    modules: dict[tuple[str, ...], str]  # ours: theirs. Several of ours are stacked along the outputs in one of theirs
    prefix: str  # what a checkpoint of the model without its head leaves out of the names
    dropout: tuple[str, ...]  # keys of config.json that an export sets
    implied: dict[str, object] = field(default_factory=dict)  # our options that the architecture itself settles
    transposed: tuple[str, ...] = ()  # ends of the names of modules that hold a matrix as (in, out)
    ignored: str = r"(?!)"  # pattern of the names of buffers that some versions saved


GPT2 = Family(
    model="gpt2",
    architecture="GPT2LMHeadModel",
    options={
        "vocab_size": ("vocab_size",),
        "d_model": ("n_embd",),
        "n_layers": ("n_layer",),
        "n_heads": ("n_head",),
        "d_ff": ("n_inner",),
        "norm_eps": ("layer_norm_epsilon",),
        "tie_embeddings": ("tie_word_embeddings",),
    },
    seq_len="n_positions",
    defaults={"d_ff": 0, "norm_eps": 1e-5, "tie_embeddings": True},
    fixed={
        "activation_function": ("gelu_new", "gelu_pytorch_tanh"),
        "scale_attn_weights": (True,),
        "scale_attn_by_inverse_layer_idx": (False,),
        "add_cross_attention": (False,),
        "quantization_config": (None,),
    },
    modules={
        ("embed.tokens",): "transformer.wte",
        ("embed.positions",): "transformer.wpe",
        ("blocks.{i}.attn_norm",): "transformer.h.{i}.ln_1",
        ("blocks.{i}.attn.q", "blocks.{i}.attn.k", "blocks.{i}.attn.v"): "transformer.h.{i}.attn.c_attn",
        ("blocks.{i}.attn.out",): "transformer.h.{i}.attn.c_proj",
        ("blocks.{i}.mlp_norm",): "transformer.h.{i}.ln_2",
        ("blocks.{i}.mlp.up",): "transformer.h.{i}.mlp.c_fc",
        ("blocks.{i}.mlp.down",): "transformer.h.{i}.mlp.c_proj",
        ("head.norm",): "transformer.ln_f",
        ("head.proj",): "lm_head",
    },
    prefix="transformer.",
    dropout=("embd_pdrop", "attn_pdrop", "resid_pdrop"),
    transposed=(".c_attn", ".c_proj", ".c_fc"),  # GPT-2's Conv1D
    ignored=r"\.attn\.(masked_)?bias$",  # the causal mask; ".c_attn.bias" is a parameter
)

# Rotary positions pair x[i] with x[i + D/2] on both sides, so that queries and keys need no permutation.
LLAMA = Family(
    model="llama",
    architecture="LlamaForCausalLM",
    options={
        "vocab_size": ("vocab_size",),
        "d_model": ("hidden_size",),
        "n_layers": ("num_hidden_layers",),
        "n_heads": ("num_attention_heads",),
        "n_kv_heads": ("num_key_value_heads",),
        "d_ff": ("intermediate_size",),
        "norm_eps": ("rms_norm_eps",),
        "rope_theta": ("rope_parameters.rope_theta", "rope_theta"),  # since version 5 of transformers, and before
        "tie_embeddings": ("tie_word_embeddings",),
    },
    seq_len="max_position_embeddings",
    defaults={"n_kv_heads": 0, "norm_eps": 1e-6, "rope_theta": 10_000.0, "tie_embeddings": False},
    fixed={
        "hidden_act": ("silu", "swish"),
        "attention_bias": (False,),
        "mlp_bias": (False,),
        "rope_scaling": (None,),
        "rope_parameters.rope_type": ("default",),
        "partial_rotary_factor": (None, 1.0),
        "rope_parameters.partial_rotary_factor": (None, 1.0),
        "quantization_config": (None,),
    },
    modules={
        ("embed.tokens",): "model.embed_tokens",
        ("blocks.{i}.attn_norm",): "model.layers.{i}.input_layernorm",
        ("blocks.{i}.attn.q",): "model.layers.{i}.self_attn.q_proj",
        ("blocks.{i}.attn.k",): "model.layers.{i}.self_attn.k_proj",
        ("blocks.{i}.attn.v",): "model.layers.{i}.self_attn.v_proj",
        ("blocks.{i}.attn.out",): "model.layers.{i}.self_attn.o_proj",
        ("blocks.{i}.mlp_norm",): "model.layers.{i}.post_attention_layernorm",
        ("blocks.{i}.mlp.gate",): "model.layers.{i}.mlp.gate_proj",
        ("blocks.{i}.mlp.up",): "model.layers.{i}.mlp.up_proj",
        ("blocks.{i}.mlp.down",): "model.layers.{i}.mlp.down_proj",
        ("head.norm",): "model.norm",
        ("head.proj",): "lm_head",
    },
    prefix="model.",
    dropout=("attention_dropout",),
    ignored=r"rotary_emb\.inv_freq$",
)

# LLaMA with a norm of each head's queries and keys: what our llama family with qk_norm = true is called over there.
QWEN3 = replace(
    LLAMA,
    architecture="Qwen3ForCausalLM",
    implied={"qk_norm": True},
    fixed=LLAMA.fixed | {"use_sliding_window": (False,)},
    modules=LLAMA.modules
    | {
        ("blocks.{i}.attn.q_norm",): "model.layers.{i}.self_attn.q_norm",
        ("blocks.{i}.attn.k_norm",): "model.layers.{i}.self_attn.k_norm",
    },
)

FAMILIES = {"gpt2": GPT2, "llama": LLAMA, "qwen3": QWEN3}
"""By the `model_type` of config.json."""


# ---------------------------------------------------------------------------------------------------------------------
# config.json


def family_of(hf_config: Mapping, where: str) -> Family:
    """The family of a config.json, which `where` names in the UserError about one that nanopre has not."""
    kind = hf_config.get("model_type")
    if kind not in FAMILIES:
        raise UserError(f"{where}: model_type is {json.dumps(kind)}; nanopre reads {', '.join(FAMILIES)}.")
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
        options[option] = values[0] if values else family.defaults[option]
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
        values |= dict.fromkeys(keys, getattr(config, option))
    values[family.seq_len] = config.seq_len
    values |= dict.fromkeys(family.dropout, config.dropout)
    if config.positions == "rope":
        values["head_dim"] = config.head_dim
    kind = next(kind for kind, member in FAMILIES.items() if member is family)
    hf_config = {"architectures": [family.architecture], "model_type": kind}
    for key, value in values.items():
        outer, _, inner = key.rpartition(".")
        (hf_config.setdefault(outer, {}) if outer else hf_config)[inner] = value
    return hf_config


def family_for(config: ModelConfig, where: str) -> Family:
    """The family that computes what a model of ours does. Raises UserError where transformers has none."""
    match config:
        case ModelConfig(positions="learned", norm="layernorm", activation="gelu_tanh", qk_norm=False):
            return GPT2
        case ModelConfig(positions="rope", norm="rmsnorm", activation="swiglu", bias=False):
            return QWEN3 if config.qk_norm else LLAMA
    raise UserError(f"{where}: no model of transformers has this combination of positions, norm, MLP and biases.")


# ---------------------------------------------------------------------------------------------------------------------
# Weights


def read_weights(folder: Path) -> dict[str, Tensor]:
    """All tensors of a folder by their names there, from one file or the shards that an index names, safetensors first.

    Raises UserError that names the file which is missing or damaged.
    """
    for name in ("model.safetensors", "pytorch_model.bin"):
        index = folder / f"{name}.index.json"
        if index.is_file():
            files = sorted(set(read_json(index)["weight_map"].values()))
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


def from_hf(family: Family, tensors: Mapping[str, Tensor], tied: bool, where: str = "weights") -> dict[str, Tensor]:
    """The state dict of our model, in float32, from transformers' tensors by name.

    `tied`: the output projection is the token embedding. Raises UserError for a tensor that has no place in our model.
    """
    ours_of = {theirs: ours for ours, theirs in family.modules.items()}
    state = {}
    for name, tensor in tensors.items():
        if re.search(family.ignored, name):
            continue
        # A checkpoint of the model without its head leaves the prefix out.
        full = name if name.startswith((family.prefix, "lm_head.")) else family.prefix + name
        module, _, kind = full.rpartition(".")
        number = re.search(r"\.(\d+)\.", module)
        ours = ours_of.get(module.replace(number[0], ".{i}.") if number else module)
        if ours is None:
            raise UserError(f"{where}: the tensor {name} has no place in nanopre's {family.model}.")
        if kind == "weight" and module.endswith(family.transposed):
            tensor = tensor.T
        for part_name, part in zip(ours, tensor.float().chunk(len(ours)), strict=True):
            state[f"{part_name.format(i=number and number[1])}.{kind}"] = part
    if tied and "embed.tokens.weight" in state:
        embedding = state["embed.tokens.weight"]
        if not torch.equal(state.setdefault("head.proj.weight", embedding), embedding):
            raise UserError(f"{where}: lm_head.weight is not the token embedding, though config.json ties the two.")
    return state


def to_hf(family: Family, state: Mapping[str, Tensor], n_layers: int, tied: bool) -> dict[str, Tensor]:
    """transformers' tensors by name from the state dict of our model. GPT-2 over there always has biases: those that
    ours lacks are zeros."""
    state, tensors = dict(state), {}
    if family is GPT2:
        for name, tensor in list(state.items()):
            module, _, kind = name.rpartition(".")
            if kind == "weight" and not module.startswith("embed.") and module != "head.proj":
                state.setdefault(f"{module}.bias", torch.zeros(len(tensor)))
    for ours, theirs in family.modules.items():
        if tied and theirs == "lm_head":
            continue
        for i in range(n_layers) if "{i}" in theirs else [0]:
            for kind in ("weight", "bias"):
                parts = [state[name] for part in ours if (name := f"{part.format(i=i)}.{kind}") in state]
                if parts:
                    tensor = torch.cat(parts)
                    flip = kind == "weight" and theirs.endswith(family.transposed)
                    tensors[f"{theirs.format(i=i)}.{kind}"] = (tensor.T if flip else tensor).contiguous()
    return tensors


def fill(model: Transformer, state: Mapping[str, Tensor], where: str) -> None:
    """Load the state dict. Raises UserError that names the first tensor which is missing or of another shape."""
    for name, tensor in model.state_dict().items():
        if name not in state:
            raise UserError(f"{where}: there are no weights for {name}.")
        if state[name].shape != tensor.shape:
            raise UserError(
                f"{where}: the weights for {name} have the shape {tuple(state[name].shape)}; config.json's sizes give "
                f"{tuple(tensor.shape)}."
            )
    unused = set(state) - set(model.state_dict())
    if unused:
        raise UserError(f"{where}: there are weights for {min(unused)}, which config.json's sizes leave out.")
    model.load_state_dict(state)


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
        tokenizer = read_tokenizer(data, eos[0] if isinstance(eos, list) else eos, str(tokenizer_file))
    if tokenizer.eot >= (rows := options["vocab_size"]):
        raise UserError(f"{tokenizer_file}: its ids go up to {tokenizer.eot}, beyond the vocab_size of {rows} in {where}.")
    table = {
        "name": run_dir.name,
        "out_dir": str(run_dir.parent),
        "model": {"name": family.model, **options},
        "tokenizer": {"name": "bpe", "vocab_size": max(361, tokenizer.n_vocab)},  # the run's tokenizer.json is what counts
        "train": {"seq_len": seq_len},
    }
    config, registry = configs.from_dict(table, where)
    model = config.model.build(vocab_size=options["vocab_size"], seq_len=seq_len)
    fill(model, from_hf(family, read_weights(source), model.config.tie_embeddings, str(source)), str(source))
    checkpoint.create_run(run_dir, config, tokenizer)
    info = {"imported_from": str(source), "config": configs.to_dict(config), "plugins": registry.versions()}
    return checkpoint.save(run_dir, 0, model, [], info)


def export_model(run: str | Path, folder: str | Path) -> None:
    """Write a run's latest checkpoint, or the one given, as a new folder for AutoModelForCausalLM and AutoTokenizer.

    Raises UserError.
    """
    folder = Path(folder)
    opened = checkpoint.open_run(run)
    config, tokenizer = opened.model.config, opened.tokenizer
    family = family_for(config, str(run))
    if folder.exists():
        raise UserError(f"{folder}: is there already; choose a new folder.")
    folder.mkdir(parents=True)

    tensors = to_hf(family, opened.model.state_dict(), config.n_layers, config.tie_embeddings)
    safetensors.torch.save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})

    # Special tokens that the embedding has no rows for, which an import can leave, are not exported.
    n_vocab = min(tokenizer.n_vocab, config.vocab_size)
    tokenizer_json = write_tokenizer(tokenizer, n_vocab)
    names = {token["id"]: token["content"] for token in tokenizer_json["added_tokens"]}
    roles = dict(bos=tokenizer.eot, eos=tokenizer.eot, pad=tokenizer.pad)
    ids = {f"{role}_token_id": i for role, i in roles.items() if i in names}
    roles |= dict(cls=tokenizer.cls, sep=tokenizer.sep, mask=tokenizer.mask)
    named = {f"{role}_token": names[i] for role, i in roles.items() if i in names}
    tokenizer_config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **named,
        "additional_special_tokens": [name for name in names.values() if name not in named.values()],
        "model_max_length": config.seq_len,
        "clean_up_tokenization_spaces": False,
    }
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
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{file}: can't be read as JSON ({getattr(error, 'strerror', None) or error}).") from None


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m nanopre.hf", description="Models from and to Hugging Face.")
    commands = parser.add_subparsers(dest="command", required=True)
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
    try:
        main(sys.argv[1:])
    except UserError as error:
        print(f"nanopre.hf: {error}", file=sys.stderr)
        sys.exit(2)
