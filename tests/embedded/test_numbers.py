"""The second embedded task, numbers of three digits: what it does not share with the first."""

from __future__ import annotations

import pytest
import torch

from sfgrpo import backbones, config, prompts
from sfgrpo.backbones import sd3
from sfgrpo.embedded import architecture, autoencoder, data, judges, pretrain, task
from sfgrpo.embedded.evaluate import evaluate, evaluation_prompts
from sfgrpo.embedded.task import DIGIT, NUMBER


def sampled(count: int, split: slice = data.PRETRAINING_DIGITS, seed: int = 0) -> data.Batch:
    generator = torch.Generator().manual_seed(seed)
    return data.sample(count, split=split, generator=generator, task=NUMBER)


def test_tasks_are_found_by_the_names_that_recipes_use() -> None:
    assert {name: task.find(name).folder / "model" for name in task.TASKS} == backbones.EMBEDDED
    for name in task.TASKS:
        assert name in prompts.BUILTIN
        assert config.load(name).model.path == config.load(name).prompts == name
    with pytest.raises(ValueError, match="unknown task 'letters'; there are: embedded, numbers"):
        task.find("letters")


def test_prompts_are_every_number_once_in_every_pair_of_colours() -> None:
    records = data.prompts(NUMBER)
    assert [entry["text"] for entry in records] == [f"{number:03d}" for number in range(1000)]
    drawn = {(entry["foreground"], entry["background"]) for entry in records}
    assert drawn == set(data.colour_pairs())
    assert data.record("472", "red", "dark blue", NUMBER)["prompt"] == "472 in red on dark blue"
    written = (NUMBER.folder / "prompts.jsonl").read_text(encoding="utf-8")
    assert written == data.as_jsonl(records)


def test_every_numeral_and_word_of_a_caption_is_one_token() -> None:
    tokenizer = architecture.build_tokenizer(NUMBER)
    for entry in data.prompts(NUMBER):
        tokens = [token.removesuffix("</w>") for token in tokenizer.tokenize(entry["prompt"])]
        assert tokens == [*entry["text"], *entry["prompt"].split()[1:]]
        assert len(tokens) + 2 <= architecture.MAX_TOKENS


def test_digits_stand_in_their_cells() -> None:
    batch = sampled(200)
    assert batch.images.shape == (200, 3, 32, 64)
    assert ["".join(map(str, row)) for row in batch.labels.reshape(200, 3).tolist()] == [
        entry["text"] for entry in batch.records
    ]
    masks, _ = data.digits(data.PRETRAINING_DIGITS)
    ink = data.enlarge(masks[:600], torch.Generator().manual_seed(0), NUMBER)
    across = ink.mean((0, 1, 2))
    thirds = [range(21), range(21, 43), range(43, 64)]
    places = [
        float((across[list(c)] * torch.tensor(c)).sum() / across[list(c)].sum()) for c in thirds
    ]
    assert places == pytest.approx([64 / 6 - 0.5, 31.5, 64 * 5 / 6 - 0.5], abs=0.6)


def test_judges_read_every_digit() -> None:
    batch = sampled(240)
    texts = [entry["text"] for entry in batch.records]
    assert judges.classifier_accuracy(batch.images, texts, NUMBER) > 0.75  # measured: 0.83 on 600
    wrong = [f"{text[:2]}{(int(text[2]) + 1) % 10}" for text in texts]
    assert judges.classifier_accuracy(batch.images, wrong, NUMBER) < 0.05
    real = judges.distance_to_real(batch.images, NUMBER)
    assert judges.distance_to_real(batch.images[:80].repeat(3, 1, 1, 1), NUMBER) > real
    noise = torch.rand(240, 3, 32, 64, generator=torch.Generator().manual_seed(0))
    assert judges.distance_to_real(noise, NUMBER) > 20 * real


def test_reading_is_the_share_that_ocr_reads_letter_by_letter() -> None:
    batch = sampled(80)
    images = batch.images.unflatten(0, (40, 2))[:, :1].expand(-1, 2, -1, -1, -1)
    asked = [{"text": entry["text"]} for entry in batch.records[::2]]
    share = judges.reading(images, asked)["read_as_asked"]
    assert share > 0.75  # measured: 0.91 on 300
    halved = [*asked[:20], *({"text": entry["text"] + "1"} for entry in asked[20:])]
    first = judges.reading(images[:20], asked[:20])["read_as_asked"]
    assert judges.reading(images, halved)["read_as_asked"] == pytest.approx(first / 2)


def test_pretraining_starts_from_the_model_of_single_digits() -> None:
    pipeline = architecture.build_pipeline(0, NUMBER)
    before = pipeline.text_encoder_2.get_input_embeddings().weight.detach().clone()
    places = pipeline.transformer.pos_embed.pos_embed.clone()
    pretrain.adopt(pipeline, DIGIT)
    source = sd3.load("embedded", max_sequence_length=0).pipeline
    adopted = pipeline.transformer.state_dict()
    for name, weight in source.transformer.state_dict().items():
        if name != "pos_embed.pos_embed":
            torch.testing.assert_close(adopted[name], weight, atol=0, rtol=0)
    torch.testing.assert_close(adopted["pos_embed.pos_embed"], places, atol=0, rtol=0)
    old, new = source.tokenizer.get_vocab(), pipeline.tokenizer.get_vocab()
    rows = source.text_encoder_2.get_input_embeddings().weight
    tokens = pipeline.text_encoder_2.get_input_embeddings().weight
    for here, there in (("7</w>", "seven</w>"), ("red</w>", "red</w>")):
        torch.testing.assert_close(tokens[new[here]], rows[old[there]], atol=0, rtol=0)
    torch.testing.assert_close(tokens[new["in</w>"]], before[new["in</w>"]], atol=0, rtol=0)
    batch = sampled(8)
    latents = autoencoder.encode_images(pipeline.vae, batch.images)
    decoded = pipeline.vae.decode(latents, return_dict=False)[0] / 2 + 0.5
    assert (decoded - batch.images).abs().mean() < 0.05  # measured: 0.034 on 64


def test_evaluation_asks_for_each_digit_and_no_number_twice() -> None:
    texts = [entry["text"] for entry in evaluation_prompts(24, NUMBER)]
    assert len(set(texts)) == 240
    assert [text[0] for text in texts] == [str(digit) for digit in range(10) for _ in range(24)]


def test_shipped_model_starts_half_right() -> None:
    """It leaves reinforcement learning something to do, and something to begin with."""
    scores = evaluate(sd3.load("numbers", max_sequence_length=0), task=NUMBER, per_digit=12)
    assert 0.3 < scores["right"] < 0.65
    assert scores["colour"] > 0.8
    assert scores["classifier"] > 0.25
    assert sum(p.stat().st_size for p in NUMBER.folder.rglob("*") if p.is_file()) <= 10e6
