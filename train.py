"""Train a stage: one flat loop for all of them.

    python train.py --stage interp                  fresh temporal layers on the shipped image model, minutes
    python train.py --stage interp --resume auto    go on where the last run of this stage stopped
    python train.py --stage interp --data DIR       on your own clips, prepared and encoded by data.py

The tiny model from nothing, in this order (README.md has the times and what to expect):

    python train.py --stage vae
    python train.py --stage image --weights out/vae/weights.safetensors
    python train.py --stage video --weights out/image/weights.safetensors --export my_tiny.safetensors

`vae` learns to shrink pictures to latents. `image` learns to denoise latents of single frames, told by a
caption what to show; it is then frozen. `starter`, `extrap` and `interp` train the temporal layers on the
windows that a plan starts with, goes on with and fills with; `video` trains one set of them on all three.
"""

import argparse
import csv
import json
import os
import sys
import time
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from tqdm import tqdm

import data
from diffusion import T, NoiseSchedule, ddim_sample, ddim_timesteps, min_snr_weight
from model import (PRESETS, TINY_WEIGHTS, Model, choose_device, fill, is_temporal, load_weights, read_weights,
                   save_weights)

VIDEO_STAGES = ("starter", "extrap", "interp", "video")
# what a stage uses where the command line is silent: steps, batch size, peak learning rate, worlds
DEFAULTS = {"vae": (3000, 16, 2e-3, 0), "image": (2400, 32, 1e-3, 4096), "video": (5000, 6, 2e-3, 768),
            "starter": (400, 6, 2e-3, 128), "extrap": (400, 6, 2e-3, 128), "interp": (150, 6, 2e-3, 96)}
LEVELS = [62, 187, 312, 437, 562, 687, 812, 937]  # of validation, fixed: two per quarter of the noise range


