"""A judge in this process: tiny models with random weights and a vocabulary of words."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
    Qwen2VLImageProcessorPil,
)

from sfgrpo import processors, rewards
from sfgrpo.rewards import vlm_local
from tests.support.clip import pictures, to_bytes

DIGITS = ["1", "2", "3", "4", "5"]
WORDS = [
    "[PAD]", "[UNK]", "<image>", "yes", "Yes", "no", "NO", "yesterday", "USER", "ASSISTANT", ":",
    "a", "red", "seven", "nine", "show", "?", *DIGITS,
]  # fmt: skip
PROMPTS = ["a red seven", "nine", "a red nine a red nine"]
QUESTION = "show {prompt} ?"
TEMPLATE = (
    "{% for m in messages %}USER : {% for c in m['content'] %}{% if c['type'] == 'image' %}<image> "
    "{% else %}{{ c['text'] }}{% endif %}{% endfor %} {% endfor %}ASSISTANT :"
)
SIDE, PATCH = 16, 8
QWEN_WORDS = [*WORDS, "<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>"]
QWEN_TEMPLATE = TEMPLATE.replace("<image>", "<|vision_start|> <|image_pad|> <|vision_end|>")


def tokenizer_of(words: list[str], special: list[str]) -> PreTrainedTokenizerFast:
    """Of words between spaces."""
    places = {word: place for place, word in enumerate(words)}
    plain = Tokenizer(models.WordLevel(places, unk_token="[UNK]"))
    plain.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=plain, pad_token="[PAD]", unk_token="[UNK]", extra_special_tokens=special
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("llava")
    tokenizer = tokenizer_of(WORDS, ["<image>"])
    size = {"shortest_edge": SIDE}
    images = CLIPImageProcessorPil(size=size, crop_size={"height": SIDE, "width": SIDE})
    LlavaProcessor(
        image_processor=images, tokenizer=tokenizer, patch_size=PATCH, chat_template=TEMPLATE,
        vision_feature_select_strategy="default", num_additional_image_tokens=1,
    ).save_pretrained(path)  # fmt: skip
    torch.manual_seed(0)
    eyes = CLIPVisionConfig(
        hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        image_size=SIDE, patch_size=PATCH, projection_dim=32,
    )  # fmt: skip
    reader = LlamaConfig(
        vocab_size=len(WORDS), hidden_size=32, intermediate_size=32, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=2, pad_token_id=0, bos_token_id=None,
        eos_token_id=None,
    )  # fmt: skip
    settings: dict[str, Any] = {"image_token_id": WORDS.index("<image>")}
    config = LlavaConfig(
        vision_config=eyes, text_config=reader, vision_feature_layer=-1, **settings
    )
    network = LlavaForConditionalGeneration(config)
    for weights in network.parameters():
        torch.nn.init.normal_(weights, std=0.3)
    # Whatever it generates is a digit: one of two logits is far above 0.
    head, one, two = network.lm_head.weight.data, WORDS.index("1"), WORDS.index("2")
    head[one] *= 30
    head[two] = -head[one]
    network.save_pretrained(path)
    return str(path)


def build(folder: str, **options: Any) -> vlm_local.LocalVlm:
    given = {"model": folder, "question": QUESTION, "dtype": "fp32", "device": "cpu", **options}
    return vlm_local.build(**given)


def logits(folder: str, image: Tensor, prompt: str) -> Tensor:
    """Of the first token of the answer to one image alone."""
    processor: Any = AutoProcessor.from_pretrained(folder)
    network: Any = AutoModelForImageTextToText.from_pretrained(folder)
    text = f"USER : <image> show {prompt} ? ASSISTANT :"
    shown = Image.fromarray(to_bytes(image))
    given = processor(text=text, images=shown, return_tensors="pt")
    with torch.no_grad():
        return network(**given).logits[0, -1]


def yes(chances: Tensor) -> float:
    """The reward by the probabilities of all words."""
    for_it, against = (
        sum(float(chances[WORDS.index(word)]) for word in words)
        for words in (("yes", "Yes"), ("no", "NO"))
    )
    return for_it / (for_it + against)


def test_the_probability_of_yes(folder: str) -> None:
    """Prompts of several lengths in one batch, as each of them alone."""
    images = pictures(3)
    expected = []
    for image, prompt in zip(images, PROMPTS, strict=True):
        expected.append(yes(logits(folder, image, prompt).softmax(0)))
    for batch in (3, 2):
        scores = build(folder, batch=batch)(images, PROMPTS, [{}] * 3)
        assert scores.dtype == torch.float32
        assert scores.tolist() == pytest.approx(expected, abs=1e-5)
    assert scores.std() > 1e-3
    assert build(folder)(torch.empty(0, 3, 8, 8), [], []).shape == (0,)


def qwen(family: str, path: Path, reader: Any) -> Any:
    """A model of a family saved with its processor; the model."""
    text = {
        "vocab_size": len(QWEN_WORDS), "hidden_size": 32, "intermediate_size": 32,
        "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 16,
        "pad_token_id": 0, "bos_token_id": None, "eos_token_id": None,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]},
    }  # fmt: skip
    eyes = {
        "depth": 2, "hidden_size": 32, "intermediate_size": 32, "num_heads": 2,
        "out_hidden_size": 32, "patch_size": reader.patch_size, "deepstack_visual_indexes": [0],
        "num_position_embeddings": 16,
    }  # fmt: skip
    if family == "Qwen2VL":
        eyes |= {"embed_dim": 32, "mlp_ratio": 2}
    special = {
        f"{name}_token_id": QWEN_WORDS.index(f"<|{word}|>")
        for name, word in (
            ("image", "image_pad"), ("video", "video_pad"),
            ("vision_start", "vision_start"), ("vision_end", "vision_end"),
        )
    }  # fmt: skip
    config = getattr(transformers, f"{family}Config")(
        text_config=text, vision_config=eyes, **special
    )
    torch.manual_seed(0)
    network = getattr(transformers, f"{family}ForConditionalGeneration")(config).eval()
    for weights in network.parameters():
        torch.nn.init.normal_(weights, std=0.3)
    network.save_pretrained(path)
    tokenizer = tokenizer_of(QWEN_WORDS, QWEN_WORDS[-4:])
    made = processors.OF_IMAGES[f"{family}Processor"](reader, tokenizer, QWEN_TEMPLATE)
    made.save_pretrained(path)
    return network


@pytest.mark.parametrize("family", ["Qwen2VL", "Qwen2_5_VL", "Qwen3VL"])
def test_qwen_s_models_need_no_torchvision(family: str, tmp_path: Path) -> None:
    """Their processors have a part for videos, which transformers does not read without it. As the
    model answers to patches and tokens that are put together by hand."""
    patch = 16 if family == "Qwen3VL" else 14
    reader = Qwen2VLImageProcessorPil(patch_size=patch, min_pixels=1, max_pixels=16 * patch**2)
    network = qwen(family, tmp_path, reader)
    images, expected = pictures(3, 4 * patch, 2 * patch), []
    for image, prompt in zip(images, PROMPTS, strict=True):
        shown: Any = reader(images=[to_bytes(image)], return_tensors="pt")
        assert shown["image_grid_thw"].tolist() == [[1, 4, 2]]
        said = f"USER : <|vision_start|> {'<|image_pad|> ' * 2}<|vision_end|> show {prompt} ? "
        tokens = torch.tensor([[QWEN_WORDS.index(w) for w in f"{said} ASSISTANT :".split()]])
        kinds = (tokens == QWEN_WORDS.index("<|image_pad|>")).int()
        with torch.no_grad():
            given = {"input_ids": tokens, "mm_token_type_ids": kinds, **shown}
            chances = network(**given).logits[0, -1].softmax(0)
        expected.append(yes(chances))
    scores = build(str(tmp_path))(images, PROMPTS, [{}] * 3)
    assert scores.tolist() == pytest.approx(expected, abs=1e-5)
    assert scores.std() > 1e-3


def test_a_score_that_is_written(folder: str) -> None:
    images = pictures(3)
    first = WORDS.index("1")
    expected = [
        1 + int(logits(folder, image, prompt)[first:].argmax())
        for image, prompt in zip(images, PROMPTS, strict=True)
    ]
    options = {"answer": "score", "pattern": "([1-5])", "tokens": 1}
    assert build(folder, **options)(images, PROMPTS, [{}] * 3).tolist() == expected
    with pytest.raises(ValueError, match=r"expected '\(\[1-5\]\)' once in the answer, found it 3"):
        build(folder, **options | {"tokens": 3})(images, PROMPTS, [{}] * 3)
    with pytest.raises(ValueError, match="once in the answer, found it 0 times"):
        build(folder, answer="score", tokens=1)(images, PROMPTS, [{}] * 3)


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        ("Good.\nFinal Score: 4.25", 4.25),
        ("Final Score:3", 3),
        ("Final Score: 7", None),
        ("Final Score: 2 or Final Score: 3", None),
        ("", None),
    ],
)
def test_unified_reward_s_answers(folder: str, said: str, expected: float | None) -> None:
    reward = build(folder, answer="score", question=None)
    if expected is None:
        with pytest.raises(ValueError, match="once in the answer"):
            reward._read(said)
    else:
        assert reward._read(said) == expected


def test_it_is_a_reward_of_the_recipe(folder: str) -> None:
    options = {"model": folder, "question": QUESTION}
    mixture = rewards.load({"vlm_local": 1}, {"vlm_local": options})
    images = pictures(2)
    total, _ = mixture(images.requires_grad_(), PROMPTS[:2], [{}] * 2)
    assert not total.requires_grad
    torch.testing.assert_close(
        total, build(folder)(images, PROMPTS[:2], [{}] * 2), atol=0.05, rtol=0
    )  # bf16


def test_a_question_may_show_metadata(folder: str) -> None:
    """As the reward vlm's: with the prompt there, it is the question of the prompt."""
    shown = build(folder, question=QUESTION.replace("{prompt}", "{metadata.of}"))
    images = pictures(2)
    found = shown(images, ["", ""], [{"of": prompt} for prompt in PROMPTS[:2]])
    torch.testing.assert_close(found, build(folder)(images, PROMPTS[:2], [{}] * 2))
    with pytest.raises(KeyError, match="has no metadata 'of'"):
        shown.check(["a"], [{}])


