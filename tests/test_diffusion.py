"""Run: python -m pytest -q tests/test_diffusion.py

fixtures/schedule.safetensors holds what reference implementations of SD1.x's schedule and samplers gave in
float64: tables, time steps, single DDIM and DDPM steps, and DDIM walks with a formula for the network.
"""
from itertools import combinations
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import diffusion as D
from diffusion import (NoiseSchedule, ddim_sample, ddim_step, ddim_timesteps, ddpm_step, frame_noise,
                       parse_noise_level)

REFERENCE = load_file(Path(__file__).parent / "fixtures" / "schedule.safetensors")
EPS, V, V_ZERO = NoiseSchedule("eps"), NoiseSchedule("v"), NoiseSchedule("v", zero_terminal_snr=True)
every_schedule = pytest.mark.parametrize("schedule", [EPS, V, V_ZERO], ids=["eps", "v", "v zero SNR"])


def cases(kind):
    """The reference names "kind/a/b": [["a", "b"], ...]."""
    found = [name.split("/")[1:] for name in REFERENCE if name.startswith(kind + "/")]
    assert found, f"the fixture holds no {kind}/..."
    return found


def assert_near(got, name, tolerance=2e-5):
    """Largest difference, against the largest reference value."""
    want = REFERENCE[name]
    assert got.shape == want.shape, name
    assert (got - want).abs().max() <= tolerance * want.abs().max(), name


