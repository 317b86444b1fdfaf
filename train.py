"""Train a stage: one flat loop for all of them.

    python train.py --stage interp                  fresh temporal layers on the shipped image model, minutes
    python train.py --stage interp --resume auto    go on where the last run of this stage stopped
    python train.py --stage interp --data DIR       on your own clips, prepared and encoded by data.py
    torchrun --standalone --nproc_per_node=2 train.py --stage interp     two processes, half a batch each
    python train.py --stage interp --preset sd15 --dry_run --vram 12      does it fit, and if not, what to add

The tiny model from nothing, in this order (README.md has the times and what to expect):

    python train.py --stage vae
    python train.py --stage image --weights out/vae/weights.safetensors
    python train.py --stage video --weights out/image/weights.safetensors --export my_tiny.safetensors

`vae` learns to shrink pictures to latents. `image` learns to denoise latents of single frames, told by a
caption what to show; it is then frozen. `starter`, `extrap` and `interp` train the temporal layers on the
windows that a plan starts with, goes on with and fills with; `video` trains one set of them on all three.
"""

import argparse
import copy
import csv
import json
import os
import sys
import time
import warnings
import weakref
from contextlib import contextmanager, nullcontext

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.parallel import DistributedDataParallel
from torch.profiler import ProfilerActivity, profile, record_function
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from tqdm import tqdm

import data
from convert_sd_weights import lora_tensors, merge_lora
from diffusion import T, NoiseSchedule, ddim_sample, ddim_timesteps, min_snr_weight
from model import (PRESETS, TEXT_TOKENS, TINY_WEIGHTS, Model, add_lora, choose_device, fill, is_temporal,
                   keep_activations, load_weights, processes, read_weights, save_memory, save_weights)

VIDEO_STAGES = ("starter", "extrap", "interp", "video")
# what a stage uses where the command line is silent: steps, batch size, peak learning rate, worlds, frames
DEFAULTS = {"vae": (3000, 16, 2e-3, 0, 121), "image": (2400, 32, 1e-3, 4096, 121),
            "video": (8000, 6, 2e-3, 512, 481), "starter": (400, 6, 2e-3, 128, 121),
            "extrap": (400, 6, 2e-3, 128, 121), "interp": (240, 6, 2e-3, 96, 121)}
SD15_DEFAULTS = (20_000, 1, 1e-4, 0, 121)         # of its video stages: a place to start from, not measured
DTYPES = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
LEVELS = [62, 187, 312, 437, 562, 687, 812, 937]  # of validation, fixed: two per quarter of the noise range


def run_flags(p):
    """What to train."""
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


def data_flags(p):
    """What to train it on."""
    p.add_argument("--data", metavar="DIR", help="folder that data.py has prepared and encoded (--prepare, "
                   "--cache), instead of sky worlds; for the video stages")
    p.add_argument("--drop", metavar="LIST", help="clips of --data not to train on: data.py --drop_hardest")
    p.add_argument("--flips", action=argparse.BooleanOptionalAction, default=True,
                   help="show half of --data mirrored, but no clip whose caption says left or right")
    p.add_argument("--score", metavar="FILE", help="do not train: write the loss of every clip of --data to "
                   "this file, with the temporal layers of --weights or --temporal")
    p.add_argument("--worlds", type=int, help="training worlds whose latents are kept in memory: more is "
                   "better and slower to prepare; default 4096 for image, 512 for video, else about 100")
    p.add_argument("--frames", type=int, help="length of the training clips: windows of plans for so many "
                   "frames, and for half and a quarter of it; default 481 for video, else 121")
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


def optimisation_flags(p):
    """How to train it."""
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
    p.add_argument("--focus", type=float, default=0.0, metavar="SHARE", help="errors weigh more where more "
                   "moves: small bright things get solid, the rest a little worse; try 0.5, to go on with "
                   "--temporal layers that are trained")
    p.add_argument("--snr_gamma", type=float, default=0.0,
                   help="min-SNR loss weights, 5 is usual; 0: every level counts alike")
    p.add_argument("--ema_decay", type=float, default=0.998,
                   help="of the averaged weights, which are what is kept; 0: no average")
    p.add_argument("--mixed_precision", choices=("no", "fp16", "bf16", "auto"),
                   help="fp16 only on a GPU; bf16 gains the tiny preset little; auto is bf16 where the "
                   "device really has it, else fp16. In the video stages the frozen layers are then stored "
                   "in it too. Default: no for tiny, auto for sd15")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--device", help="default: cuda, else mps, else cpu")


def memory_flags(p):
    """What to save memory with: README.md has what each saves and what it costs."""
    p.add_argument("--gradient_checkpointing", type=int, metavar="K", help="recompute every K-th "
                   "stage of the UNet instead of storing it: 1 saves the most memory and costs about a third "
                   "more time; 0: off. Default: 0 for tiny, 1 for sd15")
    p.add_argument("--lean", action=argparse.BooleanOptionalAction, default=True, help="frozen layers keep "
                   "nothing for the backward pass, which needs only their weights; costs no time")
    p.add_argument("--recompute", action="store_true", help="compute norms and activations of the image "
                   "model twice instead of storing them: for runs without --gradient_checkpointing")
    p.add_argument("--optimizer_on_cpu", action="store_true", help="gradients, optimizer state and averaged "
                   "weights live on the CPU, which makes the update")
    p.add_argument("--offload_activations", action="store_true", help="what is stored for the backward pass "
                   "waits on the CPU")
    p.add_argument("--activations_8bit", action="store_true", help="what is stored for the backward pass is "
                   "stored in 8 bit; gradients are then good to about a percent")
    p.add_argument("--backbone_8bit", action="store_true", help="frozen layers are stored in 8 bit, and "
                   "unpacked whenever they are used")
    p.add_argument("--lora_rank", type=int, default=0, metavar="R", help="train the spatial attentions too, "
                   "by a LoRA of this rank in a file of its own, for sample.py --lora; 0: none")


def process_flags(p):
    """Speed, and several processes: torchrun starts them, and --batch_size is what they share."""
    p.add_argument("--compile", action="store_true", help="torch.compile every stage of the UNet by itself; "
                   "pays after minutes, and needs a C++ compiler on the CPU")
    p.add_argument("--profile", action="store_true",
                   help="look closely at steps 4 to 6: trace.json in --out, and a table of where time goes")
    p.add_argument("--shard", action="store_true", help="each process keeps only its part of the UNet, of "
                   "gradients and of optimizer state: less memory, more traffic; for the video stages")
    p.add_argument("--pipeline", action="store_true", help="two processes make one UNet, the way down and "
                   "the way up: half of the activations each, 4 processes are two pairs; for video stages")