def parse(argv):
    """The command line of train.py. Defaults are the tiny preset on the sky world."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    # what to train
    p.add_argument("--stage", required=True, choices=("vae", "image", *VIDEO_STAGES))
    p.add_argument("--preset", default="tiny", choices=list(PRESETS))
    p.add_argument("--weights", help="what to start from; default assets/tiny.safetensors, and nothing for "
                   "--stage vae")
    p.add_argument("--temporal", help="start from these temporal layers (a file of another run) instead of "
                   "fresh ones")
    p.add_argument("--out", help="folder of this run; default out/STAGE")
    p.add_argument("--export", help="also write the whole model, frozen parts included, to this one file for "
                   "sample.py")
    p.add_argument("--resume", metavar="auto|FILE",
                   help="go on from the checkpoint in --out (auto) or from a file")
    # data
    p.add_argument("--data", metavar="DIR", help="folder that data.py has prepared and encoded (--prepare, "
                   "--cache), instead of sky worlds; for the video stages")
    p.add_argument("--drop", metavar="LIST", help="clips of --data not to train on: data.py --drop_hardest")
    p.add_argument("--flips", action=argparse.BooleanOptionalAction, default=True,
                   help="show half of --data mirrored, but no clip whose caption says left or right")
    p.add_argument("--score", metavar="FILE", help="do not train: write the loss of every clip of --data to "
                   "this file, with the temporal layers of --weights or --temporal")
    p.add_argument("--worlds", type=int, help="training worlds whose latents are kept in memory: more is "
                   "better and slower to prepare; default 4096 for image, 768 for video, else about 100")
    p.add_argument("--frames", type=int, default=121,
                   help="length of the training clips: windows of plans for so many frames")
    p.add_argument("--max_stride", type=int, default=16, help="most frames from key to key in windows of the "
                   "ladder; with 64 and --frames 481 or more, sample.py can use --max_stride 64")
    p.add_argument("--aug_max", type=int, default=250, help="highest noise level (0..999) of given frames "
                   "that a plan would have made; 0 trains without noise augmentation, and long videos then "
                   "fall apart")
    p.add_argument("--error_bank", type=float, default=0.0, metavar="SHARE", help="of windows that lead on, "
                   "show so many with errors on their given frames that the network itself has made; 0: off, "
                   "0.5 is usual, for a finished model (--temporal) and a small --learning_rate")
    p.add_argument("--caption_dropout", type=float, default=0.1,
                   help="share of examples without a caption, for guidance")
    # optimisation
    p.add_argument("--max_steps", type=int, help="optimizer steps of the whole run")
    p.add_argument("--batch_size", type=int,
                   help="halve it when memory runs out, and double --gradient_accumulation_steps")
    p.add_argument("--gradient_accumulation_steps", type=int, default=1)
    p.add_argument("--learning_rate", type=float,
                   help="peak, reached after warm-up, then down a cosine to zero")
    p.add_argument("--warmup_steps", type=int, default=50)
    p.add_argument("--max_grad_norm", type=float, default=1.0,
                   help="longer gradients are scaled down to this length")
    p.add_argument("--weight_decay", type=float, default=0.01)
    p.add_argument("--snr_gamma", type=float, default=0.0,
                   help="min-SNR loss weights, 5 is usual; 0: every level counts alike")
    p.add_argument("--ema_decay", type=float, default=0.998,
                   help="of the averaged weights, which are what is kept; 0: no average")
    p.add_argument("--mixed_precision", default="no", choices=("no", "fp16", "bf16"),
                   help="fp16 only on a GPU; bf16 does not pay for the tiny preset")
    p.add_argument("--gradient_checkpointing", type=int, default=0, metavar="K", help="recompute every K-th "
                   "stage of the UNet instead of storing it: 1 saves the most memory and costs about a third "
                   "more time; 0: off")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--device", help="default: cuda, else mps, else cpu")
    # once in a while
    p.add_argument("--val_every", type=int, default=250)
    p.add_argument("--sample_every", type=int, default=1000,
                   help="steps between contact sheets; 0: only at the end")
    p.add_argument("--save_every", type=int, default=250)
    p.add_argument("--dry_run", action="store_true",
                   help="print what would be trained, touch nothing, and stop")
    args = p.parse_args(argv)
    for name, value in zip(("max_steps", "batch_size", "learning_rate", "worlds"), DEFAULTS[args.stage]):
        if getattr(args, name) is None:
            setattr(args, name, value)
    args.out = args.out or os.path.join("out", args.stage)
    args.data_hash = None   # of the clips of --data, when they have been found
    if args.data and args.stage not in VIDEO_STAGES:
        raise ValueError(f"--data is for the stages {', '.join(VIDEO_STAGES)}, found --stage {args.stage}: "
                         "leave --data away")
    if args.error_bank and args.stage not in VIDEO_STAGES:
        raise ValueError(f"--error_bank is for the stages {', '.join(VIDEO_STAGES)}, found --stage "
                         f"{args.stage}: leave it away")
    if (args.drop or args.score) and not args.data:
        raise ValueError("--drop and --score are about the clips of a folder: give it as --data")
    if args.weights is None and args.stage != "vae":
        args.weights = TINY_WEIGHTS
    return args


def get_learning_rate(step, args):
    """Linear warm-up, then half a cosine down to zero at the last step."""
    warm = min(1.0, (step + 1) / max(1, args.warmup_steps))
    cosine = torch.cos(torch.tensor(torch.pi * step / args.max_steps)).item()
    return args.learning_rate * warm * 0.5 * (1 + cosine)


# ------------------------------------------------------------------------------------------------------------
# What a stage trains, on what, and its loss
# ------------------------------------------------------------------------------------------------------------

def trainable_parameters(model, stage):
    """{name: parameter} of what a stage trains. Everything else is frozen."""
    if stage == "vae":
        return {f"vae.{name}": p for name, p in model.vae.named_parameters()}
    unet = {f"unet.{name}": p for name, p in model.unet.named_parameters()
            if is_temporal(name) == (stage in VIDEO_STAGES)}
    text = {f"text.{name}": p for name, p in model.text.named_parameters()} if stage == "image" else {}
    return unet | text


def freeze_the_rest(model, stage):
    """Let a stage train its own parameters and no others; returns them as {name: parameter}."""
    trainable = trainable_parameters(model, stage)
    for network in model.networks().values():
        network.requires_grad_(False)
    for parameter in trainable.values():
        parameter.requires_grad_(True)
    return trainable


def prepare_data(args, model, split, device):
    """A function (step) -> batch on the CPU for the training or validation worlds of a stage."""
    if args.stage == "vae":
        size = model.config.size
        return lambda step: {"images": data.picture_batch(split, args.seed, step, args.batch_size, size)}
    if args.data:
        clips = data.cached_clips(args.data, model, args.stage, split, args.drop, args.flips)
        print(f"{len(clips.names)} clips of {args.data} to {'train' if split == 'train' else 'validate'} on")
        if split == "train":
            args.data_hash = clips.key   # goes into the checkpoint: what is drawn from must not change
        shapes = data.window_shapes(args.stage, min(args.frames, int(clips.lengths.max())), args.max_stride)
        return lambda step: clips.windows(shapes, args.seed, step, args.batch_size)
    few = args.worlds if split == "train" else min(16, args.worlds)
    worlds = range(data.SPLITS[split], data.SPLITS[split] + few)
    frames = range(0, data.DAY, data.DAY // 8) if args.stage == "image" else range(args.frames)
    kind = "image" if args.stage == "image" else f"video{args.frames}"
    name = f"{kind}_{split}_{few}.safetensors"
    cache = os.path.join(os.path.dirname(args.out) or ".", "cache", name)
    encode = torch.no_grad()(lambda video: model.vae.encode(video.to(device)).cpu())
    clips = data.sky_clips(cache, encode, worlds, frames, model.config.size, key=fingerprint(model.vae))
    if args.stage == "image":
        def image_batch(step):
            latents, captions = clips.images(args.seed, step, args.batch_size)
            return {"latents": latents, "captions": captions}
        return image_batch
    shapes = data.window_shapes(args.stage, args.frames, args.max_stride)
    return lambda step: clips.windows(shapes, args.seed, step, args.batch_size)


def fingerprint(network):
    """A number that changes with the weights of a network: a latent cache is only as good as its VAE."""
    return f"{sum(p.double().abs().sum().item() for p in network.parameters()):.6f}"


class ErrorBank:
    """Errors that the network has made on new frames, to be put on given ones (2510.09212, error recycling).

    In training given frames are true, in sampling they are the model's own. So a share of the windows that
    lead on is shown with such an error on all frames that a plan would have made, and must come back to the
    truth. Not windows that fill: they shall go on with what they are given, or they would show seams.

    errors: (n, c, h, w) float16 on the CPU, the last 1024 frames; part of the checkpoint."""

    def __init__(self, share):
        self.share, self.errors = share, None

    def spoil(self, x0, given, user, generator):
        """Latents (b, c, f, h, w) with an error of the bank, or none, on the given frames of each window."""
        hit = torch.rand(len(x0), generator=generator) < self.share
        if self.errors is None:
            return x0
        drawn = self.errors[torch.randint(len(self.errors), (len(x0),), generator=generator)].float()
        error = (drawn * hit[:, None, None, None]).to(x0.device)[:, :, None]
        where = given & ~user & ~given[:, -1:]                                                        # (b, f)
        return x0 + error * where[:, None, :, None, None]

    @torch.no_grad()
    def add(self, error, given):
        """Keep the errors (b, c, f, h, w) of the new frames of windows that lead on."""
        new = ~given & ~given[:, -1:]
        fresh = error.transpose(1, 2)[new].half().cpu()
        self.errors = torch.cat([*([] if self.errors is None else [self.errors]), fresh])[-1024:]


def random_levels(batch, generator, args):
    """Noise levels t (b,) for a training batch: one per example for what is made, one for what is given."""
    b = len(batch["latents"])
    t_new = torch.randint(0, T, (b,), generator=generator)
    # mostly little noise, which fills between close frames need, and seldom much; level 0 itself often
    # enough, because it is a choice at sampling
    t_aug = (args.aug_max * torch.rand(b, generator=generator) ** 3).round().long()
    return t_new, torch.where(torch.rand(b, generator=generator) < 0.2, 0, t_aug)


def embed(model, batch, captions):
    """Text embeddings (b, 77, d) of captions: from the batch if it brings them, but for dropped captions."""
    if "contexts" not in batch:
        return model.context(captions)
    dropped = torch.tensor([caption == "" for caption in captions], device=batch["contexts"].device)
    if not dropped.any():
        return batch["contexts"]
    return torch.where(dropped[:, None, None], model.context([""]), batch["contexts"])


def diffusion_errors(model, schedule, batch, t_new, t_aug, generator, args, captions, bank=None):
    """Errors of the UNet's answer, and of its guess at the clean frames: (b, c, f, h, w), 0 on given frames.

    Every frame has its own level: t_new where it is made, t_aug where it is given, 0 where the user gave
    it. A single frame has no neighbours to guess from: None. bank: an ErrorBank to use and to fill."""
    x0 = batch["latents"]  # (b, c, f, h, w)
    eps = torch.randn(x0.shape, generator=generator).to(x0.device)
    given, user = batch["given"], batch["user"]                                   # (b, f) each
    t = torch.where(user, 0, torch.where(given, t_aug[:, None], t_new[:, None]))  # (b, f)
    shown = bank.spoil(x0, given, user, generator) if bank else x0                # new frames: as they are
    x_t = schedule.q_sample(shown, t, eps)
    x_t = torch.where((given & (t == 0))[:, None, :, None, None], shown, x_t)     # level 0: really clean
    context, new = embed(model, batch, captions), ~given[:, None, :, None, None]
    target = schedule.target(x0, t, eps)
    if args.stage not in VIDEO_STAGES:
        return (model.unet(x_t, t, context, temporal=False).float() - target) * new, None
    output, guess = model.unet(x_t, t, context, batch["frames"], given, with_guess=True)
    if bank:
        bank.add(schedule.to_x0(x_t, t, output.detach().float()) - x0, given)
    return (output.float() - target) * new, (guess.float() - x0) * new


def mean_square(error, given):
    """Mean square per example (b,) of an error (b, c, f, h, w) on the frames that are made."""
    return (error.square().mean(dim=(1, 3, 4)) * ~given).sum(1) / (~given).sum(1)


def jitter(error, frames):
    """Mean square per example (b,) of how an error bends from frame to frame, where frames (b, f) are even.

    An error that stays is hardly seen, one that comes and goes flickers. The best possible answer is the same
    with or without this term, the mean of all that may come, but what is far from it shows earlier."""
    gaps = frames.diff(dim=1)
    even = gaps[:, 1:] == gaps[:, :-1]
    bent = error[:, :, 2:] - 2 * error[:, :, 1:-1] + error[:, :, :-2]
    return (bent.square().mean(dim=(1, 3, 4)) * even).sum(1) / even.sum(1).clamp(min=1)


def relative(error, batch, floor):
    """A loss per example (b,) with the gradient of log(size + floor), size being mean square plus jitter.

    Windows differ: where to go from one frame is open, a fill between frames 4 apart is nearly known, and
    its error, a thousand times smaller, is what flickers. So every example counts relative to its own error,
    as if one measured in decibels."""
    size = mean_square(error, batch["given"]) + jitter(error, batch["frames"])
    return size / (size.detach() + floor)


def vae_loss(model, images, generator):
    """What the picture loses, and how far the latents are from unit normal: (b,).

    L1 of the picture and of its differences to the neighbours (edges stay sharp), and a little KL, all means
    (Rombach et al., without the discriminator)."""
    mean, log_variance = model.vae.moments(images)
    noise = torch.randn(mean.shape, generator=generator).to(mean.device)
    log_variance = log_variance.clamp(-30, 20)
    wrong = model.vae.pictures(mean + (0.5 * log_variance).exp() * noise) - images
    edges = wrong.diff(dim=2).abs().mean(dim=(1, 2, 3)) + wrong.diff(dim=3).abs().mean(dim=(1, 2, 3))
    kl = 0.5 * (mean ** 2 + log_variance.exp() - 1 - log_variance).mean(dim=(1, 2, 3))
    return wrong.abs().mean(dim=(1, 2, 3)) + 0.5 * edges + 3e-4 * kl


def to_device(batch, device):
    """A batch with its tensors on the device. Single frames become windows of one frame, to be made."""
    batch = {key: value.to(device) if torch.is_tensor(value) else value for key, value in batch.items()}
    if "frames" not in batch and "latents" in batch:
        batch["latents"] = batch["latents"][:, :, None]
        none = torch.zeros(len(batch["latents"]), 1, dtype=torch.bool, device=device)
        batch |= {"given": none, "user": none, "frames": none.long()}
    return batch


def training_loss(model, schedule, batch, seed, args, device, bank=None):
    """What to descend on for one batch, and its loss, two scalars. Its noise is a function of `seed` alone.

    Video stages go by relative errors, that of the guess beside that of the answer."""
    generator = torch.Generator().manual_seed(seed)
    batch = to_device(batch, device)
    if args.stage == "vae":
        loss = vae_loss(model, batch["images"], generator).mean()
        return loss, loss
    t_new, t_aug = (t.to(device) for t in random_levels(batch, generator, args))
    dropped = torch.rand(len(t_new), generator=generator) < args.caption_dropout
    captions = ["" if drop else caption for drop, caption in zip(dropped, batch["captions"])]
    error, guess_error = diffusion_errors(model, schedule, batch, t_new, t_aug, generator, args, captions,
                                          bank)
    weight = min_snr_weight(schedule, t_new, args.snr_gamma) if args.snr_gamma else 1
    loss = weight * mean_square(error, batch["given"])
    descend = loss
    if args.stage in VIDEO_STAGES:
        descend = weight * relative(error, batch, 1e-4) + relative(guess_error, batch, 2e-5)
    return descend.mean(), loss.mean()


@torch.no_grad()
def validation_loss(model, schedule, batches, args, device, levels=LEVELS):
    """(loss, [loss per quarter of the noise range]) on fixed batches, with fixed noise, at fixed levels.

    A training loss jumps with the levels it happens to draw; this one is comparable from step to step and
    run to run. Given frames stand at the level t = 20. For the VAE there are no levels: the quarters are
    empty."""
    if args.stage == "vae":
        losses = [vae_loss(model, to_device(batch, device)["images"], torch.Generator().manual_seed(i)).mean()
                  for i, batch in enumerate(batches)]
        return torch.stack(losses).mean().item(), []
    by_level = []
    for level in levels:
        losses = []
        for i, batch in enumerate(batches):
            batch = to_device(batch, device)
            t_new = torch.full((len(batch["latents"]),), level, device=device)
            t_aug = torch.full_like(t_new, min(20, args.aug_max))
            noise, captions = torch.Generator().manual_seed(i), batch["captions"]
            error, _ = diffusion_errors(model, schedule, batch, t_new, t_aug, noise, args, captions)
            losses.append(mean_square(error, batch["given"]))
        by_level.append(torch.cat(losses).mean())
    by_level = torch.stack(by_level)
    return by_level.mean().item(), by_level.view(4, -1).mean(1).tolist()


@torch.no_grad()
def write_scores(args, model, device):
    """The loss of every clip of --data as a csv file (clip, stage, loss): what data.py --drop_hardest reads.

    The same windows, noise and levels for every clip, so that nothing but the clip makes the difference:
    windows that fit in the shortest clip. Clips too short for any window that is trained have no score."""
    clips = data.cached_clips(args.data, model, args.stage)
    if not model.unet.temporal_hint.weight.any():   # it starts at zero
        raise ValueError("the temporal layers are untrained and know no hard clips: give trained ones as "
                         "--temporal")
    schedule = NoiseSchedule(model.config.prediction, model.config.zero_terminal_snr).to(device)
    shapes = data.window_shapes(args.stage, min(args.frames, int(clips.lengths.max())))
    shortest = min(data.reach(window) for windows in shapes for window in windows) + 1
    scored = [i for i, length in enumerate(clips.lengths) if length >= shortest]   # the others train nothing
    rows, probes = [], data.probes(shapes, min(clips.lengths[i] for i in scored))
    for i in tqdm(scored, desc="scoring", unit="clip"):
        batch = clips.stack([clips.cut(window, i, int(part * (clips.lengths[i] - data.reach(window))))
                             for window, part in probes])
        rows.append({"clip": clips.names[i], "stage": args.stage,
                     "loss": validation_loss(model, schedule, [batch], args, device, LEVELS[1::2])[0]})
    with data.complete(args.score) as path, open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, ["clip", "stage", "loss"], lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    print(f"wrote {args.score}: {len(rows)} clips, {len(probes)} windows each, at levels {LEVELS[1::2]}")


# ------------------------------------------------------------------------------------------------------------
# Averaged weights, checkpoints, logs
# ------------------------------------------------------------------------------------------------------------

@torch.no_grad()
def update_ema(ema, parameters, decay, step):
    """Move the averaged weights towards the current ones; faster at first, when the average knows little."""
    decay = min(decay, (1 + step) / (10 + step))
    for name, parameter in parameters.items():
        ema[name].lerp_(parameter, 1 - decay)


@torch.no_grad()
def swap(ema, parameters):
    """Exchange averaged and current weights, one tensor at a time."""
    for name, parameter in parameters.items():
        kept = parameter.clone()
        parameter.copy_(ema[name])
        ema[name].copy_(kept)


@contextmanager
def averaged(ema, parameters):
    """Inside this, the network has the averaged weights: validation, samples and results are theirs."""
    swap(ema, parameters)
    try:
        yield
    finally:
        swap(ema, parameters)


def save_checkpoint(path, parameters, ema, optimizer, scaler, step, model, args, bank=None):
    """Everything that a run needs to go on exactly. The file is complete or not there."""
    state = {"model": parameters, "ema": ema, "optimizer": optimizer.state_dict(),
             "scaler": scaler.state_dict(), "step": step, "rng": torch.get_rng_state(),
             "preset": model.config.name, "stage": args.stage, "args": vars(args),
             "errors": bank and bank.errors}
    with data.complete(path) as unfinished:
        torch.save(state, unfinished)


def load_checkpoint(path, parameters, ema, optimizer, scaler, args, bank=None):
    """Put a run back where it was saved; returns its step. ValueError when the file is of another run."""
    if not os.path.exists(path):
        raise ValueError(f"no checkpoint at {path} to resume from: leave --resume away to start anew, "
                         "or give the file")
    state = torch.load(path, map_location="cpu", weights_only=True)
    for name in ("stage", "preset"):
        if state[name] != getattr(args, name):
            raise ValueError(f"{path} is a checkpoint of {name} {state[name]}, but --{name} is "
                             f"{getattr(args, name)}: resume with the same {name}, or start anew in another "
                             "--out folder")
    # what decides the batches and the learning rate must not change in the middle of a run
    old = {"max_stride": 16, "error_bank": 0.0} | state["args"]   # what older checkpoints do not say
    for name in ("max_steps", "batch_size", "learning_rate", "seed", "worlds", "frames", "aug_max",
                 "weights", "max_stride", "error_bank"):
        if old[name] != getattr(args, name):
            raise ValueError(f"{path} was trained with --{name} {old[name]}, now it is "
                             f"{getattr(args, name)}: give the old value to go on exactly, or start anew in "
                             "another --out folder")
    before = state["args"].get("data_hash")   # a checkpoint from before there was --data has none
    if before != args.data_hash:
        raise ValueError(f"{path} was trained on other clips (hash {before}, now {args.data_hash}): give "
                         "--data, --drop and --flips as they were, or start anew in another --out folder")
    shapes = lambda tensors: {name: tensor.shape for name, tensor in tensors.items()}
    if shapes(state["model"]) != shapes(parameters):
        raise ValueError(f"{path} holds other layers than model.py now has: start anew in another --out "
                         "folder")
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(state["model"][name])
            ema[name].copy_(state["ema"][name])
    optimizer.load_state_dict(state["optimizer"])
    scaler.load_state_dict(state["scaler"])
    torch.set_rng_state(state["rng"])
    if bank:
        bank.errors = state["errors"]
    return state["step"]


def start_or_resume(path, parameters, ema, optimizer, scaler, args, bank=None):
    """Go on from a checkpoint if asked to, `path` for --resume auto. Writes args.json, returns the step."""
    step = 0
    if args.resume:
        path = path if args.resume == "auto" else args.resume
        step = load_checkpoint(path, parameters, ema, optimizer, scaler, args, bank)
        print(f"resumed {path} at step {step}")
    with open(os.path.join(args.out, "args.json"), "w") as file:
        json.dump(vars(args), file, indent=1)
    return step


COLUMNS = ["step", "loss", "val_loss", "val_q1", "val_q2", "val_q3", "val_q4", "grad_norm", "learning_rate",
           "seconds", "memory"]


def start_log(path, step):
    """Open log.csv with its rows before `step`: what was logged after the last checkpoint is done again."""
    rows = []
    if step and os.path.exists(path):
        with open(path, newline="") as file:
            rows = [row for row in csv.DictReader(file) if int(row["step"]) < step]
    file = open(path, "w", newline="")
    writer = csv.DictWriter(file, COLUMNS)
    writer.writeheader()
    writer.writerows(rows)
    return file, writer


def peak_memory(device):
    """Most memory used so far, in GB: of the GPU, or of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 1e9
    if sys.platform == "win32":
        return 0.0  # the standard library cannot tell there
    import resource
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return used / (1e9 if sys.platform == "darwin" else 1e6)


