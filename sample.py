"""Make a video: run a plan window by window in latent space, decode it, write it, and measure its drift.

    python sample.py --frames 121                      from a first frame that the image model draws
    python sample.py --frames 121 --image photo.png    from a picture of yours
    python sample.py --frames 121 --prompt "wind left fast, few clouds, dusk, red balloon"
    python sample.py --frames 121 --world 3            from the first frame of a test world, beside its truth
    python sample.py --evaluate                        schedules against the truth on 64 test worlds

A run writes one folder: args.json, frames/00001.png, video.gif, video.webp, video.mp4 (with ffmpeg),
sheet.png, drift.png, metrics.csv and latents.safetensors.
"""

import argparse
import csv
import json
import os
import shutil
import subprocess
import time

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, UnidentifiedImageError
from safetensors import safe_open
from safetensors.torch import save_file
from tqdm import tqdm

import data
from convert_sd_weights import merge_lora
from diffusion import (NoiseSchedule, ddim_sample, ddim_timesteps, frame_noise, guide, parse_noise_level,
                       rescale_guidance)
from model import PRESETS, TINY_WEIGHTS, choose_device, fill, is_temporal, load_weights, read_weights
from schedule import PLANNERS, STAGES, show, stats, verify

FIRST_FRAME_STEPS = 20      # at least: a picture from nothing needs more steps than a frame beside known ones
# what a preset uses where the command line is silent: DDIM steps of windows that lead on and that fill,
# guidance, noise of frames the model made
DEFAULTS = {"tiny": (10, 1, 1.0, "none"), "sd15": (30, 30, 7.5, "nsr=0.33")}


