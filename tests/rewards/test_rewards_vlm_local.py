"""A judge in this process: a tiny LLaVA with random weights and a vocabulary of words."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
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
)

from sfgrpo import rewards
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


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("llava")
    words = {word: place for place, word in enumerate(WORDS)}
    plain = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    plain.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=plain, pad_token="[PAD]", unk_token="[UNK]",
        extra_special_tokens=["<image>"],
    )  # fmt: skip
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


def test_the_probability_of_yes(folder: str) -> None:
    """Prompts of several lengths in one batch, as each of them alone."""
    images = pictures(3)
    expected = []
    for image, prompt in zip(images, PROMPTS, strict=True):
        chances = logits(folder, image, prompt).softmax(0)
        yes, no = (
            sum(chances[WORDS.index(w)] for w in ws) for ws in (("yes", "Yes"), ("no", "NO"))
        )
        expected.append(float(yes / (yes + no)))
    for batch in (3, 2):
        scores = build(folder, batch=batch)(images, PROMPTS, [{}] * 3)
        assert scores.dtype == torch.float32
        assert scores.tolist() == pytest.approx(expected, abs=1e-5)
    assert scores.std() > 1e-3
    assert build(folder)(torch.empty(0, 3, 8, 8), [], []).shape == (0,)


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
    yes, no = (sum(chances[WORDS.index(w)] for w in ws) for ws in (("yes", "Yes"), ("no", "NO")))
    assert reward(image[None], PROMPTS[:1], [entry]).item() == pytest.approx(
        float(yes / (yes + no)), abs=1e-5
    )
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