def plot_losses(log_path, out_path):
    """Training loss (running mean of 20 steps) and validation loss against the step, as a picture."""
    with open(log_path, newline="") as file:
        rows = list(csv.DictReader(file))
    train = [(int(row["step"]), float(row["loss"])) for row in rows if row["loss"]]
    mean = [(train[i][0], sum(loss for _, loss in train[i - 19:i + 1]) / 20) for i in range(19, len(train))]
    val = [(int(row["step"]), float(row["val_loss"])) for row in rows if row["val_loss"]]
    data.line_plot(out_path, {"validation": val, "training": mean}, "loss against step", log=True)


@torch.no_grad()
def sample_sheet(path, model, schedule, batch, args, device):
    """A contact sheet: what the truth is (upper rows) and what the model makes of it (lower rows).

    vae: pictures and their round trip. image: new pictures for the captions. Video stages: windows with their
    given frames."""
    batch = to_device(batch, device)
    if args.stage == "vae":
        truth = batch["images"][:8, :, None]
        made = model.vae.pictures(model.vae.moments(batch["images"][:8])[0])[:, :, None]
    else:
        n = 16 if args.stage == "image" else 5
        batch = {key: value[:n] for key, value in batch.items()}
        x0, given = batch["latents"], batch["given"]
        noise = torch.randn(x0.shape, generator=torch.Generator().manual_seed(0)).to(device)
        context = model.context(batch["captions"])
        temporal = args.stage in VIDEO_STAGES
        say = lambda x, t: model.unet(x, t, context, batch["frames"], given, temporal=temporal)
        x = torch.where(given[:, None, :, None, None], x0, noise)
        levels = ddim_timesteps(20 if args.stage == "image" else 8) + [-1]
        x = ddim_sample(schedule, say, x, torch.zeros_like(given).long(), ~given, levels)
        truth, made = model.vae.decode(x0), model.vae.decode(x)
    rows = [data.to_pixels(video) for pair in zip(truth, made) for video in pair]
    if truth.shape[2] == 1:  # single pictures: side by side
        rows = [data.to_pixels(part[:, :, 0].transpose(0, 1)) for part in (*truth.split(8), *made.split(8))]
    data.contact_sheet(rows, scale=2).save(path)


