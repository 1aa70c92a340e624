"""Model families of Hugging Face transformers in terms of ours: which option, which weight is which over there."""

from __future__ import annotations

from dataclasses import dataclass, field, replace


@dataclass(frozen=True)
class Family:
    """One architecture of transformers in terms of ours. A further family is a further table."""

    kind: str  # the model_type of config.json
    model: str  # our model family's name in the config
    architecture: str  # transformers' class
    settings: dict[str, object]  # of our ModelConfig, where the family leaves no choice
    options: dict[str, tuple[str, ...]]  # our option: its keys in config.json; the first that is there counts
    seq_len: str  # the key in config.json of the longest sequence
    defaults: dict[str, object]  # what an option is whose keys config.json may lack or set to null
    fixed: dict[str, tuple]  # key: the values that mean what nanopre computes; the first is also what its absence means
    # Ours: theirs. Several of ours are stacked along the outputs in one of theirs. {i} counts the blocks of a decoder or
    # an encoder, {j} those of an encoder-decoder's decoder, which ours counts on from the encoder's {last}.
    modules: dict[tuple[str, ...], str]
    prefix: str  # what a checkpoint of the model without its head leaves out of the names
    dropout: tuple[str, ...]  # keys of config.json that an export sets
    implied: dict[str, object] = field(default_factory=dict)  # our options that the architecture itself settles
    values: dict[str, dict[str, str]] = field(default_factory=dict)  # our option: {their word for a value: ours}
    transposed: tuple[str, ...] = ()  # ends of the names of modules that hold a matrix as (in, out)
    ignored: str = r"(?!)"  # pattern of the names of buffers and copies that some versions saved
    aliases: dict[str, str] = field(default_factory=dict)  # pattern in a name that some versions saved: what it is now
    optional: str = r"(?!)"  # pattern of our names of weights that only some objectives or some checkpoints have


GPT2 = Family(
    kind="gpt2",
    model="gpt2",
    architecture="GPT2LMHeadModel",
    settings={"positions": "learned", "norm": "layernorm", "activation": "gelu_tanh"},
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
    kind="llama",
    model="llama",
    architecture="LlamaForCausalLM",
    settings={"positions": "rope", "norm": "rmsnorm", "activation": "swiglu", "bias": False},
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
    kind="qwen3",
    architecture="Qwen3ForCausalLM",
    settings=LLAMA.settings | {"qk_norm": True},
    implied={"qk_norm": True},
    fixed=LLAMA.fixed | {"use_sliding_window": (False,)},
    modules=LLAMA.modules
    | {
        ("blocks.{i}.attn.q_norm",): "model.layers.{i}.self_attn.q_norm",
        ("blocks.{i}.attn.k_norm",): "model.layers.{i}.self_attn.k_norm",
    },
)

