"""Sections about what newer runs keep: strips, rewards of prompts, signs of exploited rewards; and
how images of a prompt are set."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from sfgrpo import report
from sfgrpo.report import glance, hacking, pictures, sections
from tests.support.made_run import make_run

PAIR = {
    "prompt": "a <cat>", "states": [0, 3, 4], "levels": [1.0, 0.25, 0.0],
    "rewards": [[0.25, 0.75, 0.5], [0.25, 0.125, 0.5]], "contrast": 0.3,
}  # fmt: skip


def keep_strip(run: Path, iteration: int, **changes: Any) -> None:
    strip = {**PAIR, **changes}
    (run / "strips").mkdir(exist_ok=True)
    (run / "strips" / f"{iteration:06d}.json").write_text(json.dumps(strip))
    size = (8 * len(strip["states"]), 8 * len(strip["rewards"]))
    Image.new("RGB", size).save(run / "strips" / f"{iteration:06d}.png")


def test_a_film_shows_every_state_with_the_gain_that_led_to_it(tmp_path: Path) -> None:
    keep_strip(tmp_path, 5, contrast=0.1)
    keep_strip(tmp_path, 10)
    keep_strip(tmp_path, 15, contrast=0.2)
    (tmp_path / "strips" / "000020.json").write_text(json.dumps({**PAIR, "contrast": 9}))  # alone
    page = glance.section(tmp_path)
    assert "Sampling &quot;a &lt;cat&gt;&quot; in iteration 10." in page
    assert page.count("<img") == 6
    assert re.findall(r"<small>(.*?)</small>", page) == ["noise 1.00", "noise 0.25", "image"] * 2
    assert re.findall(r"<b>(.*?)</b>", page) == ["0.25", "0.75", "0.50", "0.25", "0.12", "0.50"]
    gains = re.findall(r'<span class="(\w+)">(.*?)</span>.*?style="(\w+):50%;height:(.*?)%', page)
    assert gains == [
        ("good", "+0.50", "bottom", "50.0"), ("bad", "-0.25", "top", "25.0"),
        ("bad", "-0.12", "top", "12.5"), ("good", "+0.38", "bottom", "37.5"),
    ]  # fmt: skip
    assert "In trajectory A the largest gain, +0.50, is that of the way from state 0 to 3." in page
    assert "trajectory B the largest gain, +0.38, is that of the way from state 3 to 4." in page
    assert "end 0.000 apart" in page


def test_a_run_without_strips_has_no_section_of_them(tmp_path: Path) -> None:
    assert glance.section(tmp_path) == ""


def test_one_trajectory_whose_reward_never_changes_is_shown(tmp_path: Path) -> None:
    keep_strip(tmp_path, 1, rewards=[[0.5, 0.5, 0.5]])
    page = glance.section(tmp_path)
    assert page.count("<span>0</span>") == 2
    assert "the largest gain" not in page
    assert "trajectory B" not in page


def test_what_improved_most_and_least_is_shown_with_its_rewards(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", "stepwise", [0.25, 0.5])
    (run / "images" / "prompts.txt").write_text("".join(f"prompt {k}\n" for k in range(4)))
    rewards = {0: [0.5, 0.5, None, 0.25], 1: [0.25, 1.0, 0.5, 0.5]}
    rows = [{"iteration": k, "reward": values} for k, values in rewards.items()]
    (run / "eval_prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    evaluations = [{"iteration": k, "reward": 0.5} for k in rewards]
    page = sections.images(run, evaluations)
    most, least = page.split("<h3>")[1:]
    assert most.startswith("Improved most")
    shown = r'<p>(.*?)<span class="number">(.*?) <b class="(\w+)">(.*?)</b>'
    assert re.findall(shown, most) == [
        ("prompt 1", "0.50 to 1.00", "good", "+0.50"),
        ("prompt 3", "0.25 to 0.50", "good", "+0.25"),
    ]
    assert least.startswith("Improved least")
    assert re.findall(shown, least) == [("prompt 0", "0.50 to 0.25", "bad", "-0.25")]


SIGNS = {"diversity": 0.4, "judge_a": 0.0}


def test_signs_have_their_thresholds_and_alarms_are_named() -> None:
    rows = [{"iteration": k, "alarms": {**SIGNS, "judge_a": 0.15 * k}} for k in (0, 1, 2)]
    rows[1]["alarms"] |= {"estimates": 0.4}  # there are none before the first iteration
    page = hacking.section([{"iteration": 0}, *rows])
    assert re.findall(r'class="(\w+) state">(.*?)<', page) == [
        ("good", "quiet"), ("bad", "alarm since iteration 2"), ("good", "quiet")
    ]  # fmt: skip
    assert "Alarms: a parts from the reward (alarm since iteration 2)." in page
    assert "No judge of this run says" not in page


def test_a_run_without_judges_of_known_direction_is_told_so() -> None:
    page = hacking.section([{"iteration": 0, "alarms": {"diversity": 0.4}}])
    assert "No alarm in this run." in page
    assert "No judge of this run says which way is better" in page
    assert hacking.section([{"iteration": 0}]) == ""


def test_numbers_of_each_step_are_heat_maps_where_they_are_not_zero(tmp_path: Path) -> None:
    steps = {"clip_fraction_per_step": [1e-4, 0.1], "logp_drift_per_step": [0.0, 0.0]}
    page = sections.health([{"iteration": 1, "kl": 0.1, **steps}], None)
    assert "<h3>Clip fraction per step</h3>" in page
    assert "mathdefault" not in page
    assert "<h3>Drift per step</h3>" not in page


@pytest.mark.parametrize("night", [False, True])
def test_every_colour_of_a_figure_has_a_variable(tmp_path: Path, night: bool) -> None:
    run = make_run(tmp_path / "run", "stepwise", [0.25, 0.5])
    report.write(run)
    page = (run / "report.html").read_text()
    day, dark = re.split(r"prefers-color-scheme: dark", page.partition("</style>")[0], maxsplit=1)
    declared = set(re.findall(r"(--[\w]+):", dark if night else day))
    if not night:
        assert set(re.findall(r"var\((--\w+)\)", page)) <= declared
    assert {f"--c{c}" for c in ("1f2933", "0b6e99", "d9730d")} <= declared
    assert np.all([name not in page.partition("<main>")[2] for name in ("#1f2933", "#0b6e99")])


def test_images_of_a_prompt_stand_apart() -> None:
    """Three lines of writing side by side read as one without a gap."""
    pixels = np.arange(12 * 24 * 3, dtype=np.uint8).reshape(12, 24, 3)
    spaced = pictures.apart(pixels, 4)
    assert spaced.shape == (12, 24 + 3, 3)
    for k in range(4):
        assert np.array_equal(spaced[:, 7 * k : 7 * k + 6], pixels[:, 6 * k : 6 * k + 6])
    assert (spaced[:, 6::7] == 255).all()
    assert np.array_equal(pictures.apart(pixels, 1), pixels)
    assert np.array_equal(pictures.apart(pixels, 7), pixels)