def test_what_is_edited_is_shown_before_what_was_made(folder: str, tmp_path: Path) -> None:
    """As the model answers when it is given both images in that order."""
    image, source = pictures(2)
    Image.fromarray(to_bytes(source)).save(tmp_path / "source.png")
    entry = {"image": str(tmp_path / "source.png")}
    reward = build(folder, sources=True)
    reward.check(PROMPTS[:1], [entry])
    processor: Any = AutoProcessor.from_pretrained(folder)
    network: Any = AutoModelForImageTextToText.from_pretrained(folder)
    given = processor(
        text=f"USER : <image> <image> show {PROMPTS[0]} ? ASSISTANT :", return_tensors="pt",
        images=[Image.fromarray(to_bytes(shown)) for shown in (source, image)],
    )  # fmt: skip
    with torch.no_grad():
        chances = network(**given).logits[0, -1].softmax(0)
    score = reward(image[None], PROMPTS[:1], [entry]).item()
    assert score == pytest.approx(yes(chances), abs=1e-5)
    with pytest.raises(KeyError, match="no metadata 'image'"):
        reward.check(["a"], [{}])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"answer": "maybe"}, r"answer must be one of \['yes', 'score'\], got 'maybe'"),
        ({"question": "Is it good?"}, r"question shows neither \{prompt\} nor \{metadata.KEY\}"),
        ({"pattern": "("}, "reward 'vlm_local': pattern: "),
        ({"pattern": "5"}, "needs a pattern with one group"),
        ({"tokens": 0}, "tokens of at least 1"),
        ({"batch": 0}, "batch must be at least 1"),
    ],
)
def test_values_that_make_no_sense_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        vlm_local.build(model="/nowhere", **options)