BERT = Family(
    kind="bert",
    model="bert",
    architecture="BertForPreTraining",
    settings={
        "architecture": "encoder",
        "positions": "learned",
        "norm": "layernorm",
        "post_norm": True,
        "embedding_norm": True,
        "n_segments": 2,
        "transform": True,
        "activation": "gelu",
        "bias": True,
        "tie_embeddings": True,
    },
    options={
        "vocab_size": ("vocab_size",),
        "d_model": ("hidden_size",),
        "n_layers": ("num_hidden_layers",),
        "n_heads": ("num_attention_heads",),
        "d_ff": ("intermediate_size",),
        "norm_eps": ("layer_norm_eps",),
    },
    seq_len="max_position_embeddings",
    defaults={"norm_eps": 1e-12},
    fixed={
        "hidden_act": ("gelu",),
        "type_vocab_size": (2,),
        "position_embedding_type": ("absolute",),
        "is_decoder": (False,),
        "add_cross_attention": (False,),
        "tie_word_embeddings": (True,),
        "quantization_config": (None,),
    },
    modules={
        ("embed.tokens",): "bert.embeddings.word_embeddings",
        ("embed.positions",): "bert.embeddings.position_embeddings",
        ("embed.segments",): "bert.embeddings.token_type_embeddings",
        ("embed.norm",): "bert.embeddings.LayerNorm",
        ("blocks.{i}.attn.q",): "bert.encoder.layer.{i}.attention.self.query",
        ("blocks.{i}.attn.k",): "bert.encoder.layer.{i}.attention.self.key",
        ("blocks.{i}.attn.v",): "bert.encoder.layer.{i}.attention.self.value",
        ("blocks.{i}.attn.out",): "bert.encoder.layer.{i}.attention.output.dense",
        ("blocks.{i}.attn_norm",): "bert.encoder.layer.{i}.attention.output.LayerNorm",
        ("blocks.{i}.mlp.up",): "bert.encoder.layer.{i}.intermediate.dense",
        ("blocks.{i}.mlp.down",): "bert.encoder.layer.{i}.output.dense",
        ("blocks.{i}.mlp_norm",): "bert.encoder.layer.{i}.output.LayerNorm",
        ("head.pooler",): "bert.pooler.dense",
        ("head.dense",): "cls.predictions.transform.dense",
        ("head.dense_norm",): "cls.predictions.transform.LayerNorm",
        ("head.proj",): "cls.predictions",  # its bias; the weight is the token embedding
        ("head.outputs.nsp",): "cls.seq_relationship",
    },
    prefix="bert.",
    dropout=("hidden_dropout_prob", "attention_probs_dropout_prob"),
    ignored=r"embeddings\.position_ids$",
    aliases={
        r"^cls\.predictions\.decoder\.": "cls.predictions.",
        r"LayerNorm\.gamma$": "LayerNorm.weight",  # Google's names, in the first checkpoints
        r"LayerNorm\.beta$": "LayerNorm.bias",
    },
    optional=r"head\.",
)
BERT_WITHOUT_PAIRS = replace(BERT, architecture="BertForMaskedLM")
BERT_CLASSIFIER = replace(
    BERT, architecture="BertForSequenceClassification", modules=BERT.modules | {("head.outputs.label",): "classifier"}
)
BERT_READER = replace(
    BERT, architecture="BertForQuestionAnswering", modules=BERT.modules | {("head.outputs.span",): "qa_outputs"}
)
BERT_BY_HEAD = {("nsp", "pooler"): BERT, ("label", "pooler"): BERT_CLASSIFIER, ("span",): BERT_READER}
"""By what our head has beside the projection to the vocabulary, for an export."""

