"""Make a video: follow a plan window by window in latent space, decode the frames, measure how they drift.

    python sample.py --frames 121                      the model draws the first frame, too
    python sample.py --frames 121 --image photo.png    from a picture of yours
    python sample.py --resume --out out/sample_001     finish a run that was stopped

A run leaves one folder: args.json, latents/ and frames/ with a file per frame, video.gif, video.webp,
video.mp4 (with ffmpeg), sheet.png, drift.png and metrics.csv. Nothing but the plan grows in memory with the
video. `torchrun --standalone --nproc_per_node=2 sample.py ...` shares the work and gives the same bytes, if
all have as many threads (OMP_NUM_THREADS): other numbers of threads round sums differently.

Read `denoise_window` first, then `Sampler.run`: the method is in these two. The rest is files and flags.
"""
import argparse
import copy
import json
import math
import os
import subprocess
import sys
import time
import zlib
from bisect import bisect_right
from datetime import timedelta
from functools import partial
from itertools import groupby

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image, ImageOps
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from tqdm import tqdm

import data
from convert_sd_weights import lora_file, merge_lora
from diffusion import ddim_step, describe_noise_level, frame_noise, guide, parse_noise_level
from model import (TEXT_TOKENS, TINY_WEIGHTS, ClipParallel, checksum, complete, fill, is_temporal,
                   load_weights, plain_errors, read_weights)
from schedule import FIRST_FRAME, PLANNERS, STAGES, assign, by_frame, costs, plan_video, share, show

# what a preset uses where the command line is silent; sd15's are usual ones, aug lxj616's: not measured here
DEFAULTS = {
    "tiny": dict(steps=8, guidance_scale=1.5, temperature=0.1, aug="none", batch_size=8, decode_chunk=16),
    "sd15": dict(steps=30, guidance_scale=7.5, temperature=1.0, aug="nsr=0.33", batch_size=1, decode_chunk=1)}
DTYPES = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}    # of --mixed_precision
FIRST_FRAME_STEPS = 50      # at least: a picture from nothing needs more steps than a frame beside others


@torch.no_grad()
def denoise_window(unet, schedule, latents, frames, new, text, prompt_start, levels, scale=1.0, seeds=(0,),
                   t_given=None, eta=0.0, clips=None, temperature=1.0):
    """Make the new frames of a batch of windows.   latents (b, 4, f, h, w) -> the same shape

    latents  hold the given frames, which come back bit for bit; what they hold at new frames is ignored
    frames   (b, f) absolute frame numbers; new (b, f) bool; seeds: one per window
    text     (context, context of the negative prompt), each (b, 77, d); scale: of guidance, 1 is off
    prompt_start  (b,) the frame at which the prompt took over from another; -inf if none did
    levels   the noise levels that new frames walk down: [999, 749, 499, 249, -1]
    t_given  (b, f) noise augmentation: the level that each given frame is raised to; 0, the default, is clean
    eta      0 is DDIM, 1 adds fresh noise at every step, like DDPM (see `ddim_step`)
    clips    a `ClipParallel`: which part of the windows this process has, and which frames attend to which
    temperature  new frames start as noise times this: below 1 their error is lower and seeds differ less"""
    pick = lambda mask, a, b: torch.where(mask[:, None, :, None, None], a, b)
    t_given = torch.zeros_like(frames) if t_given is None else t_given

    def noise(kind, step=0):
        draw = lambda seed, frame: frame_noise(seed, frame, latents[0, :, 0].shape, kind, step)
        return torch.stack([torch.stack([draw(seed, frame) for frame in row], dim=1)
                            for seed, row in zip(seeds, frames.tolist())]).to(latents.device)

    # classifier-free guidance: the network is asked with the prompt and, beside it, with the negative prompt
    rows = lambda v: v if scale == 1 else torch.cat([v, v])
    context = text[0] if scale == 1 else torch.cat(text)
    # Given frames stay at their own low noise level. The network is told the level of every frame.
    kept, noised = latents, ~new & (t_given > 0)
    if noised.any():
        kept = pick(noised, schedule.q_sample(latents, t_given, noise("aug")), latents)
    x = pick(new, temperature * noise("start"), kept)
    for step, (level, next_level) in enumerate(zip(levels, levels[1:])):
        t, t_prev = torch.where(new, level, t_given), torch.where(new, next_level, t_given)
        output = unet(rows(x), rows(t), context, rows(frames), rows(~new), rows(prompt_start), clips=clips)
        output = output.float() if scale == 1 else guide(*output.float().chunk(2), scale)
        fresh = noise("fresh", step) if eta > 0 else None
        x = pick(new, ddim_step(schedule, x, t, t_prev, output, eta, fresh), kept)
    return pick(new, x, latents)