# ------------------------------------------------------------------------------------------------------------
# The run
# ------------------------------------------------------------------------------------------------------------

def prepare_model(args):
    """The model that a stage starts from. Video stages get fresh temporal layers, or those of --temporal."""
    torch.manual_seed(args.seed)
    if args.stage == "vae":
        return Model.build(PRESETS[args.preset])
    if args.stage == "image":
        config, merges, about, tensors = read_weights(args.weights)
        model = Model.build(config, merges)
        model.about = {"recipes": about.get("recipes", [])}
        vae = {key: t for key, t in tensors.items() if key.startswith("first_stage_model.")}
        fill(model, vae, args.weights, parts=("vae",))
        return model
    model = load_weights(args.weights, args.preset)
    if args.temporal:
        fill(model, read_weights(args.temporal)[3], args.temporal, parts=("unet",), temporal="only")
    elif not args.score:
        fresh = Model.build(model.config).unet.state_dict()
        loaded = model.unet.state_dict()
        model.unet.load_state_dict({k: fresh[k] if is_temporal(k) else v for k, v in loaded.items()})
    return model


def prepare_optimizer(trainable, args, device):
    """AdamW on what is trained, and the scaler that keeps small gradients from vanishing in fp16."""
    optimizer = torch.optim.AdamW(trainable.values(), lr=args.learning_rate, betas=(0.9, 0.99),
                                  weight_decay=args.weight_decay)
    return optimizer, torch.amp.GradScaler(device.type, enabled=args.mixed_precision == "fp16")