def report_flags(p):
    """What to look at once in a while, or before."""
    p.add_argument("--val_every", type=int, help="steps between validations; default: a quarter of the run, "
                   "but 20 to 250")
    p.add_argument("--sample_every", type=int, default=1000,
                   help="steps between contact sheets; 0: only at the end")
    p.add_argument("--save_every", type=int, default=250)
    p.add_argument("--dry_run", action="store_true",
                   help="print what would be trained and the memory it would take, touch nothing, and stop")
    p.add_argument("--vram", type=float, metavar="GB", help="with --dry_run: does it fit on a GPU with so "
                   "much memory, and which flags to add if not")


def parse(argv):
    """The command line of train.py. Defaults are the tiny preset on the sky world."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for add_flags in (run_flags, data_flags, optimisation_flags, memory_flags, process_flags, report_flags):
        add_flags(p)
    args = p.parse_args(argv)
    names, sd15 = ("max_steps", "batch_size", "learning_rate", "worlds", "frames"), args.preset == "sd15"
    defaults = dict(zip(names, SD15_DEFAULTS if sd15 else DEFAULTS[args.stage]))
    defaults |= {"gradient_checkpointing": int(sd15), "mixed_precision": "auto" if sd15 else "no"}
    for name, value in defaults.items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    if args.val_every is None:
        args.val_every = min(max(20, args.max_steps // 4), 250)
    args.out = args.out or os.path.join("out", args.stage)
    args.data_hash = None   # of the clips of --data, when they have been found
    for name in ("data", "error_bank", "lora_rank", "focus"):
        if getattr(args, name) and args.stage not in VIDEO_STAGES:
            raise ValueError(f"--{name} is for the stages {', '.join(VIDEO_STAGES)}, found --stage "
                             f"{args.stage}: leave --{name} away")
    if args.focus < 0:
        raise ValueError(f"--focus is {args.focus}: what moves cannot weigh less than nothing, try 0.5")
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
            if (is_temporal(name) or ".lora." in name) == (stage in VIDEO_STAGES)}
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
    if args.preset == "sd15":
        raise ValueError("--preset sd15 trains on latents that are there: encode your clips with data.py "
                         "--cache, and give the folder as --data")
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
            """Single frames as windows of one frame, to be made."""
            latents, captions = clips.images(args.seed, step, args.batch_size)
            none = torch.zeros(len(latents), 1, dtype=torch.bool)
            return {"latents": latents[:, :, None], "captions": captions, "given": none, "user": none,
                    "frames": none.long()}
        return image_batch
    shapes = data.window_shapes(args.stage, args.frames, args.max_stride)
    return lambda step: clips.windows(shapes, args.seed, step, args.batch_size)


def prepare_batches(args, model, device, rank, world):
    """What to train on, a function (number of the batch) -> batch, and four batches to validate on."""
    with in_turn(rank, world):
        os.makedirs(os.path.join(args.out, "samples"), exist_ok=True)
        next_batch = data.prefetch(prepare_data(args, model, "train", device))
        val_batch = prepare_data(args, model, "val", device)
    return next_batch, [val_batch(step) for step in range(4)]


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


def add_noise(model, batch, seed, args, bank=None):
    """A training batch with all that is random about it, a function of `seed` alone, and of an ErrorBank.

    That is eps, and but for the VAE levels t_new and t_aug (b,) and which captions are dropped; with a bank,
    latents `shown` that have its errors."""
    generator = torch.Generator().manual_seed(seed)
    if args.stage == "vae":
        b, _, H, W = batch["images"].shape
        size = (b, 4, H // model.config.vae_factor, W // model.config.vae_factor)
        return batch | {"eps": torch.randn(size, generator=generator)}
    t_new, t_aug = random_levels(batch, generator, args)
    dropped = torch.rand(len(t_new), generator=generator) < args.caption_dropout
    captions = ["" if drop else caption for drop, caption in zip(dropped, batch["captions"])]
    eps = torch.randn(batch["latents"].shape, generator=generator)
    if bank:
        batch = batch | {"shown": bank.spoil(batch["latents"], batch["given"], batch["user"], generator)}
    return batch | {"t_new": t_new, "t_aug": t_aug, "captions": captions, "eps": eps}


def embed(model, batch, captions):
    """Text embeddings (b, 77, d) of captions: from the batch if it brings them, but for dropped captions."""
    if "contexts" not in batch:
        return model.context(captions)
    device = batch["contexts"].device
    dropped = torch.tensor([caption == "" for caption in captions], device=device)
    if not dropped.any():
        return batch["contexts"]
    return torch.where(dropped[:, None, None], model.context([""]).to(device), batch["contexts"])


def noised(schedule, batch):
    """What the UNet is shown of a batch: x_t like batch["latents"], and the levels t (b, f).

    Every frame has its own: t_new where it is made, t_aug where it is given, 0 where the user gave it."""
    shown, given = batch.get("shown", batch["latents"]), batch["given"]
    t = torch.where(given, batch["t_aug"][:, None], batch["t_new"][:, None])
    t = torch.where(batch["user"], 0, t)                                          # (b, f)
    x_t = schedule.q_sample(shown, t, batch["eps"])
    return torch.where((given & (t == 0))[:, None, :, None, None], shown, x_t), t   # level 0: really clean


def diffusion_errors(unet, schedule, batch, args, bank=None):
    """Errors of the UNet's answer, and a list of those of its guess at the clean frames and of what moved.

    (b, c, f, h, w) each, 0 on given frames. `unet`: a function called like it. A single frame has no
    neighbours to guess from: []. bank: an ErrorBank to fill."""
    x0, given, context = batch["latents"], batch["given"], batch["context"]
    x_t, t = noised(schedule, batch)
    target, new = schedule.target(x0, t, batch["eps"]), ~given[:, None, :, None, None]
    if args.stage not in VIDEO_STAGES:
        return (unet(x_t, t, context, temporal=False).float() - target) * new, []
    output, *guesses = unet(x_t, t, context, batch["frames"], given, with_guess=True)
    if bank:
        bank.add(schedule.to_x0(x_t, t, output.detach().float()) - x0, given)
    return (output.float() - target) * new, [(guess.float() - x0) * new for guess in guesses]


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


def focus(latents, share):
    """Weights (b, 1, f, h, w), 1 in the mean, of latents (b, c, f, h, w) of windows: more where more moves.

    A sun covers a hundredth of the picture: in a mean over all of it, little is lost if it is pale and soft.
    How much a place moves is its squared distance from its mean over the window, without what light does
    everywhere, relative to all places; `share` times that is added to what every place has. These weights
    know the answer: the best guess at a sun that may be there or not is no longer the mean but brighter."""
    change = latents - latents.mean(2, keepdim=True)
    change = change - change.mean((3, 4), keepdim=True)
    change = change.square().mean(1, keepdim=True)
    change = change / change.mean((2, 3, 4), keepdim=True).clamp(min=1e-6)
    weight = 1 + share * change
    return weight / weight.mean((2, 3, 4), keepdim=True)


def relative(error, batch, floor, weights):
    """A loss per example (b,) with the gradient of log(size + floor), size being mean square plus jitter.

    weights: those of `focus`, in the mean square; jitter counts everywhere alike, or what is still would
    flicker.

    Windows differ: where to go from one frame is open, a fill between frames 4 apart is nearly known, and
    its error, a thousand times smaller, is what flickers. So every example counts relative to its own error,
    as if one measured in decibels."""
    size = mean_square(weights.sqrt() * error, batch["given"]) + jitter(error, batch["frames"])
    return size / (size.detach() + floor)


def vae_loss(model, images, eps):
    """What the picture loses, and how far the latents are from unit normal: (b,).

    L1 of the picture and of its differences to the neighbours (edges stay sharp), and a little KL, all means
    (Rombach et al., without the discriminator). eps: noise like the latents, to draw a sample of them."""
    mean, log_variance = model.vae.moments(images)
    log_variance = log_variance.clamp(-30, 20)
    wrong = model.vae.pictures(mean + (0.5 * log_variance).exp() * eps) - images
    edges = wrong.diff(dim=2).abs().mean(dim=(1, 2, 3)) + wrong.diff(dim=3).abs().mean(dim=(1, 2, 3))
    kl = 0.5 * (mean ** 2 + log_variance.exp() - 1 - log_variance).mean(dim=(1, 2, 3))
    return wrong.abs().mean(dim=(1, 2, 3)) + 0.5 * edges + 3e-4 * kl


def to_device(batch, device):
    """A batch with its tensors on the device."""
    return {key: value.to(device) if torch.is_tensor(value) else value for key, value in batch.items()}


def take(batch, share):
    """One of so many equal parts of a batch, whose tensors and lists all go by examples."""
    part, parts = share
    size = len(next(iter(batch.values()))) // parts
    return {key: value[part * size:(part + 1) * size] for key, value in batch.items()}


def prepare_batch(model, batch, seed, args, device, share=(0, 1), bank=None):
    """A drawn batch as the loss needs it, tensors (b, ...) on the device: noise added, captions embedded.

    Of several processes each makes the noise of all, a function of `seed` alone, and keeps its share."""
    batch = to_device(take(add_noise(model, batch, seed, args, bank), share), device)
    if args.stage != "vae":
        batch["context"] = embed(model, batch, batch.pop("captions"))
    return batch


def training_loss(model, schedule, batch, args, bank=None):
    """What to descend on for a batch of `prepare_batch`, and its loss, two scalars."""
    if args.stage == "vae":
        loss = vae_loss(model, batch["images"], batch["eps"]).mean()
        return loss, loss
    return denoising_loss(model.unet, schedule, batch, args, bank)


def denoising_loss(unet, schedule, batch, args, bank=None):
    """The same where noise is taken off by a function called like the UNet.

    Video stages go by relative errors, those of the guess and of what moved beside that of the answer."""
    error, guess_errors = diffusion_errors(unet, schedule, batch, args, bank)
    weight = min_snr_weight(schedule, batch["t_new"], args.snr_gamma) if args.snr_gamma else 1
    loss = weight * mean_square(error, batch["given"])
    descend = loss
    if args.stage in VIDEO_STAGES:
        places = focus(batch["latents"], args.focus)
        descend = weight * relative(error, batch, 1e-4, places)
        descend = descend + sum(relative(e, batch, 2e-5, places) for e in guess_errors)
    return descend.mean(), loss.mean()


@torch.no_grad()
def validation_loss(model, schedule, batches, args, device, levels=LEVELS):
    """(loss, [loss per quarter of the noise range]) on fixed batches, with fixed noise, at fixed levels.

    A training loss jumps with the levels it happens to draw; this one is comparable from step to step and
    run to run. Given frames stand at the level t = 20. For the VAE there are no levels: the quarters are
    empty."""
    if args.stage == "vae":
        losses = [training_loss(model, schedule, prepare_batch(model, batch, i, args, device), args)[1]
                  for i, batch in enumerate(batches)]
        return torch.stack(losses).mean().item(), []
    by_level = []
    for level in levels:
        losses = []
        for i, batch in enumerate(batches):
            eps = torch.randn(batch["latents"].shape, generator=torch.Generator().manual_seed(i))
            batch = to_device(batch | {"eps": eps}, device)
            batch["context"] = embed(model, batch, batch["captions"])
            batch["t_new"] = torch.full((len(eps),), level, device=device)
            batch["t_aug"] = torch.full((len(eps),), min(20, args.aug_max), device=device)
            with computing(args, device):
                error, _ = diffusion_errors(model.unet, schedule, batch, args)
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
    shortest = min(data.reach(window) for _, windows in shapes for window in windows) + 1
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
# Several processes: each takes its share of every batch, and rank 0 alone validates, logs and writes
# ------------------------------------------------------------------------------------------------------------

def batch_parts(args, world):
    """Into how many parts a batch is cut. ValueError if so many processes cannot share a run like this."""
    parts = world // 2 if args.pipeline else world
    apart, size = args.shard or args.pipeline, args.batch_size
    for wrong, words in (
            (apart and world == 1, "--shard and --pipeline are for several processes, found one: start with "
                                   "torchrun --standalone --nproc_per_node=2 train.py ..."),
            (args.shard and args.pipeline, "--shard and --pipeline exclude each other: leave one away"),
            (apart and args.stage not in VIDEO_STAGES, "--shard and --pipeline are for the stages "
             f"{', '.join(VIDEO_STAGES)}, found {args.stage}: leave them away"),
            (apart and args.mixed_precision == "fp16", "--shard and --pipeline have no fp16: take bf16"),
            (args.error_bank and world > 1, "--error_bank is filled and drawn from by one process, found "
             f"{world}: start it without torchrun, or leave it away"),
            (world > 1 and args.optimizer_on_cpu, "--optimizer_on_cpu is for one process: leave it away, "
             "--shard saves the same memory"),
            (apart and (args.backbone_8bit or args.lora_rank), "--shard and --pipeline go with neither "
             "--backbone_8bit nor --lora_rank: leave these away"),
            (args.score and world > 1, "--score runs in one process: start it without torchrun"),
            (args.pipeline and world % 2, f"--pipeline takes pairs of processes, found {world}: add one"),
            (size % max(1, parts), f"--batch_size {size} cannot be shared by {parts}: give a multiple"),
            (args.pipeline and size < 2 * parts, f"--batch_size {size} leaves a pipeline fewer than two "
             f"examples at a time: give {2 * parts} or more")):
        if wrong:
            raise ValueError(words)
    return parts


@contextmanager
def in_turn(rank, world):
    """Inside this rank 0 goes first: the others find on the disk what it made."""
    if rank > 0:
        dist.barrier()
    yield
    if rank == 0 and world > 1:
        dist.barrier()


def add_up(number, device):
    """The sum of a number over all processes, if there are several."""
    if not dist.is_initialized():
        return number
    total = torch.tensor(number, device=device)
    dist.all_reduce(total)
    return total.item()


class Objective(nn.Module):
    """A loss, a function (batch, seed) -> two scalars, as the module that DistributedDataParallel wraps."""
    def __init__(self, networks, loss):
        super().__init__()
        self.networks, self.loss = nn.ModuleDict(networks), loss

    def forward(self, batch, seed):
        return self.loss(batch, seed)


def shard(unet):
    """Split every tensor of a UNet among the processes, in place. Stages are whole only while they run.

    Returns a copy on the CPU that stays whole, for `averaged`.
    fully_shard splits neither a lone number nor what is not contiguous, as channels-last is not."""
    from torch.distributed.fsdp import fully_shard   # takes a second to import
    warnings.filterwarnings("ignore", "FSDP2-wrapped module")   # returns a view: nobody changes it in place
    device = next(unet.parameters()).device
    spare = copy.deepcopy(unet.cpu())
    unet.to(device, memory_format=torch.contiguous_format)
    unet.temporal_guess.sharpness = nn.Parameter(unet.temporal_guess.sharpness.detach()[None])
    mesh = dist.init_device_mesh(device.type, (dist.get_world_size(),))
    for stage in (*unet.stages(), unet):
        fully_shard(stage, mesh=mesh)
    return spare


def whole(state):
    """A nested dict of tensors with those that are sharded put together, on the CPU, for rank 0 to keep.

    All processes do it at the same time. What is not sharded stays as it is."""
    if isinstance(state, dict):
        return {key: whole(value) for key, value in state.items()}
    if not hasattr(state, "full_tensor"):
        return state
    tensor = state.full_tensor()
    return (tensor[0] if tensor.shape == (1,) else tensor).cpu() if dist.get_rank() == 0 else None


def part_of(tensor, parameter):
    """Of a whole tensor what this process keeps: all of it, unless the parameter is sharded."""
    if not hasattr(parameter, "full_tensor"):
        return tensor
    from torch.distributed.tensor import distribute_tensor
    tensor = tensor.to(parameter.device).view(parameter.shape)
    return distribute_tensor(tensor, parameter.device_mesh, parameter.placements)


class Half(nn.Module):
    """One half of the UNet as a stage of a pipeline: the way down, or the way up and the loss.

    Both make x_t for themselves from the same batch; only what the first half has learned goes over."""
    def __init__(self, unet, schedule, args, device, first):
        super().__init__()
        self.unet, self.schedule, self.args, self.device, self.first = unet, schedule, args, device, first

    def forward(self, *learned, **batch):
        def second_half(x, t, context, frames, given, with_guess):
            """What is called like the UNet, and goes on from what the first half has learned."""
            return self.unet.decode(x, t, context, window._replace(emb=learned[0]), *learned[1:])

        x_t, t = noised(self.schedule, batch)
        with computing(self.args, self.device):
            window = self.unet.look_around(x_t, t, batch["context"], batch["frames"], batch["given"])
            if self.first:
                learned = window.emb, *self.unet.encode(x_t, t, batch["context"], window)
                return tuple(tensor.contiguous() for tensor in learned)       # only such can be sent
            return torch.stack(denoising_loss(second_half, self.schedule, batch, self.args))[None]   # (1, 2)


class Pipeline:
    """Forward and backward of a batch through two processes, its examples one by one and one after the other.

    A pair of processes is one pipeline. Activations and work are halved; weights, gradients and optimizer
    state are not: gradients are summed over all processes, and then every one does the same step."""
    def __init__(self, model, schedule, args, device, rank, world):
        self.model, self.args, self.device, self.place = model, args, device, rank % 2
        self.halves = [Half(model.unet, schedule, args, device, first) for first in (True, False)]
        self.share = (rank // 2, world // 2)
        self.group = [dist.new_group([i, i + 1]) for i in range(0, world, 2)][rank // 2]
        self.schedules = {}   # by the length of the windows: what is sent has a fixed shape

    def __call__(self, batch, seed):
        """The loss of this pipeline's share of a batch, and 0 in the process that does not see it."""
        batch = prepare_batch(self.model, batch, seed, self.args, self.device, self.share)
        f = batch["frames"].shape[1]
        if f not in self.schedules:
            self.schedules[f] = self.plan(batch)
        losses = self.schedules[f].step(target=batch["frames"], **batch)      # (b, 2); a target has to be
        return 0.0 if losses is None else losses[:, 1].mean().item()

    def plan(self, batch):
        """What torch runs for batches of this shape: one forward, one backward, by turns, per example."""
        from torch.distributed.pipelining import PipelineStage, Schedule1F1B   # takes two seconds to import
        learned = self.halves[0](**{key: value[:1] for key, value in batch.items()})
        ends = (), learned, (torch.zeros(1, 2, requires_grad=True),)      # what goes in and out, by example
        stage = PipelineStage(self.halves[self.place], self.place, 2, self.device, ends[self.place],
                              ends[self.place + 1], group=self.group)
        examples = len(batch["frames"])
        mean = lambda losses, _: losses[:, 0].mean() / (examples * self.args.gradient_accumulation_steps)
        return Schedule1F1B(stage, examples, mean, scale_grads=False)

    def add_gradients(self):
        """Give every process the mean gradient over all pipelines; of the other half it has none itself."""
        for parameter in filter(lambda parameter: parameter.requires_grad, self.model.unet.parameters()):
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            dist.all_reduce(parameter.grad)
            parameter.grad /= self.share[1]


