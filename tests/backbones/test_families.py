"""Every family of pipelines: what diffusers' own pipeline does, trained, exported, loaded back."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from benchmarks.trainer import family_checks, flow_pipelines
from sfgrpo import backbones, report
from sfgrpo.backbones._images import ImagesBackbone
from sfgrpo.backbones.base import Conditioning
from sfgrpo.run import records
from tests.support import families
from tests.support.families import FAMILIES, PROMPTS

pytestmark = pytest.mark.slow

GUIDED = [name for name, family in FAMILIES.items() if family.guided]
LOGGED = ("reward", "kl", "ratio_min", "ratio_max", "grad_norm", "loss", "logp_drift_mean")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A saved pipeline of every family."""
    place = tmp_path_factory.mktemp("families")
    return {name: families.save(name, place / name) for name in FAMILIES}


@pytest.fixture(scope="module")
def loaded(folders: dict[str, Path]) -> Callable[[str], Any]:
    """A family's backbone, for tests that leave it as it is."""
    return functools.cache(lambda name: family_checks.load(name, folders[name]))


@pytest.fixture(scope="module")
def stock(folders: dict[str, Path]) -> Callable[[str], Any]:
    """A family's stock pipeline, for tests that leave it as it is."""
    return functools.cache(lambda name: family_checks.stock(folders[name], FAMILIES[name]))


