"""Make a video: run a plan window by window in latent space, decode it, write it, and measure its drift.

    python sample.py --frames 121                      from a first frame that the image model draws
    python sample.py --frames 121 --image photo.png    from a picture of yours
    python sample.py --frames 121 --prompt "wind left fast, few clouds, dusk, red balloon"
    python sample.py --frames 121 --world 3            from the first frame of a test world, beside its truth
    python sample.py --frames 121 --keyframes 0:a.png 120:b.png    between pictures; --loop: back to the first
    python sample.py --resume --out out/sample_001     go on with a run that was stopped
    python sample.py --extend 60 --out out/sample_001  60 frames more
    torchrun --standalone --nproc_per_node=2 sample.py --frames 121     the same video by two processes
    python sample.py --schedule joint --max_stride 1 --radius 8 --global_frames 16    all frames at once
    python sample.py --evaluate                        schedules against the truth on 64 test worlds
    python sample.py --evaluate schedule=ladder,seed aug=none,t=20 frames=121,481      all combinations

A run writes one folder: args.json, latents.safetensors and frames/00001.png on the way, frames as soon as
they are final; then video.gif, video.webp, video.mp4 (with ffmpeg), sheet.png, drift.png and metrics.csv.
What it keeps in memory does not grow with the video, but for the plan and a few numbers of each frame.
"""

import argparse
import csv
import json
import math
import os
import shutil
import struct
import subprocess
import sys
import time
import zlib
from bisect import bisect_right
from functools import lru_cache
from itertools import groupby, product

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image, UnidentifiedImageError
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

import data
from convert_sd_weights import merge_lora
from diffusion import (NoiseSchedule, T, ddim_sample, ddim_timesteps, frame_noise, guide, parse_noise_level,
                       rescale_guidance, start_noise)
from model import (PRESETS, TEXT_TOKENS, TINY_WEIGHTS, SharedWindow, PseudoConv3d, TemporalAttention, UNet,
                   checksum, choose_device, fill, is_temporal, load_weights, nearest_given, processes,
                   read_weights)
from schedule import (SCHEDULES, STAGES, assign, by_frame, costs, cut, extension, gain, length, share, show,
                      verify)

STRIDED = ("ladder", "joint")   # schedules with strides to choose, and from given frames of any number
FILL_GAP = 16               # between known frames farther apart so much is open that --fill_steps are too few
ANIMATION_FRAMES = 241      # longer videos get no GIF and WebP, whose writers keep all frames in memory
# what --plan assumes of a process: FLOP/s, and bytes received per second, on a CPU core and on a GPU with 8
# lanes of PCIe 4
SPEEDS = {"tiny": (50e9, 1e9), "sd15": (25e12, 12e9)}
HISTORY_LEVEL = 250         # of given frames where history guidance leads away from; training has none higher
FIRST_FRAME_STEPS = 50      # at least: a picture from nothing needs more steps than a frame beside known ones
# what a preset uses where the command line is silent: DDIM steps of windows that lead on and that fill,
# guidance of both, noise of frames the model made, how joins are shown, and eta of a first frame from nothing
DEFAULTS = {"tiny": (10, 1, 1.5, 1.0, "none", "smooth", 1.0),
            "sd15": (30, 30, 7.5, 7.5, "nsr=0.33", "plain", 0.0)}


def content_flags(p):
    """What to make."""
    p.add_argument("--frames", type=int, default=121, help="length of the video; any number from 1 on")
    p.add_argument("--image", metavar="FILE", help="first frame: a picture, cropped to a square and resized")
    p.add_argument("--world", type=int, metavar="N",
                   help="first frame and caption of the N-th test world, whose truth is known")
    p.add_argument("--keyframes", nargs="+", default=[], metavar="FRAME:FILE",
                   help="pictures that the video passes through, by frame, counted from 0: 0:a.png 120:b.png")
    p.add_argument("--loop", action="store_true", help="the last frame leads back into the first")
    p.add_argument("--prompt", help="default for the tiny preset: a caption drawn with --seed. Its words: "
                   "wind left|right slow|fast, few|some|many clouds, dawn|day|dusk|night, "
                   "red|green|violet|yellow balloon")
    p.add_argument("--prompts", nargs="+", default=[], metavar="FRAME:TEXT",
                   help='the prompt from a frame on, for each segment: "0:dawn" "60:night"; before the first '
                   "of them --prompt holds")
    p.add_argument("--negative_prompt", default="", help="what guidance leads away from")
    p.add_argument("--seed", type=int, default=0, help="the same seed gives the same video, bit for bit")
    p.add_argument("--fps", type=int, default=12, help="of the written videos")


def method_flags(p):
    """How to make it."""
    p.add_argument("--schedule", default="ladder", choices=list(SCHEDULES),
                   help="which frames are made from which; joint denoises all keys together, and processes "
                   "share them frame by frame; to compare: ladder_plain fills all gaps at once, the fills of "
                   "seed_key see a key instead of the frame before")
    p.add_argument("--max_stride", type=int, default=16, help="most frames from key to key; 64 makes videos "
                   "of thousands of frames less deep, but training must have shown it; 1 with --schedule "
                   "joint denoises the whole video together")
    p.add_argument("--radius", type=int, help="a frame attends to so many others of its window to each side, "
                   "at most; for --schedule joint on several processes try 8; default all")
    p.add_argument("--global_frames", type=int, default=0, help="with --radius: so many frames, spread "
                   "evenly from the first to the last, are attended to by all others too; try 16")
    p.add_argument("--steps", type=int, help="DDIM steps of a window that starts a video or goes on; default "
                   "10 for tiny, 30 for sd15; a first frame from nothing takes at least 50")
    p.add_argument("--fill_steps", type=int, help="of a window that fills between known frames, where less "
                   "is open; default 1 for tiny, 30 for sd15")
    p.add_argument("--guidance_scale", type=float, help="how strongly the prompt leads a window that starts "
                   "a video or goes on; 1 is off and twice as fast; default 1.5 for tiny, 7.5 for sd15")
    p.add_argument("--fill_guidance_scale", type=float,
                   help="the same for a window that fills; default 1 for tiny, 7.5 for sd15")
    p.add_argument("--eta", type=float, help="how much noise the steps of a first frame from nothing add "
                   "again, 0 (DDIM) to 1 (as DDPM), so that later steps mend what earlier ones got wrong; "
                   "default 1 for tiny, 0 for sd15")
    p.add_argument("--guidance_rescale", type=float, default=0.0,
                   help="0 to 1; 0.7 tames the burnt colours of strong guidance")
    p.add_argument("--aug", help="noise level of given frames that the model made itself: nsr=0.33, snr=..., "
                   "abar=..., t=94 or none; default none for tiny, nsr=0.33 for sd15")
    p.add_argument("--context_noise", default="add", choices=("add", "label", "none"), help="add: noise is "
                   "put on these frames; label: the network is only told so; none: neither")
    p.add_argument("--joins", choices=("plain", "smooth"), help="smooth: frames where two windows meet are "
                   "shown as the cubic through their neighbours, which hides the bend there but blurs what "
                   "moves fast; default smooth for tiny, plain for sd15")