# --- running a plan ---------------------------------------------------------------------------------------
class Sampler:
    """A model, and the choices of a run. rank, world: which process this is, of how many."""
    def __init__(self, args, rank=0, world=1):
        """Load what the command line names, and fill in the defaults of the preset. Says what it found."""
        self.args, self.rank, self.world, self.scope = args, rank, world, args.scope or (math.inf, 0)
        self.device, why = choose_device(args.device, work=not args.plan)
        auto = "no" if self.device.type == "cpu" else "fp16"
        self.dtype = DTYPES[auto if args.mixed_precision == "auto" else args.mixed_precision]
        self.model = model = load_weights(args.weights or TINY_WEIGHTS, dtype=self.dtype)
        self.schedule, side = model.unet.schedule, model.config.size // model.config.vae_factor
        self.shape = (4, side, side)    # of the latents of a frame
        for name, value in DEFAULTS[model.config.name].items():
            if getattr(args, name) is None:
                setattr(args, name, value)
        for item in args.lora:
            path, scale = lora_file(item)
            count, unknown = merge_lora(model, path, scale)
            print(f"{path}: {count} layers merged, times {scale:g}; no place for {unknown or 'none'}")
        temporal = lambda: {key: p for key, p in model.unet.state_dict().items() if is_temporal(key)}
        self.layers = dict.fromkeys(STAGES, temporal())     # the temporal layers for the windows of a stage
        for path in args.temporal:
            _, _, about, tensors = read_weights(path)
            fill(model, tensors, path, only=is_temporal, dtype=self.dtype)
            self.layers |= {stage: temporal() for stage in STAGES if about["stage"] in (stage, "video")}
            print(f"temporal layers of {path} make the windows of stage {about['stage']}")
        trained = lambda state: any(p.any() for key, p in state.items() if key.endswith(".temporal.weight"))
        untrained = [stage for stage, state in self.layers.items() if not trained(state)]
        if args.frames > 1 and untrained:
            print(f"temporal layers of stage {', '.join(untrained)} are untrained: give others as --temporal")
        self.schedule.levels(args.steps)   # says so if there cannot be so many
        self.aug = parse_noise_level(args.aug, self.schedule)
        print(f"device: {self.device} ({why}), computing in {self.dtype}; "
              f"noise augmentation of given frames: {describe_noise_level(self.aug, self.schedule)}")

    def autocast(self):
        """Inside this, networks compute in the precision of the run."""
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32)

    def use(self, part):
        """Move a network to the device, and the others away: only the one at work needs room there."""
        self.model.to("cpu", self.model.networks().keys() - {part})
        self.model.to(self.device, [part])

    def text(self, prompts):
        """The contexts of prompts, and as many of the negative prompt: (n, 77, d) each."""
        self.use("text")
        with self.autocast():
            return [self.model.context(texts).float() for texts in (
                prompts, [self.args.negative_prompt] * len(prompts))]

    def vae(self, way, x):
        """"encode" pictures (3, f, H, W), or "decode" latents (4, f, h, w), to the CPU."""
        self.use("vae")
        x, vae, chunk = x[None].to(self.device), self.model.vae, self.args.decode_chunk
        with self.autocast():
            out = getattr(vae, way)(x, chunk)
        if not torch.isfinite(out).all():      # fp16 ends at 65504
            out = getattr(copy.deepcopy(vae).float(), way)(x, chunk)
            if not torch.isfinite(out).all():
                raise ValueError(f"the VAE cannot {way} this: its numbers, or its weights, are not finite")
        return out[0].float().cpu()

    def guidance(self, window):
        """Off in infill, which follows the frames around it: there it would double the work for little."""
        return self.args.guidance_scale if window.gap > self.args.max_stride else 1.0

    @torch.no_grad()
    def run(self, plan, store, text, seed, user=(0,), borders=(0,)):
        """Run this process's share of a plan. The `user` frames are in the store; what it holds is kept.
        text: a row per segment of the video; segments begin at the frames `borders`."""
        # Batches depend neither on what is done nor on the number of processes: same matrices, same rounding.
        kind = lambda window: (window.depth, window.stage, self.guidance(window), len(window.frames))
        batches, size, loaded = [], self.args.batch_size, None
        for _, group in groupby(sorted(plan, key=kind), kind):
            group = list(group)
            batches += [group[i:i + size] for i in range(0, len(group), size)]
        work = [sum(len(window.frames) for window in batch) for batch in batches]
        places = assign(batches, work, self.world)
        mine = [batch for batch, (process, _) in zip(batches, places) if process in (self.rank, None)]
        for batch in tqdm(mine, "batches", mininterval=1, disable=self.rank > 0):
            if all(store.made(window.new) for window in batch):
                continue
            while not all(store.made(window.given) for window in batch):
                time.sleep(0.002)   # another process is making them
            if self.layers[batch[0].stage] is not loaded:
                loaded = self.layers[batch[0].stage]
                self.model.unet.load_state_dict(loaded, strict=False, assign=True)   # no copy into old ones
            self.make(batch, store, text, seed, user, borders)

    def make(self, batch, store, text, seed, user=(), borders=(0,)):
        """Make the new frames of windows of one kind. Of a joint window each process makes its own clip."""
        self.use("unet")
        first, tensor = batch[0], lambda rows: torch.tensor(rows, device=self.device)
        segments = [bisect_right(borders, window.new[0]) - 1 for window in batch]
        prompt_start = tensor([borders[segment] if segment else -math.inf for segment in segments])
        steps, eta, temperature = self.args.steps, 0.0, self.args.temperature
        if not first.given:
            # a picture from nothing has all of its noise; fresh noise lets later steps mend early mistakes
            # (2206.00364, section 4)
            steps, eta, temperature = max(steps, FIRST_FRAME_STEPS), 1.0, 1.0
        rank, world = (self.rank, self.world) if first.joint else (0, 1)
        clips = ClipParallel(share(len(first.frames), world), rank, *self.scope)   # of 1: the whole window
        rows = [window.frames[clips.here] for window in batch]                                     # (b, f)
        frames, ours = tensor(rows), tensor([[frame not in user for frame in row] for row in rows])
        new = tensor([[frame in window.new for frame in row] for row, window in zip(rows, batch)])
        t_given = torch.where(ours & ~new, self.aug, 0)      # the user's frames stay clean
        latents = torch.stack([store.read(row) for row in rows]).to(self.device)
        with self.autocast():
            latents = denoise_window(
                self.model.unet, self.schedule, latents, frames, new, [context[segments] for context in text],
                prompt_start, self.schedule.levels(steps), self.guidance(first), [seed] * len(batch),
                t_given, eta, clips, temperature).cpu()
        if not torch.isfinite(latents).all():
            raise ValueError(f"frames {first.new} came out as numbers that are not finite: try "
                             "--mixed_precision no, in another --out folder")
        for x, row, made in zip(latents, frames.cpu(), new.cpu()):
            store.write(row[made].tolist(), x[:, made])


