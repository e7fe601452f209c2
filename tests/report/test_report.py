"""What a run shows: a report in one file, its numbers as text, comparisons as pictures."""

from __future__ import annotations

import base64
import html
import io
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from matplotlib.patches import Rectangle
from PIL import Image

from sfgrpo import cli, report
from sfgrpo.prompts import Prompt
from sfgrpo.report import costs, curves, pictures, plots
from sfgrpo.run import samples
from tests.support.made_run import make_run


def test_report_is_one_file_with_everything_in_it(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", "stepwise", [0.25, 0.5, 0.875])
    shown = report.write(run)
    assert re.search(r"reward +0.250 +0.875", shown)
    assert re.search(r"judge +0.750 +0.125", shown)
    page = (run / "report.html").read_text()
    assert page.count("data:image/png;base64,") == 6  # two prompts twice, a heat map and its bar
    assert page.count('<svg role="img"') == 9
    # Nothing is loaded from elsewhere, and nothing runs.
    assert not re.search(r'(src|href)="(?!data:|#)|url\((?!#)|<script|@import', page)
    titles = re.findall("<h2>(.*?)</h2>", page)
    assert titles == ["Images", "Reward and credit", "On held-out noise", "Optimisation", "Cost",
                      "Recipe"]  # fmt: skip
    assert "&lt;b&gt;" in page
    assert "<b>0.875</b>" in page


def test_what_prompts_bring_is_shown_above_their_samples(tmp_path: Path) -> None:
    """Kept once, as high as the samples; a prompt that brings none has no such row."""
    run = make_run(tmp_path / "run", "stepwise", [0.25, 0.5])
    for name, size in (("a", (20, 10)), ("b", (10, 10))):
        Image.new("RGB", size, "red").save(tmp_path / f"{name}.png")
    both = tuple(str(tmp_path / f"{name}.png") for name in "ab")
    asked = [Prompt("a cat", {}, images=both), Prompt("a dog", {})]
    for colour in ("red", "blue"):  # the second evaluation writes nothing anew
        samples.save_sources(run / "images", asked, 8)
        Image.new("RGB", (20, 10), colour).save(tmp_path / "a.png")
    kept = Image.open(run / "images" / "sources" / "0000.png")
    assert kept.size == (16 + 8, 8)
    assert kept.getpixel((0, 0)) == (255, 0, 0)
    assert [p.name for p in (run / "images" / "sources").iterdir()] == ["0000.png"]
    report.write(run)
    page = (run / "report.html").read_text()
    assert page.count('alt="source: a cat"') == page.count('class="source"') == 1
    assert page.index('alt="source: a cat"') < page.index('alt="before: a cat"')


def test_the_cost_of_an_iteration_is_a_mean_of_each_kind() -> None:
    log = [{"cost": {"velocity": v, "gradient": 864, "decoded": 872, "scored": 9}} for v in (1, 3)]
    shown = re.findall(r'<td class="number">([\d,]+)</td>', costs.section(log, []))
    assert shown == ["2", "4", "864", "1,728", "872", "1,744", "9", "18"]


def test_seconds_of_a_phase_are_of_all_iterations() -> None:
    """An evaluation every second iteration takes half of its seconds of each."""
    rows = [
        {"seconds": sum(p.values()), "images_per_second": 1.0, "phases": p, "slowest": p}
        for p in ({"train": 3.0, "evaluate": 2.0}, {"train": 3.0})
    ]
    page = costs.section([], rows)
    assert "<h3>4.0 seconds an iteration</h3>" in page
    assert re.findall(r'<td class="number">([\d.]+)</td>', page) == ["3.00", "3.00", "1.00", "1.00"]


def test_a_run_that_counted_nothing_is_reported(tmp_path: Path) -> None:
    """Its logs are of a version without costs, timing or ratios."""
    run = make_run(tmp_path / "run", "stepwise", [0.25, 0.5])
    log = run / "metrics.jsonl"
    rows = [json.loads(line) for line in log.read_text().splitlines()]
    for row in rows:
        del row["cost"]
    log.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (run / "timing.jsonl").unlink()
    report.write(run)
    page = (run / "report.html").read_text()
    assert "This run did not count what it computed." in page
    assert "This run kept no timing.jsonl." in page


def test_a_credit_rule_without_gains_has_no_gains_to_show(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", "uniform", [0.0, 0.0])
    report.write(run)
    page = (run / "report.html").read_text()
    assert "no gains were measured" in page
    assert "Where credit goes" not in page


def test_a_heat_map_leaves_out_what_is_zero() -> None:
    log = [{"iteration": k, "gain_per_step": [0.0, 0.5 * k]} for k in (1, 2)]
    (shown,) = curves.gains(log).axes[0].get_images()
    found: Any = shown.get_array()
    assert np.ma.filled(found, -1).tolist() == [[-1, -1], [0.5, 1.0]]


def test_means_of_a_step_are_over_the_iterations_that_credit_it() -> None:
    gains = [[0.0, 0.5], [0.25, 0.0]] * 5
    (axes,) = curves.gain_per_step([{"gain_per_step": row} for row in gains]).axes
    heights = [bar.get_height() for bar in axes.patches if isinstance(bar, Rectangle)]
    assert heights == [0.25, 0.5] * 2


def test_states_that_were_not_scored_have_no_point() -> None:
    (axes,) = curves.reward_per_state([{"reward_per_state": [0.5, 0.5, 0.75]}]).axes
    assert [np.asarray(line.get_xdata()).tolist() for line in axes.lines] == [[1, 2], [1, 2]]


def test_an_empty_folder_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert cli.main(["report", str(tmp_path)]) == 2
    assert "holds no run" in capsys.readouterr().err


def images(folder: Path, prompts: list[str], size: tuple[int, int] = (8, 8)) -> Path:
    (folder / "images").mkdir(parents=True)
    (folder / "images" / "prompts.txt").write_text("".join(f"{p}\n" for p in prompts))
    Image.new("L", size).save(folder / "images" / "000000.png")
    return folder


def test_prompts_and_names_are_shown_as_they_are_written(tmp_path: Path) -> None:
    prompts = ["cash $$ rich", "tag $_$ b", "from <5%> & $10", '"$x^2$"']
    run = make_run(tmp_path / "run", "uniform", [0.25, 0.5])
    (run / "images" / "prompts.txt").write_text("".join(f"{prompt}\n" for prompt in prompts))
    (log := run / "eval.jsonl").write_text(log.read_text().replace("judge", "a$_$<b"))
    report.write(run)
    page = (run / "report.html").read_text()
    assert re.findall("<p>(.*?)</p>", page) == [html.escape(prompt) for prompt in prompts]
    assert "<h3>a$ $&lt;b</h3>" in page


def test_names_of_the_users_are_drawn_as_they_are_written(tmp_path: Path) -> None:
    runs = [make_run(tmp_path / "a", "own:$_$", [0.2, 0.5])]
    (log_file := runs[0] / "eval.jsonl").write_text(log_file.read_text().replace("judge", "$_$"))
    assert plots.compare(runs, tmp_path / "y.png", metric="$_$").is_file()


def test_a_long_prompt_is_shortened(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", "uniform", [0.25, 0.5])
    (run / "images" / "prompts.txt").write_text("ab " * 300_000 + "\na cat\n")
    report.write(run)
    page = (run / "report.html").read_text()
    (shown,) = re.findall("<p>(ab.*?)</p>", page)
    assert 150 < len(shown) <= 160
    assert shown.endswith("ab...")
    assert len(page) < 500_000


def test_a_grid_of_200_megapixels_is_shown(tmp_path: Path) -> None:
    run = images(tmp_path, [f"prompt {k}" for k in range(50)], (4 * 1024, 50 * 1024))
    shown = pictures.Grid(run / "images" / "000000.png", 50).row(49, "the last")
    data = base64.b64decode(shown.partition("base64,")[2].rstrip('">'))
    assert Image.open(io.BytesIO(data)).size == (4 * pictures.SIDE, pictures.SIDE)


def test_a_page_of_large_noisy_pictures_and_videos_stays_small(tmp_path: Path) -> None:
    """Noise is what no format makes small."""
    run, noise = make_run(tmp_path / "run", "stepwise", [0.25, 0.5]), np.random.default_rng(0)
    (run / "videos").mkdir()
    for iteration in (0, 1):
        grid = noise.integers(0, 256, (16 * 256, 4 * 256, 3), np.uint8)
        Image.fromarray(grid).save(run / "images" / f"{iteration:06d}.png", compress_level=0)
        for k in range(4):
            first, *rest = map(Image.fromarray, noise.integers(0, 256, (3, 320, 320, 3), np.uint8))
            path = run / "videos" / f"{iteration:06d}-{k}.webp"
            first.save(path, save_all=True, append_images=rest, quality=90, method=0)
    (run / "images" / "prompts.txt").write_text("".join(f"prompt {k}\n" for k in range(16)))
    report.write(run)
    page = (run / "report.html").read_text()
    assert page.count("data:image/webp") == 8
    assert len(page) < 3_000_000


def test_a_report_that_fails_fails_no_run(
    recipe, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = recipe(tmp_path / "a run", run__iterations="1", eval__every="1")
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump(given.model_dump(mode="json")))

    def fails(*_: object) -> None:
        raise Image.DecompressionBombError("a picture\nthat is too large")

    monkeypatch.setattr(pictures, "Grid", fails)
    assert cli.main(["train", str(file)]) == 0
    told = [line for line in capsys.readouterr().err.splitlines() if "report" in line]
    assert told == [
        "sfgrpo train: the run is over and saved, but its report could not be written "
        "(DecompressionBombError: a picture that is too large); "
        f"`sfgrpo report '{tmp_path}/a run'` writes it"
    ]
    assert (tmp_path / "a run" / "checkpoints" / "000001" / "model").is_dir()


@pytest.mark.parametrize("command", ["report", "compare"])
def test_what_is_no_run_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture, command: str
) -> None:
    run = make_run(tmp_path / "run", "uniform", [0.2, 0.5])

    def said(folder: Path) -> str:
        assert (
            cli.main(
                [
                    command,
                    str(folder),
                    *(["--out", str(tmp_path / "x.png")] if command == "compare" else []),
                ]
            )
            == 2
        )
        message = capsys.readouterr().err
        assert message.count("\n") == 1
        return message

    assert "not/there' holds no run: there is no such folder" in said(tmp_path / "not/there")
    (run / "recipe.yaml").write_text("a note\n")
    assert "recipe.yaml' is no recipe of a run" in said(run)
    (run / "recipe.yaml").unlink()
    assert "run' holds no run: there is no recipe.yaml" in said(run)
    for text, why in (
        ("[1]\n", "'iteration'"),
        ('{"iteration": 1}\n', "'reward'"),
        ("x\n", "eval.jso"),
    ):
        (run / "eval.jsonl").write_text(text)
        assert why in said(run)


def test_compare_groups_runs_by_rule(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    runs = [
        make_run(tmp_path / "a", "stepwise", [0.2, 0.5, 0.9]),
        make_run(tmp_path / "b", "stepwise", [0.2, 0.6, 0.8]),
        make_run(tmp_path / "c", "uniform", [0.2, 0.3, 0.4]),
    ]
    out = tmp_path / "figures" / "curves.png"
    assert cli.main(["compare", *map(str, runs), "--out", str(out)]) == 0
    assert Image.open(out).size[0] > 800
    with pytest.raises(ValueError, match=r"no evaluation of 'rewrd' .*judge, reward"):
        plots.compare(runs, out, metric="rewrd")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "embeded"], "did you mean 'embedded'"),
        (["train", "embedded", "--train.learning_rat", "1"], "did you mean 'learning_rate'"),
        (["train", "embedded", "--lora"], "--lora needs a value"),
        (["train", "embedded", "lora"], "expected --key value, got 'lora'"),
    ],
)
def test_wrong_commands_say_what_is_right(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture
) -> None:
    assert cli.main(arguments) == 2
    assert message in capsys.readouterr().err


def test_show_prints_every_key(capsys: pytest.CaptureFixture) -> None:
    assert cli.main(["show", "embedded", "--run.seed", "7"]) == 0
    shown = yaml.safe_load(capsys.readouterr().out)
    assert shown["run"]["seed"] == 7
    assert shown["credit"]["stride"] == 1
    assert cli.main(["recipes"]) == 0
    assert "embedded" in capsys.readouterr().out.split()
