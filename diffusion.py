"""Diffusion in formulas: the noise schedule, noising, what the network predicts, sampling steps, guidance.

Every frame of a video has its own noise level t (Diffusion Forcing, 2407.01392): a frame that exists already
has t near 0, one to be made starts at T - 1, pure noise. t is never the time inside the video. Throughout

    x   (b, c, f, h, w) videos with t (b, f), one level per frame, or (b,); (b, c, h, w) images with t (b,)
    t   integer 0 .. T - 1; any negative t means no noise, alpha_bar = 1: where sampling ends. The network
        never sees it: it is told 0 for a clean frame

Symbols: ᾱ = alpha_bar, ε = eps, α = √ᾱ and σ = √(1 − ᾱ) in x_t = α x0 + σ ε, SNR = ᾱ/(1 − ᾱ), λ = ln SNR.
Papers, by arXiv number: DDPM 2006.11239, DDIM 2010.02502, v-prediction 2202.00512, classifier-free guidance
2207.12598, zero terminal SNR 2305.08891, EDM 2206.00364. The frame schedule is in schedule.py.

Read `NoiseSchedule` and `ddim_step` first.
"""
import math

import numpy as np
import torch

T = 1000
TINY = 1e-20   # prevents 0/0 at ᾱ = 1 and ᾱ = 0, far below the smallest ᾱ that is not 0, about 2e-7


def at(alpha_bar, t, x):
    """ᾱ_t, 1 where t < 0, shaped to multiply x: (b, 1, 1, ...) for t (b,), (b, 1, f, 1, 1) for t (b, f).

    Always float32, so half-precision latents turn into float32: in half, 1 − ᾱ has no digits left."""
    # plain indexing would read t = -1 as the last entry: the noisiest level instead of none
    abar = torch.where(t < 0, 1.0, alpha_bar.to(t.device)[t.clamp(min=0)])
    if t.shape == x.shape[:1]:
        return abar.view(-1, *[1] * (x.ndim - 1))
    if x.ndim == 5 and t.shape == (x.shape[0], x.shape[2]):
        return abar[:, None, :, None, None]
    raise ValueError(f"t has shape {tuple(t.shape)} and x {tuple(x.shape)}: expected t (b,), one level for "
                     "each image or video, or t (b, f), one for each frame of x (b, c, f, h, w)")


class NoiseSchedule:
    """ᾱ_t for t = 0..T-1, and what the network's output means: "eps" or "v". The defaults are SD1.x.

    ᾱ_t = ∏ (1 − β_s) over s <= t, √β linear in t: the curve SD1.x calls "linear" (DDPM eq. 4).
    zero_terminal_snr: shift and scale √ᾱ to end at 0 (2305.08891 algorithm 1). Else even the noisiest frames
    of training show the mean of a picture (ᾱ = 0.0047), and sampling never makes a very dark one."""
    def __init__(self, prediction="eps", zero_terminal_snr=False, beta_start=0.00085, beta_end=0.012):
        if prediction not in ("eps", "v"):
            raise ValueError(f'prediction is {prediction!r}: expected "eps" (as SD1.x was trained) or "v"')
        self.prediction, self.zero_terminal_snr = prediction, zero_terminal_snr
        # on the CPU, even where the networks are built without numbers, on the meta device
        betas = torch.linspace(beta_start ** 0.5, beta_end ** 0.5, T, dtype=torch.float64, device="cpu") ** 2
        alpha_bar = torch.cumprod(1 - betas, dim=0)   # in float32, a thousand products lose the last digit
        if zero_terminal_snr:
            root = alpha_bar.sqrt()
            alpha_bar = ((root - root[-1]) * root[0] / (root[0] - root[-1])) ** 2
        self.alpha_bar = alpha_bar.float()            # (T,)

    def levels(self, steps):
        """The noise levels that sampling walks down: those of `ddim_timesteps`, and the last one."""
        # zero terminal SNR has to start at the last level; SD 1.x was published with levels that stop at 0
        spacing, last = ("trailing", -1) if self.zero_terminal_snr else ("leading", 0)
        return ddim_timesteps(steps, spacing) + [last]

    def q_sample(self, x0, t, eps):
        """x_t = √ᾱ x0 + √(1 − ᾱ) ε   (DDPM eq. 4): noise every frame to its own level. Shaped like x0."""
        abar = at(self.alpha_bar, t, x0)
        return abar.sqrt() * x0 + (1 - abar).sqrt() * eps

    def target(self, x0, t, eps):
        """What the network should output for x_t: ε, or v = √ᾱ ε − √(1 − ᾱ) x0   (2202.00512 section 4)."""
        abar = at(self.alpha_bar, t, x0)
        return eps if self.prediction == "eps" else abar.sqrt() * eps - (1 - abar).sqrt() * x0

    def to_x0(self, x_t, t, output):
        """x0_pred = (x_t − √(1 − ᾱ) ε)/√ᾱ (DDPM eq. 15), or √ᾱ x_t − √(1 − ᾱ) v; output is ε or v.

        ValueError for ε at ᾱ = 0: there x_t = ε, which says nothing about x0."""
        abar = at(self.alpha_bar, t, x_t)
        if self.prediction == "v":
            return abar.sqrt() * x_t - (1 - abar).sqrt() * output
        if (abar == 0).any():
            raise ValueError("eps was predicted at alpha_bar = 0, the last level of zero terminal SNR: it "
                             'says nothing about x0; use prediction="v" or zero_terminal_snr=False')
        return (x_t - (1 - abar).sqrt() * output) / abar.sqrt()

    def to_eps(self, x_t, t, output):
        """eps_pred = ε itself, or √ᾱ v + √(1 − ᾱ) x_t   (2202.00512 appendix D); output is ε or v."""
        abar = at(self.alpha_bar, t, x_t)
        return output if self.prediction == "eps" else abar.sqrt() * output + (1 - abar).sqrt() * x_t


