"""Tiny detectors with random weights that are sure of what they see."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import (
    BertTokenizer,
    CLIPTokenizer,
    GroundingDinoConfig,
    GroundingDinoForObjectDetection,
    GroundingDinoImageProcessorPil,
    GroundingDinoProcessor,
    Mask2FormerConfig,
    Mask2FormerForUniversalSegmentation,
    Mask2FormerImageProcessorPil,
    Owlv2Config,
    Owlv2ForObjectDetection,
    Owlv2ImageProcessorPil,
    Owlv2Processor,
    SwinConfig,
    YolosConfig,
    YolosForObjectDetection,
    YolosImageProcessorPil,
)
from transformers.convert_slow_tokenizer import bytes_to_unicode

NAMES = {0: "cup", 1: "dog", 2: "mouse"}
"""Their classes."""


def decide(classifier: Any, std: float) -> None:
    """Let each query be sure of a class that is one: random weights are sure of nothing."""
    torch.nn.init.normal_(classifier.weight, std=std)
    torch.nn.init.zeros_(classifier.bias)
    classifier.bias.data[-1] = -9


def masks(path: Path) -> str:
    """A tiny Mask2Former in a folder."""
    torch.manual_seed(0)
    swin: dict[str, Any] = {
        "embed_dim": 8, "depths": [1, 1, 1, 1], "num_heads": [1, 1, 1, 1], "window_size": 3,
        "image_size": 64, "out_features": ["stage1", "stage2", "stage3", "stage4"],
    }  # fmt: skip
    config = Mask2FormerConfig(
        backbone_config=SwinConfig(**swin), feature_size=32, mask_feature_size=32, hidden_dim=32,
        encoder_feedforward_dim=32, dim_feedforward=32, encoder_layers=1, decoder_layers=2,
        num_attention_heads=2, num_queries=5, id2label=NAMES,
    )  # fmt: skip
    network = Mask2FormerForUniversalSegmentation(config)
    decide(network.class_predictor, std=1)
    network.save_pretrained(path)
    size = {"shortest_edge": 384, "longest_edge": 384}
    Mask2FormerImageProcessorPil(size=size, size_divisor=32).save_pretrained(path)
    return str(path)


def boxes(path: Path) -> str:
    """A tiny YOLOS in a folder."""
    torch.manual_seed(0)
    config = YolosConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
        image_size=[32, 32], patch_size=8, num_detection_tokens=6, id2label=NAMES,
    )  # fmt: skip
    network = YolosForObjectDetection(config)
    decide(network.class_labels_classifier.layers[-1], std=30)
    network.save_pretrained(path)
    size = {"shortest_edge": 32, "longest_edge": 64}
    YolosImageProcessorPil(size=size).save_pretrained(path)
    return str(path)


def owl(path: Path) -> str:
    """A tiny OWLv2 in a folder, with a tokeniser of the bytes of words."""
    text = {
        "vocab_size": 600, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2,
        "num_attention_heads": 2, "max_position_embeddings": 32, "bos_token_id": 512,
        "eos_token_id": 513,
    }  # fmt: skip
    eyes = {
        "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "patch_size": 16,
        "num_attention_heads": 2, "image_size": 64,
    }  # fmt: skip
    config = Owlv2Config(text_config=text, vision_config=eyes, projection_dim=32)
    network = Owlv2ForObjectDetection(config)
    torch.manual_seed(4)
    for name, weights in network.named_parameters():
        torch.nn.init.normal_(weights, std=3 if "text" in name else 0.4)
    torch.nn.init.normal_(network.class_head.logit_scale.weight, std=2)
    network.save_pretrained(path)
    units = [*bytes_to_unicode().values()]
    vocab = {unit: place for place, unit in enumerate([*units, *(f"{u}</w>" for u in units)])}
    vocab |= {"<|startoftext|>": len(vocab), "<|endoftext|>": len(vocab) + 1}
    tokenizer = CLIPTokenizer(vocab=vocab, merges=[], model_max_length=32)
    reader = Owlv2ImageProcessorPil(size={"height": 64, "width": 64})
    Owlv2Processor(reader, tokenizer).save_pretrained(path)
    return str(path)


def dino(path: Path) -> str:
    """A tiny Grounding DINO in a folder, whose special tokens have BERT's numbers."""
    torch.manual_seed(0)
    words = [f"[unused{n}]" for n in range(1040)]
    words[0], words[100:103] = "[PAD]", ["[UNK]", "[CLS]", "[SEP]"]
    words[1012], words[1029], words[1030:1036] = ".", "?", ["red", "cup", "dog", "mo", "##use", "a"]
    swin: dict[str, Any] = {
        "embed_dim": 8, "depths": [1, 1, 1, 1], "num_heads": [1, 1, 1, 1], "window_size": 3,
        "image_size": 64, "out_features": ["stage2", "stage3", "stage4"],
    }  # fmt: skip
    bert: dict[str, Any] = {
        "model_type": "bert", "vocab_size": len(words), "hidden_size": 32, "num_hidden_layers": 1,
        "num_attention_heads": 2, "intermediate_size": 32, "max_position_embeddings": 64,
    }  # fmt: skip
    config = GroundingDinoConfig(
        backbone_config=SwinConfig(**swin), text_config=bert, d_model=32, encoder_layers=1,
        encoder_ffn_dim=32, encoder_attention_heads=2, decoder_layers=2, decoder_ffn_dim=32,
        decoder_attention_heads=2, num_queries=6, max_text_len=32, encoder_n_points=2,
        decoder_n_points=2,
    )  # fmt: skip
    network = GroundingDinoForObjectDetection(config)
    for name, weights in network.named_parameters():
        if "text_backbone" in name and weights.ndim > 1:
            torch.nn.init.normal_(weights, std=1)
    network.save_pretrained(path)
    vocab = {word: place for place, word in enumerate(words)}
    reader = GroundingDinoImageProcessorPil(size={"shortest_edge": 64, "longest_edge": 96})
    GroundingDinoProcessor(reader, BertTokenizer(vocab=vocab)).save_pretrained(path)
    return str(path)