def drift_flags(p):
    """What may help against drift: all off, README.md says what they did."""
    p.add_argument("--noise_correlation", type=float, default=0.0, metavar="RHO", help="of the noise that "
                   "two frames start from, 0 to 1: more holds a video still, clouds too")
    p.add_argument("--fill_start", default="none", metavar="LEVEL", help="a fill starts from the blend of "
                   "its ends with so much noise, t=600 for example, and not from pure noise (none)")
    p.add_argument("--history_guidance", type=float, default=1.0, metavar="SCALE", help="lead away from what "
                   "the network says if given frames are noisier; 1 is off and twice as fast")
    p.add_argument("--match_colours", type=float, default=0.0, metavar="SHARE", help="move mean and "
                   "deviation of each colour to those of the first frame, 0 to 1; only where the light never "
                   "changes")


def model_flags(p):
    """What to make it with."""
    p.add_argument("--preset", default="tiny", choices=list(PRESETS))
    p.add_argument("--weights", default=None, help="default for the tiny preset: assets/tiny.safetensors")
    p.add_argument("--temporal", nargs="+", default=[], metavar="FILE",
                   help="temporal layers of training runs: each file makes the windows of its stage (video: "
                   "all), --weights the others")
    p.add_argument("--lora", nargs="+", default=[], metavar="FILE[:SCALE]", help="LoRA files for Stable "
                   "Diffusion 1.x in kohya's layout, each at full strength or times SCALE")
    p.add_argument("--batch_size", type=int, default=8,
                   help="windows that go through the UNet together; less needs less memory, and is shared "
                   "out more evenly over processes (try 2). Sums are rounded differently: +-1 of 255")
    p.add_argument("--decode_chunk", type=int, default=16, help="frames that the VAE decodes together")
    p.add_argument("--device", help="default: cuda, else mps, else cpu")


def output_flags(p):
    """Where to put it, and what else to do."""
    p.add_argument("--out", help="folder of this run; default the next free out/sample_NNN")
    p.add_argument("--resume", action="store_true", help="go on with the interrupted run in --out; what the "
                   "command line leaves out is as it was")
    p.add_argument("--extend", type=int, metavar="N", help="make the finished video in --out N frames longer")
    p.add_argument("--plan", action="store_true",
                   help="print the plan, its costs and what 2, 4 and 8 processes would gain, and stop")
    p.add_argument("--evaluate", nargs="*", metavar="FLAG=VALUE,...", help="make videos of test worlds with "
                   "every combination of these values and compare them with the truth; default "
                   "schedule=ladder,seed; --out keeps what is done: the same command goes on")
    p.add_argument("--worlds", type=int, default=64, help="how many worlds --evaluate uses; try 8 first, and "
                   "go on with more into the same --out")
    p.add_argument("--split", default="test", choices=("val", "test"),
                   help="which worlds: choose settings on val, report on test")