def latents(backbone: Any, name: str, seed: int = 0) -> Tensor:
    shape = backbone.latent_shape(*FAMILIES[name].size)
    return torch.randn(len(PROMPTS), *shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("name", FAMILIES)
def test_rollout_is_the_stock_pipeline(
    name: str, loaded: Callable[[str], Any], stock: Callable[[str], Any]
) -> None:
    """The same operations in the same order: not one bit differs, but for the affine step, which
    the fused kernel rounds once where the scheduler rounds twice."""
    family = FAMILIES[name]
    found = family_checks.compare(family, loaded(name), stock(name), 1.0)
    assert found.spread > 0.5
    assert found.latents <= family.roundings * torch.finfo(torch.float32).eps * found.spread
    assert found.samples <= 1e-6


@pytest.mark.parametrize("name", GUIDED)
def test_guided_rollout_is_the_stock_pipeline(
    name: str, loaded: Callable[[str], Any], stock: Callable[[str], Any]
) -> None:
    """Both halves of a guided batch come from one forward here and from two there: other shapes,
    other roundings, amplified by the scale."""
    family, backbone = FAMILIES[name], loaded(name)
    found = family_checks.compare(family, backbone, stock(name), 3.0)
    assert found.latents <= 2e-5 * found.spread
    assert found.samples <= 2e-6
    weak, strong = (family_checks.ours(backbone, family, g) for g in (1.0, 3.0))
    assert (weak - strong).abs().max() > 100 * found.latents  # or the test would see no guidance


@pytest.mark.parametrize("name", FAMILIES)
def test_rows_stand_at_times_and_prompts_of_their_own(
    name: str, loaded: Callable[[str], Any]
) -> None:
    """A batch of rows at different noise levels, with prompts of different lengths, is its rows."""
    backbone = loaded(name)
    x, cond = latents(backbone, name), family_checks.encode(backbone, FAMILIES[name])
    t = torch.tensor([0.95, 0.2])
    with torch.no_grad():
        together = backbone.velocity(backbone.transformer, x, t, cond)
        for row in range(len(PROMPTS)):
            one = slice(row, row + 1)
            alone = family_checks.encode(backbone, FAMILIES[name], [row])
            v = backbone.velocity(backbone.transformer, x[one], t[one], alone)
            torch.testing.assert_close(v[0], together[row], rtol=1e-4, atol=1e-4)
        later = backbone.velocity(backbone.transformer, x, t.flip(0), cond)
        other = backbone.velocity(
            backbone.transformer, x, t, cond.rows(torch.tensor([1, 0], dtype=torch.int64))
        )
    assert together.dtype == torch.float32
    for changed in (later, other):
        assert ((changed - together).flatten(1).abs().amax(1) > 1e-3).all()


@pytest.mark.parametrize("name", FAMILIES)
def test_checkpointing_changes_no_velocity(name: str, loaded: Callable[[str], Any]) -> None:
    """Training with it has to see the velocities that sampling saw without."""
    backbone = loaded(name)
    x, t = latents(backbone, name), torch.tensor([0.95, 0.2])
    cond = family_checks.encode(backbone, FAMILIES[name])
    expected = backbone.velocity(backbone.transformer, x, t, cond)
    assert expected.requires_grad
    backbone.transformer.enable_gradient_checkpointing()
    assert torch.equal(backbone.velocity(backbone.transformer, x, t, cond), expected)


@pytest.mark.parametrize("name", FAMILIES)
def test_one_iteration_and_its_export(name: str, folders: dict[str, Path], tmp_path: Path) -> None:
    """Sampling, estimates, rewards, credit, update; then the stock pipeline with what was saved."""
    out = tmp_path / "run"
    trainer, metrics = family_checks.train(name, folders[name], out)
    assert all(math.isfinite(metrics[key]) for key in LOGGED)
    assert metrics["kl"] > 0  # the second update no longer stands at the start
    assert metrics["ratio_min"] < metrics["ratio_max"]
    assert metrics["grad_norm"] > 0
    assert metrics["moved"] > 1e-4
    assert max(metrics["logp_drift_of_budget"]) < 0.1  # measured: .04, on one thread and two
    difference, change = family_checks.export(trainer, name, folders[name], out)
    assert change > 5e-5
    assert difference < change / 100
    assert len(records.read(out / "eval.jsonl")) == 2
    assert (out / "report.html").exists() or list((out / "images").glob("*.png"))


@pytest.mark.parametrize("name", ["flux", "wan22"])
def test_all_weights_and_their_export(name: str, folders: dict[str, Path], tmp_path: Path) -> None:
    out = tmp_path / "run"
    trainer, metrics = family_checks.train(
        name, folders[name], out, lora="null", train__learning_rate="1e-3",
        train__gradient_checkpointing="true",
    )  # fmt: skip
    assert metrics["moved"] > 1e-4
    difference, change = family_checks.export(trainer, name, folders[name], out)
    assert change > 1e-4
    assert difference < change / 100


@pytest.mark.parametrize("name", FAMILIES)
def test_adapters_attach_where_they_are_said_to(name: str, loaded: Callable[[str], Any]) -> None:
    backbone = loaded(name)
    layers = {
        n for n, module in backbone.transformer.named_modules()
        if isinstance(module, torch.nn.Linear)
    }  # fmt: skip
    for target in backbone.lora_targets:
        assert any(n == target or n.endswith(f".{target}") for n in layers), target


@pytest.mark.parametrize("name", FAMILIES)
def test_sizes_and_lengths(name: str, loaded: Callable[[str], Any]) -> None:
    backbone, (height, width, frames) = loaded(name), FAMILIES[name].size
    shape = backbone.latent_shape(height, 2 * width, frames)
    assert shape[-1] == 2 * shape[-2]
    for wrong in ((height + 1, width), (height, 0)):
        with pytest.raises(ValueError, match=r"must be a multiple of \d+ pixels.*got"):
            backbone.latent_shape(*wrong, frames)
    sigmas = backbone.sigmas(4, shape)
    assert sigmas.shape == (5,)
    assert (sigmas[:-1] > sigmas[1:]).all()
    assert (sigmas[0], sigmas[-1]) == (1, 0)
    if isinstance(backbone, ImagesBackbone):
        backbone.sample_size = FAMILIES[name].size
    blank, real = backbone.blank(2), family_checks.encode(backbone, FAMILIES[name])
    assert blank.tokens.shape[-1] == real.tokens.shape[-1]
    assert blank.tokens.shape[1] >= real.tokens.shape[1]
    assert (blank.pooled is None) == (real.pooled is None)
    for key, part in blank.extra.items():  # of several images, the first
        assert part.shape == real.extra[key].shape
    assert bool(blank.extra) == bool(real.extra)
    with pytest.raises(TypeError, match="one string"):
        backbone.encode(PROMPTS[0])


@pytest.mark.parametrize(
    "name",
    [
        "auraflow", "cogview4", "hidream", "hunyuanimage", "sana", "sana-video", "ltx", "ltx2",
        "hunyuanvideo", "hunyuanvideo15", "qwenimage21",
    ],
)  # fmt: skip
def test_sizes_are_known_without_values(name: str) -> None:
    """The doctor runs networks on the meta device; recipes try that of the other families."""
    family, pipeline = FAMILIES[name], FAMILIES[name].build()
    pipeline.transformer.to("meta")
    backbone: Any = backbones.load(
        family.backbone, "none", pipeline=pipeline, device="meta",
        embedded_guidance=family.embedded_guidance, max_sequence_length=family.length,
    )  # fmt: skip
    x = torch.zeros(2, *backbone.latent_shape(*family.size), device="meta")
    cond = backbone.blank(2).to("meta")
    v = backbone.velocity(backbone.for_sizes(), x, torch.zeros(2, device="meta"), cond)
    assert (v.shape, v.device.type, v.requires_grad) == (x.shape, "meta", True)


def test_videos_want_whole_groups_of_frames_and_images_one(loaded: Callable[[str], Any]) -> None:
    video = loaded("wan")
    assert video.latent_shape(32, 32, 9) == (4, 3, 4, 4)
    with pytest.raises(ValueError, match="num_frames must be 1 more than a multiple of 4, got 8"):
        video.latent_shape(32, 32, 8)
    image = loaded("flux")
    with pytest.raises(ValueError, match="num_frames: this model makes images, got 5 frames"):
        image.latent_shape(32, 32, 5)
    assert video.decode(latents(video, "wan")).shape == (2, 5, 3, 32, 32)


def test_videos_are_kept_and_shown(folders: dict[str, Path], tmp_path: Path) -> None:
    """Strips of four frames of every video; the first few whole, playing in the report."""
    out = tmp_path / "run"
    family_checks.train("wan", folders["wan"], out)
    strips = Image.open(out / "images" / "000001.png")
    assert strips.size == (2 * 4 * 32, 2 * 32)  # two videos each of two prompts
    assert sorted(p.name for p in (out / "videos").iterdir()) == [
        f"00000{iteration}-{k}.webp" for iteration in (0, 1) for k in range(4)
    ]
    video: Any = Image.open(out / "videos" / "000001-0.webp")
    assert (video.n_frames, video.size) == (5, (32, 32))
    report.write(out)
    page = (out / "report.html").read_text()
    assert page.count("data:image/webp") == 8
    assert page.index("before: video 0") < page.index("after: video 0")


def test_wan_with_the_scheduler_of_published_folders(tmp_path: Path) -> None:
    """UniPC's folder gives the times of Euler's scheduler with the same shift."""
    unipc = families.diffusers.UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
    )
    families.videos.wan(scheduler=unipc).save_pretrained(tmp_path)
    backbone = family_checks.load("wan", tmp_path)
    euler = families.scheduler(shift=3.0)
    euler.set_timesteps(6)
    assert torch.equal(backbone.sigmas(6, (4, 2, 4, 4)), euler.sigmas)


