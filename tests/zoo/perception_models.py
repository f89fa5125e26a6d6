"""Models of transformers that see, hear, do both with text, or predict series: tiny."""

from __future__ import annotations

from typing import Any

import torch

from zoo.entry import Entry, Inputs, _tokens, audio, image, normal
from zoo.language_models import BART, DECODER

VIT = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 32,
    "patch_size": 8,
}
SPEECH = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "conv_dim": [32, 32],
    "conv_kernel": [10, 3],
    "conv_stride": [5, 2],
    "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 16,
    "num_conv_pos_embedding_groups": 2,
    "vocab_size": 32,
}
CLIP_TEXT = {**DECODER, "projection_dim": 64}
CLIP_VISION = {**VIT, "projection_dim": 64}


def vision(name: str, cls: str = "", sizes: dict[str, Any] = VIT, **options: Any) -> Entry:
    cls = cls or f"{name}ForImageClassification"
    return Entry(name, "vision", f"{name}Config", cls, {**sizes, **options}, image)


def speech(name: str, cls: str = "", **options: Any) -> Entry:
    return Entry(name, "speech", f"{name}Config", cls or f"{name}ForCTC", {**SPEECH, **options}, audio)


def mel(config: Any) -> Inputs:
    return {"input_features": normal(2, 16, 32), "decoder_input_ids": _tokens(config, 2, 8)}


def frames(config: Any) -> Inputs:
    return {"input_features": normal(2, 32, 16), "decoder_input_ids": _tokens(config, 2, 8)}


def spectrogram(config: Any) -> Inputs:
    return {"input_values": normal(2, 64, 16)}


def wave(config: Any) -> Inputs:
    return {"input_values": normal(2, 1, 1000)}


def text_and_image(config: Any) -> Inputs:
    return {"input_ids": _tokens(config, 1), "pixel_values": normal(2, 3, 32, 32)}


def llava(config: Any) -> Inputs:
    tokens = _tokens(config, 1, 24)
    tokens[:, :16] = config.image_token_id
    return {"input_ids": tokens, "pixel_values": normal(2, 3, 32, 32)}


def qwen_vl(config: Any) -> Inputs:
    tokens = _tokens(config, 1, 24)[:1]
    tokens[:, 4:8] = config.image_token_id
    types = (tokens == config.image_token_id).int()
    grid = torch.tensor([[1, 4, 4]])
    return {
        "input_ids": tokens,
        "pixel_values": normal(16, 3 * 2 * 8 * 8),
        "image_grid_thw": grid,
        "mm_token_type_ids": types,
    }


def series(config: Any) -> Inputs:
    return {"past_values": normal(2, 32, 2)}


def decisions(config: Any) -> Inputs:
    return {
        "states": normal(2, 5, 17),
        "actions": normal(2, 5, 4),
        "rewards": normal(2, 5, 1),
        "returns_to_go": normal(2, 5, 1),
        "timesteps": torch.arange(5).expand(2, 5),
        "attention_mask": torch.ones(2, 5),
    }


STAGES = {"image_size": 32, "hidden_sizes": [32, 64], "depths": [1, 1]}

