"""The noise schedule and what follows from it: noising, what the network predicts, sampling steps, guidance.

Not the frame schedule (schedule.py). And t is never the time inside the video: it is a noise level index, 0
(almost clean) to T - 1 (noise). Every frame may have its own (Diffusion Forcing, 2407.01392), so throughout

    x   (b, c, f, h, w) videos with t (b,) or (b, f), or (b, c, h, w) images with t (b,)
    t   long; any negative t is the clean level, alpha_bar = 1

Symbols: ᾱ = alpha_bar, ε = eps, SNR = ᾱ/(1 − ᾱ), λ = ln SNR, σ/α = √((1 − ᾱ)/ᾱ) = noise over signal.
Papers, by arXiv number: DDPM 2006.11239, DDIM 2010.02502, v-prediction 2202.00512, classifier-free guidance
2207.12598, zero terminal SNR 2305.08891, Min-SNR 2303.09556.
"""
import math
from dataclasses import dataclass

import torch

T = 1000
TINY = 1e-20  # keeps 0/0 out at ᾱ = 1 and ᾱ = 0; far below the next smallest ᾱ, about 2e-7


# ---------------------------------------------------------------------------------------------- the schedule

def pick(values, t):
    """values[t], shaped like t; a negative t reads 1, the clean level."""
    # Plain indexing would read t = -1 as the last entry: the noisiest level in place of the cleanest.
    return torch.where(t < 0, 1.0, values[t.clamp(min=0)])


def at(values, t, x):
    """values (T,) at t, shaped to multiply x: (b, 1, 1, ...) for t (b,), (b, 1, f, 1, 1) for t (b, f).

    float32 whatever x is, so half latents come back as float32: in half, 1 − ᾱ has no digits left.
    """
    if t.shape == x.shape[:1]:
        return pick(values, t).view(-1, *[1] * (x.ndim - 1))
    if x.ndim == 5 and t.shape == (x.shape[0], x.shape[2]):
        return pick(values, t)[:, None, :, None, None]
    raise ValueError(f"t has shape {tuple(t.shape)} and x {tuple(x.shape)}: expected t (b,), one level for "
                     "each image or video, or t (b, f), one for each frame of x (b, c, f, h, w)")


def zero_terminal_snr(alpha_bar):
    """Shift and scale √ᾱ so that the last is 0 and the first stays (2305.08891 algorithm 1). (T,) -> (T,)

    Without it the noisiest level of training still shows the picture's mean (ᾱ = 0.0047 in SD1.x). Sampling
    starts from noise that shows nothing, and a very dark or very bright frame cannot come out.
    """
    root = alpha_bar.sqrt()
    return ((root - root[-1]) * root[0] / (root[0] - root[-1])) ** 2


def make_alpha_bar(beta_start, beta_end, terminal_zero):
    """ᾱ_t = ∏ (1 − β_s) over s <= t, √β linear in t: the curve SD1.x names "linear" (DDPM eq. 4). -> (T,)"""
    betas = torch.linspace(math.sqrt(beta_start), math.sqrt(beta_end), T, dtype=torch.float64) ** 2
    alpha_bar = torch.cumprod(1 - betas, dim=0)  # a thousand products in float32 would lose the last digit
    return (zero_terminal_snr(alpha_bar) if terminal_zero else alpha_bar).float()


class NoiseSchedule:
    """ᾱ_t for t = 0..T-1, and what the network's output means: "eps" or "v". The defaults are SD1.x."""

    def __init__(self, prediction="eps", zero_terminal_snr=False, beta_start=0.00085, beta_end=0.012):
        if prediction not in ("eps", "v"):
            raise ValueError(f'prediction is {prediction!r}: expected "eps" (as SD1.x was trained) or "v"')
        self.prediction = prediction
        self.alpha_bar = make_alpha_bar(beta_start, beta_end, zero_terminal_snr)  # (T,) float32

    def to(self, device):
        """Move ᾱ to the device of the latents; returns self."""
        self.alpha_bar = self.alpha_bar.to(device)
        return self

    def q_sample(self, x0, t, eps):
        """x_t = √ᾱ x0 + √(1 − ᾱ) ε   (DDPM eq. 4): noise every frame to its own level. Shaped like x0."""
        abar = at(self.alpha_bar, t, x0)
        return abar.sqrt() * x0 + (1 - abar).sqrt() * eps

    def target(self, x0, t, eps):
        """What the network should say about x_t: ε, or v. Shaped like x0."""
        return eps if self.prediction == "eps" else v_from(x0, eps, at(self.alpha_bar, t, x0))

    def to_x0(self, x_t, t, output):
        """x0_pred = (x_t − √(1 − ᾱ) ε)/√ᾱ (DDPM eq. 15), or √ᾱ x_t − √(1 − ᾱ) v; output is ε or v.

        Raises ValueError for ε at ᾱ = 0: there x_t = ε, which says nothing about x0.
        """
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

    def lambda_(self, t):
        """λ = ln(ᾱ/(1 − ᾱ)), shaped like t; held within ±18.4, so finite at ᾱ = 0 and ᾱ = 1."""
        abar = pick(self.alpha_bar, t)
        return abar.clamp(min=1e-8).log() - (1 - abar).clamp(min=1e-8).log()