def precondition(schedule, output, x_t, t, mean, std):
    """Combine the network's output with a prior N(mean, std²) of the clean frame, `FlowPrior` in model.py.

    These are EDM's c_skip and c_out (table 1) around a prior: v_prior is the best v without a network, and
    std/√variance the size of its error. mean 0, std 1 return the output itself; std -> 0 returns the prior.
    output, x_t, mean (b, c, f, h, w); t (b, f); std > 0 broadcasts. Returns ε or v, like output."""
    abar = at(schedule.alpha_bar, t, x_t)
    alpha, sigma = abar.sqrt(), (1 - abar).sqrt()
    variance = 1 + abar * (std ** 2 - 1)   # ᾱ std² + 1 − ᾱ, of x_t given the prior; exactly 1 at std 1
    v_prior = sigma * (alpha * (1 - std ** 2) * x_t - mean) / variance
    scale = std / variance.sqrt()
    if schedule.prediction == "v":
        return v_prior + scale * output
    return output + (scale - 1) * (output - sigma * x_t) + alpha * v_prior   # the same in ε = α v + σ x_t


def ddim_timesteps(steps, spacing="trailing"):
    """The levels a sampler visits, noisiest first: a list of ints (2305.08891 table 2).

    trailing  starts at T - 1, where training has its noisiest frames: 10 steps are 999, 899, ... 99
    leading   as SD1.x samples, with its offset of 1, to reproduce its pictures: 901, 801, ... 1
    Walk them as `zip(ts, ts[1:] + [-1])`: -1 is clean. SD1.x ends at ᾱ_0 instead: `ts[1:] + [0]`."""
    most = {"trailing": T, "leading": T - 1}.get(spacing, 0)
    if not 1 <= steps <= most:
        raise ValueError(f"{steps} {spacing} steps: expected 1 to {T} trailing or 1 to {T - 1} leading ones")
    if spacing == "leading":
        return [i * (T // steps) + 1 for i in reversed(range(steps))]
    return [round(T - i * T / steps) - 1 for i in range(steps)]


def posterior_variance(abar, abar_prev):
    """β̃ = (1 − ᾱ_prev)/(1 − ᾱ) · (1 − ᾱ/ᾱ_prev)   (DDPM eq. 7; DDIM eq. 16 squared, at η = 1)."""
    # A frame may stay at its level, ᾱ_prev = ᾱ, even at 0 or 1: the floors make its variance exactly 0.
    beta = 1 - abar.clamp(min=TINY) / abar_prev.clamp(min=TINY)
    return (1 - abar_prev) / (1 - abar).clamp(min=TINY) * beta.clamp(min=0)


def ddim_step(schedule, x_t, t, t_prev, output, eta=0.0, noise=None):
    """x_prev = √ᾱ_prev x0_pred + √(1 − ᾱ_prev − s²) eps_pred + s z, s² = η² β̃   (DDIM eq. 12, 16: σ is s).

    t, t_prev  (b,) or (b, f); a frame with t_prev = -1 becomes x0_pred, one with t_prev = t stays as it is
    output     the network's, with guidance or without; noise is z; both shaped like x_t
    eta        0 is deterministic, 1 is DDPM's ancestral sampler on these levels"""
    abar, abar_prev = at(schedule.alpha_bar, t, x_t), at(schedule.alpha_bar, t_prev, x_t)
    x0_pred = schedule.to_x0(x_t, t, output)
    eps_pred = schedule.to_eps(x_t, t, output)
    variance = eta ** 2 * posterior_variance(abar, abar_prev)
    direction = (1 - abar_prev - variance).clamp(min=0).sqrt()   # at η = 1 rounding may leave -1e-8
    x_prev = abar_prev.sqrt() * x0_pred + direction * eps_pred
    return x_prev + variance.sqrt() * noise if eta > 0 else x_prev


def ddpm_step(schedule, x_t, t, output, noise):
    """x_{t-1} = √ᾱ_{t-1} β/(1 − ᾱ) x0_pred + √α (1 − ᾱ_{t-1})/(1 − ᾱ) x_t + √β̃ z   (DDPM eq. 7), t >= 0.

    Here α = ᾱ_t/ᾱ_{t-1}, β = 1 − α. At t = 0 this is x0_pred. To compare: sampling uses `ddim_step`."""
    abar, abar_prev = at(schedule.alpha_bar, t, x_t), at(schedule.alpha_bar, t - 1, x_t)
    alpha = abar / abar_prev
    mean = (abar_prev.sqrt() * (1 - alpha) / (1 - abar) * schedule.to_x0(x_t, t, output)
            + alpha.sqrt() * (1 - abar_prev) / (1 - abar) * x_t)
    return mean + posterior_variance(abar, abar_prev).sqrt() * noise


def guide(cond, uncond, scale):
    """uncond + scale (cond − uncond)   (2207.12598 eq. 6, whose w is scale − 1); the same for ε and v."""
    return uncond + scale * (cond - uncond)


def frame_noise(seed, frame, shape, kind="start", step=0):
    """Standard normal noise of one frame, a function of its arguments and nothing else: float32 on the CPU.

    So a video does not depend on batches, the order of windows or devices, and all windows that are given a
    frame see the same noisy copy. kind: "start" for new frames, "aug" for augmentation of given ones, "fresh"
    for what a step of the sampler adds."""
    kind = ("start", "aug", "fresh").index(kind)
    # torch's CPU generator keeps 32 bits of a seed: two frames would soon share one; numpy's mixes all this
    generator = np.random.default_rng([frame, kind, step, seed < 0, abs(seed)])
    return torch.from_numpy(generator.standard_normal(shape, dtype=np.float32))


# --- units of noise ---------------------------------------------------------------------------------------
TO_ALPHA_BAR = {"nsr": lambda s: 1 / (1 + s * s), "snr": lambda s: s / (1 + s), "abar": lambda a: a}


def parse_noise_level(text, schedule):
    """Read nsr=0.33 (σ/α), snr=9.2 (power), abar=0.9 (ᾱ), t=94 or none: the nearest t, and 0 for none.

    ValueError for a bare number (0.33 could be nsr, t = 94, or snr, t = 522) or a level out of range."""
    unit, _, number = text.replace(" ", "").lower().partition("=")
    if unit in ("0", "none") and not number:
        return 0
    table = schedule.alpha_bar.tolist()               # falls as t rises
    try:
        abar = dict(enumerate(table))[int(number)] if unit == "t" else TO_ALPHA_BAR[unit](float(number))
    except (KeyError, ValueError, ZeroDivisionError):
        abar = math.nan
    # a little slack, so that printed figures can be typed back in; the sign of sigma/alpha would be lost
    if number.startswith("-") or not 0.999 * table[-1] <= abar <= 1 - 0.99 * (1 - table[0]):
        raise ValueError(f"noise level {text!r}: expected nsr=0.33 (sigma/alpha), snr=9.2 (power), abar=0.9 "
                         f"(alpha_bar), t=94 or none, from {describe_noise_level(1, schedule)} to "
                         f"{describe_noise_level(T - 1, schedule)}")
    return min(range(T), key=lambda t: abs(table[t] - abar))


def describe_noise_level(t, schedule):
    """A noise level in every unit, in words."""
    if t == 0:
        return "no noise"
    abar = max(schedule.alpha_bar[t].item(), 1e-8)    # 0 with zero terminal SNR
    snr = abar / (1 - abar)
    return (f"sigma/alpha {snr ** -0.5:.3g} = alpha_bar {abar:.3g} = SNR {float(f'{snr:.2g}'):g} "
            f"({10 * math.log10(snr):.1f} dB) = t {t}")