T5 = Family(
    kind="t5",
    model="t5",
    architecture="T5ForConditionalGeneration",
    settings={
        "architecture": "encoder-decoder",
        "positions": "relative",
        "norm": "rmsnorm",
        "bias": False,
        "scale_attention": False,
    },
    options={
        "vocab_size": ("vocab_size",),
        "d_model": ("d_model",),
        "n_layers": ("num_layers",),
        "n_decoder_layers": ("num_decoder_layers",),
        "n_heads": ("num_heads",),
        "d_head": ("d_kv",),
        "d_ff": ("d_ff",),
        "activation": ("feed_forward_proj",),
        # Version 1.0 ties and scales, 1.1 does neither. Since version 5 transformers' own files say "tied" of both.
        "tie_embeddings": ("scale_decoder_outputs", "tie_word_embeddings"),
        "relative_buckets": ("relative_attention_num_buckets",),
        "relative_distance": ("relative_attention_max_distance",),
        "norm_eps": ("layer_norm_epsilon",),
    },
    seq_len="n_positions",  # the model has no limit; this is what it was trained on
    defaults={
        "n_decoder_layers": 0,
        "activation": "relu",
        "tie_embeddings": True,
        "relative_buckets": 32,
        "relative_distance": 128,
        "norm_eps": 1e-6,
        "seq_len": 512,
    },
    values={"activation": {"relu": "relu"}},
    fixed={"is_encoder_decoder": (True,), "quantization_config": (None,)},
    modules={
        ("embed.tokens",): "shared",
        ("relative.bias",): "encoder.block.0.layer.0.SelfAttention.relative_attention_bias",
        ("relative.decoder_bias",): "decoder.block.0.layer.0.SelfAttention.relative_attention_bias",
        ("blocks.{i}.attn_norm",): "encoder.block.{i}.layer.0.layer_norm",
        ("blocks.{i}.attn.q",): "encoder.block.{i}.layer.0.SelfAttention.q",
        ("blocks.{i}.attn.k",): "encoder.block.{i}.layer.0.SelfAttention.k",
        ("blocks.{i}.attn.v",): "encoder.block.{i}.layer.0.SelfAttention.v",
        ("blocks.{i}.attn.out",): "encoder.block.{i}.layer.0.SelfAttention.o",
        ("blocks.{i}.mlp_norm",): "encoder.block.{i}.layer.1.layer_norm",
        ("blocks.{last}.out_norm",): "encoder.final_layer_norm",
        ("blocks.{j}.attn_norm",): "decoder.block.{j}.layer.0.layer_norm",
        ("blocks.{j}.attn.q",): "decoder.block.{j}.layer.0.SelfAttention.q",
        ("blocks.{j}.attn.k",): "decoder.block.{j}.layer.0.SelfAttention.k",
        ("blocks.{j}.attn.v",): "decoder.block.{j}.layer.0.SelfAttention.v",
        ("blocks.{j}.attn.out",): "decoder.block.{j}.layer.0.SelfAttention.o",
        ("blocks.{j}.cross_norm",): "decoder.block.{j}.layer.1.layer_norm",
        ("blocks.{j}.cross.q",): "decoder.block.{j}.layer.1.EncDecAttention.q",
        ("blocks.{j}.cross.k",): "decoder.block.{j}.layer.1.EncDecAttention.k",
        ("blocks.{j}.cross.v",): "decoder.block.{j}.layer.1.EncDecAttention.v",
        ("blocks.{j}.cross.out",): "decoder.block.{j}.layer.1.EncDecAttention.o",
        ("blocks.{j}.mlp_norm",): "decoder.block.{j}.layer.2.layer_norm",
        ("head.norm",): "decoder.final_layer_norm",
        ("head.proj",): "lm_head",
        ("blocks.{i}.mlp.up",): "encoder.block.{i}.layer.1.DenseReluDense.wi",
        ("blocks.{i}.mlp.down",): "encoder.block.{i}.layer.1.DenseReluDense.wo",
        ("blocks.{j}.mlp.up",): "decoder.block.{j}.layer.2.DenseReluDense.wi",
        ("blocks.{j}.mlp.down",): "decoder.block.{j}.layer.2.DenseReluDense.wo",
    },
    prefix="",
    dropout=("dropout_rate",),
    # Copies of the token embedding, and a table that nothing reads.
    ignored=r"^(en|de)coder\.embed_tokens\.weight$|EncDecAttention\.relative_attention_bias\.weight$",
)
T5_GATED = replace(  # version 1.1
    T5,
    values={"activation": {"gated-gelu": "geglu_tanh"}},
    modules=T5.modules
    | {
        ("blocks.{i}.mlp.gate",): "encoder.block.{i}.layer.1.DenseReluDense.wi_0",
        ("blocks.{i}.mlp.up",): "encoder.block.{i}.layer.1.DenseReluDense.wi_1",
        ("blocks.{j}.mlp.gate",): "decoder.block.{j}.layer.2.DenseReluDense.wi_0",
        ("blocks.{j}.mlp.up",): "decoder.block.{j}.layer.2.DenseReluDense.wi_1",
    },
)

FAMILIES = {family.kind: family for family in (GPT2, LLAMA, QWEN3, BERT, T5)}
"""By the `model_type` of config.json."""

OBJECTIVES = {"gpt2": "clm", "llama": "clm", "qwen3": "clm", "bert": "mlm_nsp", "t5": "span_corruption"}
"""What a model of each kind was trained by, for the config of an imported run."""