def prepare_objective(model, schedule, args, device, rank, world, bank=None):
    """What is called with a batch and a seed: a loss to go down from, or a `Pipeline`, which goes itself."""
    if args.pipeline:
        return Pipeline(model, schedule, args, device, rank, world)
    def loss(batch, seed):
        """(what to descend on, loss) of this process's share of a batch."""
        batch = prepare_batch(model, batch, seed, args, device, (rank, world), bank)
        return training_loss(model, schedule, batch, args, bank)
    if world == 1 or args.shard:
        return loss
    # those that train, which are on one device: it takes no others
    training = {name: network for name, network in model.networks().items()
                if any(parameter.requires_grad for parameter in network.parameters())}
    return DistributedDataParallel(Objective(training, loss), broadcast_buffers=False)   # they are constants


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
def averaged(ema, parameters, model, spare=None):
    """Inside this, the network has the averaged weights: validation, samples and results are theirs.

    A sharded UNet gives them to its whole copy, `spare`, with which rank 0 can go on alone."""
    swap(ema, parameters)
    unet = model.unet
    if spare:
        state, device = whole(unet.state_dict()), next(unet.parameters()).device
        if dist.get_rank() == 0:
            spare.load_state_dict(state)
            model.unet = spare.to(device)
    try:
        yield
    finally:
        if spare:
            model.unet = unet
            spare.cpu()
        swap(ema, parameters)


