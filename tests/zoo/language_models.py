"""Language models of transformers, tiny: decoders, mixtures of experts, state spaces, encoders, encoder-decoders."""

from __future__ import annotations

from zoo.entry import Entry, ids, pair

DECODER = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 128,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GPT = {
    "n_embd": 64,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 64,
    "vocab_size": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
EXPERTS = {
    **DECODER,
    "num_experts": 8,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 64,
}
ENCODER = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 128,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}
BART = {
    "d_model": 64,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 128,
    "decoder_ffn_dim": 128,
    "vocab_size": 128,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 2,
    "forced_eos_token_id": 2,
}
T5 = {
    "d_model": 64,
    "d_kv": 16,
    "d_ff": 128,
    "num_layers": 2,
    "num_decoder_layers": 2,
    "num_heads": 4,
    "vocab_size": 128,
    "decoder_start_token_id": 0,
}
DEEPSEEK = {
    **EXPERTS,
    "num_key_value_heads": 4,
    "n_routed_experts": 8,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "n_group": 2,
    "topk_group": 1,
    "kv_lora_rank": 32,
    "q_lora_rank": 32,
    "qk_rope_head_dim": 16,
    "qk_nope_head_dim": 16,
    "v_head_dim": 16,
    "head_dim": 16,
}


def causal(name: str, sizes: dict[str, object] = DECODER, kind: str = "decoder", **options: object) -> Entry:
    """A model with a language head over all tokens."""
    return Entry(name, kind, f"{name}Config", f"{name}ForCausalLM", {**sizes, **options}, ids)


def encoder(name: str, cls: str = "", **options: object) -> Entry:
    """A model over both directions."""
    return Entry(name, "encoder", f"{name}Config", cls or f"{name}ForMaskedLM", {**ENCODER, **options}, ids)


def seq2seq(name: str, cls: str = "", sizes: dict[str, object] = BART, **options: object) -> Entry:
    """An encoder and a decoder."""
    cls = cls or f"{name}ForConditionalGeneration"
    return Entry(name, "encoder-decoder", f"{name}Config", cls, {**sizes, **options}, pair)


DECODERS = [
    causal("Llama"),
    causal("Mistral"),
    causal("Qwen2"),
    causal("Qwen3"),
    causal("Gemma"),
    causal("Gemma2"),
    Entry("Gemma3", "decoder", "Gemma3TextConfig", "Gemma3ForCausalLM", DECODER, ids),
    causal("Phi"),
    causal("Phi3"),
    causal("StableLm"),
    causal("Starcoder2"),
    causal("Cohere"),
    causal("Cohere2"),
    causal("Olmo"),
    causal("Olmo2"),
    causal("Granite"),
    causal("Nemotron"),
    causal("SmolLM3"),
    causal("Glm"),
    causal("Glm4"),
    causal("Exaone4"),
    causal("Helium"),
    causal("Arcee"),
    causal("Ernie4_5"),
    causal("Persimmon"),
    causal("GPTNeoX"),
    causal(
        "Falcon",
        {k: v for k, v in DECODER.items() if k != "head_dim"},
        num_kv_heads=2,
        new_decoder_architecture=True,
    ),
    causal("OPT", ffn_dim=128, word_embed_proj_dim=64),
    Entry("GPT2", "decoder", "GPT2Config", "GPT2LMHeadModel", GPT, ids),
    causal("GPTBigCode", GPT),
    causal("GPTJ", {**GPT, "rotary_dim": 8}),
    causal("CodeGen", {**GPT, "rotary_dim": 8}),
    causal(
        "GPTNeo", {**DECODER, "num_layers": 2, "num_heads": 4, "attention_types": [[["global", "local"], 1]]}
    ),
    causal("Bloom", {"hidden_size": 64, "n_layer": 2, "n_head": 4, "vocab_size": 128}),
    causal("Mpt", {"d_model": 64, "n_layers": 2, "n_heads": 4, "max_seq_len": 64, "vocab_size": 128}),
    causal("XGLM", {"d_model": 64, "num_layers": 2, "attention_heads": 4, "ffn_dim": 128, "vocab_size": 128}),
    causal("BioGpt"),
    Entry("OpenAIGPT", "decoder", "OpenAIGPTConfig", "OpenAIGPTLMHeadModel", GPT, ids),
    Entry("CTRL", "decoder", "CTRLConfig", "CTRLLMHeadModel", {**GPT, "dff": 128}, ids),
]

MIXTURES = [
    causal("Mixtral", EXPERTS, "MoE"),
    causal("Qwen2Moe", EXPERTS, "MoE", shared_expert_intermediate_size=64),
    causal("Qwen3Moe", EXPERTS, "MoE"),
    causal("DeepseekV2", DEEPSEEK, "MoE"),
    causal("DeepseekV3", DEEPSEEK, "MoE"),
    causal("Olmoe", {**EXPERTS, "intermediate_size": 64}, "MoE"),
    causal("Phimoe", EXPERTS, "MoE"),
    causal("GraniteMoe", EXPERTS, "MoE"),
    causal("Glm4Moe", DEEPSEEK, "MoE"),
    causal("GptOss", EXPERTS, "MoE", layer_types=["sliding_attention", "full_attention"]),
    causal("MiniMax", EXPERTS, "MoE"),
    causal("Ernie4_5_Moe", EXPERTS, "MoE", moe_num_experts=8, moe_k=2, moe_layer_start_index=1),
    Entry("Llama4", "MoE", "Llama4TextConfig", "Llama4ForCausalLM", {**EXPERTS, "intermediate_size_mlp": 128}, ids),
    Entry("SwitchTransformers", "MoE", "SwitchTransformersConfig", "SwitchTransformersForConditionalGeneration", {
        **T5, "num_experts": 4, "num_sparse_encoder_layers": 1, "num_sparse_decoder_layers": 1,
    }, pair),
]  # fmt: skip

