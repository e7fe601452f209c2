"""The coefficient tables: marginals, limits, published formulas, refusals."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from sfgrpo import sde

SD35 = [1, 0.9601, 0.9133, 0.8577, 0.7904, 0.7073, 0.6022, 0.4649, 0.2780, 0.0089, 0]
NOISY = ["flow", "dance", "ddim", "cps", "precise"]


def columns(sigmas: list[float], kind: str, eta: float) -> tuple[Tensor, ...]:
    return sde.coefficients(sigmas, kind, eta).double().unbind(-1)


@pytest.mark.parametrize("kind", ["ode", "ddim", "cps", "precise", "renoise"])
def test_marginals_are_kept_exactly(kind: str) -> None:
    """With all data at one point c the exact velocity is (x - c) / t, and x_t ~ N((1-t) c, t^2)
    must be carried to N((1-s) c, s^2) by every sampler built on x0_hat and x1_hat."""
    a, b, n, t = columns(SD35, kind, 0.7)
    s = torch.tensor(SD35, dtype=torch.float64)[1:]
    gain = a + b / t  # x_s = (a + b/t) x_t - b/t c + n eps
    mean = gain * (1 - t) - b / t  # in units of c
    std = (gain.square() * t.square() + n.square()).sqrt()
    torch.testing.assert_close(mean, 1 - s, rtol=0, atol=3e-7)
    torch.testing.assert_close(std, s, rtol=0, atol=3e-7)


@pytest.mark.parametrize("kind", ["flow", "dance"])
def test_langevin_samplers_keep_marginals_as_steps_shrink(kind: str) -> None:
    """Euler-Maruyama is right to first order: ten times finer, ten times less error."""

    def error(steps: int) -> float:
        levels = torch.linspace(0.8, 0.3, steps + 1, dtype=torch.float64).tolist()
        a, b, n, t = columns(levels, kind, 0.7)
        std = torch.tensor(levels[0], dtype=torch.float64)
        for k in range(steps):
            std = ((a[k] + b[k] / t[k]).square() * std.square() + n[k].square()).sqrt()
        return abs(std.item() - levels[-1])

    assert error(100) < 0.01
    assert error(1000) < 0.15 * error(100)


@pytest.mark.parametrize("kind", NOISY)
def test_without_noise_every_sampler_is_the_ode(kind: str) -> None:
    torch.testing.assert_close(
        sde.coefficients(SD35, kind, 0.0), sde.coefficients(SD35, "ode"), rtol=0, atol=1e-6
    )


def test_flow_matches_flow_grpo_as_published() -> None:
    """arXiv 2505.05470: drift and diffusion as in its public sde_step_with_logprob."""
    eta = 0.7
    sigma = torch.tensor(SD35, dtype=torch.float64)
    t, dt = sigma[:-1], sigma[1:] - sigma[:-1]
    std_dev = (t / (1 - torch.where(t == 1, sigma[1], t))).sqrt() * eta
    a, b, n, _ = columns(SD35, "flow", eta)
    torch.testing.assert_close(a, 1 + std_dev**2 / (2 * t) * dt, rtol=0, atol=1e-6)
    torch.testing.assert_close(b, (1 + std_dev**2 * (1 - t) / (2 * t)) * dt, rtol=0, atol=1e-6)
    torch.testing.assert_close(n, std_dev * (-dt).sqrt(), rtol=0, atol=1e-6)


def test_noise_of_the_published_schedule() -> None:
    """DDIM-SDE on SD3.5's ten steps: 8 noisy steps, 0.0053 at the last of them."""
    n = sde.coefficients(SD35, "ddim", 0.7)[:, 2]
    assert (n > 0).tolist() == [False] + [True] * 8 + [False]
    assert n[8].item() == pytest.approx(0.0053, abs=5e-5)
    cps = sde.coefficients(SD35, "cps", 0.7)[:, 2]
    assert cps[0].item() == pytest.approx(0.9601 * math.sin(0.35 * math.pi))
    assert cps[-1] == 0