def save_checkpoint(path, parameters, ema, optimizer, scaler, step, model, args, rank, bank=None):
    """Everything that a run needs to go on exactly, in any number of processes. Complete or not there."""
    state = {"model": parameters, "ema": ema, "optimizer": optimizer.state_dict(),
             "scaler": scaler.state_dict(), "step": step, "rng": torch.get_rng_state(),
             "preset": model.config.name, "stage": args.stage, "args": vars(args),
             "errors": bank and bank.errors}
    state = whole(state)
    if rank == 0:
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
    # older checkpoints do not say all of it
    old = {"max_stride": 16, "error_bank": 0.0, "focus": 0.0} | state["args"]
    # what decides the batches, the loss and the learning rate must not change in the middle of a run
    for name in ("max_steps", "batch_size", "learning_rate", "seed", "worlds", "frames", "aug_max",
                 "weights", "max_stride", "error_bank", "focus"):
        if old[name] != getattr(args, name):
            raise ValueError(f"{path} was trained with --{name} {old[name]}, now it is "
                             f"{getattr(args, name)}: give the old value to go on exactly, or start anew in "
                             "another --out folder")
    before = state["args"].get("data_hash")   # a checkpoint from before there was --data has none
    if before != args.data_hash:
        raise ValueError(f"{path} was trained on other clips (hash {before}, now {args.data_hash}): give "
                         "--data, --drop and --flips as they were, or start anew in another --out folder")
    shapes = lambda tensors: {name: tensor.shape or (1,) for name, tensor in tensors.items()}   # see `shard`
    if shapes(state["model"]) != shapes(parameters):
        raise ValueError(f"{path} holds other layers than model.py now has: start anew in another --out "
                         "folder")
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(part_of(state["model"][name], parameter))
            ema[name].copy_(part_of(state["ema"][name], parameter))
    for moments, parameter in zip(state["optimizer"]["state"].values(), parameters.values()):
        moments |= {key: part_of(moments[key], parameter) for key in ("exp_avg", "exp_avg_sq")}
    optimizer.load_state_dict(state["optimizer"])
    scaler.load_state_dict(state["scaler"])
    torch.set_rng_state(state["rng"])
    if bank:
        bank.errors = state["errors"]
    return state["step"]