def accumulate(model, schedule, next_batch, step, args, device, scaler, bank=None):
    """Forward and backward of the micro-steps of one step, whose gradients add up to the mean's; the loss."""
    dtype = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[args.mixed_precision]
    loss, n = 0.0, args.gradient_accumulation_steps
    for number in range(step * n, (step + 1) * n):
        with torch.autocast(device.type, dtype, enabled=args.mixed_precision != "no"):
            seed = args.seed * 1_000_003 + number
            descend, part = training_loss(model, schedule, next_batch(number), seed, args, device, bank)
        scaler.scale(descend / n).backward()
        loss += part.item() / n
    return loss


def report(model, trainable, args, device, why):
    """Say what is about to be trained, before anything is spent."""
    total = sum(p.numel() for network in model.networks().values() for p in network.parameters())
    count = sum(p.numel() for p in trainable.values())
    print(f"device: {device} ({why})")
    print(f"stage {args.stage}, preset {args.preset}: trainable {count:,} of {total:,} parameters, "
          f"{total - count:,} frozen")
    print(f"{args.max_steps} steps of {args.batch_size} x {args.gradient_accumulation_steps} examples, "
          f"learning rate up to {args.learning_rate:g}, into {args.out}")


def check_out(args):
    """Refuse to write into a folder that holds another run."""
    if not args.resume and os.path.exists(os.path.join(args.out, "args.json")):
        raise ValueError(f"{args.out} already holds a run: go on with it (--resume auto), "
                         "or give another --out folder")


