"""Tiny detectors with random weights that are sure of what they see."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import (
    Mask2FormerConfig,
    Mask2FormerForUniversalSegmentation,
    Mask2FormerImageProcessorPil,
    SwinConfig,
    YolosConfig,
    YolosForObjectDetection,
    YolosImageProcessorPil,
)

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