def parse(argv):
    """The command line of sample.py."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    # what to make
    p.add_argument("--frames", type=int, default=121, help="length of the video; any number from 1 on")
    p.add_argument("--image", metavar="FILE", help="first frame: a picture, cropped to a square and resized")
    p.add_argument("--world", type=int, metavar="N",
                   help="first frame and caption of the N-th test world, whose truth is known")
    p.add_argument("--prompt", help="default for the tiny preset: a caption drawn with --seed. Its words: "
                   "wind left|right slow|fast, few|some|many clouds, dawn|day|dusk|night, "
                   "red|green|violet|yellow balloon")
    p.add_argument("--negative_prompt", default="", help="what guidance leads away from")
    p.add_argument("--seed", type=int, default=0, help="the same seed gives the same video, bit for bit")
    p.add_argument("--fps", type=int, default=12, help="of the written videos")
    # how
    p.add_argument("--schedule", default="ladder", choices=list(PLANNERS),
                   help="which frames are made from which")
    p.add_argument("--steps", type=int, help="DDIM steps of a window that starts a video or goes on; default "
                   "10 for tiny, 30 for sd15; a first frame from nothing takes at least 20")
    p.add_argument("--fill_steps", type=int, help="of a window that fills between known frames, where less "
                   "is open; default 1 for tiny, 30 for sd15")
    p.add_argument("--guidance_scale", type=float,
                   help="1 is off and twice as fast; default 1 for tiny, 7.5 for sd15")
    p.add_argument("--guidance_rescale", type=float, default=0.0,
                   help="0 to 1; 0.7 tames the burnt colours of strong guidance")
    p.add_argument("--aug", help="noise level of given frames that the model made itself: nsr=0.33, snr=..., "
                   "abar=..., t=94 or none; default none for tiny, nsr=0.33 for sd15")
    p.add_argument("--context_noise", default="add", choices=("add", "label", "none"), help="add: noise is "
                   "put on these frames; label: the network is only told so; none: neither")
    # with what
    p.add_argument("--preset", default="tiny", choices=list(PRESETS))
    p.add_argument("--weights", default=None, help="default for the tiny preset: assets/tiny.safetensors")
    p.add_argument("--temporal", nargs="+", default=[], metavar="FILE",
                   help="temporal layers of training runs: each file makes the windows of its stage (video: "
                   "all), --weights the others")
    p.add_argument("--lora", nargs="+", default=[], metavar="FILE[:SCALE]", help="LoRA files for Stable "
                   "Diffusion 1.x in kohya's layout, each at full strength or times SCALE")
    p.add_argument("--batch_size", type=int, default=8,
                   help="windows that go through the UNet together; less needs less memory")
    p.add_argument("--decode_chunk", type=int, default=16, help="frames that the VAE decodes together")
    p.add_argument("--device", help="default: cuda, else mps, else cpu")
    # where, and what else
    p.add_argument("--out", help="folder of this run; default the next free out/sample_NNN")
    p.add_argument("--resume", action="store_true", help="go on with the interrupted run in --out")
    p.add_argument("--plan", action="store_true", help="print the plan and stop")
    p.add_argument("--evaluate", nargs="*", choices=list(PLANNERS), metavar="SCHEDULE",
                   help="compare schedules, default all, with the truth on test worlds")
    p.add_argument("--worlds", type=int, default=64, help="how many worlds --evaluate uses")
    p.add_argument("--split", default="test", choices=("val", "test"),
                   help="which worlds: choose settings on val, report on test")
    args = p.parse_args(argv)
    for name, value in zip(("steps", "fill_steps", "guidance_scale", "aug"), DEFAULTS[args.preset]):
        if getattr(args, name) is None:
            setattr(args, name, value)
    if args.weights is None:
        if args.preset != "tiny":
            raise ValueError(f"preset {args.preset} needs --weights FILE, written by convert_sd_weights.py "
                             "from a Stable Diffusion 1.x checkpoint; without weights use --preset tiny")
        args.weights = TINY_WEIGHTS
    for steps in (args.steps, args.fill_steps):
        ddim_timesteps(steps)   # says so if there cannot be so many
    if args.frames < 1:
        raise ValueError(f"--frames is {args.frames}: a video has at least 1 frame, try --frames 121")
    return args


# ------------------------------------------------------------------------------------------------------------
# Sampling
# ------------------------------------------------------------------------------------------------------------

class Sampler:
    """A model with the choices of one run: how its UNet is asked, and at which noise levels.

    Contexts are (b, 77, d), one for the prompt and one for the negative prompt. `layers` holds temporal
    layers {name: tensor} by stage, if stages have files of their own, and is else empty."""

    def __init__(self, model, args, device, layers):
        self.model, self.device, self.args, self.layers = model.to(device), device, args, layers
        self.schedule = NoiseSchedule(model.config.prediction, model.config.zero_terminal_snr).to(device)
        self.aug = parse_noise_level("none" if args.context_noise == "none" else args.aug, self.schedule)
        # with zero terminal SNR sampling has to start at the last level; SD1.x was made with "leading" and
        # stops at level 0
        self.spacing, self.last = ("trailing", -1) if model.config.zero_terminal_snr else ("leading", 0)

    def contexts(self, prompts):
        """Text embeddings of the prompts, and of the negative prompt as often."""
        return self.model.context(prompts), self.model.context([self.args.negative_prompt] * len(prompts))

    def denoise(self, x, t_given, new, contexts, steps, frames=None):
        """Windows (b, 4, f, h, w) with noise where `new` (b, f) -> the same windows, after `steps` steps."""
        positive, negative = contexts
        scale = self.args.guidance_scale

        def say(x_t, t):
            """What the network says about x_t: eps or v, guided unless the scale is 1."""
            if scale == 1:
                return self.model.unet(x_t, t, positive, frames, ~new)
            twice = [torch.cat([v, v]) if v is not None else None for v in (x_t, t, frames, ~new)]
            both = torch.cat([positive, negative])
            cond, uncond = self.model.unet(*twice[:2], both, *twice[2:]).chunk(2)
            return rescale_guidance(guide(cond, uncond, scale), cond, self.args.guidance_rescale)

        levels = ddim_timesteps(steps, self.spacing) + [self.last]
        return ddim_sample(self.schedule, say, x, t_given, new, levels)

    def first_frames(self, seeds, prompts):
        """Pictures from the image model alone: latents (n, 4, 1, h, w)."""
        size = self.model.config.size // self.model.config.vae_factor
        noise = torch.stack([frame_noise(seed, 0, (4, 1, size, size)) for seed in seeds]).to(self.device)
        new = torch.ones(len(seeds), 1, dtype=torch.bool, device=self.device)
        steps = max(self.args.steps, FIRST_FRAME_STEPS)
        return self.denoise(noise, torch.zeros_like(new).long(), new, self.contexts(prompts), steps)

    def windows(self, jobs, latents, contexts, seeds, user):
        """Make the new frames of jobs (video index, window) of equal kind; puts them into `latents`."""
        index = torch.tensor([video for video, _ in jobs], device=self.device)
        frames = torch.tensor([w.frames for _, w in jobs], device=self.device)  # (b, f), like new and made
        new = torch.tensor([[frame in w.new for frame in w.frames] for _, w in jobs], device=self.device)
        made = torch.tensor([[frame not in user for frame in w.frames] for _, w in jobs], device=self.device)
        noised = made & ~new & (self.aug.t > 0)
        t_given = torch.where(noised, self.aug.t, 0)
        x = torch.stack([latents[video][:, list(window.frames)] for video, window in jobs]).to(self.device)
        shape = x[0, :, 0].shape

        def noise(kind):  # of every frame by (seed, frame): the batch does not matter
            rows = [[frame_noise(seeds[video], f, shape, kind) for f in w.frames] for video, w in jobs]
            return torch.stack([torch.stack(row, dim=1) for row in rows]).to(self.device)

        if self.args.context_noise == "add":
            x_t = self.schedule.q_sample(x, t_given, noise("aug"))
            x = torch.where(noised[:, None, :, None, None], x_t, x)
        x = torch.where(new[:, None, :, None, None], noise("start"), x)
        steps = self.args.fill_steps if jobs[0][1].stage == "interp" else self.args.steps
        x = self.denoise(x, t_given, new, [context[index] for context in contexts], steps, frames)
        for row, (video, window) in enumerate(jobs):
            for place, frame in enumerate(window.frames):
                if frame in window.new:
                    latents[video][:, frame] = x[row, :, place].cpu()

    @torch.no_grad()
    def run(self, plan, latents, contexts, seeds, user=(0,), after_level=None, done=()):
        """Run a plan for several videos at once, level by level, in batches of equal stage and length.

        latents: (n, 4, frames, h, w) on the CPU with the `user` frames filled in; the rest is written in
        place. after_level(latents, frames made so far) is called when a level is complete. `done` frames are
        not made again."""
        bar = tqdm(total=len(plan) * len(seeds), desc="windows", unit="window", mininterval=1)
        known = set(user) | set(done)
        for level in range(max((window.level for window in plan), default=-1) + 1):
            todo = [window for window in plan if window.level == level and not set(window.new) <= known]
            kind = lambda window: (window.stage, len(window.frames))  # what goes through the UNet together
            for stage, length in sorted(set(map(kind, todo))):
                if self.layers:
                    self.model.unet.load_state_dict(self.layers[stage], strict=False)
                jobs = [(video, w) for w in todo if kind(w) == (stage, length) for video in range(len(seeds))]
                for start in range(0, len(jobs), self.args.batch_size):
                    batch = jobs[start:start + self.args.batch_size]
                    self.windows(batch, latents, contexts, seeds, user)
                    bar.update(len(batch))
            known |= {frame for window in todo for frame in window.new}
            if not torch.isfinite(latents[:, :, sorted(known)]).all():
                raise ValueError(f"level {level} of the plan made numbers that are not finite: "
                                 "try --device cpu or fewer --steps")
            if after_level:
                after_level(latents, sorted(known))
        bar.close()
        return latents


def empty_latents(videos, plan, n_frames, config, size):
    """Room for every frame of a plan, padding included: zeros (n, 4, frames, h, w)."""
    length = max([n_frames - 1, *(frame for window in plan for frame in window.frames)]) + 1
    return torch.zeros(videos, 4, length, size // config.vae_factor, size // config.vae_factor)


# ------------------------------------------------------------------------------------------------------------
# Metrics: how a video differs from the truth at its end, compared with its start
# ------------------------------------------------------------------------------------------------------------

def statistics(video):
    """Colour statistics of each frame of a video (3, f, H, W) in [0, 1]: (f, 7).

    Mean RGB, deviation of RGB, mean saturation."""
    spread = video.amax(0) - video.amin(0)
    return torch.cat([video.mean((2, 3)).T, video.std((2, 3)).T, spread.mean((1, 2))[:, None]], dim=1)


def sharpness(video):
    """Variance of the Laplacian of the brightness of each frame: (f,)."""
    y = video.mean(0)[:, None]
    kernel = torch.tensor([[0.0, 1, 0], [1, -4, 1], [0, 1, 0]])[None, None]
    return F.conv2d(y, kernel).var((1, 2, 3))


def second_difference(video):
    """mean |x_{f+1} - 2 x_f + x_{f-1}| for each inner frame: (f - 2,).

    Steady motion hardly counts, flicker does."""
    return (video[:, 2:] - 2 * video[:, 1:-1] + video[:, :-2]).abs().mean((0, 2, 3))


def joins(plan, n_frames):
    """Inner frames where two windows meet.

    They are given to both, with the frame before made by one and the one after by the other."""
    maker = {frame: i for i, window in enumerate(plan) for frame in window.new}
    meets = lambda f: (f - 1 in maker and f + 1 in maker and maker[f - 1] != maker[f + 1]
                       and f in plan[maker[f - 1]].given and f in plan[maker[f + 1]].given)
    return [f for f in range(1, n_frames - 1) if meets(f)]


def seam_energy(video, seams):
    """Median second difference at the frames `seams`, divided by the median at the other inner frames."""
    energy = second_difference(video)
    at = torch.zeros(len(energy), dtype=torch.bool)
    at[[f - 1 for f in seams]] = True
    return (energy[at].median() / energy[~at].median().clamp(min=1e-9)).item()


def balloon_pixels(video, colour):
    """Which pixels have the hue of a balloon: bool (f, H, W).

    Hue is the direction of a colour away from grey."""
    hue = torch.tensor(data.BALLOONS[colour]) / 255
    hue = hue - hue.mean()
    chroma = video - video.mean(0)
    length = chroma.norm(dim=0)
    cosine = (chroma * hue[:, None, None, None]).sum(0) / (length * hue.norm() + 1e-6)
    return (cosine > 0.93) & (length > 0.45 * hue.norm())


def cloud_pixels(video, world):
    """Which pixels of the upper half show neither a balloon nor the sun or moon: bool (f, H/2, W)."""
    _, f, h, w = video.shape
    hidden = torch.stack([balloon_pixels(video, colour) for colour in world.colours]).any(0)
    hidden = F.pad(hidden.float(), (3, 3), mode="circular")            # the world is a cylinder
    hidden = F.max_pool2d(hidden, 7, stride=1, padding=(3, 0)) > 0     # the trail and the basket too
    x, y = (torch.arange(w) + 0.5) / w, (torch.arange(h)[:, None] + 0.5) / h
    for lamp in torch.from_numpy(world.lamps(np.arange(f))).float()[..., None, None]:  # (f, 2, 1, 1)
        hidden |= data.sideways(x, lamp[:, 0]) ** 2 + (y - lamp[:, 1]) ** 2 < 0.15 ** 2  # with its glow
    return ~hidden[:, : h // 2]


def speed(video, world, lag=8):
    """How fast the clouds drift, as a multiple of the true wind: 1 is right, 0 is frozen.

    The shift that best explains the sky `lag` frames later, searched from -0.5 to 2 times the truth."""
    sky = video.mean(0)[:, : video.shape[2] // 2]  # (f, rows, W)
    # light and gradients do not drift
    sky = sky - F.avg_pool1d(F.pad(sky, (12, 12), mode="circular"), 25, stride=1)
    clear = cloud_pixels(video, world)
    multiples = torch.linspace(-0.5, 2, 51)
    freqs = torch.fft.rfftfreq(sky.shape[2])
    wrong = []
    for multiple in multiples:  # moving by a fraction of a pixel is a phase in Fourier space
        shift = multiple * lag * world.wind * sky.shape[2]
        phase = torch.exp(-2j * torch.pi * freqs * shift)
        moved = torch.fft.irfft(torch.fft.rfft(sky[:-lag]) * phase, n=sky.shape[2])
        both = clear[:-lag].roll(round(shift.item()), dims=2) & clear[lag:]
        wrong.append(((moved - sky[lag:]).abs() * both).sum() / both.sum())
    return multiples[torch.stack(wrong).argmin()].item()


def survival(video, world):
    """Share of frames and balloons where at least a third of the balloon's disc can be found: 0 to 1."""
    disc = torch.pi * (data.BALLOON_RADIUS * video.shape[-1]) ** 2
    found = [balloon_pixels(video, colour).sum((1, 2)) > disc / 3 for colour in world.colours]
    return torch.stack(found).float().mean().item()