def v_from(x0, eps, abar):
    """v = √ᾱ ε − √(1 − ᾱ) x0   (2202.00512 section 4); abar as `at` gives it."""
    return abar.sqrt() * eps - (1 - abar).sqrt() * x0


def lean_on(schedule, output, x_t, t, guess, e):
    """The answer of a network that works on what is left over by a guess at the clean frame, in eps or v.

    If x0 were known to lie around `guess` with deviation e, the best answer in v without any network would
    be v* = σ (α (1 − e²) x_t − guess) / D with D = α² e² + σ², and its error would have deviation e/√D: the
    network's v is scaled by that and added. With guess 0 and e 1 this is c_skip and c_out of EDM (2206.00364,
    table 1) at σ_data = 1, where v* = 0: the network's own answer, bit for bit. As e -> 0 it becomes the
    guess itself.

    output, x_t, guess (b, c, f, h, w); t (b, f); e > 0 broadcasts against them."""
    abar = at(schedule.alpha_bar, t, x_t)
    alpha, sigma = abar.sqrt(), (1 - abar).sqrt()
    d = 1 + abar * (e ** 2 - 1)                             # exactly 1 at e = 1, whatever alpha rounds to
    v_guess = sigma * (alpha * (1 - e ** 2) * x_t - guess) / d
    scale = e / d.sqrt()
    if schedule.prediction == "v":
        return scale * output + v_guess
    return output + (scale - 1) * (output - sigma * x_t) + alpha * v_guess  # the same with eps = α v + σ x_t


def min_snr_weight(schedule, t, gamma):
    """Loss weight that keeps the easy, almost clean levels from dominating (2303.09556). Shaped like t.

    It is min(SNR, γ) on the loss of x0: min(SNR, γ)/SNR on that of ε, min(SNR, γ)/(SNR + 1) on that of v.
    """
    abar = pick(schedule.alpha_bar, t)
    if schedule.prediction == "eps":
        return (gamma * (1 - abar) / abar).clamp(max=1)  # ᾱ = 0 divides to infinity, and weighs 1
    return torch.minimum(abar, gamma * (1 - abar))       # 1/(SNR + 1) is 1 − ᾱ: nothing left to divide


# -------------------------------------------------------------------------------------------- sampling steps