def start_or_resume(path, parameters, ema, optimizer, scaler, args, rank, bank=None):
    """Go on from a checkpoint if asked to, `path` for --resume auto. Rank 0 writes args.json; the step."""
    step = 0
    if args.resume:
        path = path if args.resume == "auto" else args.resume
        step = load_checkpoint(path, parameters, ema, optimizer, scaler, args, bank)
        print(f"resumed {path} at step {step}")
    if rank == 0:
        with open(os.path.join(args.out, "args.json"), "w") as file:
            json.dump(vars(args), file, indent=1)
    return step


# seconds: of the step; data_seconds: of these spent waiting for the batch
COLUMNS = ["step", "loss", "val_loss", "val_q1", "val_q2", "val_q3", "val_q4", "grad_norm", "learning_rate",
           "seconds", "data_seconds", "memory"]


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
        n = 16 if args.stage == "image" else 5 if args.preset == "tiny" else 1   # VAE of sd15: on the CPU
        batch = {key: value[:n] for key, value in batch.items()}
        x0, given = batch["latents"], batch["given"]
        noise = torch.randn(x0.shape, generator=torch.Generator().manual_seed(0)).to(device)
        context = embed(model, batch, batch["captions"])
        temporal = args.stage in VIDEO_STAGES
        say = lambda x, t: model.unet(x, t, context, batch["frames"], given, temporal=temporal)
        x = torch.where(given[:, None, :, None, None], x0, noise)
        levels = ddim_timesteps(20 if args.stage == "image" else 8) + [-1]
        with computing(args, device):
            x = ddim_sample(schedule, say, x, torch.zeros_like(given).long(), ~given, levels)
        home = next(model.vae.parameters()).device
        truth, made = model.vae.decode(x0.to(home)), model.vae.decode(x.float().to(home))
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
        _, _, about, tensors = read_weights(args.temporal)
        fill(model, tensors, args.temporal, parts=("unet",), temporal="only")
        if "recipes" in about:
            model.about["recipes"] = about["recipes"]      # of these layers too
    elif not args.score:
        fresh = Model.build(model.config).unet.state_dict()
        loaded = model.unet.state_dict()
        model.unet.load_state_dict({k: fresh[k] if is_temporal(k) else v for k, v in loaded.items()})
    if args.lora_rank:
        add_lora(model.unet, args.lora_rank)
    return model