def finish(model, schedule, args, minutes, val, batches, device):
    """Write the trained weights with the recipe that made them, and say what to run next."""
    if args.stage == "vae":                                # measure what the other stages will see as latents
        with torch.no_grad():
            pictures = lambda i: data.picture_batch("train", 1, i, 64, model.config.size).to(device)
            z = torch.cat([model.vae.moments(pictures(i))[0] for i in range(16)])
        model.set_latent_scaling(z.mean((0, 2, 3)).tolist(), z.std((0, 2, 3)).tolist())
    recipe = {"stage": args.stage, "args": vars(args), "minutes": round(minutes, 1), "val_loss": val}
    recipes = [*model.about.get("recipes", []), recipe]
    path, export = os.path.join(args.out, "weights.safetensors"), args.export
    if args.stage == "vae":
        save_weights(path, model, torch.float32, parts=("vae",), stage=args.stage, recipes=recipes)
        say = f"python train.py --stage image --weights {path}"
    elif args.stage == "image":
        save_weights(path, model, torch.float32, only=lambda name: not is_temporal(name), stage=args.stage,
                     recipes=recipes)
        say = f"python train.py --stage video --weights {path} --export my_tiny.safetensors"
    else:
        save_weights(path, model, parts=("unet",), only=is_temporal, stage=args.stage, recipes=recipes)
        say = f"python sample.py --frames 121 --weights {args.weights} --temporal {path}"
        if export:
            save_weights(export, model, stage=args.stage, recipes=recipes)
            print(f"wrote {export}")
            say = f"python sample.py --frames 121 --weights {export}"
    sample_sheet(os.path.join(args.out, "samples", "final.png"), model, schedule, batches[0], args, device)
    print(f"wrote {path} and {args.out}/samples/final.png\nnext: {say}")