STATES = [
    causal("Mamba", {"hidden_size": 64, "num_hidden_layers": 2, "vocab_size": 128, "state_size": 8}, "state space"),
    causal("Mamba2", {
        "hidden_size": 64, "num_hidden_layers": 2, "vocab_size": 128, "state_size": 16, "num_heads": 8, "head_dim": 16,
        "n_groups": 1,
    }, "state space"),
    causal("FalconMamba", {"hidden_size": 64, "num_hidden_layers": 2, "vocab_size": 128, "state_size": 8},
           "state space"),
    causal("RecurrentGemma", {**DECODER, "lru_width": 64, "num_hidden_layers": 3}, "state space"),
    causal("Rwkv", {"hidden_size": 64, "num_hidden_layers": 2, "vocab_size": 128, "context_length": 64,
                    "rescale_every": 0}, "state space"),  # rescaling divides weights in a forward
    causal("Jamba", {**EXPERTS, "num_hidden_layers": 4, "attn_layer_period": 4, "attn_layer_offset": 2,
                     "expert_layer_period": 2, "expert_layer_offset": 1, "use_mamba_kernels": False}, "state space"),
    causal("Bamba", {**DECODER, "mamba_n_heads": 8, "mamba_d_head": 16, "mamba_d_state": 16, "attn_layer_indices": [1]},
           "state space"),
    causal("FalconH1", {**DECODER, "mamba_d_ssm": 64, "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 16},
           "state space"),
    causal("Lfm2", {**DECODER, "layer_types": ["conv", "full_attention"]}, "state space"),
    causal("Qwen3Next", {**EXPERTS, "linear_num_value_heads": 4, "linear_num_key_heads": 2, "linear_key_head_dim": 16,
                         "linear_value_head_dim": 16, "shared_expert_intermediate_size": 64,
                         "layer_types": ["linear_attention", "full_attention"]}, "state space"),
]  # fmt: skip

ENCODERS = [
    encoder("Bert"),
    encoder("Roberta"),
    encoder("Electra", embedding_size=32),
    encoder("Albert", embedding_size=32),
    encoder("Deberta", relative_attention=True, pos_att_type=["c2p", "p2c"], max_relative_positions=32),
    encoder("DebertaV2", relative_attention=True, pos_att_type=["c2p", "p2c"], max_relative_positions=32),
    encoder("MPNet"),
    encoder("ModernBert", global_attn_every_n_layers=2),
    encoder("RoFormer", embedding_size=32),
    encoder("ConvBert", embedding_size=32, head_ratio=2, conv_kernel_size=3),
    encoder("SqueezeBert", embedding_size=64),
    encoder("FNet"),
    encoder("Nystromformer", num_landmarks=4, segment_means_seq_len=16),
    encoder("BigBird", attention_type="original_full"),
    encoder("Longformer", attention_window=[4, 4]),
    encoder("XLMRoberta"),
    encoder("Canine", "CanineModel", num_hash_buckets=64, local_transformer_stride=4, type_vocab_size=2),
    Entry("DistilBert", "encoder", "DistilBertConfig", "DistilBertForMaskedLM",
          {"dim": 64, "hidden_dim": 128, "n_layers": 2, "n_heads": 4, "vocab_size": 128}, ids),
    Entry("XLNet", "encoder", "XLNetConfig", "XLNetLMHeadModel",
          {"d_model": 64, "n_layer": 2, "n_head": 4, "d_inner": 128, "vocab_size": 128}, ids),
    Entry("XLM", "encoder", "XLMConfig", "XLMWithLMHeadModel",
          {"emb_dim": 64, "n_layers": 2, "n_heads": 4, "vocab_size": 128, "pad_index": 0}, ids),
    Entry("Funnel", "encoder", "FunnelConfig", "FunnelForMaskedLM",
          {"d_model": 64, "d_inner": 128, "n_head": 4, "d_head": 16, "block_sizes": [1, 1], "vocab_size": 128}, ids),
]  # fmt: skip

SEQ2SEQ = [
    seq2seq("T5", sizes=T5),
    seq2seq("MT5", sizes=T5),
    seq2seq("UMT5", sizes=T5),
    seq2seq("LongT5", sizes={**T5, "local_radius": 4}),
    seq2seq("Bart"),
    seq2seq("MBart"),
    seq2seq("Pegasus"),
    seq2seq("M2M100"),
    seq2seq("Blenderbot"),
    seq2seq("LED", max_encoder_position_embeddings=64, max_decoder_position_embeddings=64, attention_window=4),
    seq2seq("Marian", "MarianMTModel"),
    seq2seq("ProphetNet", sizes={
        "hidden_size": 64, "num_encoder_layers": 2, "num_decoder_layers": 2, "num_encoder_attention_heads": 4,
        "num_decoder_attention_heads": 4, "encoder_ffn_dim": 128, "decoder_ffn_dim": 128, "vocab_size": 128,
        "max_position_embeddings": 64,
    }),
]  # fmt: skip

LANGUAGE = [*DECODERS, *MIXTURES, *STATES, *ENCODERS, *SEQ2SEQ]