def frame_plan(args):
    """The plan of a run, checked; the frames that the user gives; the first frames of the prompt segments."""
    keyframes, segments = by_frame(args.keyframes, "keyframes"), by_frame(args.prompts, "prompts")
    last = max([*keyframes, *segments], default=0)
    if last >= args.frames:
        raise ValueError(f"--keyframes and --prompts name frame {last}: the last one is {args.frames - 1}")
    pictured = bool(args.image) + (args.world is not None)
    if pictured + (0 in keyframes) > 1:
        raise ValueError("--image, --world and --keyframes 0:FILE each give frame 0: keep one")
    # a loop has one frame more, a copy of frame 0 that the last windows are given and nobody is shown
    given = sorted({*keyframes, *[0] * (pictured or not keyframes), *[args.frames] * args.loop})
    if args.loop and given[0] != 0:
        raise ValueError(f"--loop leads back to frame 0, but the first picture is at {given[0]}: add one")
    borders = sorted({0, *segments})
    plan = plan_video(args.schedule, args.frames + args.loop, given, borders, args.max_stride, args.known)
    return plan, given, borders


def choose_device(name=None, work=True):
    """The torch device to run on, and why. ValueError if it is to work, and does not."""
    if name:
        try:
            device = torch.device(name)
            if work:
                torch.ones(1, device=device).item()
            return device, "as --device says"
        except (RuntimeError, AssertionError) as error:      # AssertionError: torch was built without it
            raise ValueError(f"--device {name} does not work: {str(error).splitlines()[0]}") from None
    if torch.cuda.is_available():    # mps lacks FlowPrior's grid_sample before torch 2.13: only if asked for
        return torch.device("cuda"), "found it"
    return torch.device("cpu"), f"no GPU, {torch.get_num_threads()} threads"