def prepare_optimizer(trainable, args, device):
    """AdamW on what is trained, and the scaler that keeps small gradients from vanishing in fp16."""
    optimizer = torch.optim.AdamW(trainable.values(), lr=args.learning_rate, betas=(0.9, 0.99),
                                  weight_decay=args.weight_decay,
                                  fused=next(iter(trainable.values())).is_cuda or None)   # needs no scratch
    return optimizer, torch.amp.GradScaler(device.type, init_scale=512.0, growth_interval=2000,
                                           enabled=args.mixed_precision == "fp16")


# ------------------------------------------------------------------------------------------------------------
# Memory: what the flags do, and how much it will be
# ------------------------------------------------------------------------------------------------------------

def choose_precision(asked, device):
    """"no", "fp16" or "bf16", which is only taken where it is not emulated."""
    if asked not in ("auto", "bf16"):
        return asked
    real = torch.cuda.is_bf16_supported(including_emulation=False) if device.type == "cuda" else (
        device.type == "cpu")
    if asked == "bf16" and not real:
        print(f"bf16 is only emulated on {device}: taking fp16")
    return "bf16" if real else "fp16"


def make_smaller(model, args):
    """Store the frozen part of a UNet, and what it keeps for the backward pass, as the flags say."""
    unet, dtype = model.unet, DTYPES[args.mixed_precision]
    if args.stage in VIDEO_STAGES:
        for parameter in unet.parameters():
            if not parameter.requires_grad:
                parameter.data = parameter.data.to(dtype)
    unet.checkpoint_every = args.gradient_checkpointing
    # torch.compile decides for itself what to keep, and cannot look into layers that decide
    save_memory(unet, args.recompute, args.lean and not args.compile, args.backbone_8bit)


@contextmanager
def computing(args, device, home="cpu"):
    """Inside this the networks compute in half precision and keep activations as the flags say.

    Validation too, where frozen layers are in half precision. home: where activations are offloaded to."""
    dtype = DTYPES[args.mixed_precision]
    half = dtype != torch.float32 and (args.stage in VIDEO_STAGES or torch.is_grad_enabled())
    smaller = args.activations_8bit or args.offload_activations
    with torch.autocast(device.type, dtype if half else None, enabled=half):
        with keep_activations(args.activations_8bit, home if args.offload_activations else None,
                              dtype) if smaller else nullcontext():
            yield


def hand_over(trainable, home="cpu"):
    """Copies of the trained parameters on the CPU, for the optimizer: {name: parameter}.

    A gradient goes there, and is added up there, as soon as the backward pass has made it."""
    masters = {name: nn.Parameter(p.detach().to(home, copy=True)) for name, p in trainable.items()}
    for name, parameter in trainable.items():
        def take_gradient(parameter, master=masters[name]):
            """Move a gradient that is complete to the copy, and let go of it here."""
            gradient, parameter.grad = parameter.grad.to(home), None
            master.grad = gradient if master.grad is None else master.grad + gradient
        parameter.register_post_accumulate_grad_hook(take_gradient)
    return masters


@torch.no_grad()
def give_back(masters, trainable):
    """The network takes over what the optimizer has made of the copies, if they are copies."""
    for name, parameter in trainable.items():
        if masters[name] is not parameter:
            parameter.copy_(masters[name])


class MemoryMeter(TorchDispatchMode):
    """Bytes of the tensors made while it is on and still alive, `known` ones aside; works on fake ones too.

    At the moment when they were most: `peak`, and how much of it were the gradients of `trained`."""
    def __init__(self, known, trained):
        super().__init__()
        self.trained, self.live, self.peak, self.gradients = trained, 0, 0, 0
        self.sizes = weakref.WeakKeyDictionary({t.untyped_storage(): 0 for t in known})

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for tensor in tree_iter(out):
            if isinstance(tensor, torch.Tensor) and tensor.device.type != "meta":     # meta: on the CPU
                self.count(tensor.untyped_storage())
        return out

    def count(self, storage):
        """Take note of memory that is seen for the first time, and be told when it is freed."""
        if storage in self.sizes:                                                     # a view, or in place
            return
        self.sizes[storage] = size = storage.nbytes()
        weakref.finalize(storage, self.free, size)
        self.live += size
        if self.live > self.peak:
            self.peak = self.live
            self.gradients = sum(p.grad.nbytes for p in self.trained if p.grad is not None)

    def free(self, size):
        """So many bytes are not alive any more."""
        self.live -= size


def fake_batch(args, config, f, size=None):
    """A batch as `prepare_batch` returns it, with f frames; only its shapes mean something."""
    b, size = args.batch_size, size or config.size // config.vae_factor
    if args.stage == "vae":
        return {"images": torch.empty(b, 3, config.size, config.size), "eps": torch.empty(b, 4, size, size)}
    given = torch.zeros(b, f, dtype=torch.bool)
    return {"latents": torch.empty(b, 4, f, size, size), "eps": torch.empty(b, 4, f, size, size),
            "frames": given.long(), "given": given, "user": given, "t_new": torch.zeros(b).long(),
            "t_aug": torch.zeros(b).long(), "context": torch.empty(b, TEXT_TOKENS, config.text_width)}


def predict_memory(args, f):
    """{part: bytes on the device} of a training step on windows of f frames, when they are most.

    The step is really run, by the code that trains, but on tensors that have a shape and no content. Not in
    it are the driver, what the allocator loses, and scratch memory of the kernels."""
    config = PRESETS[args.preset]
    with FakeTensorMode():
        model = Model.build(config)
        if args.lora_rank:
            add_lora(model.unet, args.lora_rank)
        trainable = freeze_the_rest(model, args.stage)
        model.unet.train()
        make_smaller(model, args)
        if args.optimizer_on_cpu:
            hand_over(trainable, "meta")
        there = [model.unet] if args.data or args.preset == "sd15" else model.networks().values()
        known = [tensor for network in there for tensor in (*network.parameters(), *network.buffers())]
        schedule = NoiseSchedule(config.prediction, config.zero_terminal_snr)
        batch = fake_batch(args, config, f)
        with MemoryMeter(known, trainable.values()) as meter:
            with computing(args, torch.device("cpu"), "meta"):
                if args.stage == "image":                           # which trains the text encoder too
                    batch["context"] = model.context([""] * args.batch_size)
                descend, _ = training_loss(model, schedule, batch, args)
            descend.backward()
    trained = sum(p.nbytes for p in trainable.values())
    averages = 0 if args.optimizer_on_cpu else 3 * trained      # two of AdamW, and the averaged weights
    return {"frozen weights": sum(t.nbytes for t in known) - trained, "trained weights": trained,
            "optimizer and averaged weights": averages, "gradients": meter.gradients,
            "activations": meter.peak - meter.gradients}