def psnr(video, truth):
    """Peak signal-to-noise ratio of each frame in dB, for videos in [0, 1]: (f,)."""
    return -10 * (video - truth).square().mean((0, 2, 3)).clamp(min=1e-10).log10()


def measure(video, truth, world, seams):
    """All metrics of one video against the truth, (3, f, H, W) in [-1, 1] each: {name: number}.

    "Drift" compares the last 15 % of the frames with the first 15 %."""
    video, truth = (video + 1) / 2, (truth + 1) / 2
    n = video.shape[1]
    part = max(1, round(0.15 * n))
    drift = lambda values: (values[-part:].mean() - values[:part].mean()).item()
    colour = (statistics(video) - statistics(truth)).abs().mean(1)
    sharp = (sharpness(video).clamp(min=1e-9) / sharpness(truth)).log2()
    quality = psnr(video, truth)
    spans = [(a, b) for a, b in ((1, 8), (30, 43), (60, 73), (108, 121)) if b <= n]
    return {
        "colour": 255 * drift(colour), "sharp": drift(sharp),
        "flicker": (second_difference(video).median() / second_difference(truth).median()).item(),
        "seam": seam_energy(video, seams) / seam_energy(truth, seams) if seams else float("nan"),
        "speed": speed(video, world), "alive": survival(video[:, -part:], world),
        **{f"psnr {a}-{b - 1}": quality[a:b].mean().item() for a, b in spans}}


