"""Recipes: what is valid comes through, what is not is named."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from sfgrpo import config, prompts


def test_every_recipe_of_the_package_is_valid_and_survives_a_round_trip(tmp_path: Path) -> None:
    assert "embedded" in config.recipe_names()
    for name in config.recipe_names():
        recipe = config.load(name)
        path = tmp_path / f"{name}.yaml"
        path.write_text(yaml.safe_dump(recipe.model_dump(mode="json")))
        assert config.load(str(path)) == recipe


def test_overrides_are_read_as_yaml() -> None:
    recipe = config.load(
        "embedded",
        [("train.learning_rate", "1e-4"), ("lora", "null"), ("reward", "{colour: 1}")],
    )
    assert recipe.train.learning_rate == 1e-4
    assert recipe.lora is None
    assert recipe.reward == {"colour": 1.0}


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("train.learning_rat", "1", "train.learning_rat: unknown key .* 'learning_rate'"),
        ("sampel.eta", "1", "sampel: unknown key 'sampel'; did you mean 'sample'"),
        ("lora.rnk", "1", "lora.rnk: unknown key 'rnk'; did you mean 'rank'"),
        ("sample.sampler", "dimm", "sample.sampler: .* did you mean 'ddim'"),
        ("sample.sampler", "ode", "no policy to train"),
        ("train.kl", "gausian", "train.kl: unknown value 'gausian'; did you mean 'gaussian'"),
        ("credit.rule", "stepwize", "credit.rule: .* did you mean 'stepwise'"),
        ("train.learning_rate", "-3", "greater than 0 .got -3"),
        ("run.output_dir", "''", "run.output_dir: .*expected a folder, got ''; the current one is"),
        ("run.seed.x", "1", "'seed' is not a section"),
        ("train.beta", ".nan", "finite"),
        ("train.loss_scale", "dynamical", "train.loss_scale.*unknown value 'dynamical'.*'dynamic'"),
        ("deepspeed.zero_stage", "4", "deepspeed.zero_stage: unknown value '4' .known: 0,"),
        ("deepspeed.offload_optimizer", "cpu", "offload_optimizer: cpu needs zero_stage 1 or more"),
        ("deepspeed.offload_parameters", "cpu", "parameters: cpu needs zero_stage 3 or more"),
    ],
)
def test_errors_name_the_key_and_the_nearest_name(key: str, value: str, message: str) -> None:
    with pytest.raises(config.RecipeError, match=message):
        config.load("embedded", [(key, value)])


def test_missing_and_broken_files(tmp_path: Path) -> None:
    with pytest.raises(config.RecipeError, match="did you mean 'embedded'"):
        config.load("embeded")
    with pytest.raises(config.RecipeError, match="does not exist"):
        config.load(str(tmp_path / "no.yaml"))
    broken = tmp_path / "broken.yaml"
    broken.write_text("a: [1")
    with pytest.raises(config.RecipeError, match="not valid YAML"):
        config.load(str(broken))
    broken.write_text("- 1")
    with pytest.raises(config.RecipeError, match="must be a mapping"):
        config.load(str(broken))
    broken.write_text("run: !!python/object/apply:os.system ['true']")
    with pytest.raises(config.RecipeError, match="not valid YAML"):
        config.load(str(broken))


def test_prompts_are_drawn_without_repetition_in_a_pass() -> None:
    drawn = [i for k in range(5) for i in prompts.draw(4, 10, seed=1, iteration=k)]
    assert sorted(drawn[:10]) == sorted(drawn[10:]) == list(range(10))
    assert drawn[:10] != drawn[10:]
    assert drawn[4:8] == prompts.draw(4, 10, seed=1, iteration=1)
    assert drawn[:4] != prompts.draw(4, 10, seed=2, iteration=0)
    assert prompts.spread(3, 11) == [0, 5, 10]


def test_prompt_files(tmp_path: Path) -> None:
    text = tmp_path / "p.txt"
    text.write_text("a cat\n\n a dog \n")
    assert [p.text for p in prompts.load(str(text))] == ["a cat", "a dog"]
    lines = tmp_path / "p.jsonl"
    lines.write_text('{"prompt": "a 7", "text": "7"}\n')
    assert prompts.load(str(lines)) == [prompts.Prompt("a 7", {"text": "7"})]
    for content, message in [
        ('{"prompt": "x"}\n{"promt": "a"}', 'line 2: expected an object with a text "prompt"'),
        ("{", "line 1: not valid JSON"),
        ("\n", "holds no prompt"),
    ]:
        lines.write_text(content)
        with pytest.raises(ValueError, match=message):
            prompts.load(str(lines))
    with pytest.raises(ValueError, match="does not exist"):
        prompts.load(str(tmp_path / "none.jsonl"))