def parse(argv):
    """The command line of sample.py."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for add_flags in (content_flags, method_flags, drift_flags, model_flags, output_flags):
        add_flags(p)
    p.set_defaults(known=0)   # frames that were finished before --extend
    args = p.parse_args(argv)
    if args.resume or args.extend is not None:
        args = continued(p, argv, args)
    for name, value in zip(("steps", "fill_steps", "guidance_scale", "fill_guidance_scale", "aug", "joins",
                            "eta"), DEFAULTS[args.preset]):
        if getattr(args, name) is None:
            setattr(args, name, value)
    if args.weights is None:
        if args.preset != "tiny":
            raise ValueError(f"preset {args.preset} needs --weights FILE, written by convert_sd_weights.py "
                             "from a Stable Diffusion 1.x checkpoint; without weights use --preset tiny")
        args.weights = TINY_WEIGHTS
    for steps in (args.steps, args.fill_steps):
        ddim_timesteps(steps)   # says so if there cannot be so many
    if not 0 <= args.eta <= 1:
        raise ValueError(f"--eta {args.eta}: expected 0, as DDIM, to 1, as much noise as DDPM")
    if args.radius is not None and args.radius < 0 or args.global_frames < 0:
        raise ValueError(f"--radius {args.radius} --global_frames {args.global_frames}: neither can be below "
                         "0, try 8 and 16")
    if args.global_frames and args.radius is None:
        raise ValueError(f"--global_frames {args.global_frames} without --radius, where every frame attends "
                         "to all others: give --radius 8, or leave both away")
    if args.frames < 1:
        raise ValueError(f"--frames is {args.frames}: a video has at least 1 frame, try --frames 121")
    return args


def continued(parser, argv, args):
    """The arguments of the run in --out, for --resume and --extend. ValueError if argv has others."""
    extend, path = args.extend, os.path.join(args.out or "", "args.json")
    if extend is not None and (args.resume or extend < 1):
        raise ValueError(f"--extend {extend}: give the number of frames to add, at least 1, and not "
                         "--resume, which finishes what was begun; extend it then")
    if not os.path.exists(path):
        raise ValueError(f"{args.out} holds no run to go on with: leave --resume and --extend away, "
                         "or give the folder of the run as --out")
    with open(path) as file:
        old = json.load(file)
    args = parser.parse_args(argv, argparse.Namespace(**old))   # what argv leaves out stays as it was
    free = {"resume", "extend", "out", "device", "plan"} | ({"prompt", "prompts"} if extend else set())
    for name, value in vars(args).items():
        if name not in free and old.get(name, value) != value:
            raise ValueError(f"the run in {args.out} was started with --{name} {old[name]}, now it is "
                             f"{value}: give the same arguments to go on, or another --out folder")
    args.resume, args.extend = True, None
    if extend is not None:
        if args.loop:
            raise ValueError(f"{args.out} holds a loop, which has no end to extend: make a longer one")
        if not is_written(args.out, range(args.frames)):
            raise ValueError(f"the video in {args.out} is not finished: --resume it first, then --extend it")
        args.known, args.frames = args.frames, args.frames + extend
    return args


def frame_plan(args):
    """The plan of a run, checked; the frames it starts from, known to the user; first frames of its segments.

    A loop has one frame more, equal to frame 0: the windows at the end are given it, and it is not shown."""
    keys, segments = by_frame(args.keyframes, "keyframes"), by_frame(args.prompts, "prompts")
    if max([*keys, *segments], default=0) >= args.frames:
        raise ValueError(f"--keyframes and --prompts name frames 0 to {args.frames - 1} of {args.frames}, "
                         f"found {max([*keys, *segments])}: frames are counted from 0")
    if 0 in keys and (args.image or args.world is not None):
        raise ValueError(f"frame 0 is {keys[0]}, and --image or --world shows one too: leave one away")
    from_start = not keys or bool(args.image) or args.world is not None
    given = sorted({*keys, *[0] * from_start, *[args.frames] * args.loop})
    if args.loop and given[0] != 0:
        raise ValueError(f"--loop leads to frame 0, but the first picture is at {given[0]}: add one at 0")
    if args.schedule not in STRIDED and (given != [0] or args.known or args.max_stride != 16):
        raise ValueError(f"--schedule {args.schedule} only goes on from frame 0: leave it away for "
                         "--keyframes, --loop, --extend and --max_stride")
    if args.known:
        plan = extension(args.frames, args.known, args.max_stride)
    elif args.schedule in STRIDED:
        plan = SCHEDULES[args.schedule](args.frames + args.loop, given, args.max_stride)
    else:
        plan = SCHEDULES[args.schedule](args.frames)
    borders = sorted({0, *segments})
    plan = cut(plan, borders)
    verify(plan, args.frames + args.loop, range(args.known) if args.known else given)
    return plan, given, borders


def print_plan(plan, args):
    """A plan as a picture, its costs, and what sharing its windows out over processes would gain."""
    print(show(plan, args.frames + args.loop))
    print(f"plan {args.schedule}: {costs(plan)}")
    config, (batches, work) = PRESETS[args.preset], make_batches(plan, 1, args)
    size = 16 * (config.size // config.vae_factor) ** 2   # bytes of a frame: 4 channels of float32
    joint = max((len(window.frames) for window in plan if window.joint), default=0)
    shared = {devices: clip_gain(config, joint or args.frames, devices, args) for devices in (2, 4, 8)
              if devices <= (joint or args.frames)}
    for devices in (2, 4, 8):
        together, _ = shared[devices] if joint else (None, 0)
        faster, reads = gain([[window for _, window in batch] for batch in batches], work, devices, together)
        print(f"{devices} processes: {faster:.2f} times as fast as one, {faster / devices:.0%} efficient; "
              f"{reads * size / 1e6:.1f} MB of latents read from one another")
    print("{} one window of {} frames, of which each has a clip, at {:g} GFLOP/s and {:g} GB/s:".format(
        "its" if joint else "--schedule joint, as", joint or args.frames,
        *(speed / 1e9 for speed in SPEEDS[args.preset])))
    for devices, (faster, received) in shared.items():
        print(f"{devices} processes: {faster:.2f} times as fast as one, {faster / devices:.0%} efficient; "
              f"each receives {received / 1e6:.0f} MB in a step")


def scope(args):
    """Radius and number of global frames of temporal attention, as `SharedWindow` wants them."""
    return math.inf if args.radius is None else args.radius, args.global_frames


@lru_cache
def exchanges(config):
    """FLOPs of one frame in the UNet, and the shapes (c, h, w) before its temporal convs and attentions.

    From a pass of tensors that have shapes but no numbers."""
    shapes = {PseudoConv3d: [], TemporalAttention: []}
    note = lambda layer, _, out: shapes[type(layer)].append(out.shape[1:])
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        unet, side = UNet(config), config.size // config.vae_factor
        for layer in unet.modules():
            if type(layer) in shapes:
                layer.register_forward_hook(note)
        text = torch.empty(1, TEXT_TOKENS, config.text_width)
        unet(torch.empty(1, 4, 2, side, side), torch.zeros(1, 2, dtype=torch.long), text)
    return counter.get_total_flops() / 2, *shapes.values()


def clip_gain(config, n_frames, devices, args):
    """How many times as fast as one process several are that share a window; and the bytes that one receives.

    The one that has most to do decides. It computes its frames, and the first product of temporal layers, c x
    3c per pixel, again for what it reads from the others. Nothing is received while it computes."""
    flops, convs, attentions = exchanges(config)
    size = lambda shapes, power: sum(c ** power * h * w for c, h, w in shapes)
    guided, (flops_per_second, bandwidth) = passes(args.guidance_scale, args), SPEEDS[args.preset]
    clips, times, received = SharedWindow(share(n_frames, devices), 0, *scope(args)), [], []
    for clip, halo, seen in zip(clips.clips, clips.halo, clips.seen):
        halo, seen = len(halo) - len(clip), len(seen) - len(clip)       # from other clips
        work = len(clip) * flops + 6 * (halo * size(convs, 2) + seen * size(attentions, 2))
        received.append(4 * guided * (halo * size(convs, 1) + seen * size(attentions, 1)))
        times.append(guided * work / flops_per_second + received[-1] / bandwidth)
    return guided * n_frames * flops / flops_per_second / max(times), max(received)


# ------------------------------------------------------------------------------------------------------------
# Latents on disk
# ------------------------------------------------------------------------------------------------------------

class Store:
    """The latents of one video on disk: store[:, [0, 4, 8]] reads and writes like a tensor (4, f, h, w).

    A safetensors file, valid at every moment: latents (f, 4, h, w) float32 and made (f,), 0 or 1. A frame
    is marked as made after it is written, so a process that is killed loses only what it was working on (a
    power cut may lose more), and the processes of one machine can share the file. It is read and written in
    place, not mapped into memory: only the frames of a batch are ever there."""

    def __init__(self, path):
        self.path, self.file = path, open(path, "r+b", buffering=0)
        length, = struct.unpack("<Q", self.file.read(8))
        header = json.loads(self.file.read(length))
        if "made" not in header:
            raise ValueError(f"{path} was written by an older version, which kept no marks: start a new run")
        self.length, *self.shape = header["latents"]["shape"]
        self.start, self.bytes = 8 + length, 4 * math.prod(self.shape)

    @classmethod
    def create(cls, path, length, shape):
        """A store for `length` frames of latents `shape`, (4, h, w), none of them made."""
        size = length * 4 * math.prod(shape)
        header = json.dumps({
            "latents": {"dtype": "F32", "shape": [length, *shape], "data_offsets": [0, size]},
            "made": {"dtype": "U8", "shape": [length], "data_offsets": [size, size + length]}}).encode()
        header += b" " * (-len(header) % 8)   # the format wants its data aligned
        with data.complete(path) as unfinished, open(unfinished, "wb") as file:
            file.write(struct.pack("<Q", len(header)) + header)
            file.truncate(8 + len(header) + size + length)   # zeros that take no room on the disk
        return cls(path)

    def lengthen(self, length):
        """A store for more frames in place of this one, with the same latents."""
        with data.complete(self.path) as unfinished:
            longer = Store.create(unfinished, length, self.shape)
            for frame in range(self.length):
                longer[:, [frame]] = self[:, [frame]]
            for store in (self, longer):
                store.file.close()
        return Store(self.path)

    def __getitem__(self, key):
        rows = []
        for frame in key[1]:
            self.file.seek(self.start + frame * self.bytes)
            rows.append(self.file.read(self.bytes))
        latents = torch.frombuffer(bytearray(b"".join(rows)), dtype=torch.float32)
        return latents.view(-1, *self.shape).transpose(0, 1).contiguous()

    def __setitem__(self, key, latents):
        for frame, row in zip(key[1], latents.transpose(0, 1)):
            self.file.seek(self.start + frame * self.bytes)
            self.file.write(row.contiguous().numpy().tobytes())
        for frame in key[1]:
            self.file.seek(self.start + self.length * self.bytes + frame)
            self.file.write(b"\1")

    def made(self, frames):
        """Whether all these frames, in increasing order, are made."""
        self.file.seek(self.start + self.length * self.bytes + frames[0])
        marks = self.file.read(frames[-1] - frames[0] + 1)
        return all(marks[frame - frames[0]] for frame in frames)


# ------------------------------------------------------------------------------------------------------------
# Sampling
# ------------------------------------------------------------------------------------------------------------

def effort(window, args):
    """Steps and guidance scale of a window: --fill_steps and so on between known frames that are close."""
    if window.gap <= FILL_GAP:
        return args.fill_steps, args.fill_guidance_scale
    return args.steps, args.guidance_scale


def passes(scale, args):
    """How often a frame goes through the UNet in one step: guidance, of either kind, sends it twice."""
    return (1 if scale == 1 else 2) * (1 if args.history_guidance == 1 else 2)


def cost(window, args):
    """How many frames a window sends through the UNet."""
    steps, scale = effort(window, args)
    return len(window.frames) * steps * passes(scale, args)


def make_batches(plan, videos, args):
    """Lists of (video index, window) that go through the UNet together, alike and of one level; their costs.

    In an order in which they can run. Cut without regard to what is done already, or by how many processes:
    so every run multiplies the same matrices and rounds alike."""
    def kind(job):
        """What windows of a batch have in common: they run with the steps and the guidance of the first."""
        steps, scale = effort(job[1], args)
        return job[1].level, -steps, -scale, job[1].stage, len(job[1].frames)

    jobs = sorted(((video, window) for window in plan for video in range(videos)), key=kind)
    groups = [list(group) for _, group in groupby(jobs, kind)]
    size = lambda group: 1 if group[0][1].joint else args.batch_size
    batches = [group[i:i + size(group)] for group in groups for i in range(0, len(group), size(group))]
    return batches, [sum(cost(window, args) for _, window in batch) for batch in batches]


def blend_ends(x, frames, new):
    """Windows (b, c, f, h, w) with each new frame on the straight line from given frame to given frame.

    frames (b, f) say how far apart they are; given frames must lie on both sides."""
    before, after = nearest_given(~new)[..., :2].unbind(-1)                                     # (b, f) each
    a, b = frames.gather(1, before), frames.gather(1, after)
    share = ((frames - a) / (b - a).clamp(min=1)).to(x.dtype)[:, None, :, None, None]
    take = lambda places: x.gather(2, places[:, None, :, None, None].expand_as(x))
    return torch.lerp(take(before), take(after), share)


class Sampler:
    """A model with the choices of one run: how its UNet is asked, and at which noise levels.

    Contexts are (b, 77, d), one for the prompt and one for the negative prompt. `layers` holds temporal
    layers {name: tensor} by stage, if stages have files of their own, and is else empty."""

    def __init__(self, model, args, device, layers):
        self.model, self.device, self.args, self.layers = model.to(device), device, args, layers
        self.schedule = NoiseSchedule(model.config.prediction, model.config.zero_terminal_snr).to(device)
        self.aug = parse_noise_level("none" if args.context_noise == "none" else args.aug, self.schedule)
        fill_start = parse_noise_level(args.fill_start, self.schedule)
        self.fill_start = fill_start.t if fill_start.nsr > 0 else None
        # with zero terminal SNR sampling has to start at the last level; SD1.x was made with "leading" and
        # stops at level 0
        self.spacing, self.last = ("trailing", -1) if model.config.zero_terminal_snr else ("leading", 0)

    def contexts(self, prompts):
        """Text embeddings of the prompts, and of the negative prompt as often."""
        return self.model.context(prompts), self.model.context([self.args.negative_prompt] * len(prompts))

    def denoise(self, x, t_given, new, contexts, steps, scale, frames=None, clips=None, top=T - 1, weak=None,
                step_noise=None):
        """Windows (b, 4, f, h, w) with noise where `new` (b, f) -> the same windows, after `steps` steps.

        scale: of the guidance. clips: who has the other frames, if this process does not have all. top: the
        level that new frames start at. weak: for history guidance, the windows with given frames at
        HISTORY_LEVEL. step_noise: what --eta adds at each step; without it nothing."""
        positive, negative = contexts

        def say(x_t, t):
            """What the network says about x_t: eps or v, guided unless the scale is 1."""
            if scale == 1:
                return self.model.unet(x_t, t, positive, frames, ~new, clips=clips)
            twice = [torch.cat([v, v]) if v is not None else None for v in (x_t, t, frames, ~new)]
            both = torch.cat([positive, negative])
            cond, uncond = self.model.unet(*twice[:2], both, *twice[2:], clips=clips).chunk(2)
            return rescale_guidance(guide(cond, uncond, scale), cond, self.args.guidance_rescale)

        def led_by_history(x_t, t):
            """The same, led away from what it would be if the given frames were less clear (2502.06764)."""
            x_weak = torch.where(new[:, None, :, None, None], x_t, weak)
            unclear = say(x_weak, torch.where(new, t, HISTORY_LEVEL))
            return guide(say(x_t, t), unclear, self.args.history_guidance)

        levels = [(level + 1) * (top + 1) // T - 1 for level in ddim_timesteps(steps, self.spacing)]
        answer = say if weak is None else led_by_history
        eta = self.args.eta if step_noise else 0.0
        return ddim_sample(self.schedule, answer, x, t_given, new, levels + [self.last], eta, step_noise)

    def first_frames(self, seeds, prompts):
        """Pictures from the image model alone: latents (n, 4, 1, h, w).

        Nothing beside them says what is right, so a step should mend what earlier ones left half done. Where
        noise is added again it can (2206.00364, section 4)."""
        size = self.model.config.size // self.model.config.vae_factor
        noise = lambda frame: torch.stack([frame_noise(seed, frame, (4, 1, size, size))
                                           for seed in seeds]).to(self.device)
        step_noise = lambda i: noise(-1 - i)    # that of frames no video has
        new = torch.ones(len(seeds), 1, dtype=torch.bool, device=self.device)
        steps = max(self.args.steps, FIRST_FRAME_STEPS)
        t_given, scale = torch.zeros_like(new).long(), self.args.guidance_scale
        return self.denoise(noise(0), t_given, new, self.contexts(prompts), steps, scale,
                            step_noise=step_noise)

    def windows(self, jobs, latents, contexts, seeds, user, borders=(0,), rank=0, world=1):
        """Make the new frames of jobs (video index, window) of equal kind; puts them into `latents`.

        Of joint windows only those of the clip of process `rank` of `world`, all of which call this."""
        segment = lambda window: bisect_right(borders, window.new[0]) - 1
        index = torch.tensor([video * len(borders) + segment(w) for video, w in jobs], device=self.device)
        steps, scale = effort(jobs[0][1], self.args)
        # not a joint one: a process may lack the given frames on either side of its own
        from_blend = self.fill_start is not None and jobs[0][1].gap <= FILL_GAP and not jobs[0][1].joint
        lens = share(len(jobs[0][1].frames), world if jobs[0][1].joint else 1)
        clips = SharedWindow(lens, rank if len(lens) > 1 else 0, *scope(self.args))
        if len(lens) > 1:
            jobs = [(video, w.part(clips.here)) for video, w in jobs]
        frames = torch.tensor([w.frames for _, w in jobs], device=self.device)  # (b, f), like new and made
        new = torch.tensor([[frame in w.new for frame in w.frames] for _, w in jobs], device=self.device)
        made = torch.tensor([[frame not in user for frame in w.frames] for _, w in jobs], device=self.device)
        noised = made & ~new & (self.aug.t > 0)
        t_given = torch.where(noised, self.aug.t, 0)
        x = torch.stack([latents[video][:, list(window.frames)] for video, window in jobs]).to(self.device)
        shape = x[0, :, 0].shape

        def noise(draw, *how):  # of every frame by (seed, frame): the batch does not matter
            rows = [[draw(seeds[video], f, shape, *how) for f in w.frames] for video, w in jobs]
            return torch.stack([torch.stack(row, dim=1) for row in rows]).to(self.device)

        extra, start = {}, noise(start_noise, self.args.noise_correlation)
        if self.args.history_guidance != 1:
            unclear = torch.full_like(t_given, HISTORY_LEVEL)
            extra["weak"] = self.schedule.q_sample(x, unclear, noise(frame_noise, "aug"))
        if from_blend:
            extra["top"], top = self.fill_start, torch.full_like(t_given, self.fill_start)
            start = self.schedule.q_sample(blend_ends(x, frames, new), top, start)
        if self.args.context_noise == "add":
            x_t = self.schedule.q_sample(x, t_given, noise(frame_noise, "aug"))
            x = torch.where(noised[:, None, :, None, None], x_t, x)
        x = torch.where(new[:, None, :, None, None], start, x)
        contexts = [context[index] for context in contexts]
        x = self.denoise(x, t_given, new, contexts, steps, scale, frames, clips, **extra).cpu()
        if not torch.isfinite(x).all():
            raise ValueError(f"level {jobs[0][1].level} of the plan made numbers that are not finite: "
                             "try --device cpu or fewer --steps")
        for row, (video, window) in enumerate(jobs):
            places = [window.frames.index(frame) for frame in window.new]
            latents[video][:, list(window.new)] = x[row][:, places]

    @torch.no_grad()
    def run(self, plan, stores, contexts, seeds, user=(0,), borders=(0,), after_batch=None, rank=0, world=1):
        """Run a plan for several videos at once: the batches that are the share of process `rank` of `world`.

        stores: one Store per video with the `user` frames, into which the rest is written; what is made there
        is not made again. contexts: one for each video and each segment that begins at a frame of `borders`.
        after_batch() is called when frames have been made."""
        batches, work = make_batches(plan, len(stores), self.args)
        places = assign([[window for _, window in batch] for batch in batches], work, world)
        mine = [batch for batch, (device, _) in zip(batches, places) if device in (rank, None)]
        bar = tqdm(total=sum(map(len, mine)), desc="windows", unit="window", mininterval=1, disable=rank > 0)
        loaded = None
        for batch in mine:
            if all(stores[video].made(window.new) for video, window in batch):
                bar.update(len(batch))
                continue
            while not all(stores[video].made(window.given) for video, window in batch):
                time.sleep(0.002)   # another process is at work on them
            stage = batch[0][1].stage
            if self.layers and stage != loaded:
                self.model.unet.load_state_dict(self.layers[stage], strict=False)
                loaded = stage
            self.windows(batch, stores, contexts, seeds, user, borders, rank, world)
            bar.update(len(batch))
            if after_batch:
                after_batch()
        bar.close()


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


def smoothed(args, plan):
    """The frames that a run shows as the cubic through two neighbours on either side: see --joins."""
    n = args.frames
    return {f for f in joins(plan, n) if 2 <= f < n - 2} if args.joins == "smooth" else set()


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


def frame_errors(video, truth):
    """How far each frame is from the truth, (3, f, H, W) in [0, 1] each: {name: (f,)}.

    Colour: of 255. Sharp: in bits, below 0 is blurred. PSNR: in dB."""
    return {"colour": 255 * (statistics(video) - statistics(truth)).abs().mean(1),
            "sharp": (sharpness(video).clamp(min=1e-9) / sharpness(truth)).log2(),
            "psnr": psnr(video, truth)}


def measure(video, truth, world, seams):
    """Metrics of one video against the truth, (3, f, H, W) in [-1, 1] each: {name: number}, `frame_errors`.

    "Drift" compares the last 15 % of the frames with the first 15 %. Seam says whether the video moves less
    evenly where windows meet than elsewhere; a video that flickers everywhere hides its seams. So there is
    join besides: how unevenly it moves where windows meet, over how the truth does there."""
    video, truth = (video + 1) / 2, (truth + 1) / 2
    n = video.shape[1]
    part = max(1, round(0.15 * n))
    drift = lambda values: (values[-part:].mean() - values[:part].mean()).item()
    errors, bends, true_bends = frame_errors(video, truth), second_difference(video), second_difference(truth)
    at = [f - 1 for f in seams]
    spans = [(a, b) for a, b in ((1, 8), (30, 43), (60, 73), (108, 121), (228, 241), (468, 481)) if b <= n]
    return {
        "colour": drift(errors["colour"]), "sharp": drift(errors["sharp"]),
        "flicker": (bends.median() / true_bends.median()).item(),
        "seam": seam_energy(video, seams) / seam_energy(truth, seams) if seams else float("nan"),
        "join": (bends[at].median() / true_bends[at].median()).item() if seams else float("nan"),
        "speed": speed(video, world), "alive": survival(video[:, -part:], world),
        **{f"psnr {a}-{b - 1}": errors["psnr"][a:b].mean().item() for a, b in spans}}, errors


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


def frame_path(folder, frame):
    """Where a frame is written. Files count from 1."""
    return os.path.join(folder, "frames", f"{frame + 1:05d}.png")


def read_frames(folder, frames):
    """Written frames as pixels (f, H, W, 3) uint8."""
    return np.stack([np.array(Image.open(frame_path(folder, frame))) for frame in frames])


def is_written(folder, frames):
    """Whether all these frames are written, and so final."""
    return all(os.path.exists(frame_path(folder, frame)) for frame in frames)


def match_colours(video, first, share):
    """A video (3, f, H, W) with mean and deviation of each channel of each frame moved to those of `first`.

    first: (3, 1, H, W). share: how far, 0 leaves it as it is, 1 goes all the way."""
    mean, deviation = video.mean((2, 3), keepdim=True), video.std((2, 3), keepdim=True).clamp(min=1e-4)
    matched = (video - mean) / deviation * first.std((2, 3), keepdim=True) + first.mean((2, 3), keepdim=True)
    return torch.lerp(video, matched, share)


def shown(store, frames, smooth):
    """Latents (4, f, h, w) of those frames as they are decoded: frames in `smooth` from their neighbours.

    These get the cubic through two frames on either side. The network fills like a cubic, but what one window
    makes left of a frame and another right of it bends there; so the bend is shared by three frames."""
    latents = store[:, frames]
    for place, frame in enumerate(frames):
        if frame in smooth:
            near = store[:, [frame - 2, frame - 1, frame + 1, frame + 2]]
            latents[:, place] = (4 * (near[:, 1] + near[:, 2]) - near[:, 0] - near[:, 3]) / 6
    return latents


def decoded(args, model, device, store, frames, smooth=()):
    """Those frames of a video as pictures (3, f, H, W), with what the run wants done to them afterwards."""
    decode = lambda latents: model.vae.decode(latents[None].to(device), args.decode_chunk)[0].cpu()
    video = decode(shown(store, frames, smooth))
    return match_colours(video, decode(store[:, [0]]), args.match_colours) if args.match_colours else video


def write_ready(args, model, device, store, pictures, pending, smooth=()):
    """Decode and write those lists of frames in `pending` whose latents are made, and take them off it.

    pictures: {frame: (3, 1, H, W)}, given, come back as they were. smooth: set of frames, see `shown`."""
    near = lambda frames: sorted({*frames, *(f + i for f in frames if f in smooth for i in (-2, -1, 1, 2))})
    for frames in [frames for frames in pending if store.made(near(frames))]:
        video = decoded(args, model, device, store, frames, smooth)
        for place, frame in enumerate(frames):
            pixels = data.to_pixels(pictures.get(frame, video[:, place:place + 1]))[0]
            with data.complete(frame_path(args.out, frame)) as path:
                Image.fromarray(pixels).save(path)
        pending.remove(frames)


def write_mp4(folder, fps):
    """video.mp4 from the numbered frames, with ffmpeg if it is there.

    Even size and yuv420p, or browsers do not play it."""
    if shutil.which("ffmpeg") is None:
        print("no ffmpeg found: wrote no video.mp4")
        return
    scale = "scale='if(lt(iw,256),256*ceil(iw/256),ceil(iw/2)*2)':-2:flags=bicubic"
    frames = os.path.join(folder, "frames", "%05d.png")
    with data.complete(os.path.join(folder, "video.mp4")) as path:
        subprocess.run(["ffmpeg", "-y", "-loglevel", "error", "-framerate", str(fps), "-i", frames,
                        "-vf", scale, "-c:v", "libx264", "-pix_fmt", "yuv420p", "-crf", "18",
                        "-movflags", "+faststart", path], check=True)


def write_video(folder, n_frames, fps):
    """Everything one can look at, from the written frames: GIF, WebP, MP4 and a contact sheet."""
    if n_frames > ANIMATION_FRAMES:
        print(f"more than {ANIMATION_FRAMES} frames: no video.gif and video.webp, whose writers keep all "
              "frames in memory; see video.mp4 or frames")
    pixels = read_frames(folder, range(n_frames)) if n_frames <= ANIMATION_FRAMES else None
    for name in (os.path.join(folder, "video.gif"), os.path.join(folder, "video.webp")):
        if pixels is not None:
            with data.complete(name) as path:
                data.save_animation(path, pixels, fps, max(1, 256 // pixels.shape[1]))
        elif os.path.exists(name):
            os.remove(name)   # it shows the video before it was extended
    write_mp4(folder, fps)
    picked = np.linspace(0, n_frames - 1, min(32, n_frames)).round().astype(int)
    rows = [read_frames(folder, picked[i:i + 8]) for i in range(0, len(picked), 8)]
    labels = [f"frame {picked[i] + 1}" for i in range(0, len(picked), 8)]
    with data.complete(os.path.join(folder, "sheet.png")) as path:
        data.contact_sheet(rows, max(1, 128 // rows[0].shape[1]), labels).save(path)


def frame_metrics(video, truth=None, first=None):
    """Numbers about each frame, {name: (f,)}, for videos (3, f, H, W) in [0, 1]; colours are of 255.

    With a truth also its own, the PSNR, and the PSNR of copying the frame `first`, (3, 1, H, W)."""
    colour = statistics(video)
    columns = {"brightness": 255 * colour[:, :3].mean(1), "contrast": 255 * colour[:, 3:6].mean(1),
               "saturation": 255 * colour[:, 6], "sharpness": sharpness(video),
               "change": 255 * F.pad(video.diff(dim=1).abs().mean((0, 2, 3)), (0, 1))}
    if truth is not None:
        true = 255 * statistics(truth)
        columns |= {"psnr": psnr(video, truth), "copy_psnr": psnr(first.expand_as(truth), truth),
                    "true_brightness": true[:, :3].mean(1), "true_contrast": true[:, 3:6].mean(1)}
    return columns


def write_metrics(folder, n_frames, world=None, chunk=16):
    """Write metrics.csv and drift.png of the written frames; returns the columns, {name: f numbers}.

    Brightness, contrast, saturation and sharpness of every frame, and its change to the next; with a world,
    the truth, also those of frame_metrics. A few frames at a time."""
    unit = lambda pixels: torch.from_numpy(pixels).permute(3, 0, 1, 2).float() / 255
    first, columns = unit(read_frames(folder, [0])), {}
    for start in range(0, n_frames, chunk):
        frames = range(start, min(start + chunk + 1, n_frames))   # one more, to see the change to it
        truth = unit(data.to_pixels(world.video(frames))) if world else None
        part = frame_metrics(unit(read_frames(folder, frames)), truth, first)
        for name, column in part.items():   # plain numbers: small tensors left between large ones pin memory
            columns.setdefault(name, []).extend(column[:chunk].tolist())
    with data.complete(os.path.join(folder, "metrics.csv")) as path, open(path, "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["frame", *columns])
        writer.writerows([i + 1, *(f"{column[i]:.5g}" for column in columns.values())]
                         for i in range(n_frames))
    curves = {name: [(i, value - column[0]) for i, value in enumerate(column, 1)]
              for name, column in columns.items() if name.endswith(("brightness", "contrast", "saturation"))}
    with data.complete(os.path.join(folder, "drift.png")) as path:
        data.line_plot(path, curves, "change since the first frame, of 255, against the frame")
    return columns


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
        raise ValueError(f"no picture at {path}: give the path of a PNG or JPG file") from None
    except (UnidentifiedImageError, OSError) as error:
        raise ValueError(f"{path} is not a picture that can be read ({error}): give a PNG or JPG") from None
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    square = image.crop((left, top, left + side, top + side))
    return data.from_pixels(square if side == size else square.resize((size, size), Image.Resampling.LANCZOS))


def read_inputs(args, size, world, borders):
    """What the user shows and says: {frame: picture (3, 1, H, W)}, and the prompt of each segment."""
    pictures = {frame: read_image(path, size)
                for frame, path in by_frame(args.keyframes, "keyframes").items()}
    if world or args.image:
        pictures[0] = world.video([0]) if world else read_image(args.image, size)
    prompt = args.prompt
    if prompt is None:
        world = world or (data.SkyWorld(abs(args.seed)) if args.preset == "tiny" else None)
        prompt = world.caption() if world else ""
    prompts = {0: prompt} | by_frame(args.prompts, "prompts")
    return pictures, [prompts[border] for border in borders]


def open_run(args, n_frames, size):
    """Make the folder of a run, or open it again. Returns its Store, n_frames latents (4, size, size).

    It grows where a finished video is extended."""
    os.makedirs(os.path.join(args.out, "frames"), exist_ok=True)
    with data.complete(os.path.join(args.out, "args.json")) as path, open(path, "w") as file:
        json.dump(vars(args), file, indent=1)
    path = os.path.join(args.out, "latents.safetensors")
    if not os.path.exists(path):
        return Store.create(path, n_frames, (4, size, size))
    store = Store(path)
    return store if store.length >= n_frames else store.lengthen(n_frames)


def fill_in(args, store, pictures, given, model, sampler, prompt):
    """Put the frames that are known at the start into the store."""
    for frame in given:
        if store.made([frame]):
            continue
        if frame in pictures:
            store[:, [frame]] = model.vae.encode(pictures[frame][None].to(sampler.device))[0].cpu()
        elif frame == 0:
            store[:, [0]] = sampler.first_frames([args.seed], [prompt])[0].cpu()
        else:   # the frame after the last of a loop
            store[:, [frame]] = store[:, [0]]


@torch.no_grad()
def sample(args):
    """One video, from its plan to its folder.

    No latents go through the process group: the processes of one machine share the run's folder, where each
    finds what the others have made. So gloo serves on GPUs too."""
    begun, (rank, world_size) = time.time(), processes()
    wait_for_all = dist.barrier if world_size > 1 else lambda: None
    plan, given, borders = frame_plan(args)
    print(f"plan {args.schedule}: {costs(plan)}")
    for window in plan:
        if window.joint and world_size > 1:
            share(len(window.frames), world_size)   # says so if there are too few frames
            if args.guidance_rescale:
                raise ValueError(f"--guidance_rescale {args.guidance_rescale} measures whole windows, and "
                                 f"{world_size} processes share one: leave it away, or start one process")
    args.out = args.out or free_folder()
    if not args.resume and os.path.exists(os.path.join(args.out, "args.json")):
        raise ValueError(f"{args.out} already holds a run: give another --out folder, "
                         "or --resume to go on with it")
    wait_for_all()   # nobody writes before all have looked
    model, sampler, device = prepare(args)
    config = model.config
    world = data.SkyWorld(data.SPLITS["test"] + args.world, config.size) if args.world is not None else None
    pictures, prompts = read_inputs(args, config.size, world, borders)
    print("prompt: " + "; ".join(f"from frame {border} {prompt}" if border else prompt
                                 for border, prompt in zip(borders, prompts)))
    if rank == 0:
        store = open_run(args, length(plan, args.frames), config.size // config.vae_factor)
        fill_in(args, store, pictures, given, model, sampler, prompts[0])
    wait_for_all()

    store, chunk = Store(os.path.join(args.out, "latents.safetensors")), args.decode_chunk
    pending = [range(i, min(i + chunk, args.frames)) for i in range(args.known, args.frames, chunk)]
    pending = [frames for frames in pending[rank::world_size] if not is_written(args.out, frames)]
    smooth = smoothed(args, plan)
    write = lambda: write_ready(args, model, device, store, pictures, pending, smooth)
    contexts = sampler.contexts(prompts)
    sampler.run(plan, [store], contexts, [args.seed], given, borders, write, rank, world_size)
    while pending:
        write()
        time.sleep(0.002)
    wait_for_all()
    if rank == 0:
        finish(args, world, begun)


def finish(args, world, begun):
    """Write and say what is to be seen when all frames are written."""
    made = time.time()
    write_video(args.out, args.frames, args.fps)
    columns = write_metrics(args.out, args.frames, world)
    if world is not None and args.frames > 1:   # a model that does not beat copying should say so
        for name, column in (("this video", "psnr"), ("copying the first frame", "copy_psnr")):
            print(f"{name}: {np.mean(columns[column][1:]):.1f} dB against the truth")
    print(f"frames in {made - begun:.1f} s, the rest in {time.time() - made:.1f} s: "
          f"{args.frames} frames in {args.out}")
    print(f"look at {args.out}/sheet.png first, then at the video and drift.png")


# ------------------------------------------------------------------------------------------------------------
# The drift laboratory: schedules, noise levels, lengths and other choices against the truth
# ------------------------------------------------------------------------------------------------------------

BASELINES = ("VAE round trip", "copy first frame", "blend true ends")
COMPARED = ("frames", "schedule", "max_stride", "radius", "global_frames", "steps",        # may be listed
            "fill_steps", "guidance_scale", "fill_guidance_scale", "guidance_rescale", "aug", "context_noise",
            "noise_correlation", "fill_start", "history_guidance", "joins", "match_colours")


def combinations(args, argv):
    """{name: arguments} of the cells of an evaluation: every combination of the values that it lists.

    A cell has the name of its values; its arguments are those of the command line with these values."""
    lists = [item.partition("=")[::2] for item in args.evaluate or ["schedule=ladder,seed"]]
    for flag, values in lists:
        if flag not in COMPARED or not values:
            raise ValueError(f"--evaluate has {flag!r} = {values!r}: expected FLAG=VALUE,VALUE with one of "
                             f"{', '.join(COMPARED)}")
    cells = {}
    for values in product(*(values.split(",") for _, values in lists)):
        cell = parse([*argv, *(f"--{flag}={value}" for (flag, _), value in zip(lists, values))])
        if cell.schedule not in STRIDED:
            cell.max_stride = 16
        cells[" ".join(values)] = cell
    return cells


def cell_folder(args, name, cell):
    """Where a cell or baseline is kept: a folder for its length and its values of what --evaluate may list.

    So every evaluation into the same --out finds what others have made, whatever it lists."""
    if name in BASELINES:
        return os.path.join(args.out, f"{cell.frames} {name}")
    settings = {flag: getattr(cell, flag) for flag in COMPARED}
    folder = os.path.join(args.out, f"{cell.frames} {cell.schedule} {zlib.crc32(str(settings).encode()):08x}")
    os.makedirs(folder, exist_ok=True)
    data.write_json(os.path.join(folder, "settings.json"), settings)
    return folder


def claim(args, model):
    """Write down what all cells in --out have in common. ValueError if those there have something else."""
    free = {*COMPARED, "out", "device", "worlds", "batch_size", "decode_chunk", "evaluate", "fps", "plan"}
    about = {name: value for name, value in vars(args).items() if name not in free}
    about["checksum"] = checksum({f"{part}.{name}": tensor.cpu() for part, network in model.networks().items()
                                  for name, tensor in network.state_dict().items()})
    path = os.path.join(args.out, "about.json")
    old = data.read_json(path) if os.path.exists(path) else about
    different = [name for name in about if old.get(name) != about[name]]
    if different:
        raise ValueError(f"{args.out} holds an evaluation with other {', '.join(different)}: give the same "
                         "arguments and weights to go on, or another --out folder")
    os.makedirs(args.out, exist_ok=True)
    data.write_json(path, about)


def baseline(name, truth, model, device, chunk):
    """What one gets without a model of time, from the truth (3, f, H, W)."""
    if name == "copy first frame":
        return truth[:, :1].expand_as(truth)
    if name == "blend true ends":
        mix = torch.linspace(0, 1, truth.shape[1])[None, :, None, None]
        return truth[:, :1] * (1 - mix) + truth[:, -1:] * mix
    return model.vae.decode(model.vae.encode(truth[None].to(device)), chunk)[0].cpu()


def make_cell(folder, cell, plan, worlds, model, sampler):
    """The stores of one cell, {number: store}, for worlds {number: world}. What is made is not made again."""
    stores = {}
    for i, world in worlds.items():
        path = os.path.join(folder, f"{i:03d}.safetensors")
        first = model.vae.encode(world.video([0])[None].to(sampler.device))[0].cpu()
        if not os.path.exists(path):
            Store.create(path, length(plan, cell.frames), first[:, 0].shape)
        stores[i] = Store(path)
        stores[i][:, [0]] = first
    contexts = sampler.contexts([world.caption() for world in worlds.values()])
    sampler.run(plan, list(stores.values()), contexts, list(worlds))
    return stores


def measure_cell(folder, name, cell, numbers, model, sampler):
    """Make and measure those worlds of a cell or baseline that are not measured yet.

    Leaves a file for each: {"row": its metrics, "errors": those of each frame}."""
    path = lambda i: os.path.join(folder, f"{i:03d}.json")
    worlds = {i: data.SkyWorld(data.SPLITS[cell.split] + i, model.config.size) for i in numbers
              if not os.path.exists(path(i))}
    if not worlds:
        return
    os.makedirs(folder, exist_ok=True)
    plan = frame_plan(cell)[0]
    seams, smooth, frames = joins(plan, cell.frames), smoothed(cell, plan), range(cell.frames)
    stores = make_cell(folder, cell, plan, worlds, model, sampler) if name not in BASELINES else {}
    for i, world in worlds.items():
        truth = world.video(np.arange(cell.frames))
        video = (decoded(cell, model, sampler.device, stores[i], frames, smooth) if stores else
                 baseline(name, truth, model, sampler.device, cell.decode_chunk))
        row, errors = measure(video, truth, world, seams)
        data.write_whole(path(i), json.dumps({            # the columns of the table, in order
            "row": row, "errors": {key: values.tolist() for key, values in errors.items()}}))


@torch.no_grad()
def evaluate(args, argv):
    """Choices and baselines against the truth on worlds never trained on, first frame and caption given.

    Writes to --out a table with medians and bootstrap intervals, a contact sheet, plots of the error against
    the frame; and what each cell made and measured, which is kept."""
    if processes()[1] > 1:
        raise ValueError("--evaluate runs in one process: start it without torchrun")
    if args.keyframes or args.loop or args.prompts:
        raise ValueError("--evaluate starts from the first frame and the caption of test worlds: leave "
                         "--keyframes, --loop and --prompts away")
    args.out, cells = args.out or os.path.join("out", "evaluate"), combinations(args, argv)
    model, sampler, device = prepare(args)
    claim(args, model)
    by_length = {}   # {frames: {name: arguments}}, baselines first
    for name, cell in cells.items():
        by_length.setdefault(cell.frames, {one: cell for one in BASELINES})[name] = cell
    rows = [(n, name, cell) for n, row in by_length.items() for name, cell in row.items()]
    for start in range(0, args.worlds, args.batch_size):   # all cells of some worlds, then of the next
        numbers = range(start, min(start + args.batch_size, args.worlds))
        for n, name, cell in rows:
            begun, one = time.time(), Sampler(model, cell, device, sampler.layers)
            measure_cell(cell_folder(args, name, cell), name, cell, numbers, model, one)
            print(f"worlds {numbers[0]} to {numbers[-1]}, {n} frames, {name}: {time.time() - begun:.0f} s")
    measured = {n: {} for n in by_length}
    for n, name, cell in rows:
        paths = [os.path.join(cell_folder(args, name, cell), f"{i:03d}.json") for i in range(args.worlds)]
        measured[n][name] = [data.read_json(path) for path in paths]
    write_tables(args, measured)
    write_curves(args, cells, measured)
    write_sheet(args, cells, model, device)


IDEAL = {"sharp": 0, "flicker": 1, "seam": 1, "join": 1, "speed": 1, "alive": 1}


def farther(name, value, other):
    """How much farther from the truth a metric is than another value of it; below 0 it is closer."""
    if name in IDEAL:
        return abs(value - IDEAL[name]) - abs(other - IDEAL[name])
    return value - other if name == "colour" else other - value   # more dB are better


def table(title, rows):
    """A Markdown table of {name: [{metric: number} of each world]}: median [95 % bootstrap interval]."""
    metrics = list(next(iter(rows.values()))[0])
    lines = [f"| {title} | " + " | ".join(metrics) + " |", "|---" * (len(metrics) + 1) + "|"]
    for name, worlds in rows.items():
        cells = ["{:.2f} [{:.2f}, {:.2f}]".format(*interval([row[key] for row in worlds])) for key in metrics]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def write_tables(args, measured):
    """Print and write the tables of an evaluation, two for each length.

    The second says how every cell differs from the first, world by world: worlds differ more than cells."""
    parts = [f"{args.worlds} {args.split} worlds, {args.steps} and {args.fill_steps} steps, guidance "
             f"{args.guidance_scale:g} and {args.fill_guidance_scale:g}, --aug {args.aug} --context_noise "
             f"{args.context_noise} unless the name of a row says otherwise: median [95 % interval]"]
    for n, results in measured.items():
        rows = {name: [result["row"] for result in worlds] for name, worlds in results.items()}
        parts.append(table(f"{n} frames", rows))
        reference, *others = [name for name in rows if name not in BASELINES]
        beside = {name: [{key: farther(key, row[key], first[key]) for key in row}
                         for row, first in zip(rows[name], rows[reference])] for name in others}
        if beside:
            parts.append(table(f"farther from the truth than {reference} (below 0: closer)", beside))
    print("\n\n".join(parts))
    data.write_whole(os.path.join(args.out, "table.md"), "\n\n".join(parts) + "\n")


def write_curves(args, cells, measured):
    """Plots drift_*.png: error against the frame, mean over the worlds, a curve for each cell."""
    for key, title in {"colour": "colour error of 255", "sharp": "sharpness less that of the truth in bits",
                       "psnr": "PSNR in dB"}.items():
        curves = {}
        for name, cell in cells.items():
            errors = [result["errors"][key][1:] for result in measured[cell.frames][name]]   # 0 is given
            curves[name] = list(enumerate(np.mean(errors, axis=0).tolist(), 2))
        data.line_plot(os.path.join(args.out, f"drift_{key}.png"), curves,
                       f"{title}, mean over the worlds, against the frame")


def write_sheet(args, cells, model, device):
    """sheet.png: 16 frames of each of the first worlds, the truth above what the cells made."""
    strips, labels = [], []
    for i in range(min(4, args.worlds)):
        world, last = data.SkyWorld(data.SPLITS[args.split] + i, model.config.size), None
        for name, cell in sorted(cells.items(), key=lambda item: item[1].frames):
            frames = np.linspace(0, cell.frames - 1, 16).round().astype(int)
            if cell.frames != last:
                last = cell.frames
                strips.append(data.to_pixels(world.video(frames)))
                labels.append(f"world {i}: truth, {last} frames")
            store = Store(os.path.join(cell_folder(args, name, cell), f"{i:03d}.safetensors"))
            smooth = smoothed(cell, frame_plan(cell)[0])
            strips.append(data.to_pixels(decoded(cell, model, device, store, frames.tolist(), smooth)))
            labels.append(f"world {i}: {name}")
    data.contact_sheet(strips, 1, labels).save(os.path.join(args.out, "sheet.png"))


def main(argv=None):
    """The command line of sample.py."""
    argv = sys.argv[1:] if argv is None else argv
    args = parse(argv)
    if args.plan:
        print_plan(frame_plan(args)[0], args)
    elif args.evaluate is not None:
        evaluate(args, argv)
    else:
        sample(args)


if __name__ == "__main__":
    try:
        main()
    except ValueError as error:
        raise SystemExit(f"sample.py: {error}") from None
    except KeyboardInterrupt:
        raise SystemExit("stopped; finished frames are kept, --resume --out FOLDER goes on") from None