VISION = [
    vision("ViT"),
    vision("DeiT"),
    vision("Beit", use_relative_position_bias=True),
    vision("Dinov2"),
    vision("ViTMSN"),
    vision("IJepa"),
    vision("Swin", sizes={"image_size": 32, "patch_size": 4, "embed_dim": 32, "depths": [1, 1], "num_heads": [2, 4],
                          "window_size": 4}),
    vision("Swinv2", sizes={"image_size": 32, "patch_size": 4, "embed_dim": 32, "depths": [1, 1], "num_heads": [2, 4],
                            "window_size": 4}),
    vision("ConvNext", sizes={**STAGES, "num_stages": 2}),
    vision("ConvNextV2", sizes={**STAGES, "num_stages": 2}),
    vision("ResNet", sizes={**STAGES, "embedding_size": 32, "layer_type": "basic"}),
    vision("RegNet", sizes={**STAGES, "embedding_size": 32, "groups_width": 16}),
    vision("Bit", sizes={**STAGES, "embedding_size": 32, "num_groups": 8}),
    vision("PoolFormer", sizes={**STAGES, "num_encoder_blocks": 2, "patch_sizes": [7, 3], "strides": [4, 2],
                                "padding": [2, 1], "mlp_ratio": 2.0}),
    vision("Segformer", num_encoder_blocks=2, depths=[1, 1], sr_ratios=[2, 1], hidden_sizes=[32, 64],
           patch_sizes=[7, 3], strides=[4, 2], num_attention_heads=[1, 2], mlp_ratios=[2, 2], decoder_hidden_size=32),
    vision("Pvt", num_encoder_blocks=2, depths=[1, 1], sequence_reduction_ratios=[2, 1], hidden_sizes=[32, 64],
           patch_sizes=[4, 2], strides=[4, 2], num_attention_heads=[1, 2], mlp_ratios=[2, 2]),
    vision("MobileNetV1", sizes={"image_size": 32, "depth_multiplier": 0.25, "min_depth": 8}),
    vision("MobileNetV2", sizes={"image_size": 32, "depth_multiplier": 0.25, "min_depth": 8}),
    vision("MobileViT", sizes={"image_size": 64, "hidden_sizes": [32, 48, 64], "neck_hidden_sizes": [8, 16, 24, 32, 40,
                               48, 64], "num_attention_heads": 4}),
    vision("Hiera", sizes={"image_size": [32, 32], "patch_size": [3, 3], "patch_stride": [4, 4],
                           "patch_padding": [1, 1], "embed_dim": 32, "depths": [1, 1], "num_heads": [1, 2],
                           "masked_unit_size": [4, 4], "query_stride": [2, 2], "num_query_pool": 1}),
    vision("FocalNet", sizes={"image_size": 32, "patch_size": 4, "embed_dim": 32, "hidden_sizes": [32, 64],
                              "depths": [1, 1], "focal_levels": [2, 2], "focal_windows": [3, 3]}),
    vision("Yolos", "YolosForObjectDetection", num_detection_tokens=4, image_size=[32, 32]),
    vision("DPT", "DPTForDepthEstimation", {**VIT, "num_hidden_layers": 4}, backbone_out_indices=[0, 1, 2, 3],
           neck_hidden_sizes=[16, 16, 32, 32],
           fusion_hidden_size=32, is_hybrid=False, reassemble_factors=[4, 2, 1, 0.5]),
    vision("ViTMAE", "ViTMAEModel", decoder_hidden_size=32,
           decoder_num_hidden_layers=1, mask_ratio=0.0),
]  # fmt: skip

SPEECHES = [
    Entry("Whisper", "speech", "WhisperConfig", "WhisperForConditionalGeneration",
          {**BART, "num_mel_bins": 16, "max_source_positions": 16, "max_target_positions": 32}, mel),
    Entry("Speech2Text", "speech", "Speech2TextConfig", "Speech2TextForConditionalGeneration",
          {**BART, "input_feat_per_channel": 16, "max_source_positions": 64, "max_target_positions": 32,
           "conv_channels": 32, "num_conv_layers": 2}, frames),
    speech("Wav2Vec2"),
    speech("Hubert"),
    speech("WavLM", num_buckets=8, max_bucket_distance=16),
    speech("UniSpeech"),
    speech("UniSpeechSat"),
    speech("SEW", squeeze_factor=2),
    speech("SEWD", squeeze_factor=2, position_buckets=8, max_position_embeddings=16),
    speech("Data2VecAudio", num_conv_pos_embeddings=2, conv_pos_kernel_size=3),
    speech("Wav2Vec2Conformer", position_embeddings_type="relative", conv_depthwise_kernel_size=5),
    Entry("ASTModel", "speech", "ASTConfig", "ASTForAudioClassification",
          {**VIT, "max_length": 64, "num_mel_bins": 16, "frequency_stride": 8, "time_stride": 8}, spectrogram),
    Entry("Encodec", "speech", "EncodecConfig", "EncodecModel",
          {"num_filters": 8, "hidden_size": 32, "codebook_dim": 32, "codebook_size": 64, "upsampling_ratios": [4, 2],
           "target_bandwidths": [24.0]}, wave),
    Entry("Dac", "speech", "DacConfig", "DacModel",
          {"encoder_hidden_size": 8, "downsampling_ratios": [2, 2], "decoder_hidden_size": 32,
           "n_codebooks": 2, "codebook_size": 64, "codebook_dim": 8}, wave),
]  # fmt: skip