def interval(values, seed=0):
    """Median of a list, and the bootstrap interval that holds it with 95 %: (median, low, high)."""
    values = np.array(values)
    picks = np.random.default_rng(seed).integers(len(values), size=(1000, len(values)))
    medians = np.median(values[picks], axis=1)
    return float(np.median(values)), *np.percentile(medians, (2.5, 97.5)).tolist()


# ------------------------------------------------------------------------------------------------------------
# Writing
# ------------------------------------------------------------------------------------------------------------

def free_folder():
    """The first of out/sample_001, out/sample_002 ... that does not exist."""
    number = 1
    while os.path.exists(path := os.path.join("out", f"sample_{number:03d}")):
        number += 1
    return path


def save_latents(path, latents, frames):
    """Write latents (1, 4, f, h, w) with the list of the frames that are finished.

    The file is complete under its name or not there."""
    save_file({"latents": latents.contiguous(), "frames": torch.tensor(frames)}, f"{path}.tmp")
    os.replace(f"{path}.tmp", path)


def write_mp4(folder, fps):
    """video.mp4 from the numbered frames, with ffmpeg if it is there.

    Even size and yuv420p, or browsers do not play it."""
    if shutil.which("ffmpeg") is None:
        print("no ffmpeg found: wrote video.webp and video.gif but no video.mp4")
        return []
    scale = "scale='if(lt(iw,256),256*ceil(iw/256),ceil(iw/2)*2)':-2:flags=bicubic"
    frames, path = os.path.join(folder, "frames", "%05d.png"), os.path.join(folder, "video.mp4")
    subprocess.run(["ffmpeg", "-y", "-loglevel", "error", "-framerate", str(fps), "-i", frames, "-vf", scale,
                    "-c:v", "libx264", "-pix_fmt", "yuv420p", "-crf", "18", "-movflags", "+faststart", path],
                   check=True)
    return [path]


