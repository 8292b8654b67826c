"""Tiny configs of every described family with its quirks switched on: data for tests/export/onnx/test_families.py.

Windows are shorter than the prompt, heads are odd sizes, biases are stored, heads tied and untied, key heads 1 and all.
"""

from __future__ import annotations

from typing import Any

BASE = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 96,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 24, "rope_theta": 10000.0}
LONGROPE = {
    "rope_type": "longrope",
    "short_factor": [1.0, 1.1, 1.3, 1.4, 1.5, 1.7],
    "long_factor": [1.0, 2.0, 3.0, 4.5, 6.0, 8.0],
    "rope_theta": 10000.0,
}
TURNS = ["sliding_attention", "full_attention"]
WINDOW = {"sliding_window": 7, "layer_types": TURNS}
GPT = {"vocab_size": 96, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 96}
BLOOM = {"vocab_size": 96, "hidden_size": 64, "n_layer": 2}
ROUTED = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}


def _of(model_type: str, *parts: dict[str, Any], **changes: Any) -> tuple[str, dict[str, Any]]:
    values: dict[str, Any] = {}
    for part in parts or (BASE,):
        values |= part
    return model_type, values | changes


ZOO: dict[str, tuple[str, dict[str, Any]]] = {
    "llama-dynamic": _of("llama", BASE, max_position_embeddings=20,
                         rope_parameters={"rope_type": "dynamic", "factor": 3.0, "rope_theta": 10000.0}),
    "llama-yarn": _of("llama", BASE, head_dim=24, rope_parameters=YARN, attention_bias=True),
    "llama-linear-padded-vocab": _of("llama", BASE, vocab_size=128, num_key_value_heads=1,
                                     rope_parameters={"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}),
    "ministral": _of("ministral", BASE, WINDOW, head_dim=16),
    "seed_oss": _of("seed_oss", BASE, head_dim=16, attention_bias=True, attention_out_bias=True, mlp_bias=True),
    "internlm3": _of("internlm3", BASE, head_dim=16, attention_bias=True, mlp_bias=True),
    "gemma": _of("gemma", BASE, head_dim=24, num_key_value_heads=1),
    "gemma2": _of("gemma2", BASE, WINDOW, head_dim=16, query_pre_attn_scalar=24, attn_logit_softcapping=4.0,
                  final_logit_softcapping=3.0, attention_bias=True),
    "gemma3_text": _of("gemma3_text", BASE, WINDOW, head_dim=16, query_pre_attn_scalar=24, rope_parameters={
        "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
        "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6}}),
    "phi": _of("phi", BASE, num_key_value_heads=4, qk_layernorm=True,
               rope_parameters={"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}),
    "phi-tied": _of("phi", BASE, tie_word_embeddings=True),
    "phi3": _of("phi3", BASE, sliding_window=9),
    "phi4-mini": _of("phi3", BASE, tie_word_embeddings=True, original_max_position_embeddings=30, rope_parameters={
        **LONGROPE, "partial_rotary_factor": 0.75}),
    "smollm3": _of("smollm3", BASE, no_rope_layers=[1, 0], tie_word_embeddings=True),
    "granite": _of("granite", BASE, embedding_multiplier=6.0, logits_scaling=4.0, residual_multiplier=0.3,
                   attention_multiplier=0.1, attention_bias=True, mlp_bias=True, tie_word_embeddings=True),
    "olmo": _of("olmo", BASE, clip_qkv=0.9),
    "olmo2": _of("olmo2", BASE, attention_bias=True),
    "olmo3": _of("olmo3", BASE, WINDOW, rope_parameters={
        "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
        "full_attention": {**YARN, "truncate": False}}),
    "cohere": _of("cohere", BASE, use_qk_norm=True, logit_scale=0.4, attention_bias=True),
    "cohere2": _of("cohere2", BASE, WINDOW, head_dim=16, logit_scale=0.4),
    "glm": _of("glm", BASE, head_dim=24, attention_bias=True),
    "glm4": _of("glm4", BASE, head_dim=16, attention_bias=True),
    "helium": _of("helium", BASE, head_dim=16),
    "ernie4_5": _of("ernie4_5", BASE, head_dim=16, use_bias=True),
    "gpt_neox": _of("gpt_neox", BASE),
    "gpt_neox-in-turn": _of("gpt_neox", BASE, use_parallel_residual=False, tie_word_embeddings=True,
                            rope_parameters={"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 1.0}),
    "gpt2": _of("gpt2", GPT, n_inner=80),
    "gpt2-unscaled": _of("gpt2", GPT, scale_attn_weights=False, tie_word_embeddings=False),
    "gpt_bigcode": _of("gpt_bigcode", GPT),
    "gpt_bigcode-all-heads": _of("gpt_bigcode", GPT, multi_query=False),
    "gptj": _of("gptj", GPT, rotary_dim=8),
    "gpt_neo": _of("gpt_neo", {"vocab_size": 96, "hidden_size": 64, "num_layers": 2, "num_heads": 4, "window_size": 6,
                               "max_position_embeddings": 96, "attention_types": [[["global", "local"], 1]]}),
    "starcoder2": _of("starcoder2", BASE, sliding_window=8),
    "stablelm": _of("stablelm", BASE, use_qkv_bias=True, qk_layernorm=True),
    "stablelm-parallel": _of("stablelm", BASE, use_parallel_residual=True),
    "nemotron": _of("nemotron", BASE, head_dim=16, attention_bias=True, mlp_bias=True),
    "arcee": _of("arcee", BASE, head_dim=16, mlp_bias=True),
    "exaone4": _of("exaone4", BASE, WINDOW),
    "hunyuan_v1_dense": _of("hunyuan_v1_dense", BASE, head_dim=16),
    "hunyuan-alpha": _of("hunyuan_v1_dense", BASE, head_dim=16, max_position_embeddings=24,
                         rope_parameters={"rope_type": "dynamic", "alpha": 50.0, "factor": 1.0, "rope_theta": 1e4}),
    "bloom": _of("bloom", BLOOM, n_head=4),
    "bloom-odd-heads": _of("bloom", BLOOM, hidden_size=48, n_head=6),
    "mpt": _of("mpt", {"vocab_size": 96, "d_model": 64, "n_layers": 2, "n_heads": 4, "max_seq_len": 96,
                       "attn_config": {"clip_qkv": 1.0, "softmax_scale": 0.3, "alibi_bias_max": 16}}),
    "mpt-odd-heads": _of("mpt", {"vocab_size": 96, "d_model": 48, "n_layers": 2, "n_heads": 6, "max_seq_len": 96}),
    "falcon-7b": _of("falcon", {**BASE, "num_kv_heads": 1}, multi_query=True, bias=True),
    "falcon-40b": _of("falcon", BASE, new_decoder_architecture=True, num_kv_heads=2),
    "falcon-11b": _of("falcon", BASE, new_decoder_architecture=True, num_kv_heads=2, num_ln_in_parallel_attn=1),
    "falcon-in-turn": _of("falcon", BASE, multi_query=False, parallel_attn=False, bias=True),
    "mixtral": _of("mixtral", BASE, num_local_experts=4, num_experts_per_tok=2, sliding_window=7),
    "qwen2_moe": _of("qwen2_moe", BASE, ROUTED, shared_expert_intermediate_size=40, decoder_sparse_step=2),
    "qwen3_moe": _of("qwen3_moe", BASE, ROUTED, head_dim=16, norm_topk_prob=True, mlp_only_layers=[0]),
    "olmoe": _of("olmoe", BASE, num_experts=5, num_experts_per_tok=3),
    "granitemoe": _of("granitemoe", BASE, num_local_experts=4, num_experts_per_tok=2, embedding_multiplier=6.0,
                      logits_scaling=4.0, residual_multiplier=0.3, attention_multiplier=0.1),
    "phimoe": _of("phimoe", BASE, num_local_experts=4, lm_head_bias=True, attention_bias=True),
    "phimoe-longrope": _of("phimoe", BASE, num_local_experts=4, sliding_window=9, rope_parameters={
        **LONGROPE, "short_factor": [1.0, 1.1, 1.2, 1.3, 1.5, 1.7, 1.8, 2.0], "long_factor": [2.0] * 8,
        "original_max_position_embeddings": 60, "short_mscale": 1.2, "long_mscale": 1.2}),
    "gpt_oss": _of("gpt_oss", BASE, num_local_experts=4, num_experts_per_tok=2, head_dim=16, sliding_window=7,
                   swiglu_limit=1.5, rope_parameters={**YARN, "truncate": False}),
    "glm4_moe": _of("glm4_moe", BASE, moe_intermediate_size=32, n_routed_experts=4, num_experts_per_tok=2, head_dim=16,
                    routed_scaling_factor=1.8, first_k_dense_replace=1, use_qk_norm=True),
}  # fmt: skip