MULTIMODAL = [
    Entry("CLIP", "multimodal", "CLIPConfig", "CLIPModel",
          {"text_config": CLIP_TEXT, "vision_config": CLIP_VISION, "projection_dim": 64}, text_and_image),
    Entry("Siglip", "multimodal", "SiglipConfig", "SiglipModel",
          {"text_config": CLIP_TEXT, "vision_config": CLIP_VISION}, text_and_image),
    Entry("AltCLIP", "multimodal", "AltCLIPConfig", "AltCLIPModel",
          {"text_config": {**CLIP_TEXT, "project_dim": 64}, "vision_config": CLIP_VISION, "projection_dim": 64},
          text_and_image),
    Entry("ChineseCLIP", "multimodal", "ChineseCLIPConfig", "ChineseCLIPModel",
          {"text_config": CLIP_TEXT, "vision_config": CLIP_VISION, "projection_dim": 64}, text_and_image),
    Entry("Blip", "multimodal", "BlipConfig", "BlipForConditionalGeneration",
          {"text_config": {**CLIP_TEXT, "encoder_hidden_size": 64}, "vision_config": CLIP_VISION, "projection_dim": 64},
          text_and_image),
    Entry("Git", "multimodal", "GitConfig", "GitForCausalLM",
          {**DECODER, "vision_config": CLIP_VISION}, text_and_image),
    Entry("Vilt", "multimodal", "ViltConfig", "ViltModel", {**VIT, "vocab_size": 128}, text_and_image),
    Entry("Llava", "multimodal", "LlavaConfig", "LlavaForConditionalGeneration",
          {"text_config": {**DECODER, "model_type": "llama"},
           "vision_config": {**CLIP_VISION, "model_type": "clip_vision_model"},
           "image_token_id": 127, "image_seq_length": 16}, llava),
    Entry("PaliGemma", "multimodal", "PaliGemmaConfig", "PaliGemmaForConditionalGeneration",
          {"text_config": {**DECODER, "model_type": "gemma"}, "projection_dim": 64,
           "vision_config": {**VIT, "model_type": "siglip_vision_model", "projection_dim": 64},
           "image_token_id": 127}, llava),
    Entry("Qwen2VL", "multimodal", "Qwen2VLConfig", "Qwen2VLForConditionalGeneration",
          {"text_config": {**DECODER, "rope_parameters": {"rope_type": "default", "mrope_section": [2, 3, 3],
                                                          "rope_theta": 10000.0}},
           "vision_config": {"embed_dim": 32, "hidden_size": 64, "depth": 2, "num_heads": 2, "patch_size": 8,
                             "mlp_ratio": 2}, "image_token_id": 127, "video_token_id": 126,
           "vision_start_token_id": 125, "vision_end_token_id": 124}, qwen_vl),
    Entry("PatchTST", "series", "PatchTSTConfig", "PatchTSTForPrediction",
          {"num_input_channels": 2, "context_length": 32, "patch_length": 8, "patch_stride": 8, "d_model": 64,
           "num_attention_heads": 4, "ffn_dim": 128, "num_hidden_layers": 2, "prediction_length": 8}, series),
    Entry("DecisionTransformer", "series", "DecisionTransformerConfig", "DecisionTransformerModel",
          {"hidden_size": 64, "n_layer": 2, "n_head": 4, "vocab_size": 16, "n_positions": 64}, decisions),
]  # fmt: skip

PERCEPTION = [*VISION, *SPEECHES, *MULTIMODAL]