def main(argv=None):
    """Parse, prepare, loop. Every block of the loop starts with what it does."""
    args = parse(argv)
    device, why = choose_device(args.device)
    model = prepare_model(args).to(device)
    trainable = freeze_the_rest(model, args.stage)
    report(model, trainable, args, device, why)
    if args.dry_run:
        return
    if args.score:
        return write_scores(args, model, device)
    check_out(args)
    os.makedirs(os.path.join(args.out, "samples"), exist_ok=True)
    schedule = NoiseSchedule(model.config.prediction, model.config.zero_terminal_snr).to(device)
    next_batch = data.prefetch(prepare_data(args, model, "train", device))
    val_batch = prepare_data(args, model, "val", device)
    batches = [val_batch(step) for step in range(4)]
    ema = {name: parameter.detach().clone() for name, parameter in trainable.items()}
    optimizer, scaler = prepare_optimizer(trainable, args, device)
    checkpoint_path = os.path.join(args.out, "ckpt.pt")
    bank = ErrorBank(args.error_bank) if args.error_bank else None
    step = start_or_resume(checkpoint_path, trainable, ema, optimizer, scaler, args, bank)
    log_file, log = start_log(os.path.join(args.out, "log.csv"), step)
    model.unet.train()
    model.unet.checkpoint_every = args.gradient_checkpointing
    progress = tqdm(total=args.max_steps, initial=step, desc=args.stage, unit="step", smoothing=0.05,
                    mininterval=1)
    started, val = time.time(), float("nan")

    while True:
        # once in a while: validate and show the averaged weights, save everything
        last = step == args.max_steps
        row = {"step": step}
        if step % args.val_every == 0 or last:
            with averaged(ema, trainable):
                val, quarters = validation_loss(model, schedule, batches, args, device)
            row |= {"val_loss": val, **{f"val_q{i + 1}": q for i, q in enumerate(quarters)}}
            by_quarter = " ".join(f"{q:.4f}" for q in quarters)
            progress.write(f"step {step:6d}/{args.max_steps} | val_loss {val:.4f} [{by_quarter}]")
        if args.sample_every and step and step % args.sample_every == 0:
            with averaged(ema, trainable):
                sample_sheet(f"{args.out}/samples/{step:06d}.png", model, schedule, batches[0], args, device)
        if step and (step % args.save_every == 0 or last):
            log_file.flush()
            save_checkpoint(checkpoint_path, trainable, ema, optimizer, scaler, step, model, args, bank)
        if last:
            log.writerow(row)
            break

        # determine and set the learning rate
        begun = time.time()
        for group in optimizer.param_groups:
            group["lr"] = get_learning_rate(step, args)

        # forward, backward
        loss = accumulate(model, schedule, next_batch, step, args, device, scaler, bank)
        if loss != loss:
            raise SystemExit(f"loss is not a number at step {step} of stage {args.stage}: resume from "
                             f"{checkpoint_path} with half the --learning_rate, or with --mixed_precision no")

        # clip, update, average
        scaler.unscale_(optimizer)
        grad_norm = torch.nn.utils.clip_grad_norm_(trainable.values(), args.max_grad_norm).item()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)
        step += 1
        update_ema(ema, trainable, args.ema_decay, step)

        # timing and logging
        row |= {"step": step - 1, "loss": loss, "grad_norm": grad_norm,
                "learning_rate": optimizer.param_groups[0]["lr"],
                "seconds": round(time.time() - begun, 4), "memory": round(peak_memory(device), 3)}
        log.writerow(row)
        progress.set_postfix(loss=f"{loss:.4f}", val=f"{val:.4f}", grad=f"{grad_norm:.2f}", refresh=False)
        progress.update()
        if step % args.val_every == 0:
            log_file.flush()
            plot_losses(log_file.name, os.path.join(args.out, "loss.png"))

    progress.close()
    log_file.close()
    plot_losses(log_file.name, os.path.join(args.out, "loss.png"))
    with averaged(ema, trainable):
        finish(model, schedule, args, (time.time() - started) / 60, val, batches, device)


if __name__ == "__main__":
    try:
        main()
    except ValueError as error:
        raise SystemExit(f"train.py: {error}") from None
