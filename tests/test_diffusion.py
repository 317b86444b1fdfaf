"""Run: python -m pytest -q tests/test_diffusion.py

fixtures/schedule.safetensors holds what reference implementations of SD1.x gave in float64: the schedule,
time steps, single DDIM steps, and DDIM walks with a formula for the network.
"""
from itertools import combinations
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import diffusion as D
from diffusion import NoiseSchedule, ddim_step, ddim_timesteps, ddpm_step, frame_noise, parse_noise_level

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
    """ᾱ is SD1.x's to 1e-6, also at zero terminal SNR, and falls; x_t and v."""
    for schedule, name in (V, "alpha_bar"), (V_ZERO, "alpha_bar_zero_snr"):
        assert schedule.alpha_bar.dtype == torch.float32
        torch.testing.assert_close(schedule.alpha_bar.double(), REFERENCE[name], rtol=1e-6, atol=0)
        assert (D.at(schedule.alpha_bar, torch.arange(-1, D.T), torch.zeros(1 + D.T)).diff() < 0).all()
    abar = D.at(EPS.alpha_bar, REFERENCE["snr_t"], REFERENCE["snr"])
    torch.testing.assert_close(abar / (1 - abar), REFERENCE["snr"], rtol=5e-5, atol=0)
    x0, eps, t = REFERENCE["q_x0"], REFERENCE["q_eps"], REFERENCE["q_t"]
    assert_near(EPS.q_sample(x0, t, eps), "q_x_t")
    assert_near(V.target(x0, t, eps), "q_v")
    assert torch.equal(EPS.target(x0, t, eps), eps)


def test_timesteps_match_the_reference_and_bad_requests_are_refused():
    """Every stored step count in both spacings; 1000 trailing steps visit every level."""
    for steps, spacing in cases("timesteps"):
        assert ddim_timesteps(int(steps), spacing) == REFERENCE[f"timesteps/{steps}/{spacing}"].tolist()
    assert ddim_timesteps(D.T) == list(range(D.T))[::-1]
    for steps, spacing in (0, "trailing"), (1001, "trailing"), (1000, "leading"), (10, "karras"):
        with pytest.raises(ValueError, match="expected 1 to 1000 trailing"):
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
        x, states, levels = REFERENCE["walk_start"], [], ddim_timesteps(int(steps), spacing) + [0]
        for i, (t, t_prev) in enumerate(zip(levels, levels[1:])):
            output = D.guide(network(x, t, 0), network(x, t, 1), float(scale))
            noise, per_frame = REFERENCE["walk_noise"][i % 10], torch.ones(1, 3, dtype=torch.long)
            x = ddim_step(schedule, x, t * per_frame, t_prev * per_frame, output, float(eta), noise)
            states.append(x)
        assert_near(torch.stack(states)[-len(REFERENCE[name]):], name, 1e-4)


@every_schedule
def test_a_perfect_output_gives_back_x0_and_eps_at_any_mix_of_levels(schedule):
    """t (b, f), t (b,), images; and the DDIM step to clean is x0_pred bit for bit, whatever eta."""
    x0, eps = rand(2, 4, 5, 3, 3), rand(2, 4, 5, 3, 3, seed=1)
    last = 999 if schedule is V_ZERO else 900
    t = torch.tensor([[-1, 0, 94, 500, last], [last, 3, 250, 0, 700]])
    for x0, eps, t in (x0, eps, t), (x0, eps, t[:, 4]), (x0[:, :, 0], eps[:, :, 0], t[:, 0]):
        x_t, output = schedule.q_sample(x0, t, eps), schedule.target(x0, t, eps)
        x0_pred = schedule.to_x0(x_t, t, output)
        torch.testing.assert_close(x0_pred, x0, rtol=0, atol=2e-5)
        torch.testing.assert_close(schedule.to_eps(x_t, t, output), eps, rtol=0, atol=2e-5)
        assert torch.equal(ddim_step(schedule, x_t, t, torch.full_like(t, -1), output, 1.0, eps), x0_pred)


@every_schedule
def test_ddim_at_eta_1_over_neighbouring_levels_is_ddpm(schedule):
    """So the references for DDIM check DDPM too."""
    x, output, noise = (rand(1, 4, 5, 3, 3, seed=seed) for seed in range(3))
    t = torch.tensor([[0, 1, 50, 500, 999]])
    ddim = ddim_step(schedule, x, t, t - 1, output, eta=1.0, noise=noise)
    torch.testing.assert_close(ddim, ddpm_step(schedule, x, t, output, noise), rtol=1e-5, atol=5e-5)