def processes(backend="gloo"):
    """(rank, world): which process this is, of how many. torchrun starts them; backend nccl is for GPUs."""
    if "RANK" not in os.environ:
        return 0, 1
    rank, world, local = (int(os.environ[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
    if torch.cuda.is_available():
        torch.cuda.set_device(local % torch.cuda.device_count())
    dist.init_process_group(backend, timeout=timedelta(days=1))   # one may work that long before it answers
    if rank > 0:
        sys.stdout = open(os.devnull, "w")   # one process says what happens
    return rank, world


@torch.no_grad()
def sample(args):
    """One video, from its plan to its folder, where processes find what the others have made."""
    begun = time.time()
    if os.environ.get("LOCAL_WORLD_SIZE") != os.environ.get("WORLD_SIZE"):
        raise ValueError("several machines share no folder: start all processes on one, with --standalone")
    rank, world = processes()
    wait_for_all = dist.barrier if world > 1 else lambda: None
    plan, given, borders = frame_plan(args)
    print(f"plan {args.schedule}: {costs(plan)}")
    sampler = Sampler(args, rank, world)
    pictures, prompts = read_inputs(args, sampler.model, borders)
    if rank == 0:
        args.out, lock = data.claim(args.out, "out/sample_", args.resume)
    if world > 1:
        shared = [args.out]
        dist.broadcast_object_list(shared)
        args.out, = shared
    args.sums = file_sums(args)
    print(f"folder: {args.out}\nprompt: {'; '.join(prompts)}")
    tokenizer = sampler.model.tokenizer
    unknown = sorted({word for word in tokenizer.words(" ".join(prompts)) if len(tokenizer.pieces(word)) > 1})
    if unknown and sampler.model.config.name == "tiny":   # it has a token for every word of its training
        print(f"words that this model has never seen, which say nothing to it: {', '.join(unknown)}")
    store, text = Store(os.path.join(args.out, "latents"), sampler.shape), sampler.text(prompts)
    if rank == 0:
        said = vars(args) | {"checksum": checksum({}, json.dumps(vars(args)))}    # for `continued`
        data.write_json(os.path.join(args.out, "args.json"), said)
        for frame in [frame for frame in given if not store.made([frame])]:
            if frame in pictures:
                latents = sampler.vae("encode", pictures[frame])
                store.write([frame], latents)
                error = (sampler.vae("decode", latents) - pictures[frame]) / 2
                psnr = -10 * error.square().mean().log10().item()
                if psnr < 25 and sampler.model.config.name == "tiny":   # skies come back at 36
                    print(f"the VAE cannot give the picture of frame {frame} back ({psnr:.0f} dB): it was "
                          "trained on others, the video will be blurred; README.md, Your own videos, helps")
            elif frame == 0:
                sampler.make([FIRST_FRAME], store, text, args.seed)
            else:   # the frame after the last of a loop
                store.write([frame], store.read([0]))
    wait_for_all()
    sampler.run(plan, store, text, args.seed, given, borders)
    wait_for_all()
    write_frames(args, sampler, store, pictures)
    wait_for_all()
    if rank == 0:
        keyframes = {frame for window in plan if window.gap > args.max_stride for frame in window.new}
        print("writing videos")
        write_video(args, {frame: "keyframe" for frame in keyframes} | {frame: "given" for frame in pictures})
        write_metrics(args, sampler.model.config.size)
        print(f"{args.frames} frames in {time.time() - begun:.1f} s; look at {args.out}/sheet.png first")


# --- latents on disk --------------------------------------------------------------------------------------
class Store:
    """The latents of a video on disk, a file per frame.

    A file gets its name when it is complete. So a frame that is there is whole, a process that is killed
    loses only the batch at work, and processes can share the folder."""
    def __init__(self, folder, shape):
        self.shape = shape     # (4, h, w)
        self.path = lambda frame: os.path.join(folder, f"{frame + 1:05d}.safetensors")   # as in frames/

    def made(self, frames):
        """Whether all these frames are there."""
        return all(os.path.exists(self.path(frame)) for frame in frames)

    def read(self, frames):
        """Latents (4, f, h, w) of these frames; zeros where a frame is not made."""
        return torch.stack([self.load(self.path(frame)) if self.made([frame]) else torch.zeros(self.shape)
                            for frame in frames], dim=1)

    def load(self, path):
        """What is in a file. ValueError if that is not the latents of a frame."""
        try:
            return load_file(path)["latents"].view(self.shape)
        except (SafetensorError, KeyError, RuntimeError):
            raise ValueError(f"{path} is damaged: delete it, and --resume makes it again") from None

    def write(self, frames, latents):
        """Keep latents (4, f, h, w) of these frames."""
        for place, frame in enumerate(frames):
            with complete(self.path(frame)) as path:
                save_file({"latents": latents[:, place].contiguous()}, path)


# --- the command line -------------------------------------------------------------------------------------
def parse(argv):
    """The command line of sample.py."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                usage="sample.py [flags]")
    whole, real = partial(data.number, int), partial(data.number, float)
    add = p.add_argument_group("what to make (frames are counted from 0)").add_argument
    add("--frames", type=whole(1, 100_000), default=121, help="length of the video (default: 121)")
    add("--image", metavar="FILE", type=data.file_name, help="picture for frame 0, cropped to a square")
    add("--world", type=whole(0, 999_999), metavar="N", help="frame 0 and prompt of the N-th test world")
    add("--keyframes", nargs="+", default=[], metavar="FRAME:FILE", help="pictures: 0:a.png 120:b.png")
    add("--loop", action="store_true", help="the last frame leads back into the first")
    add("--prompt", help="for tiny: wind left|right slow|fast, few|some|many clouds, dawn|day|dusk|night, "
        "red|green|violet|yellow balloon (default: drawn from --seed, or a caption of your clips)")
    add("--prompts", nargs="+", default=[], metavar="FRAME:TEXT", help='a new one from a frame on: "60:TEXT"')
    add("--negative_prompt", default="", help="what guidance leads away from")
    add("--seed", type=int, default=0, help="the same seed gives the same video on the same machine")
    add("--fps", type=whole(1, 240), default=12, help="frames per second of the written videos (default: 12)")
    add = p.add_argument_group("how, and with what").add_argument
    add("--schedule", default="hierarchical", choices=list(PLANNERS),
        help="which frames are made from which; joint: all keyframes in one window, which processes share")
    add("--max_stride", type=whole(1), default=16, help="most frames from keyframe to keyframe (default: 16)")
    add("--scope", type=whole(0), nargs=2, metavar=("RADIUS", "GLOBAL"),
        help="a frame attends to so many on either side, and to so many all over its window (default: all)")
    add("--steps", type=whole(1, 1000), help="DDIM steps of a window (default: 8 for tiny, 30 for sd15)")
    add("--guidance_scale", type=real(-100, 100),
        help="how far to exaggerate the prompt, except in infill; 1: off (default: 1.5 tiny, 7.5 sd15)")
    add("--temperature", type=real(0, 1), help="new frames beside given ones start as noise times this; "
        "lower: steadier, and seeds differ less (default: 0.1 for tiny, 1 for sd15)")
    add("--aug", help="noise on given frames that the model made: nsr=0.33 (sigma/alpha, default for sd15), "
        "snr=9.2, abar=0.9, t=94 or none (default for tiny)")
    add("--weights", metavar="FILE", type=data.file_name, help="(default: the tiny model in assets/)")
    add("--temporal", nargs="+", default=[], metavar="FILE",
        help="temporal layers from train.py; each file makes the windows of its stage")
    add("--lora", nargs="+", default=[], metavar="FILE[:SCALE]", help="LoRAs in kohya's layout")
    add("--batch_size", type=whole(1), help="windows to compute together (default: 8 for tiny, 1 for sd15)")
    add("--decode_chunk", type=whole(1), help="frames to decode together (default: 16 for tiny, 1 for sd15)")
    add("--mixed_precision", choices=(*DTYPES, "auto"), default="auto", help="auto: fp16 on a GPU (default)")
    add("--device", help="(default: cuda, else cpu)")
    group = p.add_argument_group("where, and what else")
    add, add_either = group.add_argument, group.add_mutually_exclusive_group().add_argument
    add("--out", type=data.file_name, help="folder of the run (default: the next free out/sample_NNN)")
    add_either("--resume", action="store_true", help="finish the run in --out with its own flags")
    add_either("--extend", type=whole(1, 100_000), metavar="N", help="make a finished video N frames longer")
    add("--plan", action="store_true", help="print the plan, its costs and its memory, and stop")
    p.set_defaults(known=0, sums=[])   # frames that were finished before --extend; checksums of files
    args = p.parse_args(argv)
    if args.resume or args.extend:
        args = continued(p, argv, args)
    return args


def continued(parser, argv, args):
    """The arguments of the run in --out, for --resume and --extend. ValueError if argv has others."""
    extend, path = args.extend, os.path.join(args.out or "", "args.json")
    if not args.out or not os.path.exists(path):
        raise ValueError(f"{args.out} holds no run to go on with: give the folder of a run as --out")
    old = data.read_json(path)
    if old.pop("checksum", None) != checksum({}, json.dumps(old)):    # of all the rest
        raise ValueError(f"{path} is damaged, or was edited: give another --out and start again")
    args = parser.parse_args(argv, argparse.Namespace(**old))   # what argv leaves out stays as it was
    free = {"resume", "extend", "out", "device", "plan", "sums", "weights", "temporal", "image"}
    free |= {"prompts"} if extend else set()
    for name, value in vars(args).items():
        if name not in free and old.get(name) != value:
            raise ValueError(f"the run in {args.out} was started with --{name} {old.get(name)}, now it is "
                             f"{value}: give the same arguments, or another --out folder")
    args.resume, args.extend = True, None
    done = args.frames if extend else args.known    # frames that no plan makes again
    written = all(os.path.exists(f"{args.out}/{name}") for n in range(1, done + 1)
                  for name in (f"frames/{n:05d}.png", f"latents/{n:05d}.safetensors"))
    if not written or extend and args.loop:
        raise ValueError(f"{args.out} is a loop, or lacks some of its first {done} frames or latents: "
                         f"--extend needs a finished video and no loop: --resume --out {args.out}")
    if extend:
        args.known, args.frames = args.frames, args.frames + extend
    return args


def file_sums(args):
    """Checksums of the files that a run depends on, wherever they are by now. ValueError if they changed."""
    files = [args.weights or TINY_WEIGHTS, *args.temporal, *(lora_file(item)[0] for item in args.lora),
             *by_frame(args.keyframes, "keyframes").values(), *([args.image] if args.image else [])]
    sums = [zlib.crc32(np.memmap(path, np.uint8, "r")) for path in files]
    wrong = [path for path, old, new in zip(files, args.sums or sums, sums) if old != new]
    if wrong or len(args.sums or sums) != len(sums):
        raise ValueError(f"{', '.join(wrong or files)}: not what {args.out} was started with, give the same "
                         "files, or another --out")
    return sums


def read_inputs(args, model, borders):
    """The user's pictures {frame: (3, 1, H, W)}, and the prompt of each segment."""
    pictures = by_frame(args.keyframes, "keyframes") | ({0: args.image} if args.image else {})
    pictures = {frame: data.from_pixels([data.read_square(path, model.config.size)])
                for frame, path in pictures.items()}
    seed = abs(args.seed) if args.world is None else data.SPLITS["test"] + args.world
    world = data.SkyWorld(seed, model.config.size)
    # weights that were trained on clips name one of their captions
    prompt = model.about.get("prompt", world.caption() if model.config.name == "tiny" else "")
    if args.world is not None:
        pictures[0], prompt = world.video([0]), world.caption()
    prompts = {0: prompt if args.prompt is None else args.prompt} | by_frame(args.prompts, "prompts")
    return pictures, [prompts[border] for border in borders]


# --- writing frames, videos and measurements --------------------------------------------------------------
def frame_path(folder, frame):
    """Where a frame is written. Files are counted from 1."""
    return os.path.join(folder, "frames", f"{frame + 1:05d}.png")


def read_frames(folder, frames):
    """Written frames as pixels (f, H, W, 3) uint8."""
    return np.stack([np.array(Image.open(frame_path(folder, frame))) for frame in frames])


def write_frames(args, sampler, store, pictures):
    """Decode and write this process's share of the frames. The user's pictures are written as they came."""
    starts = range(args.known, args.frames, args.decode_chunk)[sampler.rank::sampler.world]
    for start in tqdm(starts, "decoding", mininterval=1, disable=sampler.rank > 0):
        frames = range(start, min(start + args.decode_chunk, args.frames))
        if all(os.path.exists(frame_path(args.out, frame)) for frame in frames):
            continue
        video = sampler.vae("decode", store.read(frames))
        for place, frame in enumerate(frames):
            pixels = data.to_pixels(pictures.get(frame, video[:, place:place + 1]))[0]
            with complete(frame_path(args.out, frame)) as path:
                Image.fromarray(pixels).save(path)


def write_video(args, marks):
    """video.mp4, sheet.png, and video.gif and video.webp, whose writers hold all frames: of the first 241.

    marks: {frame: a word for the sheet}."""
    pixels = read_frames(args.out, range(min(args.frames, 241)))
    images = [ImageOps.scale(Image.fromarray(frame), max(1, 256 // len(frame))) for frame in pixels]
    for name, more in (("video.gif", {}), ("video.webp", {"quality": 85, "method": 2})):
        with complete(os.path.join(args.out, name)) as path:    # endless; both formats may merge equal frames
            images[0].save(path, save_all=True, append_images=images[1:], duration=round(1000 / args.fps),
                           loop=0, **more)
    try:
        with complete(os.path.join(args.out, "video.mp4")) as path:   # yuv420p, or browsers do not play it
            film = f"file:{os.path.abspath(path)}"
            subprocess.run(["ffmpeg", "-y", "-v", "error", "-xerror", "-framerate", str(args.fps),
                            "-i", "%05d.png", "-vf", "scale='max(iw,256)':-2:flags=bicubic",
                            "-c:v", "libx264", "-crf", "18", "-pix_fmt", "yuv420p", "-movflags", "+faststart",
                            film],
                           cwd=f"{args.out}/frames", stdin=subprocess.DEVNULL, check=True)
    except (FileNotFoundError, subprocess.CalledProcessError):
        print("no video.mp4: see above, or install ffmpeg with libx264; then --resume")
    picked = range(0, args.frames, -(-args.frames // 32))
    rows = [picked[i:i + 8] for i in range(0, len(picked), 8)]
    labels = [[f"{frame + 1} {marks.get(frame, '')}" for frame in row] for row in rows]
    with complete(os.path.join(args.out, "sheet.png")) as path:
        scale = max(1, 128 // pixels.shape[1])
        data.contact_sheet([read_frames(args.out, row) for row in rows], scale, labels).save(path)


def statistics(video):
    """Mean RGB, deviation of RGB, mean saturation of each frame of a video (3, f, H, W) in [0, 1]: (f, 7)."""
    saturation = (video.amax(0) - video.amin(0)).mean((1, 2))
    return torch.cat([video.mean((2, 3)).T, video.std((2, 3)).T, saturation[:, None]], dim=1)


def write_metrics(args, size):
    """metrics.csv: brightness, contrast, saturation of every frame, of 255. drift.png: how they change, and
    how those of the truth do, where --world names it."""
    names, rows = ["brightness", "contrast", "saturation"], {"": [], ", truth": []}
    for start in range(0, args.frames, args.decode_chunk):     # all of a video may not fit into memory
        frames = range(start, min(start + args.decode_chunk, args.frames))
        videos = {"": torch.from_numpy(read_frames(args.out, frames)).permute(3, 0, 1, 2).float() / 255}
        if args.world is not None and not (args.prompt or args.prompts or args.keyframes):
            videos[", truth"] = (data.SkyWorld(data.SPLITS["test"] + args.world, size).video(frames) + 1) / 2
        for who, video in videos.items():
            colour = 255 * statistics(video)
            three = colour[:, :3].mean(1), colour[:, 3:6].mean(1), colour[:, 6]
            rows[who] += torch.stack(three, dim=1).tolist()
    table = [["frame", *names], *([frame, *row] for frame, row in enumerate(rows[""], 1))]
    data.write_csv(os.path.join(args.out, "metrics.csv"), table)
    curves = {name + who: [(frame, row[i] - values[0][i]) for frame, row in enumerate(values, 1)]
              for who, values in rows.items() for i, name in enumerate(names) if values}
    with complete(os.path.join(args.out, "drift.png")) as path:
        data.line_plot(path, curves, "frame", "change since the first frame, of 255")


@torch.no_grad()
def show_memory(args, plan):
    """Print the peak memory of the networks, which take turns on the device: full batches, widest windows."""
    from train import FakeTensorMode, MemoryMeter    # train.py imports this file
    sampler, frames = Sampler(args), max([len(window.frames) for window in plan], default=1)
    model, rows = sampler.model, 1 if args.schedule == "joint" else args.batch_size
    rows *= 1 if args.guidance_scale == 1 else 2
    x = lambda b, f: torch.zeros(b, 4, f, *sampler.shape[1:])
    run = {"UNet": lambda: model.unet(x(rows, frames), torch.zeros(rows, frames).long(),
                                      torch.zeros(rows, TEXT_TOKENS, model.config.text_width)),
           "VAE": lambda: model.vae.decode(x(1, args.decode_chunk), args.decode_chunk)}
    sampler.device = torch.device("cpu")    # where tensors without content are counted, whatever the device
    for name, network in ("UNet", model.unet), ("VAE", model.vae):
        weights = [*network.parameters(), *network.buffers()]
        with FakeTensorMode(allow_non_fake_inputs=True), MemoryMeter(weights) as meter, sampler.autocast():
            run[name]()
        total = sum(weight.nbytes for weight in weights) + meter.peak
        print(f"predicted peak of the {name}: {total / 1e9:.2f} GB in {sampler.dtype}, 1 GB for the driver")


def main(argv=None):
    """The command line of sample.py."""
    args = parse(argv)
    if not args.plan:
        return sample(args)
    plan = frame_plan(args)[0]
    print(show(plan, args.frames + args.loop))
    if os.path.exists(args.weights or TINY_WEIGHTS):
        show_memory(args, plan)


if __name__ == "__main__":
    with plain_errors("sample.py", "if it has named its folder, --resume --out FOLDER goes on"):
        main()
    if dist.is_initialized():    # not after an error: nccl would wait for the others, for ever
        dist.destroy_process_group()