# what to add, in this order, when it does not fit: first what costs no time, last what costs exactness
SAVINGS = (("lean", True), ("gradient_checkpointing", 1), ("optimizer_on_cpu", True),
           ("offload_activations", True), ("backbone_8bit", True), ("activations_8bit", True))
RESERVE = 1.0     # GB of a GPU that are not for tensors: driver, fragments, scratch memory


def print_prediction(args):
    """How much memory a run will take, by part; with --vram, what to add if that is too much."""
    f = 1
    if args.stage in VIDEO_STAGES:
        shapes = data.window_shapes(args.stage, args.frames, args.max_stride)
        f = max(len(window.frames) for _, windows in shapes for window in windows)
    parts = predict_memory(args, f)
    total = lambda parts: sum(parts.values()) / 1e9
    print(f"memory of a step on {args.batch_size} x {f} frames, {args.mixed_precision}:")
    for name, size in parts.items():
        print(f"  {name:31} {size / 1e9:6.2f} GB")
    if args.vram:
        wanted, added, left = argparse.Namespace(**vars(args)), [], total(parts)
        for name, value in SAVINGS:
            if left <= args.vram - RESERVE:
                break
            if getattr(wanted, name) != value:
                setattr(wanted, name, value)
                added.append(f"--{name}" if value is True else f"--{name} {value}")
                left = total(predict_memory(wanted, f))
        fits = left <= args.vram - RESERVE
        print(f"{args.vram:g} GB, {RESERVE:g} of them for the driver and fragments: " + (
            "it fits" if fits and not added else
            f"it fits with {' '.join(added)}: {left:.1f} GB" if fits else
            f"it does not fit, with {' '.join(added)} neither: {left:.1f} GB; use a smaller --batch_size"))
    print(f"predicted peak: {total(parts):.1f} GB")


def compile_stages(unet, device):
    """torch.compile each stage of a UNet by itself, in place. ValueError where nothing can be compiled."""
    try:
        torch.compile(torch.sin)(torch.ones(2, device=device))
    except Exception as error:   # whatever compilers are missing, each is told by an error of its own
        raise ValueError(f"--compile: torch.compile does not work here ({error}): install what it asks for, "
                         "a C++ compiler such as g++ on the CPU, or leave --compile away") from None
    torch._dynamo.config.recompile_limit = 64   # one forward for all stages, and windows of several lengths
    for stage in unet.stages():
        stage.compile()


@contextmanager
def part(name, args, device):
    """A named part of a step for --profile, where the GPU ends it before the next part begins."""
    with record_function(name):
        yield
        if args.profile and device.type == "cuda":
            torch.cuda.synchronize()


def start_profile(args, device, rank):
    """For --profile what looks at three steps, then writes its trace and prints where the time went."""
    def show(trace):
        """What to do when it has looked."""
        trace.export_chrome_trace(os.path.join(args.out, "trace.json"))
        events = {event.key: event for event in trace.key_averages()}
        step = events["ProfilerStep*"].cpu_time_total    # of all the steps together, in microseconds
        for name in ("data", "forward", "backward", "pipeline", "optimizer"):
            if name in events:
                share, ms = events[name].cpu_time_total / step, events[name].cpu_time_total / 3000
                print(f"{name:10s}{ms:10.1f} ms a step {share:7.1%}")
        busy = sum(event.self_device_time_total for event in events.values() if not event.is_user_annotation)
        print(f"{'GPU':10s}{busy / 3000:10.1f} ms a step {busy / step:7.1%}" if device.type == "cuda" else
              f"no GPU: {device}")
        print(f"wrote {args.out}/trace.json: open it in ui.perfetto.dev or chrome://tracing")

    if not args.profile or rank > 0:
        return None
    kinds = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (device.type == "cuda")
    watch = profile(activities=kinds, schedule=torch.profiler.schedule(wait=2, warmup=1, active=3, repeat=1),
                    on_trace_ready=show)
    watch.start()
    return watch


def accumulate(objective, next_batch, step, args, device, scaler):
    """Forward and backward of the micro-steps of one step, whose gradients add up to the mean's.

    Returns the loss of this process's share, and the seconds it waited for data."""
    loss, waited, n = 0.0, 0.0, args.gradient_accumulation_steps
    for number in range(step * n, (step + 1) * n):
        begun, seed = time.time(), args.seed * 1_000_003 + number
        with part("data", args, device):
            batch = next_batch(number)
        waited += time.time() - begun
        if args.pipeline:
            with part("pipeline", args, device):
                loss += objective(batch, seed) / n
            continue
        # processes exchange gradients once, in the last micro-step
        alone = number + 1 < (step + 1) * n and isinstance(objective, DistributedDataParallel)
        with objective.no_sync() if alone else nullcontext():
            with part("forward", args, device), computing(args, device):
                descend, part_loss = objective(batch, seed)
            with part("backward", args, device):
                scaler.scale(descend / n).backward()
        loss += part_loss.item() / n
    if args.pipeline:
        objective.add_gradients()
    return loss, waited


def update(trainable, ema, optimizer, scaler, step, args):
    """Clip the gradients, take a step, average; the length that the gradients had."""
    scaler.unscale_(optimizer)
    grad_norm = torch.nn.utils.clip_grad_norm_(trainable.values(), args.max_grad_norm)
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad(set_to_none=True)
    update_ema(ema, trainable, args.ema_decay, step + 1)
    return (grad_norm.full_tensor() if args.shard else grad_norm).item()


def report(model, trainable, args, device, why):
    """Say what is about to be trained, before anything is spent."""
    total = sum(p.numel() for network in model.networks().values() for p in network.parameters())
    count = sum(p.numel() for p in trainable.values())
    print(f"device: {device} ({why})")
    print(f"stage {args.stage}, preset {args.preset}: trainable {count:,} of {total:,} parameters, "
          f"{total - count:,} frozen")
    print(f"{args.max_steps} steps of {args.batch_size} x {args.gradient_accumulation_steps} examples, "
          f"learning rate up to {args.learning_rate:g}, into {args.out}")