def write_video(folder, pixels, fps):
    """Everything one can look at. pixels (f, H, W, 3) uint8.

    Numbered frames, GIF, WebP, MP4 and a contact sheet."""
    os.makedirs(os.path.join(folder, "frames"), exist_ok=True)
    for i, frame in enumerate(pixels):
        Image.fromarray(frame).save(os.path.join(folder, "frames", f"{i + 1:05d}.png"))
    scale = max(1, 256 // pixels.shape[1])
    for name in ("video.gif", "video.webp"):
        data.save_animation(os.path.join(folder, name), pixels, fps, scale)
    write_mp4(folder, fps)
    shown = np.linspace(0, len(pixels) - 1, min(32, len(pixels))).round().astype(int)
    rows = [pixels[shown[i:i + 8]] for i in range(0, len(shown), 8)]
    labels = [f"frame {shown[i] + 1}" for i in range(0, len(shown), 8)]
    data.contact_sheet(rows, max(1, 128 // pixels.shape[1]), labels).save(os.path.join(folder, "sheet.png"))


def write_metrics(folder, video, truth=None):
    """Write metrics.csv and drift.png. video, truth: (3, f, H, W) in [-1, 1].

    Brightness, contrast, saturation and sharpness of every frame, and its change to the next; with a truth
    also the PSNR."""
    video = (video + 1) / 2
    colour = statistics(video)
    columns = {"brightness": 255 * colour[:, :3].mean(1), "contrast": 255 * colour[:, 3:6].mean(1),
               "saturation": 255 * colour[:, 6], "sharpness": sharpness(video),
               "change": 255 * F.pad(video.diff(dim=1).abs().mean((0, 2, 3)), (0, 1))}
    if truth is not None:
        columns["psnr"] = psnr(video, (truth + 1) / 2)
    with open(os.path.join(folder, "metrics.csv"), "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["frame", *columns])
        writer.writerows([i + 1, *(f"{column[i].item():.5g}" for column in columns.values())]
                         for i in range(video.shape[1]))
    curves = {name: list(enumerate((columns[name] - columns[name][0]).tolist(), 1))
              for name in ("brightness", "contrast", "saturation")}
    if truth is not None:
        true = 255 * statistics((truth + 1) / 2)
        curves["true bright."] = list(enumerate((true[:, :3].mean(1) - true[0, :3].mean()).tolist(), 1))
        curves["true contrast"] = list(enumerate((true[:, 3:6].mean(1) - true[0, 3:6].mean()).tolist(), 1))
    data.line_plot(os.path.join(folder, "drift.png"), curves,
                   "change since the first frame, of 255, against the frame")


# ------------------------------------------------------------------------------------------------------------
# Runs
# ------------------------------------------------------------------------------------------------------------

def lora_scale(item):
    """FILE or FILE:SCALE -> the path and the scale, 1 if not given."""
    path, _, scale = item.rpartition(":")
    try:
        return path, float(scale)
    except ValueError:
        return item, 1.0


def prepare(args):
    """Device, model and sampler of a run, and one line about each."""
    device, why = choose_device(args.device)
    model = load_weights(args.weights, args.preset)
    for item in args.lora:
        path, scale = lora_scale(item)
        layers, unknown = merge_lora(model, path, scale)
        print(f"{path}: {layers} layers merged, times {scale:g}"
              + (f"; no place for {len(unknown)} tensors: {', '.join(unknown)}" if unknown else ""))
    temporal = lambda: {name: p.clone() for name, p in model.unet.state_dict().items() if is_temporal(name)}
    layers = {stage: temporal() for stage in STAGES} if args.temporal else {}
    for path in args.temporal:
        _, _, about, tensors = read_weights(path)
        fill(model, tensors, path, parts=("unet",), temporal="only")
        layers |= {stage: temporal() for stage in STAGES if about["stage"] in (stage, "video")}
        print(f"temporal layers of {path} make the windows of stage {about['stage']}")
    hints = {stage: layers[stage]["temporal_hint.weight"] if layers else model.unet.temporal_hint.weight
             for stage in STAGES}
    fresh = [stage for stage, hint in hints.items() if not hint.any()]   # it starts at zero
    if args.frames > 1 and fresh:
        print(f"the temporal layers of stage {', '.join(fresh)} are untrained: every frame is a picture of "
              "its own; train them and give their file as --temporal")
    sampler = Sampler(model, args, device, layers)
    print(f"device: {device} ({why})")
    print(f"noise of given frames the model made: {sampler.aug} ({args.context_noise})")
    return model, sampler, device


def read_image(path, size):
    """A picture file as a first frame (3, 1, size, size) in [-1, 1]: the middle square, resized."""
    try:
        with Image.open(path) as image:
            image = image.convert("RGB")
    except FileNotFoundError:
        raise ValueError(f"no picture at {path}: give the path of a PNG or JPG file to --image") from None
    except (UnidentifiedImageError, OSError) as error:
        raise ValueError(f"{path} is not a picture that can be read ({error}): "
                         "give a PNG or JPG file to --image") from None
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    square = image.crop((left, top, left + side, top + side))
    return data.from_pixels(square if side == size else square.resize((size, size), Image.Resampling.LANCZOS))


def first_frame(args, model, sampler, device):
    """What a run starts from.

    Pixels (3, 1, H, W) or None, latents (1, 4, 1, h, w) and the prompt, and its truth or None."""
    size = model.config.size
    world = data.SkyWorld(data.SPLITS["test"] + args.world, size) if args.world is not None else None
    prompt = args.prompt
    if prompt is None:
        shown = world or (data.SkyWorld(abs(args.seed)) if args.preset == "tiny" else None)
        prompt = shown.caption() if shown else ""
    picture = world.video([0]) if world else read_image(args.image, size) if args.image else None
    if picture is None:
        return None, sampler.first_frames([args.seed], [prompt]).cpu(), prompt, None
    latents = model.vae.encode(picture[None].to(device)).cpu()
    return picture, latents, prompt, world and world.video(np.arange(args.frames))


def resumed(args):
    """Finished latents and frames of the run in --out.

    It must have been started with the same arguments."""
    path = os.path.join(args.out, "args.json")
    if not os.path.exists(path):
        raise ValueError(f"{args.out} holds no run to resume: leave --resume away, "
                         "or give the folder of the run as --out")
    with open(path) as file:
        old = json.load(file)
    for name, value in vars(args).items():
        if name not in ("resume", "out", "batch_size", "decode_chunk", "device") and old.get(name) != value:
            raise ValueError(f"the run in {args.out} was started with --{name} {old.get(name)}, now it is "
                             f"{value}: give the same arguments to resume it, or another --out folder")
    latents = os.path.join(args.out, "latents.safetensors")
    if not os.path.exists(latents):
        return None, []
    with safe_open(latents, framework="pt") as file:
        return file.get_tensor("latents"), file.get_tensor("frames").tolist()


@torch.no_grad()
def sample(args):
    """One video, from its plan to its folder."""
    begun = time.time()
    plan = PLANNERS[args.schedule](args.frames)
    verify(plan, args.frames)
    numbers = stats(plan)
    print(f"plan {args.schedule}: {len(plan)} windows, {numbers['evals']} frame evaluations per step, "
          f"{numbers['levels']} levels")
    args.out = args.out or free_folder()
    if not args.resume and os.path.exists(os.path.join(args.out, "args.json")):
        raise ValueError(f"{args.out} already holds a run: give another --out folder, "
                         "or --resume to go on with it")
    latents, done = resumed(args) if args.resume else (None, [])
    model, sampler, device = prepare(args)
    picture, first, prompt, truth = first_frame(args, model, sampler, device)
    print(f"prompt: {prompt}")
    os.makedirs(args.out, exist_ok=True)
    with open(os.path.join(args.out, "args.json"), "w") as file:
        json.dump(vars(args), file, indent=1)

    if latents is None:
        latents = empty_latents(1, plan, args.frames, model.config, model.config.size)
        latents[:, :, :1] = first
    path = os.path.join(args.out, "latents.safetensors")
    sampler.run(plan, latents, sampler.contexts([prompt]), [args.seed], done=done,
                after_level=lambda latents, frames: save_latents(path, latents, frames))
    latents = latents[:, :, :args.frames]                 # the seed schedule's padding is dropped
    save_latents(path, latents, list(range(args.frames)))
    sampled = time.time()
    video = model.vae.decode(latents.to(device), args.decode_chunk)[0].cpu()
    if picture is not None:
        video[:, :1] = picture                            # a frame that was given comes back as it was
    write_video(args.out, data.to_pixels(video), args.fps)
    write_metrics(args.out, video, truth)
    if truth is not None and args.frames > 1:             # a model that does not beat copying should say so
        ahead = slice(1, None)
        for name, made in (("this video", video), ("copying the first frame", picture.expand_as(truth))):
            print(f"{name}: {psnr((made + 1) / 2, (truth + 1) / 2)[ahead].mean():.1f} dB against the truth")
    print(f"sampled in {sampled - begun:.1f} s, decoded and written in {time.time() - sampled:.1f} s: "
          f"{args.frames} frames in {args.out}")
    print(f"look at {args.out}/sheet.png first, then at video.webp and drift.png")
    return video


@torch.no_grad()
def evaluate(args):
    """Schedules and baselines against the truth on worlds never trained on, first frame given.

    Prints a table with medians and bootstrap intervals and writes it, a contact sheet and a plot to --out."""
    args.out = args.out or os.path.join("out", "evaluate")
    if os.path.exists(os.path.join(args.out, "table.md")):
        raise ValueError(f"{args.out} already holds a table: give another --out folder")
    model, sampler, device = prepare(args)
    worlds = [data.SkyWorld(data.SPLITS[args.split] + i, model.config.size) for i in range(args.worlds)]
    n, latent_of = args.frames, lambda video: model.vae.encode(video[None].to(device)).cpu()
    truths = [world.video(np.arange(n)) for world in worlds]
    decode = lambda latents: model.vae.decode(latents[None, :, :n].to(device), args.decode_chunk)[0].cpu()
    round_trip = [decode(latent_of(truth)[0]) for truth in truths]
    mix = torch.linspace(0, 1, n)[None, :, None, None]
    videos = {"VAE round trip": round_trip,
              "copy first frame": [truth[:, :1].expand_as(truth) for truth in truths],
              "blend true ends": [truth[:, :1] * (1 - mix) + truth[:, -1:] * mix for truth in truths]}
    first = torch.stack([latent_of(truth[:, :1])[0] for truth in truths])
    contexts = sampler.contexts([world.caption() for world in worlds])
    plans = {name: PLANNERS[name](n) for name in args.evaluate or PLANNERS}
    for name, plan in plans.items():
        latents = empty_latents(len(worlds), plan, n, model.config, model.config.size)
        latents[:, :, :1] = first
        begun = time.time()
        sampler.run(plan, latents, contexts, list(range(len(worlds))))
        videos[name] = [decode(row) for row in latents]
        print(f"{name}: {(time.time() - begun) / len(worlds):.1f} s per video")
    seams = {name: joins(plans.get(name) or PLANNERS["ladder"](n), n) for name in videos}
    rows = {name: [measure(v, truth, world, seams[name]) for v, truth, world in zip(made, truths, worlds)]
            for name, made in videos.items()}
    write_table(args, rows)
    os.makedirs(args.out, exist_ok=True)
    shown = np.linspace(0, n - 1, 16).round().astype(int)
    compared = {"truth": truths, **{name: videos[name] for name in plans}}
    few = range(min(4, len(worlds)))
    strips = [data.to_pixels(made[i][:, shown]) for i in few for made in compared.values()]
    labels = [f"world {i}: {name}" for i in few for name in compared]
    data.contact_sheet(strips, 1, labels).save(os.path.join(args.out, "sheet.png"))
    error = lambda v, t: 255 * (statistics((v + 1) / 2) - statistics((t + 1) / 2)).abs().mean(1)  # (f,)
    mean_error = lambda made: torch.stack([error(v, t) for v, t in zip(made, truths)]).mean(0)
    curves = {name: list(enumerate(mean_error(made).tolist(), 1)) for name, made in videos.items()}
    data.line_plot(os.path.join(args.out, "drift.png"), curves,
                   "colour error of 255 against the frame, mean over the worlds")


def write_table(args, rows):
    """Print and write the table of an evaluation: median [95 % bootstrap interval] of each metric."""
    names = list(next(iter(rows.values()))[0])
    lines = ["| | " + " | ".join(names) + " |", "|---" * (len(names) + 1) + "|"]
    for row, measured in rows.items():
        cells = ["{:.2f} [{:.2f}, {:.2f}]".format(*interval([m[name] for m in measured])) for name in names]
        lines.append(f"| {row} | " + " | ".join(cells) + " |")
    settings = (f"{args.worlds} {args.split} worlds, {args.frames} frames, {args.steps} and "
                f"{args.fill_steps} steps, --aug {args.aug} --context_noise {args.context_noise}: "
                "median [95 % interval]")
    table = "\n".join([settings, "", *lines])
    print(table)
    os.makedirs(args.out, exist_ok=True)
    with open(os.path.join(args.out, "table.md"), "w") as file:
        file.write(table + "\n")


def main(argv=None):
    """The command line of sample.py."""
    args = parse(argv)
    if args.plan:
        plan = PLANNERS[args.schedule](args.frames)
        print(show(plan, args.frames))
    elif args.evaluate is not None:
        evaluate(args)
    else:
        sample(args)


if __name__ == "__main__":
    try:
        main()
    except ValueError as error:
        raise SystemExit(f"sample.py: {error}") from None