def ddim_timesteps(steps, spacing="trailing"):
    """The levels a sampler visits, noisiest first: a list of ints (2305.08891 table 2 compares the spacings).

    trailing  starts at T - 1, where training has its noisiest frames: 10 steps are 999, 899, ... 99
    leading   as LDM and SD1.x sample, with their offset of 1, to reproduce their pictures: 901, 801, ... 1
    linspace  both ends: 999, 888, ... 0

    Walk them as `zip(ts, ts[1:] + [-1])`, -1 being clean. SD1.x ends its walk at ᾱ_0 instead: `ts[1:] + [0]`.
    """
    most = T - 1 if spacing == "leading" else T
    if not 1 <= steps <= most:
        raise ValueError(f"{steps} sampling steps: expected 1 to {most} ({spacing} spacing); try 10")
    if spacing == "trailing":
        return [round(T - i * T / steps) - 1 for i in range(steps)]
    if spacing == "leading":
        return [i * (T // steps) + 1 for i in reversed(range(steps))]
    if spacing == "linspace":
        return [round(i * (T - 1) / max(steps - 1, 1)) for i in reversed(range(steps))]
    raise ValueError(f'spacing is {spacing!r}: expected "trailing", "leading" or "linspace"')


def posterior_variance(abar, abar_prev):
    """β̃ = (1 − ᾱ_prev)/(1 − ᾱ) · (1 − ᾱ/ᾱ_prev)   (DDPM eq. 7; DDIM eq. 16 squared, at η = 1)."""
    # A frame may rest at its level, ᾱ_prev = ᾱ, at either end too: the floors make its variance exactly 0.
    beta = 1 - abar.clamp(min=TINY) / abar_prev.clamp(min=TINY)
    return (1 - abar_prev) / (1 - abar).clamp(min=TINY) * beta.clamp(min=0)


def ddim_step(schedule, x_t, t, t_prev, output, eta=0.0, noise=None):
    """x_prev = √ᾱ_prev x0_pred + √(1 − ᾱ_prev − σ²) eps_pred + σ z, σ² = η² β̃   (DDIM eq. 12 and 16).

    t, t_prev  (b,) or (b, f); a frame with t_prev = -1 becomes x0_pred, one with t_prev = t stays as it is
    output     what the network says about x_t, guided or not; noise is z; both shaped like x_t
    eta        0 is deterministic, 1 is DDPM's ancestral sampler on these levels
    """
    if not 0 <= eta <= 1:
        raise ValueError(f"eta is {eta}: expected 0 (deterministic) to 1 (as much noise as DDPM)")
    if eta > 0 and noise is None:
        raise ValueError(f"eta is {eta} but noise is None: pass noise of shape {tuple(x_t.shape)}, or eta=0")
    abar, abar_prev = at(schedule.alpha_bar, t, x_t), at(schedule.alpha_bar, t_prev, x_t)
    x0_pred = schedule.to_x0(x_t, t, output)
    eps_pred = schedule.to_eps(x_t, t, output)
    variance = eta ** 2 * posterior_variance(abar, abar_prev)
    direction = (1 - abar_prev - variance).clamp(min=0).sqrt()  # η = 1 may leave 0, or -1e-8 if rounded so
    x_prev = abar_prev.sqrt() * x0_pred + direction * eps_pred
    return x_prev + variance.sqrt() * noise if eta > 0 else x_prev


def ddpm_step(schedule, x_t, t, output, noise):
    """x_{t-1} = √ᾱ_{t-1} β/(1 − ᾱ) x0_pred + √α (1 − ᾱ_{t-1})/(1 − ᾱ) x_t + √β̃ z   (DDPM eq. 7), t >= 0.

    α = ᾱ_t/ᾱ_{t-1} and β = 1 − α. At t = 0 this is x0_pred: the last step adds no noise.
    """
    abar, abar_prev = at(schedule.alpha_bar, t, x_t), at(schedule.alpha_bar, t - 1, x_t)
    alpha = abar / abar_prev
    mean = (abar_prev.sqrt() * (1 - alpha) / (1 - abar) * schedule.to_x0(x_t, t, output)
            + alpha.sqrt() * (1 - abar_prev) / (1 - abar) * x_t)
    return mean + posterior_variance(abar, abar_prev).sqrt() * noise


def guide(cond, uncond, scale):
    """uncond + scale (cond − uncond)   (2207.12598 eq. 6, whose w is scale − 1); on ε and v alike."""
    return uncond + scale * (cond - uncond)


def rescale_guidance(guided, cond, amount):
    """φ g std(cond)/std(g) + (1 − φ) g, with φ = amount   (2305.08891 eq. 14-16). Shaped like guided.

    Large guidance scales raise the contrast until colours burn; φ = 0 leaves it, 0.7 is the paper's choice.
    """
    dims = tuple(range(1, guided.ndim))  # all but the batch
    ratio = cond.std(dims, keepdim=True) / guided.std(dims, keepdim=True)
    return guided * (amount * ratio + 1 - amount)


# ----------------------------------------------------------------------------------------- noise-level units

@dataclass(frozen=True)
class NoiseLevel:
    """One noise level in every unit. All follow from lam = ln SNR, which is +inf where there is no noise."""
    lam: float
    t: int  # the index nearest to lam; also 0 without noise, so ask nsr == 0 for that

    @property
    def snr(self):
        """ᾱ/(1 − ᾱ), a ratio of powers."""
        return math.exp(self.lam)

    @property
    def nsr(self):
        """σ/α, a ratio of amplitudes: the s of x + s·noise."""
        return math.exp(-self.lam / 2)

    @property
    def abar(self):
        """ᾱ, the share of the signal in the power."""
        return 1 / (1 + math.exp(-self.lam))

    def __str__(self):
        if self.nsr == 0:
            return "no noise"
        snr = float(f"{self.snr:.2g}")  # two digits, but 1200 and not 1.2e+03
        return (f"sigma/alpha {self.nsr:.3g} = alpha_bar {self.abar:.3g} = SNR {snr:g} "
                f"({10 * math.log10(self.snr):.1f} dB) = t {self.t}")


TO_LAMBDA = {"nsr": lambda s: -2 * math.log(s), "snr": math.log, "abar": lambda a: math.log(a / (1 - a))}


def parse_noise_level(text, schedule):
    """A level typed as nsr=0.33 (σ/α), snr=9.2 (power), abar=0.9 (ᾱ), t=94 (index), 0 or none. -> NoiseLevel

    "A signal-to-noise ratio of 0.33" has meant nsr (t = 94) and snr (t = 522), so a bare number is refused.
    That, and levels the schedule does not have, raise ValueError.
    """
    table = schedule.lambda_(torch.arange(T, device=schedule.alpha_bar.device)).tolist()  # falls as t rises
    unit, _, number = text.replace(" ", "").lower().partition("=")
    if unit in ("0", "none") and not number:
        return NoiseLevel(math.inf, 0)
    try:
        lam = dict(enumerate(table))[int(number)] if unit == "t" else TO_LAMBDA[unit](float(number))
    except (KeyError, ValueError, ZeroDivisionError):
        lam = math.nan
    if not table[-1] - 0.01 <= lam <= table[0] + 0.01:  # slack, so that printed figures can be typed back in
        low, high = NoiseLevel(table[0], 0), NoiseLevel(table[-1], T - 1)
        raise ValueError(f"noise level {text!r}: expected nsr=0.33 (sigma/alpha, {low.nsr:.3g} to "
                         f"{high.nsr:.3g}), snr=9.2 (power, {high.snr:.3g} to {low.snr:.3g}), abar=0.9 "
                         f"(alpha_bar, {high.abar:.3g} to {low.abar:.3g}), t=94 (0 to {T - 1}), or none")
    return NoiseLevel(lam, min(range(T), key=lambda t: abs(table[t] - lam)))


# --------------------------------------------------------------------------------------- noise of one frame

NOISE_KINDS = {"start": 0, "aug": 1}


def mix(word):
    """A bijection of 32-bit words that scatters neighbours (MurmurHash3's fmix32)."""
    word &= 0xFFFFFFFF
    word = (word ^ word >> 16) * 0x85EBCA6B & 0xFFFFFFFF
    word = (word ^ word >> 13) * 0xC2B2AE35 & 0xFFFFFFFF
    return word ^ word >> 16


def frame_noise(seed, frame, shape, kind="start"):
    """Standard normal noise of one frame: float32 on the CPU, a function of its arguments and nothing else.

    kind  "start" for the noise sampling begins with, "aug" for the noise put on frames given to the model
    So a video does not depend on batching, window order or devices, and every window that is given a frame
    sees the same noisy copy of it. Any int is a seed.
    """
    if kind not in NOISE_KINDS:
        raise ValueError(f"noise kind is {kind!r}: expected one of {list(NOISE_KINDS)}")
    # torch's CPU generator keeps only the low 32 bits of its seed. Plain hashes that short would soon repeat
    # between frames of a long video; bijections of (frame, kind), with the seed's hash in between, never do.
    word = 0x9E3779B9
    for shift in range(0, seed.bit_length() + 1, 32):  # + 1 for the sign: -1 and 2**32 - 1 differ
        word = mix(word ^ seed >> shift)
    generator = torch.Generator().manual_seed(mix(word ^ mix(2 * frame + NOISE_KINDS[kind])))
    return torch.randn(shape, generator=generator)


def start_noise(seed, frame, shape, correlation=0.0):
    """What sampling a frame begins with: √ρ of a noise that all frames share, √(1 − ρ) of its own.

    Standard normal like `frame_noise`; two frames of a video have the correlation ρ (the mixed noise of
    PYoCo, 2305.10474). ValueError unless 0 <= ρ <= 1.
    """
    if not 0 <= correlation <= 1:
        raise ValueError(f"frames share {correlation} of their noise: expected 0 (none) to 1 (all)")
    own = frame_noise(seed, frame, shape)
    if correlation == 0:
        return own
    shared = frame_noise(seed, -1, shape)  # no video has a frame -1
    return math.sqrt(correlation) * shared + math.sqrt(1 - correlation) * own


# ----------------------------------------------------------------------------------------- a whole window

def ddim_sample(schedule, say, x, t_given, new, levels, eta=0.0, step_noise=None):
    """Denoise the frames `new` of a window, the given frames in view at every step.   (b, c, f, h, w) -> same

    say      (x_t, t) -> what the network says about x_t, guided or not
    x        noise where a frame is new, else its given latents, which are put back after every step
    t_given  (b, f) levels that the given frames stand at; new  (b, f) bool
    levels   what `ddim_timesteps` returns, and the end of the walk: [999, 899, ... 99, -1]
    eta      of `ddim_step`; above 0, step_noise(i) is the noise of the i-th step, shaped like x
    """
    given = ~new[:, None, :, None, None]
    x_t = x
    for i, (t, t_prev) in enumerate(zip(levels, levels[1:])):
        t, t_prev = torch.where(new, t, t_given), torch.where(new, t_prev, t_given)
        noise = step_noise(i) if eta > 0 else None
        x_t = torch.where(given, x, ddim_step(schedule, x_t, t, t_prev, say(x_t, t), eta, noise))
    return x_t