def dry_run(args, device, why):
    """Say what would be trained and how much memory it would take, on tensors without content."""
    with FakeTensorMode():
        model = Model.build(PRESETS[args.preset])
        if args.lora_rank:
            add_lora(model.unet, args.lora_rank)
        report(model, trainable_parameters(model, args.stage), args, device, why)
    print_prediction(args)


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
        lora = os.path.join(args.out, "lora.safetensors")
        if args.lora_rank:
            with data.complete(lora) as unfinished:
                save_file(lora_tensors(model), unfinished)
            print(f"wrote {lora}")
            say += f" --lora {lora}:1"
        if export:   # what is frozen comes from its file: here it may be in less precision
            whole = load_weights(args.weights)
            fill(whole, read_weights(path)[3], path, parts=("unet",), temporal="only")
            if args.lora_rank:
                merge_lora(whole, lora)
            save_weights(export, whole, stage=args.stage, recipes=recipes)
            print(f"wrote {export}")
            say = f"python sample.py --frames 121 --weights {export}"
    sample_sheet(os.path.join(args.out, "samples", "final.png"), model, schedule, batches[0], args, device)
    print(f"wrote {path} and {args.out}/samples/final.png\nnext: {say}")


def turns(step, args):
    """Whether it is time to validate, and to draw a sheet of samples."""
    return (step % args.val_every == 0 or step == args.max_steps,
            bool(args.sample_every and step and step % args.sample_every == 0))


def look_at(model, schedule, batches, step, args, device, write):
    """Do what a step is the turn for, with the weights that are in the model.

    Says the validation loss with write(text), and returns it as columns of log.csv."""
    validate, draw = turns(step, args)
    columns = {}
    if validate:
        val, quarters = validation_loss(model, schedule, batches, args, device)
        columns = {"val_loss": val, **{f"val_q{i + 1}": q for i, q in enumerate(quarters)}}
        by_quarter = " ".join(f"{q:.4f}" for q in quarters)
        write(f"step {step:6d}/{args.max_steps} | val_loss {val:.4f} [{by_quarter}]")
    if draw:
        sample_sheet(f"{args.out}/samples/{step:06d}.png", model, schedule, batches[0], args, device)
    return columns


def main(argv=None):
    """Parse, prepare, loop. Every block of the loop starts with what it does."""
    args = parse(argv)
    device, why = choose_device(args.device)
    args.mixed_precision = choose_precision(args.mixed_precision, device)
    rank, world = processes("nccl" if device.type == "cuda" else "gloo")
    parts = batch_parts(args, world)
    if args.dry_run:
        return dry_run(args, device, why)
    # VAE and text encoder have nothing to do where latents and text embeddings are cached
    model = prepare_model(args).to(device, ("unet",) if args.data else ("unet", "vae", "text"))
    trainable = freeze_the_rest(model, args.stage)
    make_smaller(model, args)
    report(model, trainable, args, device, why)
    if args.score:
        return write_scores(args, model, device)
    check_out(args)
    schedule = NoiseSchedule(model.config.prediction, model.config.zero_terminal_snr).to(device)
    next_batch, batches = prepare_batches(args, model, device, rank, world)
    if args.compile:
        compile_stages(model.unet, device)
    spare = shard(model.unet) if args.shard else None
    trainable = trainable_parameters(model, args.stage)   # parts, where they are sharded
    masters = hand_over(trainable) if args.optimizer_on_cpu else trainable
    bank = ErrorBank(args.error_bank) if args.error_bank else None
    objective = prepare_objective(model, schedule, args, device, rank, world, bank)
    ema = {name: parameter.detach().clone() for name, parameter in masters.items()}
    optimizer, scaler = prepare_optimizer(masters, args, device)
    checkpoint_path = os.path.join(args.out, "ckpt.pt")
    step = start_or_resume(checkpoint_path, masters, ema, optimizer, scaler, args, rank, bank)
    give_back(masters, trainable)
    log_file, log = start_log(os.path.join(args.out, "log.csv") if rank == 0 else os.devnull, step)
    model.unet.train()
    progress = tqdm(total=args.max_steps, initial=step, desc=args.stage, unit="step", smoothing=0.05,
                    mininterval=1, disable=rank > 0)
    started, val, watch = time.time(), float("nan"), start_profile(args, device, rank)

    while True:
        # once in a while: validate and show the averaged weights, save everything
        last = step == args.max_steps
        row = {"step": step}
        if any(turns(step, args)):
            with averaged(ema, trainable, model, spare):
                if rank == 0:
                    row |= look_at(model, schedule, batches, step, args, device, progress.write)
                    val = row.get("val_loss", val)
        if step and (step % args.save_every == 0 or last):
            log_file.flush()
            save_checkpoint(checkpoint_path, masters, ema, optimizer, scaler, step, model, args, rank, bank)
        if last:
            log.writerow(row)
            break

        # determine and set the learning rate
        begun = time.time()
        for group in optimizer.param_groups:
            group["lr"] = get_learning_rate(step, args)

        # forward, backward
        loss, waited = accumulate(objective, next_batch, step, args, device, scaler)
        loss = add_up(loss, device) / parts
        if loss != loss:
            raise SystemExit(f"loss is not a number at step {step} of stage {args.stage}: resume from "
                             f"{checkpoint_path} with half the --learning_rate, or with --mixed_precision no")

        # clip, update, average
        with part("optimizer", args, device):
            grad_norm = update(masters, ema, optimizer, scaler, step, args)
            give_back(masters, trainable)
        step += 1

        # timing and logging
        row |= {"step": step - 1, "loss": loss, "grad_norm": grad_norm,
                "learning_rate": optimizer.param_groups[0]["lr"],
                "seconds": round(time.time() - begun, 4), "data_seconds": round(waited, 4),
                "memory": round(peak_memory(device), 3)}
        log.writerow(row)
        if watch:
            watch.step()
        progress.set_postfix(loss=f"{loss:.4f}", val=f"{val:.4f}", grad=f"{grad_norm:.2f}", refresh=False)
        progress.update()
        if step % args.val_every == 0 and rank == 0:
            log_file.flush()
            plot_losses(log_file.name, os.path.join(args.out, "loss.png"))

    progress.close()
    log_file.close()
    with averaged(ema, trainable, model, spare):
        if rank == 0:
            plot_losses(log_file.name, os.path.join(args.out, "loss.png"))
            finish(model, schedule, args, (time.time() - started) / 60, val, batches, device)
    if world > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    try:
        main()
    except ValueError as error:
        raise SystemExit(f"train.py: {error}") from None
