"""Published models: their networks have the published sizes, and their pipelines can be built."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from sfgrpo.backbones import hidream
from sfgrpo.backbones.hunyuanvideo15 import WholeTexts
from sfgrpo.backbones.lumina2 import WholeCaptions
from sfgrpo.doctor import footprint, published

CLIP_L, CLIP_G = (123_650_304, 123.65e6), (694_659_840, 694.66e6)
T5, UMT5 = (4_762_310_656, 4.762e9), (5_680_910_336, 5.68e9)
QWEN3_4B, QWEN3_8B = (4_022_468_096, 4.02e9), (8_190_735_360, 8.19e9)
KL, KL_WAN, KL_FLUX2 = (83_819_683, 83.8e6), (126_892_531, 127e6), (84_046_115, 84.0e6)
WAN_14B, WAN_14B_I2V = (14_288_491_584, 14.29e9), (14_288_901_184, 14.29e9)
Z_IMAGE = (6_154_908_736, 6.15e9)
SD3 = {"vae": KL, "text_encoder": CLIP_L, "text_encoder_2": CLIP_G, "text_encoder_3": T5}
FLUX = {
    "transformer": (11_901_408_320, 11.90e9), "vae": KL,
    "text_encoder": (123_060_480, 123.06e6), "text_encoder_2": T5,
}  # fmt: skip
QWEN_IMAGE = {
    "transformer": (20_430_401_088, 20.43e9), "vae": KL_WAN,
    "text_encoder": (8_292_166_656, 8.29e9),
}  # fmt: skip
COUNTS = {
    "Alpha-VLLM/Lumina-Image-2.0": {
        "transformer": (2_609_769_152, 2.61e9), "vae": KL, "text_encoder": (2_614_341_888, 2.61e9),
    },
    "Efficient-Large-Model/SANA-Video_2B_480p_diffusers": {
        "transformer": (2_056_862_144, 2.06e9), "vae": KL_WAN,
        "text_encoder": (2_614_341_888, 2.61e9),
    },
    "Efficient-Large-Model/Sana_1600M_1024px_BF16_diffusers": {
        "transformer": (1_604_462_752, 1.604e9), "vae": (312_250_275, 312.3e6),
        "text_encoder": (2_614_341_888, 2.61e9),
    },
    "HiDream-ai/HiDream-I1-Full": {  # 17 billion
        "transformer": (17_105_733_184, 17.1e9), **SD3,
        "text_encoder": (123_781_632, 123.65e6 + 768 * (248 - 77)),  # of more places
        "text_encoder_2": (694_840_320, 694.66e6 + 1280 * (218 - 77)),
        "text_encoder_4": (8_030_261_248, 8.03e9),
    },
    "Lightricks/LTX-2": {  # all but the text encoder: a file of 43.3 GB, in bfloat16
        "transformer": (18_876_174_592, 18.88e9), "vae": (1_222_479_601, 1.22e9),
        "audio_vae": (53_248_146, 53.2e6), "vocoder": (55_592_802, 55.6e6),
        "connectors": (1_431_475_200, 1.43e9), "text_encoder": (12_187_325_040, 12_187_325_040),
    },
    "Lightricks/LTX-Video": {
        "transformer": (1_923_385_472, 1.92e9), "vae": (419_193_649, 419.2e6), "text_encoder": T5,
    },
    "Qwen/Qwen-Image": QWEN_IMAGE,
    "Qwen/Qwen-Image-Edit": QWEN_IMAGE,
    "Qwen/Qwen-Image-Edit-2509": QWEN_IMAGE,
    "Qwen/Qwen-Image-Edit-2511": QWEN_IMAGE,
    "THUDM/CogView4-6B": {
        "transformer": (6_369_118_272, 6.37e9), "vae": (406_100_643, 406.1e6),
        "text_encoder": (8_779_194_368, 9_399_951_360 - 4096 * 151_552),  # without its head
    },
    "Tongyi-MAI/Z-Image": {"transformer": Z_IMAGE, "vae": KL, "text_encoder": QWEN3_4B},
    "Tongyi-MAI/Z-Image-Turbo": {"transformer": Z_IMAGE, "vae": KL, "text_encoder": QWEN3_4B},
    "Wan-AI/Wan2.1-T2V-1.3B-Diffusers": {
        "transformer": (1_418_996_800, 1.42e9), "vae": KL_WAN, "text_encoder": UMT5,
    },
    "Wan-AI/Wan2.1-T2V-14B-Diffusers": {
        "transformer": WAN_14B, "vae": KL_WAN, "text_encoder": UMT5,
    },
    "Wan-AI/Wan2.2-I2V-A14B-Diffusers": {
        "transformer": WAN_14B_I2V, "transformer_2": WAN_14B_I2V, "vae": KL_WAN,
        "text_encoder": UMT5,
    },
    "Wan-AI/Wan2.2-T2V-A14B-Diffusers": {
        "transformer": WAN_14B, "transformer_2": WAN_14B, "vae": KL_WAN, "text_encoder": UMT5,
    },
    "Wan-AI/Wan2.2-TI2V-5B-Diffusers": {
        "transformer": (4_999_787_712, 5.0e9), "vae": (704_688_668, 704.7e6), "text_encoder": UMT5,
    },
    "black-forest-labs/FLUX.1-Kontext-dev": FLUX,
    "black-forest-labs/FLUX.1-dev": FLUX,
    "black-forest-labs/FLUX.2-dev": {
        "transformer": (32_223_281_152, 32.2e9), "vae": KL_FLUX2,
        "text_encoder": (24_011_361_280, 24.01e9),
    },
    "black-forest-labs/FLUX.2-klein-4B": {
        "transformer": (3_875_544_576, 3.88e9), "vae": KL_FLUX2, "text_encoder": QWEN3_4B,
    },
    "black-forest-labs/FLUX.2-klein-9B": {
        "transformer": (9_078_581_248, 9.08e9), "vae": KL_FLUX2, "text_encoder": QWEN3_8B,
    },
    "fal/AuraFlow-v0.3": {  # 6.8 billion to its publisher, cut and not rounded
        "transformer": (6_858_605_568, 6.86e9), "vae": (83_653_863, 83.65e6),
        "text_encoder": (1_223_550_976, 1.22e9),
    },
    "hunyuanvideo-community/HunyuanImage-2.1-Diffusers": {  # 17 billion, cut and not rounded
        "transformer": (17_425_795_520, 17.4e9), "vae": (405_575_491, 405.6e6),
        "text_encoder": (8_292_166_656, 8.29e9), "text_encoder_2": (219_314_944, 219.3e6),
    },
    "hunyuanvideo-community/HunyuanVideo": {
        "transformer": (12_821_012_544, 12.8e9), "vae": (246_478_803, 246.5e6),
        "text_encoder": (7_505_186_816, 7.5e9), "text_encoder_2": (123_060_480, 123.06e6),
    },
    "hunyuanvideo-community/HunyuanVideo-1.5-Diffusers-480p_t2v": {
        "transformer": (8_326_608_160, 8.3e9), "vae": (1_260_634_115, 1.26e9),
        "text_encoder": (7_070_619_136, 7.07e9), "text_encoder_2": (219_314_944, 219.3e6),
    },
    "krea/Krea-2-Raw": {  # 12 billion to its publisher
        "transformer": (12_820_073_036, 12.82e9), "vae": KL_WAN,
        "text_encoder": (4_437_815_808, 4.44e9),
    },
    "lodestones/Chroma1-HD": {
        "transformer": (8_899_983_424, 8.9e9), "vae": KL, "text_encoder": T5,
    },
    "stabilityai/stable-diffusion-3.5-large": {"transformer": (8_056_627_520, 8.06e9), **SD3},
    "stabilityai/stable-diffusion-3.5-medium": {"transformer": (2_243_171_520, 2.24e9), **SD3},
}  # fmt: skip
"""Parameters of what is built, and the figure published with the weights."""

LAYERS = re.compile(r"n(um)?_([a-z]+_)?layers")
"""What configurations call their numbers of blocks."""


def found(model_id: str) -> published.Published:
    model = published.find(model_id)
    assert model
    return model


def test_an_id_is_found_exactly() -> None:
    assert published.names() == sorted(COUNTS)
    assert all(known.id == name and known.sources for name in COUNTS if (known := found(name)))
    for other in ("", "embedded", "Qwen/Qwen-Imag", "qwen/qwen-image", "Qwen--Qwen-Image"):
        assert published.find(other) is None


@pytest.fixture(scope="module")
def built() -> dict[str, Any]:
    """Parts of pipelines by their configurations, which models share; they are counted alone."""
    return {}


@pytest.mark.parametrize("model_id", COUNTS)
def test_the_pipeline_has_networks_of_the_published_sizes(
    model_id: str, built: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    build = published.Component.build

    def once(component: published.Component) -> Any:
        key = json.dumps([component.library, component.kind, component.config])
        if key not in built:
            built[key] = build(component)
        return built[key]

    monkeypatch.setattr(published.Component, "build", once)
    model = found(model_id)
    pipeline = model.build(torch.bfloat16)
    assert type(pipeline).__name__ == model.pipeline
    assert {name: pipeline.config[name] for name in model.pipeline_config} == model.pipeline_config
    parts = {name: getattr(pipeline, name) for name in model.components}
    assert {n: type(p).__name__ for n, p in parts.items()} == {
        name: component.kind for name, component in model.components.items()
    }
    networks = {name: part for name, part in parts.items() if isinstance(part, nn.Module)}
    assert networks.keys() == COUNTS[model_id].keys()
    for name, network in networks.items():
        exact, figure = COUNTS[model_id][name]
        assert sum(p.numel() for p in network.parameters()) == exact
        assert exact == pytest.approx(figure, rel=0.005)
        held = [*network.parameters(), *network.buffers()]
        assert {tensor.device.type for tensor in held} == {"meta"}


def transformers() -> list[tuple[str, str]]:
    """(model, component) of every transformer; of those that have the same sizes, the first."""
    distinct = {}
    for model_id in COUNTS:
        for name, component in found(model_id).components.items():
            if name.startswith("transformer"):
                sizes = {k: v for k, v in component.config.items() if not isinstance(v, bool)}
                key = component.kind, json.dumps(sizes)
                distinct.setdefault(key, (model_id, name))
    return list(distinct.values())


@pytest.mark.slow
@pytest.mark.parametrize(("model_id", "name"), transformers())
def test_the_transformer_runs(model_id: str, name: str) -> None:
    """Two of its blocks of every kind: the others are the same, and take as long."""
    model = found(model_id)
    component = model.components[name]
    few = {k: min(v, 2) if LAYERS.fullmatch(k) else v for k, v in component.config.items()}
    if "llama_layers" in few:  # one for each block
        few["llama_layers"] = few["llama_layers"][:4]
    alone = replace(model, components={name: replace(component, config=few)})
    latent, result = run(alone.networks(torch.bfloat16)[name])
    assert result.shape == latent.shape
    assert result.dtype == torch.bfloat16


def test_what_loading_keeps_in_fp32() -> None:
    """As `from_pretrained` does: Wan's norms in any dtype, T5's outputs in fp16 alone."""
    for dtype in (torch.bfloat16, torch.float16):
        networks = found("Wan-AI/Wan2.1-T2V-1.3B-Diffusers").networks(dtype)
        kinds = {
            name.split(".", 2)[-1]: p.dtype
            for n in networks.values()
            for name, p in n.named_parameters()
        }
        assert kinds["norm2.weight"] == torch.float32
        assert kinds["attn1.to_q.weight"] == dtype
        wide = torch.float32 if dtype == torch.float16 else dtype
        assert kinds["0.layer.1.DenseReluDense.wo.weight"] == wide


def rand(*shape: int) -> Tensor:
    return torch.rand(*shape, dtype=torch.bfloat16)


def run(network: nn.Module) -> tuple[Tensor, Tensor]:
    """A small latent, and what the network makes of it: shapes alone are computed."""
    made: Any = network
    if type(network).__name__ == "Lumina2Transformer2DModel":  # asks tensors, the fake ones, too
        made.rope_embedder = WholeCaptions(made.rope_embedder)
        with torch.device("meta"), torch.no_grad():
            x, t, mask = rand(2, 16, 16, 16), torch.rand(2), torch.ones(2, 7)
            return x, made(x, t, rand(2, 7, 2304), mask, return_dict=False)[0]
    kind, c = type(network).__name__, made.config
    if kind in ("HunyuanVideo15Transformer3DModel", "HunyuanImageTransformer2DModel"):  # these, too
        with torch.device("meta"), torch.no_grad():
            given: dict[str, Tensor] = {"timestep": rand(2)}
            for name, width in (("", 3584), ("_2", 1472)):
                given[f"encoder_hidden_states{name}"] = rand(2, 7, width)
                given[f"encoder_attention_mask{name}"] = torch.ones(2, 7)
            x = rand(2, 64, 16, 16)
            if kind == "HunyuanVideo15Transformer3DModel":
                x, given["image_embeds"] = rand(2, 65, 2, 16, 16), rand(2, 5, 1152)
            (v,) = WholeTexts(network)(hidden_states=x, **given, return_dict=False)
            return x[:, : c.out_channels], v
    if kind == "HiDreamImageTransformer2DModel":
        with torch.device("meta"), torch.no_grad():
            x, *more = rand(2, 16, 16, 16), torch.rand(2), rand(2, 7, 4096), rand(32, 2, 7, 4096)
            return x, hidream.trainable(network)(x, *more, rand(2, 2048), return_dict=False)[0]
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    footprint.fake(mode, [network])
    plain = {"return_dict": False}
    with mode, torch.no_grad():
        t, text = torch.rand(2), rand(2, 7, getattr(c, "joint_attention_dim", 4096))
        tokens = rand(2, 64, c.in_channels)
        match kind:
            case "SD3Transformer2DModel":
                x = rand(2, 16, 16, 16)
                return x, made(x, text, rand(2, 2048), t, **plain)[0]
            case "ChromaTransformer2DModel":
                ids, mask = (torch.zeros(64, 3), torch.zeros(7, 3)), torch.ones(2, 71)
                return tokens, made(tokens, text, t, *ids, mask, **plain)[0]
            case "FluxTransformer2DModel":
                ids = torch.zeros(64, 3), torch.zeros(7, 3)
                return tokens, made(tokens, text, rand(2, 768), t, *ids, t, **plain)[0]
            case "Flux2Transformer2DModel":
                ids = torch.zeros(64, 4), torch.zeros(7, 4)
                guidance = t if c.guidance_embeds else None
                return tokens, made(tokens, text, t, *ids, guidance, **plain)[0]
            case "QwenImageTransformer2DModel":
                mask, shapes = torch.ones(2, 7), [[(1, 8, 8)]] * 2
                return tokens, made(tokens, text, mask, t, shapes, **plain)[0]
            case "Krea2Transformer2DModel":
                text, ids = rand(2, 7, c.num_text_layers, c.text_hidden_dim), torch.zeros(71, 3)
                return tokens, made(tokens, text, t, ids, **plain)[0]
            case "HunyuanVideoTransformer3DModel":
                x, mask = rand(2, 16, 2, 16, 16), torch.ones(2, 7)
                return x, made(x, t, text, mask, rand(2, 768), t, **plain)[0]
            case "WanTransformer3DModel":
                x = rand(2, c.in_channels, 2, 16, 16)
                return x[:, : c.out_channels], made(x, t, text, **plain)[0]
            case "CogView4Transformer2DModel":
                x, size = rand(2, 16, 16, 16), rand(2, 2)
                return x, made(x, text, t, size, size, size, **plain)[0]
            case "AuraFlowTransformer2DModel":
                x = rand(2, 4, 16, 16)
                return x, made(x, text, t, **plain)[0]
            case "SanaTransformer2DModel":
                x = rand(2, 32, 16, 16)
                return x, made(x, rand(2, 7, c.caption_channels), t, **plain)[0]
            case "LTXVideoTransformer3DModel":
                text, size = rand(2, 7, c.caption_channels), (1, 8, 8)
                return tokens, made(tokens, text, t, torch.ones(2, 7), *size, **plain)[0]
            case "SanaVideoTransformer3DModel":
                x = rand(2, 16, 2, 16, 16)
                return x, made(x, rand(2, 7, c.caption_channels), t, **plain)[0]
            case "LTX2VideoTransformer3DModel":
                sound, text = rand(2, 9, c.audio_in_channels), rand(2, 7, c.caption_channels)
                size = {"num_frames": 1, "height": 8, "width": 8, "audio_num_frames": 9}
                return tokens, made(tokens, sound, text, text, t, sigma=t, **size, **plain)[0]
            case "ZImageTransformer2DModel":
                x, text = rand(2, 16, 1, 16, 16), rand(2, 7, 2560)
                return x, torch.stack(made([*x], t, [*text], **plain)[0])
            case _:
                raise AssertionError(f"no call is written down for a {kind}")