def test_frames_with_different_levels_do_not_influence_each_other():
    """A window with mixed t equals its frames done one by one, to the last bit."""
    x, output, t = rand(2, 4, 3, 5, 5), rand(2, 4, 3, 5, 5, seed=1), torch.tensor([[5, 999, 40], [0, 700, 1]])
    for step in (lambda x, t, output: ddim_step(V_ZERO, x, t, t // 2 - 1, output, 0.7, x),
                 lambda x, t, output: ddpm_step(V_ZERO, x, t, output, x)):
        frames = [step(x[:, :, f], t[:, f], output[:, :, f]) for f in range(3)]
        assert torch.equal(step(x, t, output), torch.stack(frames, dim=2))


def test_a_frame_may_stay_at_its_level():
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
    """eps at zero SNR (only that last level), a wrong prediction or t."""
    x, t, impossible = rand(1, 4, 2, 3, 3), torch.tensor([[5, 999]]), NoiseSchedule("eps", True)
    assert impossible.to_x0(x, t - 1, x).isfinite().all()
    for call, words in ((lambda: ddim_step(impossible, x, t, t - 1, x), 'use prediction="v"'),
                        (lambda: NoiseSchedule("epsilon"), 'expected "eps"'),
                        (lambda: EPS.q_sample(x, t.repeat(1, 2), x), r"\(1, 4\) and x \(1, 4, 2, 3, 3\)")):
        with pytest.raises(ValueError, match=words):
            call()


@every_schedule
def test_a_prior_is_all_of_the_answer_where_it_is_certain_and_nothing_where_it_knows_nothing(schedule):
    """std -> 0: x0_pred is its mean; mean 0 and std 1: the output of the network, bit for bit."""
    output, x_t, mean = (rand(2, 4, 50, 3, 3, seed=seed) for seed in range(3))
    t = torch.arange(0, 1000, 10).view(2, 50)
    same = D.precondition(schedule, output, x_t, t, torch.zeros_like(x_t), torch.ones(1))
    assert torch.equal(same, output)
    x0_pred = schedule.to_x0(x_t, t, D.precondition(schedule, output, x_t, t, mean, torch.tensor(1e-6)))
    torch.testing.assert_close(x0_pred, mean, rtol=0, atol=1e-3)


def test_a_prior_without_a_network_is_as_good_as_the_posterior_mean_of_a_gaussian():
    """If x0 ~ N(mean, std^2), v = 0 has its error, std^2 sigma^2 / (alpha^2 std^2 + sigma^2); eps as well."""
    std, t = torch.tensor(0.4), torch.tensor([[150, 450, 750]])
    mean, away, eps = (rand(1, 4, 3, 60, 60, seed=seed) for seed in range(3))
    x0, abar = mean + std * away, V.alpha_bar[t[0]]
    x_t = V.q_sample(x0, t, eps)
    for schedule, output in (V, torch.zeros_like(x_t)), (EPS, V.to_eps(x_t, t, torch.zeros_like(x_t))):
        x0_pred = schedule.to_x0(x_t, t, D.precondition(schedule, output, x_t, t, mean, std))
        error, exact = (x0_pred - x0).square().mean((0, 1, 3, 4)), 1 / (1 / std ** 2 + abar / (1 - abar))
        torch.testing.assert_close(error, exact, rtol=0.05, atol=0)


def test_noise_level_units_agree_and_round_trip():
    """0.33 and 0.66 in every reading; every unit of a printed level, typed back in, is the same level."""
    for text, t in {"nsr=0.33": 94, "nsr=0.66": 236, "snr=0.33": 522, "snr=0.66": 417, "abar=0.67": 252,
                    "abar=0.8911": 103, " T = 94 ": 94, "none": 0, "0": 0}.items():
        assert parse_noise_level(text, EPS) == t, text
    for schedule, t in [(EPS, t) for t in (0, 1, 94, 500, 999)] + [(V_ZERO, 999), (V_ZERO, 94)]:
        snr = max(schedule.alpha_bar[t].item(), 1e-8) / (1 - schedule.alpha_bar[t].item())
        for text in f"t={t}", f"nsr={snr ** -0.5:.3g}", f"snr={snr:.5g}", f"abar={snr / (1 + snr)!r}":
            assert parse_noise_level(text, schedule) == t, text
    assert D.describe_noise_level(0, EPS) == "no noise"
    assert D.describe_noise_level(94, EPS) == "sigma/alpha 0.33 = alpha_bar 0.902 = SNR 9.2 (9.6 dB) = t 94"


@pytest.mark.parametrize("text", ["", "noise", "0.33", "db=3", "nsr=x", "nsr=", "nsr=-1", "nsr=0", "nsr=20",
                                  "snr=nan", "snr=inf", "abar=1", "abar=1.5", "t=1000", "t=-1", "t=9.5"])
def test_noise_levels_that_mean_nothing_are_refused_in_one_sentence(text):
    """The message repeats what was typed and shows all four units."""
    with pytest.raises(ValueError, match=f"level '{text}': expected nsr=0.33 .*snr=.*abar=.*t=.*none, from"):
        parse_noise_level(text, EPS)


def test_frame_noise_depends_on_nothing_but_its_arguments():
    """The same bits in any order and whatever the global generator does; any int is a seed."""
    frames = [frame_noise(7, f, (4, 8, 8)) for f in (0, 1, 120)]
    torch.rand(3)
    assert all(torch.equal(frame_noise(7, f, (4, 8, 8)), frames.pop()) for f in (120, 1, 0))
    seeds = [0, 1, -1, 2**32 - 1, 2**32, 2**63, 2**64, 2**64 - 1, -2**63, 10**30]
    assert len({frame_noise(seed, 0, (4,)).numpy().tobytes() for seed in seeds}) == len(seeds)


def test_frame_noise_is_normal_and_uncorrelated_between_frames_kinds_and_seeds():
    """Mean, variance and kurtosis of N(0, 1); correlations within 5 standard errors; no stream used twice."""
    n = 4 * 64 * 64
    noises = [frame_noise(seed, frame, (4, 64, 64), kind).flatten()
              for seed in (0, 1) for frame in range(8) for kind in ("start", "aug", "fresh")]
    for z in noises:
        assert abs(z.mean()) < 5 * n ** -0.5 and abs(z.var() - 1) < 5 * (2 / n) ** 0.5
        assert abs((z ** 4).mean() - 3) < 5 * (96 / n) ** 0.5
    assert max(abs((a * b).mean()) for a, b in combinations(noises, 2)) < 5 * n ** -0.5
    streams = {frame_noise(0, frame, (2,), "fresh", step).numpy().tobytes()
               for frame in range(4000) for step in (0, 9)}
    assert len(streams) == 8000