def rand(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def network(x, t, c):
    """The network of the reference walks; c is 0 for the prompt and 1 without."""
    return 0.8 * torch.tanh(x) + 0.2 * torch.cos(3 * x + t / 100 + c)


def test_schedule_values_match_the_reference():
    """alpha_bar is SD1.x's to 1e-6, also at zero terminal SNR; λ is its log-SNR, finite and falling."""
    for schedule, name in (V, "alpha_bar"), (V_ZERO, "alpha_bar_zero_snr"):
        assert schedule.alpha_bar.dtype == torch.float32
        torch.testing.assert_close(schedule.alpha_bar.double(), REFERENCE[name], rtol=1e-6, atol=0)
        lam = schedule.lambda_(torch.arange(-1, D.T))
        assert lam.isfinite().all() and (lam.diff() < 0).all()
    torch.testing.assert_close(EPS.lambda_(REFERENCE["snr_t"]).exp(), REFERENCE["snr"], rtol=5e-5, atol=0)


def test_timesteps_match_the_reference_and_bad_requests_are_refused():
    """Every stored step count in all three spacings; 1000 trailing steps visit every level."""
    for steps, spacing in cases("timesteps"):
        assert ddim_timesteps(int(steps), spacing) == REFERENCE[f"timesteps/{steps}/{spacing}"].tolist()
    assert ddim_timesteps(D.T) == list(range(D.T))[::-1]
    for steps, spacing in (0, "trailing"), (1001, "linspace"), (1000, "leading"), (10, "karras"):
        with pytest.raises(ValueError, match="expected"):
            ddim_timesteps(steps, spacing)


def test_single_ddim_steps_match_the_reference():
    """Both predictions, eta 0 to 1, first to last step; the last goes to level 0, as SD1.x does it."""
    x, output, noise = REFERENCE["ddim_x"], REFERENCE["ddim_output"], REFERENCE["ddim_noise"]
    for steps, t, eta, prediction in cases("ddim"):
        schedule, level = NoiseSchedule(prediction), torch.tensor([int(t)])
        level_prev = (level - D.T // int(steps)).clamp(min=0)
        x_prev = ddim_step(schedule, x, level, level_prev, output, float(eta), noise)
        assert_near(x_prev, f"ddim/{steps}/{t}/{eta}/{prediction}")
        assert_near(schedule.to_x0(x, level, output), f"ddim_x0/{t}/{prediction}")


def test_ddim_walks_match_the_reference():
    """10 and 50 leading steps, eta 0 and 1, guidance 7.5, t per frame; and v at zero SNR, trailing."""
    walks = [(EPS, "leading", *case, "walk/" + "/".join(case)) for case in cases("walk")]
    walks.append((V_ZERO, "trailing", 10, 0, 1, "walk_zero_snr"))
    for schedule, spacing, steps, eta, scale, name in walks:
        states, new = [], torch.ones(1, 3).bool()

        def say(x, t):
            """Guided, and every x is kept."""
            states.append(x)
            return D.guide(*(network(x, t[0, 0].item(), c) for c in (0, 1)), float(scale))

        x = ddim_sample(schedule, say, REFERENCE["walk_start"], torch.zeros(1, 3).long(), new,
                        ddim_timesteps(int(steps), spacing) + [0], float(eta),
                        lambda i: REFERENCE["walk_noise"][i % 10])
        assert_near(torch.stack([*states[1:], x])[-len(REFERENCE[name]):], name, 1e-4)


def test_ddpm_steps_match_the_reference():
    """Posterior mean and variance, and x0, of the ancestral sampler; no noise at t = 0."""
    x, output = REFERENCE["q_x_t"][:1], REFERENCE["q_eps"][:1]
    for t, prediction in cases("ddpm_mean"):
        schedule, level, name = NoiseSchedule(prediction), torch.tensor([int(t)]), f"{t}/{prediction}"
        mean = ddpm_step(schedule, x, level, output, torch.zeros_like(x))
        assert_near(mean, "ddpm_mean/" + name)
        assert_near(schedule.to_x0(x, level, output), "ddpm_x0/" + name)
        deviation = (ddpm_step(schedule, x, level, output, torch.ones_like(x)) - mean).mean().item()
        assert deviation ** 2 == pytest.approx(REFERENCE["ddpm_variance/" + name].item(), rel=1e-4, abs=1e-15)


def test_noising_and_targets_match_the_reference():
    """x_t, v and eps of three videos at t = 1, 500 and 999 in one batch."""
    x0, eps, t = REFERENCE["q_x0"], REFERENCE["q_eps"], REFERENCE["q_t"]
    assert_near(EPS.q_sample(x0, t, eps), "q_x_t")
    assert_near(V.target(x0, t, eps), "q_v")
    assert torch.equal(EPS.target(x0, t, eps), eps)


@every_schedule
def test_conversions_invert_each_other_at_any_mix_of_levels(schedule):
    """x_t and a perfect output give back x0 and eps: t (b, f), t (b,), images; a wrong t is refused."""
    x0, eps = rand(2, 4, 5, 3, 3), rand(2, 4, 5, 3, 3, seed=1)
    last = 999 if schedule is V_ZERO else 900
    t = torch.tensor([[-1, 0, 94, 500, last], [last, 3, 250, 0, 700]])
    for x0, eps, t in (x0, eps, t), (x0, eps, t[:, 4]), (x0[:, :, 0], eps[:, :, 0], t[:, 0]):
        x_t, output = schedule.q_sample(x0, t, eps), schedule.target(x0, t, eps)
        torch.testing.assert_close(schedule.to_x0(x_t, t, output), x0, rtol=0, atol=2e-5)
        torch.testing.assert_close(schedule.to_eps(x_t, t, output), eps, rtol=0, atol=2e-5)
    with pytest.raises(ValueError, match=r"\(2, 4\) and x \(2, 4, 5, 3, 3\): expected t \(b,\)"):
        schedule.q_sample(rand(2, 4, 5, 3, 3), torch.zeros(2, 4).long(), rand(2, 4, 5, 3, 3))


@every_schedule
@pytest.mark.parametrize("spacing", ["trailing", "leading", "linspace"])
def test_ddim_with_a_perfect_network_recovers_x0_at_any_step_count(schedule, spacing):
    """However few the steps; and the step to clean is x0_pred bit for bit, whatever eta."""
    x0, eps = rand(1, 4, 3, 4, 4), rand(1, 4, 3, 4, 4, seed=1)
    for steps in 1, 2, 7, 333:
        ts = [torch.tensor([t]) for t in ddim_timesteps(steps, spacing) + [-1]]
        x = schedule.q_sample(x0, ts[0], eps)
        for t, t_prev in zip(ts, ts[1:]):
            x_t, output = x, schedule.target(x0, t, eps)
            x = ddim_step(schedule, x_t, t, t_prev, output)
        torch.testing.assert_close(x, x0, rtol=0, atol=2e-4)
        stochastic = ddim_step(schedule, x_t, t, t_prev, output, eta=1.0, noise=eps)
        assert torch.equal(stochastic, schedule.to_x0(x_t, t, output)), "the last step must add no noise"


def test_ddim_at_eta_1_over_neighbouring_levels_is_ddpm():
    """Same mean and variance as the DDPM posterior in every frame."""
    x, output, noise = (rand(1, 4, 4, 3, 3, seed=seed) for seed in range(3))
    t = torch.tensor([[0, 1, 500, 999]])
    for schedule in EPS, V, V_ZERO:
        ddim = ddim_step(schedule, x, t, t - 1, output, eta=1.0, noise=noise)
        torch.testing.assert_close(ddim, ddpm_step(schedule, x, t, output, noise), rtol=1e-5, atol=5e-5)


def test_frames_with_different_levels_do_not_influence_each_other():
    """A window with mixed t equals its frames done one by one, to the last bit."""
    x, output = rand(2, 4, 3, 5, 5), rand(2, 4, 3, 5, 5, seed=1)
    t = torch.tensor([[5, 999, 40], [0, 700, 1]])
    for step in (lambda x, t, output: ddim_step(V_ZERO, x, t, t // 2 - 1, output, 0.7, x),
                 lambda x, t, output: ddpm_step(V_ZERO, x, t, output, x)):
        whole = step(x, t, output)
        for f in range(3):
            assert torch.equal(whole[:, :, f], step(x[:, :, f], t[:, f], output[:, :, f]))


def test_a_frame_may_rest_at_its_level():
    """t_prev = t leaves a frame as it is, pure noise and clean included: no NaN and no fresh noise."""
    x, output, t = rand(1, 4, 4, 3, 3), rand(1, 4, 4, 3, 3, seed=1), torch.tensor([[999, 94, 0, -1]])
    for eta in 0.0, 1.0:
        torch.testing.assert_close(ddim_step(V_ZERO, x, t, t, output, eta, x), x, rtol=0, atol=2e-6)


def test_a_variance_rounded_up_by_another_device_makes_no_nan(monkeypatch):
    """At eta = 1 and ᾱ = 0, 1 − ᾱ_prev − σ² is 0 in exact arithmetic and may come out below it."""
    exact = D.posterior_variance
    monkeypatch.setattr(D, "posterior_variance", lambda abar, abar_prev: exact(abar, abar_prev) * (1 + 1e-6))
    x, t = rand(1, 4, 3, 3), torch.tensor([999])
    assert ddim_step(V_ZERO, x, t, t - 100, x, eta=1.0, noise=x).isfinite().all()


def test_what_cannot_work_is_refused_with_the_way_out():
    """eps at zero SNR (only that last level), eta without noise or above 1, an unknown prediction."""
    x, t = rand(1, 4, 2, 3, 3), torch.tensor([[5, 999]])
    impossible = NoiseSchedule("eps", zero_terminal_snr=True)
    with pytest.raises(ValueError, match='use prediction="v"'):
        ddim_step(impossible, x, t, t - 1, x)
    assert impossible.to_x0(x, t - 1, x).isfinite().all()
    for eta, noise in (0.5, None), (1.5, x):
        with pytest.raises(ValueError, match=f"eta is {eta}"):
            ddim_step(EPS, x, t, t - 1, x, eta, noise)
    with pytest.raises(ValueError, match='expected "eps"'):
        NoiseSchedule("epsilon")


def test_guidance_scale_1_is_cond_and_rescaling_keeps_the_contrast():
    """Scale 0 is uncond; amount 1 gives each sample cond's std, 0 changes nothing, 0.7 as the reference."""
    cond, uncond = REFERENCE["rescale_cond"], REFERENCE["rescale_uncond"]
    torch.testing.assert_close(D.guide(cond, uncond, 1.0), cond)
    assert torch.equal(D.guide(cond, uncond, 0.0), uncond)
    guided = D.guide(cond, uncond, 9.0)
    assert_near(D.rescale_guidance(guided, cond, 0.7), "rescale_result")
    assert torch.equal(D.rescale_guidance(guided, cond, 0.0), guided)
    torch.testing.assert_close(D.rescale_guidance(guided, cond, 1.0).std((1, 2, 3)), cond.std((1, 2, 3)))


def test_min_snr_weights_match_the_reference_and_hand():
    """Also where SNR is 0, and for t (b, f)."""
    for gamma, prediction in cases("min_snr"):
        weight = D.min_snr_weight(NoiseSchedule(prediction), REFERENCE["snr_t"], float(gamma))
        torch.testing.assert_close(weight, REFERENCE[f"min_snr/{gamma}/{prediction}"], rtol=5e-5, atol=0)
    t = torch.tensor([[100, 500]])  # SNR 8.454 and 0.3819: 5/8.454 and 1; 5/9.454 and 0.3819/1.3819
    assert D.min_snr_weight(EPS, t, 5.0)[0].tolist() == pytest.approx([0.5914, 1], rel=1e-3)
    assert D.min_snr_weight(V, t, 5.0)[0].tolist() == pytest.approx([0.5289, 0.2763], rel=1e-3)
    for schedule, weight in (V_ZERO, 0), (NoiseSchedule("eps", zero_terminal_snr=True), 1):
        assert D.min_snr_weight(schedule, torch.tensor([999]), 5.0) == weight


QUOTED = {"nsr=0.33": 94, "nsr=0.66": 236, "snr=0.33": 522, "snr=0.66": 417, "snr=0.1089": 676,
          "snr=0.4356": 480, "abar=0.67": 252, "abar=0.34": 455, "abar=0.8911": 103, " T = 94 ": 94}


def test_noise_level_units_agree_and_round_trip():
    """0.33 and 0.66 in every reading; each printed or computed equivalent typed back in is the same level."""
    for text, t in QUOTED.items():
        assert parse_noise_level(text, EPS).t == t, text
    for schedule, t in [(EPS, t) for t in (0, 1, 94, 500, 999)] + [(V_ZERO, 999), (V_ZERO, 94)]:
        level = parse_noise_level(f"t={t}", schedule)
        assert level.t == t and level.abar == pytest.approx(max(schedule.alpha_bar[t].item(), 1e-8), rel=1e-4)
        for text in f"nsr={level.nsr:.3g}", f"snr={level.snr:.5g}", f"abar={level.abar!r}":
            again = parse_noise_level(text, schedule)
            assert again.t == t and again.lam == pytest.approx(level.lam, abs=0.01), text
    want = "sigma/alpha 0.33 = alpha_bar 0.902 = SNR 9.2 (9.6 dB) = t 94"
    assert str(parse_noise_level("nsr=0.33", EPS)) == want
    for text in "0", "none":
        none = parse_noise_level(text, EPS)
        assert (none.t, none.nsr, none.abar, str(none)) == (0, 0.0, 1.0, "no noise")


@pytest.mark.parametrize("text", ["", "noise", "0.33", "db=3", "nsr=x", "nsr=", "nsr=-1", "nsr=0", "nsr=20",
                                  "snr=nan", "snr=inf", "abar=1", "abar=1.5", "t=1000", "t=-1", "t=9.5"])
def test_noise_levels_that_mean_nothing_are_refused_in_one_sentence(text):
    """The message repeats what was typed and shows all four units."""
    with pytest.raises(ValueError, match=rf"level '{text}': expected nsr=0.33 .*snr=.*abar=.*t=.*none$"):
        parse_noise_level(text, EPS)


def test_frame_noise_depends_on_nothing_but_its_arguments():
    """The same bits in any order and whatever the global generator does; any int is a seed."""
    frames = {f: frame_noise(7, f, (4, 8, 8)) for f in (0, 1, 2, 120)}
    torch.rand(3)
    assert all(torch.equal(frame_noise(7, f, (4, 8, 8)), frames[f]) for f in (120, 2, 0, 1))
    assert frames[0].dtype == torch.float32 and frames[0].device.type == "cpu"
    seeds = [0, 1, -1, 2**32 - 1, 2**32, 2**63, 2**64, 2**64 - 1, -2**63, 10**30]
    assert len({frame_noise(seed, 0, (4,)).numpy().tobytes() for seed in seeds}) == len(seeds)
    with pytest.raises(ValueError, match="'middle': expected one of"):
        frame_noise(0, 0, (4,), kind="middle")


def test_frame_noise_is_normal_and_uncorrelated_between_frames_kinds_and_seeds():
    """Mean, variance and kurtosis of N(0, 1); correlations within 5 standard errors; no stream used twice."""
    n = 4 * 64 * 64
    noises = [frame_noise(seed, frame, (4, 64, 64), kind).flatten()
              for seed in (0, 1) for frame in range(8) for kind in ("start", "aug")]
    for z in noises:
        assert abs(z.mean()) < 5 * n ** -0.5 and abs(z.var() - 1) < 5 * (2 / n) ** 0.5
        assert abs((z ** 4).mean() - 3) < 5 * (96 / n) ** 0.5
    assert max(abs((a * b).mean()) for a, b in combinations(noises, 2)) < 5 * n ** -0.5
    streams = {D.mix(12345 ^ D.mix(i)) for i in range(200_000)}
    assert len(streams) == 200_000, "mix must be a bijection: two frames would share their noise"


@pytest.mark.parametrize("prediction", ["eps", "v"])
def test_leaning_on_nothing_is_the_network_itself(prediction):
    """guess 0 and e 1: bit for bit the network's output, at every level."""
    schedule = NoiseSchedule(prediction, zero_terminal_snr=prediction == "v")
    output, x_t = torch.randn(2, 2, 4, 50, 3, 3).unbind(0)
    t = torch.arange(0, 1000, 10).view(2, 50)
    assert torch.equal(D.lean_on(schedule, output, x_t, t, torch.zeros_like(x_t), torch.ones(1)), output)


@pytest.mark.parametrize("prediction", ["eps", "v"])
def test_leaning_all_the_way_answers_with_the_guess(prediction):
    """e -> 0: whatever the network says, x0_pred is the guess."""
    schedule = NoiseSchedule(prediction, zero_terminal_snr=prediction == "v")
    output, x_t, guess = torch.randn(3, 2, 4, 5, 3, 3).unbind(0)
    t = torch.tensor([[100, 300, 500, 700, 900]] * 2)
    answer = D.lean_on(schedule, output, x_t, t, guess, torch.tensor(1e-6))
    assert torch.allclose(schedule.to_x0(x_t, t, answer), guess, atol=1e-3)


def test_leaning_without_a_network_is_the_best_guess_of_a_gaussian():
    """If x0 ~ N(guess, e^2), output 0 has the error of the posterior mean, e^2 sigma^2 / D."""
    schedule, e = NoiseSchedule("v"), torch.tensor(0.4)
    guess, away, eps = torch.randn(3, 1, 4, 3, 60, 60).unbind(0)
    t = torch.tensor([[150, 450, 750]])
    x0 = guess + e * away
    x_t = schedule.q_sample(x0, t, eps)
    x0_pred = schedule.to_x0(x_t, t, D.lean_on(schedule, torch.zeros_like(x_t), x_t, t, guess, e))
    error = (x0_pred - x0).square().mean((0, 1, 3, 4))
    abar = schedule.alpha_bar[t[0]]
    assert torch.allclose(error, e ** 2 * (1 - abar) / (abar * e ** 2 + 1 - abar), rtol=0.05)


def test_starting_noise_has_unit_variance_the_stated_correlation_and_no_other_argument():
    """Frames of one video share the part rho, those of two videos nothing; 0 is each frame's own noise."""
    shape = (4, 64, 64)
    for rho in (0.0, 0.3, 0.9, 1.0):
        a, b, other = (D.start_noise(seed, frame, shape, rho) for seed, frame in ((7, 3), (7, 90), (8, 3)))
        for noise in (a, b, other):
            assert noise.mean().abs() < 0.03 and abs(noise.var() - 1) < 0.04
        assert abs((a * b).mean() - rho) < 0.03 and (a * other).mean().abs() < 0.03
        assert torch.equal(a, D.start_noise(7, 3, shape, rho))
    assert torch.equal(D.start_noise(7, 3, shape), frame_noise(7, 3, shape))
    with pytest.raises(ValueError, match="expected 0 "):
        D.start_noise(0, 0, shape, 1.5)