def test_precise_forgets_as_much_in_many_steps_as_in_one() -> None:
    """Exact while the clean estimate stays: only the ends count. At eta = sqrt(2) it is ancestral
    sampling, q(x_s | x_t, x_0)."""

    def kept(levels: list[float], eta: float) -> float:
        n = columns(levels, "precise", eta)[2]
        s = torch.tensor(levels[1:], dtype=torch.float64)
        return float((1 - (n / s).square()).sqrt().prod())

    for eta in (0.3, 0.7, 2**0.5):
        assert kept([0.8, 0.61, 0.6, 0.3], eta) == pytest.approx(kept([0.8, 0.3], eta), rel=1e-5)
    t, s = 0.8, 0.3
    n = columns([t, s], "precise", 2**0.5)[2]
    posterior = s**2 * (1 - (s * (1 - t) / (t * (1 - s))) ** 2)
    assert n.item() ** 2 == pytest.approx(posterior, rel=1e-5)
    first = columns([1.0, 0.9], "precise", 0.5)[2]
    assert first.item() == pytest.approx(0.9)  # nothing of pure noise is kept


def test_kl_scales() -> None:
    table = sde.coefficients(SD35, "ddim", 0.7)
    gaussian = sde.kl_scale(table, SD35, "gaussian")
    assert gaussian[0] == gaussian[-1] == 0
    assert gaussian[3].item() == pytest.approx(
        table[3, 1].item() ** 2 / 2 / table[3, 2].item() ** 2
    )
    dt = SD35[3] - SD35[4]
    flow_grpo = sde.kl_scale(table, SD35, "flow_grpo")
    assert flow_grpo[3].item() == pytest.approx(dt * gaussian[3].item())
    assert sde.kl_scale(table, SD35, "velocity").tolist() == [0] + [1] * 8 + [0]


def test_balanced_weights_give_all_steps_gradients_of_one_size() -> None:
    """The log-density's gradient in v is b eps / (n D); n = 0.0053 at the last noisy step."""
    table = sde.coefficients(SD35, "ddim", 0.7)
    weights = sde.step_weights(table, "balanced")
    _, b, n, _ = table.unbind(-1)
    noisy = n > 0
    size = (weights * b.abs() / n)[noisy]
    torch.testing.assert_close(size, size[:1].expand_as(size))
    assert (weights[~noisy] == 0).all()
    assert weights[noisy].mean().item() == pytest.approx(1)
    assert sde.step_weights(table, "equal").tolist() == [0] + [1] * 8 + [0]
    with pytest.raises(ValueError, match="did you mean 'balanced'"):
        sde.step_weights(table, "balancd")


def test_a_sampler_is_added_by_one_function(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sde.SAMPLERS, "half", None)

    @sde.sampler("half")
    def half(step: sde.Step, share: float = 0.5) -> tuple[float, float, float]:
        return 1.0, step.s - step.t, share * step.s

    levels = [1.0, 0.5, 0.0]
    assert sde.coefficients(levels, "half")[:, 2].tolist() == [0.25, 0.0]
    assert sde.coefficients(levels, "half", options={"share": 1})[:, 2].tolist() == [0.5, 0.0]
    with pytest.raises(ValueError, match="'half': unknown option 'shar'; did you mean 'share'"):
        sde.coefficients(levels, "half", options={"shar": 1})


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        ((1.0, 0.5), r"sampler 'bad' at step 0 \(1 -> 0.5\): it returned .* expected the three"),
        ((1.0, 0.5, float("nan")), "sampler 'bad' at step 0 .* expected finite numbers and n >= 0"),
        ((1.0, 0.5, -0.1), "sampler 'bad' at step 0 .* expected finite numbers and n >= 0"),
    ],
)
def test_what_is_no_transition_is_refused(
    returned: tuple, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sde.SAMPLERS, "bad", lambda step: returned)
    with pytest.raises(ValueError, match=message):
        sde.coefficients([1.0, 0.5, 0.0], "bad")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([1, 0.5, 0], "dimm"), "did you mean 'ddim'"),
        (([1, 0.5, 0.6, 0],), r"sigmas\[1\] = 0.5 is followed by"),
        (([1.5, 0.5],), r"\[0, 1\]"),
        (([1.0, float("nan")],), r"\[0, 1\]"),
        (([1.0],), "at least 2"),
        ((SD35, "ddim", -1.0), "eta: must be"),
        ((SD35, "ddim", 3.0), "at step 3 .* the largest that fits is 2.65"),
    ],
)
def test_what_cannot_be_is_refused(arguments: tuple, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        sde.coefficients(*arguments)
    if len(arguments) == 3 and arguments[2] == 3.0:  # the bound it names does fit
        sde.coefficients(SD35[3:5], "ddim", 2.65)
