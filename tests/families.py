"""Tiny models of many families, with random weights, and inputs for each. Nothing is downloaded."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import transformers as t

V = 99
SMALL = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, vocab_size=V)
IDS = dict(pad_token_id=0, bos_token_id=1, eos_token_id=2)
GROUPED = dict(SMALL, num_key_value_heads=2)
SHORT = dict(max_position_embeddings=256)
VISION = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, image_size=16, patch_size=4)
SEQ2SEQ = dict(
    d_model=32, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4, decoder_attention_heads=4,
    encoder_ffn_dim=64, decoder_ffn_dim=64, vocab_size=V,
)  # fmt: skip


@dataclass(frozen=True)
class Family:
    name: str
    build: Callable[[], Any]
    kind: str  # decoder, encoder, seq2seq, speech, vision, dual, vlm
    stacks: tuple[str, ...]

    def model(self) -> Any:
        torch.manual_seed(0)
        return self.build().eval()


def inputs(kind: str, rows: int = 2, length: int = 24, seed: int = 1) -> dict[str, Any]:
    g = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, V - 4, (rows, length), generator=g)
    pixels = torch.randn(rows, 3, 16, 16, generator=g)
    if kind in ("decoder", "vlm"):
        return {"input_ids": ids}
    if kind == "encoder":
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if kind == "seq2seq":
        return {"input_ids": ids, "decoder_input_ids": ids[:, :10].flip(1)}
    if kind == "speech":
        return {"input_features": torch.randn(rows, 8, 40, generator=g), "decoder_input_ids": ids[:, :10]}
    if kind == "vision":
        return {"pixel_values": pixels}
    return {"input_ids": ids, "pixel_values": pixels}


def outputs(model: Any, given: dict[str, Any]) -> torch.Tensor:
    with torch.no_grad():
        result = model(**given)
    for name in ("logits", "last_hidden_state", "logits_per_text"):
        if getattr(result, name, None) is not None:
            return getattr(result, name)
    raise AssertionError(f"no output of {type(model).__name__} to compare")


def _qwen2_vl() -> Any:
    text = dict(GROUPED, **SHORT, rope_scaling={"type": "mrope", "mrope_section": [1, 1, 2]}, bos_token_id=1, eos_token_id=2)
    vision = dict(depth=2, embed_dim=32, hidden_size=32, num_heads=4, patch_size=4, spatial_merge_size=2, temporal_patch_size=2)
    tokens = dict(image_token_id=97, video_token_id=96, vision_start_token_id=95, vision_end_token_id=94)
    return t.Qwen2VLForConditionalGeneration(t.Qwen2VLConfig(text_config=text, vision_config=vision, **tokens))


def _llava() -> Any:
    config = t.LlavaConfig(
        vision_config=t.CLIPVisionConfig(**VISION),
        text_config=t.LlamaConfig(**GROUPED, **IDS),
        image_token_index=98,
        image_seq_length=16,
    )
    return t.LlavaForConditionalGeneration(config)


def _clip() -> Any:
    return t.CLIPModel(
        t.CLIPConfig(text_config=dict(SMALL, max_position_embeddings=64, **IDS), vision_config=VISION, projection_dim=16)
    )


def _siglip() -> Any:
    return t.SiglipModel(t.SiglipConfig(text_config=dict(SMALL, max_position_embeddings=64, **IDS), vision_config=VISION))


def _deepseek() -> Any:
    mla = dict(kv_lora_rank=16, q_lora_rank=16, qk_rope_head_dim=8, qk_nope_head_dim=8, v_head_dim=8)
    experts = dict(
        n_routed_experts=4, n_group=1, topk_group=1, num_experts_per_tok=2, moe_intermediate_size=16, first_k_dense_replace=2
    )
    return t.DeepseekV3ForCausalLM(t.DeepseekV3Config(**dict(SMALL, num_key_value_heads=4), **mla, **experts, **IDS))


def _modernbert() -> Any:
    config = t.ModernBertConfig(
        **SMALL, pad_token_id=0, cls_token_id=1, sep_token_id=2, bos_token_id=1, eos_token_id=2, local_attention=8
    )
    return t.ModernBertForMaskedLM(config)


DECODER = ("decoder",)
ALL = [
    Family("llama", lambda: t.LlamaForCausalLM(t.LlamaConfig(**GROUPED, **IDS)), "decoder", DECODER),
    Family("qwen2", lambda: t.Qwen2ForCausalLM(t.Qwen2Config(**GROUPED, **IDS)), "decoder", DECODER),
    Family("qwen3", lambda: t.Qwen3ForCausalLM(t.Qwen3Config(**GROUPED, head_dim=8, **IDS)), "decoder", DECODER),
    Family("mistral", lambda: t.MistralForCausalLM(t.MistralConfig(**GROUPED, sliding_window=8, **IDS)), "decoder", DECODER),
    Family("mixtral", lambda: t.MixtralForCausalLM(t.MixtralConfig(**GROUPED, num_local_experts=2, **IDS)), "decoder", DECODER),
    Family(
        "gemma",
        lambda: t.GemmaForCausalLM(t.GemmaConfig(**dict(GROUPED, num_key_value_heads=1), head_dim=8, **IDS)),
        "decoder",
        DECODER,
    ),
    Family(
        "gemma2", lambda: t.Gemma2ForCausalLM(t.Gemma2Config(**GROUPED, head_dim=8, sliding_window=8, **IDS)), "decoder", DECODER
    ),
    Family(
        "gemma3",
        lambda: t.Gemma3ForCausalLM(t.Gemma3TextConfig(**GROUPED, head_dim=8, sliding_window=8, **IDS)),
        "decoder",
        DECODER,
    ),
    Family(
        "gpt_oss",
        lambda: t.GptOssForCausalLM(
            t.GptOssConfig(**GROUPED, head_dim=8, sliding_window=8, num_local_experts=2, num_experts_per_tok=1, **IDS)
        ),
        "decoder",
        DECODER,
    ),
    Family(
        "gpt2",
        lambda: t.GPT2LMHeadModel(t.GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=V, n_positions=256, **IDS)),
        "decoder",
        DECODER,
    ),
    Family("gpt_neox", lambda: t.GPTNeoXForCausalLM(t.GPTNeoXConfig(**SMALL, **SHORT, **IDS)), "decoder", DECODER),
    Family("phi", lambda: t.PhiForCausalLM(t.PhiConfig(**SMALL, **SHORT, **IDS)), "decoder", DECODER),
    Family("phi3", lambda: t.Phi3ForCausalLM(t.Phi3Config(**GROUPED, **IDS)), "decoder", DECODER),
    Family(
        "opt",
        lambda: t.OPTForCausalLM(
            t.OPTConfig(
                hidden_size=32,
                ffn_dim=64,
                num_hidden_layers=2,
                num_attention_heads=4,
                vocab_size=V,
                word_embed_proj_dim=32,
                **SHORT,
                **IDS,
            )
        ),
        "decoder",
        DECODER,
    ),
    Family("olmo2", lambda: t.Olmo2ForCausalLM(t.Olmo2Config(**SMALL, **IDS)), "decoder", DECODER),
    Family("starcoder2", lambda: t.Starcoder2ForCausalLM(t.Starcoder2Config(**GROUPED, **IDS)), "decoder", DECODER),
    Family("cohere", lambda: t.CohereForCausalLM(t.CohereConfig(**SMALL, **IDS)), "decoder", DECODER),
    Family("deepseek_v3", _deepseek, "decoder", DECODER),
    Family("bert", lambda: t.BertForMaskedLM(t.BertConfig(**SMALL, **SHORT)), "encoder", ("encoder",)),
    Family("roberta", lambda: t.RobertaForMaskedLM(t.RobertaConfig(**SMALL, **SHORT)), "encoder", ("encoder",)),
    Family("modernbert", _modernbert, "encoder", ("encoder",)),
    Family("electra", lambda: t.ElectraForMaskedLM(t.ElectraConfig(**SMALL, embedding_size=32)), "encoder", ("encoder",)),
    Family(
        "distilbert",
        lambda: t.DistilBertForMaskedLM(t.DistilBertConfig(dim=32, hidden_dim=64, n_layers=2, n_heads=4, vocab_size=V)),
        "encoder",
        ("encoder",),
    ),
    Family(
        "t5",
        lambda: t.T5ForConditionalGeneration(
            t.T5Config(d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, vocab_size=V, decoder_start_token_id=0)
        ),
        "seq2seq",
        ("encoder", "decoder", "cross"),
    ),
    Family(
        "bart", lambda: t.BartForConditionalGeneration(t.BartConfig(**SEQ2SEQ, **SHORT)), "seq2seq", ("encoder", "decoder", "cross")
    ),
    Family(
        "whisper",
        lambda: t.WhisperForConditionalGeneration(
            t.WhisperConfig(
                **SEQ2SEQ, num_mel_bins=8, max_source_positions=20, max_target_positions=64, decoder_start_token_id=1, **IDS
            )
        ),
        "speech",
        ("encoder", "decoder", "cross"),
    ),
    Family("vit", lambda: t.ViTForImageClassification(t.ViTConfig(**VISION)), "vision", ("vision",)),
    Family("dinov2", lambda: t.Dinov2Model(t.Dinov2Config(**VISION)), "vision", ("vision",)),
    Family("clip", _clip, "dual", ("text", "vision")),
    Family("siglip", _siglip, "dual", ("text", "vision")),
    Family("llava", _llava, "vlm", ("vision", "decoder")),
    Family("qwen2_vl", _qwen2_vl, "vlm", ("vision", "decoder")),
]
DECODERS = [family for family in ALL if family.kind == "decoder"]
UNSUPPORTED = {
    "FalconForCausalLM": lambda: t.FalconForCausalLM(t.FalconConfig(**SMALL)),
    "BloomForCausalLM": lambda: t.BloomForCausalLM(t.BloomConfig(hidden_size=32, n_layer=2, n_head=4, vocab_size=V)),
    "DebertaV2ForMaskedLM": lambda: t.DebertaV2ForMaskedLM(t.DebertaV2Config(**SMALL)),
    "MambaForCausalLM": lambda: t.MambaForCausalLM(t.MambaConfig(hidden_size=32, num_hidden_layers=2, vocab_size=V)),
}