def test_a_folder_of_another_family_names_its_backbone(folders: dict[str, Path]) -> None:
    with pytest.raises(ValueError, match=r"holds a FluxPipeline, not a WanPipeline; use 'flux'"):
        backbones.load("wan", folders["flux"])


def test_what_is_said_to_be_served_is_what_backbones_serve() -> None:
    said = {
        (name, backbone)
        for name, (kind, why) in flow_pipelines.verdicts().items() if kind == "served"
        for backbone in why.split(", ")
    }  # fmt: skip
    assert said == {(name, b) for b in backbones.available() for name in backbones.pipelines(b)}
    assert {family.backbone for family in FAMILIES.values()} == set(backbones.available())


def test_no_network_slices_its_attention(loaded: Callable[[str], Any]) -> None:
    """Until one does, there is no key for it; the table of pipelines says so."""
    networks = [part for name in FAMILIES for part in loaded(name)._networks()]
    assert len(networks) > len(FAMILIES)  # some have two
    assert not [type(part) for part in networks if hasattr(part, "set_attention_slice")]


def test_one_step_of_a_stretched_schedule_is_refused(loaded: Callable[[str], Any]) -> None:
    """The stock scheduler divides by zero and goes on with NaN."""
    backbone = loaded("ltx")
    assert backbone.pipeline.scheduler.config.shift_terminal
    shape = backbone.latent_shape(*FAMILIES["ltx"].size)
    assert backbone.sigmas(2, shape).isfinite().all()
    with pytest.raises(ValueError, match=r"got \[nan, 0.0\]; .*shift_terminal.* 2 steps or mo"):
        backbone.sigmas(1, shape)


def test_auraflow_has_a_largest_size(loaded: Callable[[str], Any]) -> None:
    with pytest.raises(ValueError, match="must be at most 64 pixels, got 80 x 32"):
        loaded("auraflow").latent_shape(80, 32)


def test_guidance_is_told_to_networks_that_read_it(folders: dict[str, Path]) -> None:
    with pytest.raises(ValueError, match=r"embedded_guidance: this network was distilled.*3\.5"):
        family_checks.load("flux", folders["flux"], embedded_guidance=None)
    with pytest.raises(ValueError, match=r"embedded_guidance: got 3\.5, but this network reads"):
        family_checks.load("wan", folders["wan"], embedded_guidance=3.5)


def test_padding_changes_nothing(loaded: Callable[[str], Any]) -> None:
    """A prompt beside a longer one is padded; attention must not see that."""
    backbone = loaded("qwenimage")
    short = backbone.encode(PROMPTS[1:])
    padded = Conditioning.cat([short, backbone.encode(PROMPTS[:1])])
    assert padded.mask is not None
    assert padded.tokens.shape[1] > short.tokens.shape[1]
    assert torch.equal(padded.unpadded()[0], short.tokens[0])
    assert torch.equal(padded.rows(torch.tensor([0])).unpadded()[0], short.tokens[0])
