"""Train a stage: one flat loop for all of them.

    python train.py --stage interp                  temporal layers on the shipped image model, in minutes
    python train.py --stage interp --resume auto    go on where the last run of this stage stopped
    torchrun --nproc_per_node=2 train.py --stage interp     two processes, half a batch each

The stages, in the order that makes a model from nothing (README.md has times and losses):

    vae      learns to shrink pictures to latents, and to bring them back
    image    learns to denoise the latents of single frames, given a caption; frozen afterwards
    starter, extrap, interp    train temporal layers on windows that start a video, extend it, fill it in
    video    trains one set of temporal layers on all three kinds of windows

Read `denoising_loss` and the loop in `main` first. The rest serves them.
"""
import argparse
import math
import os
import random
import signal
import time
import weakref
import zipfile
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import partial

import torch
import torch.distributed as dist
from einops import rearrange
from safetensors.torch import load_file, save_file
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from tqdm import tqdm

import data
from convert_sd_weights import lora_tensors, merge_lora
from diffusion import T
from model import (PREFIXES, PRESETS, TEXT_TOKENS, TINY_WEIGHTS, Model, Tokenizer, add_lora,
                   checksum, complete, fill, is_temporal, keep_activations, load_weights, look_around,
                   plain_errors, read_weights, save_weights, store_in_8bit)
from sample import DTYPES, choose_device, denoise_window, processes
from schedule import window_shapes

VIDEO_STAGES = ("starter", "extrap", "interp", "video")
# defaults of each stage: steps, batch size, peak learning rate, worlds, frames
DEFAULTS = {"vae": (3000, 16, 2e-3, 1024, 121), "image": (6000, 32, 1e-3, 4096, 121),
            "video": (10_000, 6, 2e-3, 512, 481), "starter": (400, 6, 2e-3, 128, 121),
            "extrap": (400, 6, 2e-3, 128, 121), "interp": (240, 6, 2e-3, 96, 121)}
SD15_DEFAULTS = (20_000, 1, 1e-4, 0, 121)         # of its video stages: a place to start from, not measured
LEVELS = [62, 187, 312, 437, 562, 687, 812, 937]  # noise levels of validation: two per quarter of the range
WARMUP_STEPS, MAX_GRAD_NORM, EMA_DECAY = 50, 1.0, 0.998
CAPTION_DROPOUT = 0.1   # share of examples trained without a caption, so that sampling can use guidance


def parse(argv):
    """The command line. Defaults are the tiny preset on the sky world."""
    p = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], usage="train.py --stage STAGE [flags]")
    whole, real, file_name = partial(data.number, int), partial(data.number, float), data.file_name
    flag = p.add_argument_group("the run").add_argument
    flag("--stage", required=True, choices=("vae", "image", *VIDEO_STAGES))
    flag("--preset", default="tiny", choices=list(PRESETS), help="default %(default)s")
    flag("--weights", metavar="FILE", type=file_name, help="to start from; default assets/tiny.safetensors")
    flag("--temporal", metavar="FILE", type=file_name, help="temporal layers to start with; default fresh")
    flag("--out", metavar="DIR", type=file_name, help="folder of this run; default out/STAGE")
    flag("--export", metavar="FILE", type=file_name, help="also write the whole model, for sample.py")
    flag("--resume", metavar="auto|FILE", type=file_name, help="go on from a checkpoint; auto: in --out")
    flag = p.add_argument_group("what to train on").add_argument
    flag("--data", metavar="DIR", type=file_name, help="clips of yours, by data.py; default sky worlds")
    flag("--drop", metavar="LIST", type=file_name, help="clips to leave out, from data.py --drop_hardest")
    flag("--score", metavar="FILE", type=file_name, help="do not train: write the losses of all clips here")
    flag("--worlds", type=whole(1, 1_000_000), help="number of sky worlds; default by stage")
    flag("--frames", type=whole(1, 100_000), help="train on windows of videos this long; default by stage")
    flag("--aug_max", type=whole(0, 999), default=250, help="highest noise augmentation; default %(default)s")
    flag = p.add_argument_group("how to train").add_argument
    flag("--max_steps", type=whole(1), help="optimizer steps of the whole run; default by stage")
    flag("--batch_size", type=whole(1), help="default by stage; halve it if memory is short")
    flag("--gradient_accumulation_steps", type=whole(1), default=1, metavar="N", help="default 1")
    flag("--learning_rate", type=real(1e-9, 1), help="after a warm-up; a cosine follows; default by stage")
    flag("--mixed_precision", choices=("no", "fp16", "bf16", "auto"), help="default no; for sd15 auto")
    flag("--seed", type=whole(0, 2 ** 32), default=0, help="default %(default)s")
    flag("--device", help="default cuda, else cpu")
    flag = p.add_argument_group("memory, for video stages (see tests/benchmark.py)").add_argument
    flag("--gradient_checkpointing", type=whole(0), metavar="K", help="recompute every K-th block; sd15: 1")
    flag("--optimizer_on_cpu", action="store_true", help="keep optimizer state and averaged weights there")
    flag("--offload_activations", action="store_true", help="keep what the backward pass needs on the CPU")
    flag("--activations_8bit", action="store_true", help="keep it in 8 bits; gradients are good to a percent")
    flag("--backbone_8bit", action="store_true", help="store frozen layers in 8 bits; needs checkpointing 1")
    flag("--lora_rank", type=whole(0), default=0, metavar="R", help="also train LoRA of spatial attentions")
    flag = p.add_argument_group("speed and reports").add_argument
    flag("--pipeline", action="store_true", help="pairs of processes share a UNet, half the activations each")
    flag("--profile", action="store_true", help="say where the time of steps 4 to 6 goes; writes trace.json")
    flag("--save_every", type=whole(1), metavar="N", help="validate, draw, save so often; default by length")
    flag("--dry_run", action="store_true", help="print what would be trained and its memory, and stop")
    args = p.parse_args(argv)
    sd15 = args.preset == "sd15"
    names = ("max_steps", "batch_size", "learning_rate", "worlds", "frames")
    p.set_defaults(**dict(zip(names, SD15_DEFAULTS if sd15 else DEFAULTS[args.stage])), weights=TINY_WEIGHTS,
                   gradient_checkpointing=int(sd15), mixed_precision="auto" if sd15 else "no",
                   out=os.path.join("out", args.stage))
    args = p.parse_args(argv, argparse.Namespace(clips="", start=""))   # later: checksums, see FIXED
    args.save_every = args.save_every or min(max(20, args.max_steps // 4), 250)
    for name in ("temporal", "export", "score", "lora_rank", "pipeline", "dry_run"):
        if getattr(args, name) and args.stage not in VIDEO_STAGES:
            raise ValueError(f"--{name} is for video stages, found --stage {args.stage}: leave --{name} out")
    if sd15 and not args.dry_run and not (args.data and args.stage in VIDEO_STAGES):
        raise ValueError("--preset sd15 trains video stages on your own clips: add --data DIR, see data.py")
    if (args.drop or args.score) and not args.data:
        raise ValueError("--drop and --score are about the clips of a folder: give the folder as --data")
    goes_on = args.resume in ("auto", f"{args.out}/ckpt.pt")
    held = any(os.path.exists(f"{args.out}/{name}") for name in ("ckpt.pt", "weights.safetensors"))
    if held and not (goes_on or args.score or args.dry_run):
        raise ValueError(f"{args.out} already holds a run: add --resume auto to go on, or give another --out")
    return args


# --- the loss and the loop ----------------------------------------------------------------------------------
def denoising_loss(model, batch, seed, args, part=slice(None), levels=None, unet=None):
    """Noise the new frames of windows, let the UNet denoise them, and measure how wrong it is.

    batch: x0 (b, 4, f, h, w), frames, given and user (b, f), captions, prompt_start (b,). seed: of the noise.
    part: the examples of the batch to compute. levels: (t_new, t_given), fixed, for validation. unet: in
    place of the model's, for --pipeline. Returns what to descend on, and the mean squared error."""
    unet, schedule = unet or model.unet, model.unet.schedule
    x0, given, user, b = batch["x0"], batch["given"], batch["user"], len(batch["x0"])
    generator, device = torch.Generator().manual_seed(seed), x0.device
    eps = torch.randn(x0.shape, generator=generator).to(device)

    # Every frame has its own noise level. The new frames of a window share one, uniform over the schedule.
    # Given frames get a little noise (noise augmentation), because in sampling the model has made them and
    # they are not perfect: mostly little, hence the cube, and often none. Those of the user are always clean.
    t_new = torch.randint(0, T, (b, 1), generator=generator)
    t_given = (args.aug_max * torch.rand(b, 1, generator=generator) ** 3).round().long()
    t_given = t_given * (torch.rand(b, 1, generator=generator) > 0.2)
    if levels:
        t_new, t_given = (torch.full((b, 1), level) for level in levels)
    t = torch.where(given, t_given.to(device), t_new.to(device)).masked_fill(user, 0)              # (b, f)

    clean = (given & (t == 0))[:, None, :, None, None]        # even level 0 has a little noise: add none
    x_t = torch.where(clean, x0, schedule.q_sample(x0, t, eps))
    context = embed(model, batch, None if levels else seed)                                     # (b, 77, d)
    inputs = (values[part] for values in (x_t, t, context, batch["frames"], given, batch["prompt_start"]))
    output, prior = unet(*inputs, with_prior=True)            # eps or v, and the prior
    new = ~given[part]

    def mean_square(made, truth):                             # over the new frames of each window: (b,)
        error = (made.float() - truth[part]).square().mean(dim=(1, 3, 4))                      # (b, f)
        return (error * new).sum(1) / new.sum(1)

    error = mean_square(output, schedule.target(x0, t, eps))
    if prior is None:                                         # a single frame has none
        return error.mean(), error.mean()
    # Between close frames little is unknown: such a window has a thousandth of the error of a long leap, and
    # this is what flickers. So each error is divided by its own size, as a learned uncertainty weight would
    # (Kendall et al. 1705.07115), plus a floor too small to see. The sum means nothing, only its gradient.
    prior_error = mean_square(prior, x0)
    loss = error / (error.detach() + 1e-4) + prior_error / (prior_error.detach() + 2e-5)
    return loss.mean(), error.mean()


def vae_loss(model, batch, seed, args, part=slice(None)):
    """How badly the VAE gives pictures back: L1, L1 of the differences between neighbours, which keeps edges
    sharp, and a little KL (Rombach et al. 2112.10752, without the discriminator)."""
    images = batch["x0"].squeeze(2)                           # (b, 3, H, W)
    mean, log_variance = model.vae.moments(images[part])
    log_variance = log_variance.clamp(-30, 20)                # SD's bounds: exp() must not overflow
    eps = torch.randn((len(images), *mean.shape[1:]), generator=torch.Generator().manual_seed(seed))
    wrong = model.vae.pictures(mean + (0.5 * log_variance).exp() * eps[part].to(mean.device)) - images[part]
    edges = wrong.diff(dim=2).abs().mean() + wrong.diff(dim=3).abs().mean()
    kl = 0.5 * (mean ** 2 + log_variance.exp() - 1 - log_variance).mean()
    loss = wrong.abs().mean() + 0.5 * edges + 3e-4 * kl
    return loss, loss.detach()


def get_learning_rate(step, args):
    """Linear warm-up, then half a cosine down to zero at the last step."""
    cosine = torch.cos(torch.tensor(torch.pi * step / args.max_steps)).item()
    return args.learning_rate * min(1.0, (step + 1) / WARMUP_STEPS) * 0.5 * (1 + cosine)


def main(argv=None):
    """Parse, prepare, loop."""
    args = parse(argv)
    device, why = choose_device(args.device, work=not args.dry_run)
    if args.mixed_precision == "auto":
        args.mixed_precision = half_precision(device)
    if args.dry_run:
        return dry_run(args, device, why)
    rank, world = processes("cpu:gloo,cuda:nccl" if torch.cuda.device_count() > 1 else "gloo")
    part, parts = batch_part(args, rank, world)
    lock = claim_outputs(args) if rank == 0 else None
    model = prepare_model(args)
    args.start = checksum(model.state())
    trainable = freeze_the_rest(model, args)
    model.to(device, ("unet",) if args.preset == "sd15" else ("unet", "vae", "text"))   # to leave room
    count = sum(parameter.numel() for parameter in trainable.values())
    print(f"stage {args.stage} on {device} ({why}): {args.max_steps} steps, {count:,} trainable parameters")
    if args.score:
        return write_scores(args, model, device, world)
    next_batch, val_batches = prepare_batches(args, model, device, world)
    masters = make_masters(trainable) if args.optimizer_on_cpu else trainable
    ema = {name: parameter.detach().clone() for name, parameter in masters.items()}
    fused = next(iter(masters.values())).is_cuda or None      # on a GPU it needs no scratch memory
    optimizer = torch.optim.AdamW(masters.values(), betas=(0.9, 0.99), weight_decay=0.01, fused=fused)
    # in fp16 small gradients vanish: scale the loss up, by a factor that doubles until one overflows
    scaler = torch.amp.GradScaler(device.type, init_scale=512.0, growth_interval=2000,
                                  enabled=args.mixed_precision == "fp16")
    scaler.scale(torch.zeros((), device=next(iter(masters.values())).device))   # makes the factor live there
    stage_loss = vae_loss if args.stage == "vae" else denoising_loss
    state = masters, ema, optimizer, scaler
    start, log = load_checkpoint(state, args, rank, world) if args.resume else (0, [])
    copy_into(trainable, masters)
    progress = tqdm(total=args.max_steps, initial=start, desc=args.stage, unit="step", disable=rank > 0)
    profiler = start_profile(args) if args.profile and rank == 0 else None
    interrupted = finish_step_first(progress) if world == 1 else []
    for step in range(start, args.max_steps + 1):
        # once in a while: validate and draw with the averaged weights, save everything
        row, stop = {"step": step}, bool(interrupted)
        if rank == 0 and (step % args.save_every == 0 or step == args.max_steps):
            progress.set_postfix_str("validating")
            with averaged(ema, trainable):
                row |= validation_loss(model, val_batches, args, device)
                sample_sheet(model, val_batches[0], step, args, device)
            progress.write(", ".join(f"{name} {value:.4g}" for name, value in row.items()))
            progress.set_postfix_str("")
            progress.unpause()      # validation is no part of the speed
        if rank == 0 and ("val_loss" in row or stop):
            save_checkpoint(state, step, [*log, row], args)
        if step == args.max_steps:
            break
        if stop:
            raise KeyboardInterrupt

        # determine and set the learning rate
        started, loss = time.time(), 0.0
        for group in optimizer.param_groups:
            group["lr"] = get_learning_rate(step, args)

        # forward and backward: the gradients of the micro-batches add up
        for micro in range(args.gradient_accumulation_steps):
            number = step * args.gradient_accumulation_steps + micro
            seed = args.seed * 1_000_003 + number
            batch = next_batch(number)              # a function of the number alone: resume is exact
            if args.pipeline:
                loss += pipeline_step(model, batch, seed, part, args, device, scaler)
                continue
            with forward_context(args, device):
                descend, error = stage_loss(model, batch, seed, args, part)
            scaler.scale(descend / args.gradient_accumulation_steps).backward()
            loss += error.item() / args.gradient_accumulation_steps
        if world > 1:
            loss = share_gradients(masters.values(), loss, parts)

        # clip, update, average
        scaler.unscale_(optimizer)
        grad_norm = torch.nn.utils.clip_grad_norm_(masters.values(), MAX_GRAD_NORM).item()
        if not math.isfinite(loss if scaler.is_enabled() else loss + grad_norm):    # the scaler skips a step
            raise ValueError(f"step {step} of stage {args.stage} is not finite, loss {loss}, gradient "
                             f"{grad_norm}: half the --learning_rate in a new --out; after half precision, "
                             "--resume auto --mixed_precision no")
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)
        copy_into(trainable, masters)
        update_ema(ema, masters, step + 1)

        # timing and logging
        memory = torch.cuda.max_memory_allocated() / 1e9 if device.type == "cuda" else None
        log.append(row | {"loss": loss, "grad_norm": grad_norm, "learning_rate": group["lr"],
                          "seconds": time.time() - started, "memory": memory})
        if profiler:
            profiler.step()
        progress.set_postfix(loss=loss, grad=grad_norm, refresh=False)
        progress.update()

    progress.close()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if rank == 0:
        with averaged(ema, trainable):
            finish(model, next_batch, args, sum(row["seconds"] for row in log) / 60, row["val_loss"])


def half_precision(device):
    """What --mixed_precision auto means: bf16, unless the device only emulates it; then fp16 is faster."""
    emulated = device.type == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False)
    return "fp16" if emulated or device.type == "mps" else "bf16"


def claim_outputs(args):
    """Hold the folder of the run while the returned lock lives, and see that other files can be written."""
    for path in filter(None, (args.export, args.score)):
        data.check_writable(path)
    return None if args.score else data.claim(args.out)


def finish_step_first(progress):
    """Let Ctrl-C and SIGTERM wait until the step at work is saved. Returns a list, empty until then."""
    pressed = []

    def press(*_):
        pressed.append(True)
        progress.write("finishing the step at work, to save it; Ctrl-C again stops at once")
        signal.signal(signal.SIGINT, signal.default_int_handler)

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, press)
    return pressed


# --- what a stage trains, and on what -----------------------------------------------------------------------
def prepare_model(args):
    """The model a stage starts from. Video stages get fresh temporal layers, or those of --temporal."""
    torch.manual_seed(args.seed)
    if args.stage == "vae":
        return Model.build(PRESETS[args.preset])
    if args.stage == "image":                             # a fresh UNet and text encoder beside a trained VAE
        config, _, about, tensors = read_weights(args.weights)
        captions = [clip["caption"] for clip in data.read_clips(args.data).values()] if args.data else [
            data.SkyWorld(i).caption() for i in range(args.worlds)]
        merges = Tokenizer.learn(captions)                                           # a token for every word
        model = Model.build(replace(config, vocabulary=514 + len(merges)), merges)
        model.about = about | ({"prompt": captions[0]} if args.data and captions else {})
        fill(model, tensors, args.weights, only=lambda key: key.startswith(PREFIXES["vae"]))
    else:
        model = load_weights(args.weights, args.preset)
        tensors = Model.build(model.config).state()                   # fresh temporal layers, at first
        if args.temporal:
            model.about, tensors = read_weights(args.temporal)[2:]    # it tells of its image model, too
        if args.temporal or not args.score:
            fill(model, tensors, args.temporal, only=is_temporal)
    return model


def freeze_the_rest(model, args):
    """What a stage trains, {name: parameter}, LoRA if asked. Freezes the rest, stores it as flags say.

    No stage trains a text encoder. SD's comes trained. That of tiny keeps its random numbers, which tell its
    few words apart; trained on pictures, it would blur words that only videos explain, like `left`."""
    trainable = {}
    if args.lora_rank:
        add_lora(model.unet, args.lora_rank)
    for part, network in model.networks().items():
        for name, parameter in network.named_parameters():
            temporal = is_temporal(name) or ".lora." in name          # what video stages train
            image_model = part == "unet" and not temporal
            trains = {"vae": part == "vae", "image": image_model}.get(args.stage, temporal)
            parameter.requires_grad_(trains)
            if trains:
                trainable[f"{part}.{name}"] = parameter
            elif part == "unet" and args.stage in VIDEO_STAGES and parameter.dim() > 1:   # norms stay float32
                parameter.data = parameter.data.to(DTYPES[args.mixed_precision])
    model.unet.train()
    model.unet.checkpoint_every = args.gradient_checkpointing
    if args.backbone_8bit:
        store_in_8bit(model.unet)
    return trainable


def prepare_data(args, model, split, device):
    """A function (number) -> batch on the CPU, from the training or validation clips of a stage."""
    if args.data:
        clips = data.folder_clips(args.data, model, args.stage, split, args.drop)
        args.clips = checksum({}, args.clips, clips.key, *model.tokenizer.merges)    # a run keeps its clips
        print(f"{split}: {sum(clips.lengths)} frames of {len(clips.names)} clips in {args.data}, such as "
              f"{', '.join(clips.names[:3])}")
    else:
        n = args.worlds if split == "train" else min(16, args.worlds)
        worlds = range(data.SPLITS[split], data.SPLITS[split] + n)
        frames = range(args.frames) if args.stage in VIDEO_STAGES else range(0, data.DAY, data.DAY // 8)
        encode = lambda video: video if args.stage == "vae" else model.vae.encode(video.to(device)).cpu()
        key = "pictures" if args.stage == "vae" else data.latents_key(model)
        path = os.path.join(os.path.dirname(args.out), "cache", f"{key}_{split}{n}x{len(frames)}.safetensors")
        clips = data.sky_clips(path, encode, worlds, frames, model.config.size, key)
    shapes = window_shapes(args.stage, min(args.frames, int(clips.lengths.max())))
    seed = args.seed if split == "train" else 0     # so that losses of runs with other seeds compare
    return partial(clips.windows, shapes, seed, batch_size=args.batch_size)


def prepare_batches(args, model, device, world):
    """What to train on, a function (number of the batch) -> batch, and four batches to validate on."""
    first = int(os.environ.get("LOCAL_RANK", 0)) == 0     # of its machine: it encodes, the others wait
    if not first:
        dist.barrier()
    if args.data and args.stage != "vae":
        data.cache(args.data, model, device)
    val_batch, next_batch = (prepare_data(args, model, split, device) for split in ("val", "train"))
    if first and world > 1:
        dist.barrier()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()    # log.csv tells what steps take, not what encoding took
    return lambda n: to_device(next_batch(n), device), [to_device(val_batch(n), device) for n in range(4)]


def embed(model, batch, seed=None):
    """Text embeddings (b, 77, d) of the captions of a batch; with a seed, some captions are dropped."""
    draws, device = random.Random(seed), batch["x0"].device
    captions = ["" if seed is not None and draws.random() < CAPTION_DROPOUT else caption
                for caption in batch["captions"]]
    for caption in {*captions} - model.remembered.keys():    # the encoder is frozen: it reads a caption once
        with torch.autocast(device.type, enabled=False):
            model.remembered[caption] = model.context([caption])[0]
    return torch.stack([model.remembered[caption] for caption in captions]).to(device)


def to_device(batch, device):
    """A batch with its tensors on the device."""
    return {key: value.to(device) if torch.is_tensor(value) else value for key, value in batch.items()}


# --- once in a while: validation, samples, checkpoints, results ---------------------------------------------
@torch.no_grad()
def copy_into(target, source):
    """Copy tensors into those of the same name."""
    for name, tensor in target.items():
        tensor.copy_(source[name])


def update_ema(ema, parameters, step):
    """Move the averaged weights towards the current ones; faster at first, when the average knows little."""
    decay = min(EMA_DECAY, (1 + step) / (10 + step))
    for name, parameter in parameters.items():
        ema[name].lerp_(parameter.detach(), 1 - decay)


@contextmanager
def averaged(ema, parameters):
    """Inside this, the network has the averaged weights: validation, samples and results are theirs."""
    current = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    copy_into(parameters, ema)
    yield
    copy_into(parameters, current)


@torch.no_grad()
def validation_loss(model, batches, args, device):
    """{column of log.csv: loss}: the mean, and each quarter of the noise range (the VAE has none).

    Batches, noise and levels are fixed (20 for given frames), so that steps and runs can be compared."""
    if args.stage == "vae":
        losses = [vae_loss(model, batch, i, args)[1].item() for i, batch in enumerate(batches)]
        return {"val_loss": sum(losses) / len(losses)}
    losses = torch.zeros(len(batches), len(LEVELS))
    for i, batch in enumerate(batches):
        for j, level in enumerate(LEVELS):
            with forward_context(args, device):
                losses[i, j] = denoising_loss(model, batch, i, args, levels=(level, min(20, args.aug_max)))[1]
    quarters = losses.mean(0).view(4, -1).mean(1).tolist()
    return {"val_loss": losses.mean().item()} | {f"val_q{i}": loss for i, loss in enumerate(quarters, 1)}


@torch.no_grad()
def sample_sheet(model, batch, step, args, device):
    """A contact sheet: the truth, what the model made of it before the first step, and what it makes now."""
    n, steps = {"vae": (8, 0), "image": (8, 50)}.get(args.stage, (4 if args.preset == "tiny" else 1, 8))
    batch, vae = {key: value[:n] for key, value in batch.items()}, model.vae
    home = next(vae.parameters()).device                     # for sd15, the CPU
    if args.stage == "vae":
        truth = batch["x0"]
        made = vae.decode(vae.encode(truth))
    else:
        text, levels = [embed(model, batch)] * 2, model.unet.schedule.levels(steps)
        with forward_context(args, device):
            latents = denoise_window(model.unet, model.unet.schedule, batch["x0"], batch["frames"],
                                     ~batch["given"], text, batch["prompt_start"], levels, seeds=range(n))
        truth, made = (vae.decode(x.float().to(home)) for x in (batch["x0"], latents))
    rows, before = {"truth": truth}, os.path.join(args.out, "samples", "before.safetensors")
    if step == 0:
        with complete(before) as unfinished:
            save_file({"made": made.contiguous()}, unfinished)
    elif os.path.exists(before):                             # not if --resume goes on in another --out
        rows["before"] = load_file(before)["made"]
    rows[f"after {step} steps"] = made
    marks = [["given" if mark else "" for mark in row] for row in batch["given"]]
    if truth.shape[2] == 1:                                  # single pictures, none given: side by side
        rows = {name: rearrange(pictures, "b c 1 h w -> 1 c b h w") for name, pictures in rows.items()}
        marks = [[""]]
    pictures = [data.to_pixels(videos[i]) for i in range(len(marks)) for videos in rows.values()]
    labels = [[f"{name}, {first}" if first else name, *others] for first, *others in marks for name in rows]
    sheet = "final.png" if step == args.max_steps else f"{step:06d}.png"
    with complete(os.path.join(args.out, "samples", sheet)) as unfinished:
        data.contact_sheet(pictures, 2, labels).save(unfinished)


# what decides the batches, the loss and the learning rate must not change in the middle of a run
FIXED = {name: name for name in (
    "stage", "preset", "max_steps", "batch_size", "gradient_accumulation_steps", "learning_rate", "seed",
    "worlds", "frames", "aug_max", "lora_rank", "activations_8bit", "backbone_8bit")}
FIXED |= {"clips": "clips with checksum", "start": "weights (or a model.py) with checksum"}


def save_checkpoint(state, step, rows, args):
    """Write ckpt.pt, all that a run needs to go on exactly, with any number of processes, and what it tells:
    args.json, log.csv, and loss.png, the losses by step, that of training as a mean of 20 steps. rows: of
    log.csv, one for each step made, and one more for a validation after them."""
    data.write_json(os.path.join(args.out, "args.json"), vars(args))
    columns = dict.fromkeys(key for row in rows for key in row)
    data.write_csv(f"{args.out}/log.csv", [columns, *([row.get(key) for key in columns] for row in rows)])
    train, val = ([(row["step"], row[key]) for row in rows if key in row] for key in ("loss", "val_loss"))
    mean = [(train[i][0], sum(loss for _, loss in train[i - 19:i + 1]) / 20) for i in range(19, len(train))]
    curves = {"training, mean of 20 steps": mean} if mean else {}
    curves["validation, always on the same frames"] = val    # the last one is drawn on top
    data.line_plot(os.path.join(args.out, "loss.png"), curves, "step", "loss", log=True)
    parameters, ema, optimizer, scaler = state
    everything = {"model": parameters, "ema": ema, "optimizer": optimizer.state_dict(), "step": step,
                  "scaler": scaler.state_dict(), "log": rows[:step], "args": vars(args)}
    with complete(os.path.join(args.out, "ckpt.pt")) as unfinished, open(unfinished, "wb") as file:
        try:
            torch.save(everything, file)
        except RuntimeError as error:    # what torch makes of a disk that is full
            raise OSError(f"{args.out}/ckpt.pt cannot be written, is the disk full? ({error})") from None


def read_checkpoint(path):
    """What `save_checkpoint` wrote. ValueError if the file is missing or damaged."""
    if not os.path.isfile(path):
        raise ValueError(f"no checkpoint at {path}: give the file, or start anew in another --out")
    try:
        with zipfile.ZipFile(path) as parts:
            if damaged := parts.testzip():      # it has checksums, which torch.load does not look at
                raise ValueError(damaged)
        found = torch.load(path, weights_only=True, map_location="cpu")
        return {key: found[key] for key in ("model", "ema", "optimizer", "scaler", "step", "log", "args")}
    except (OSError, MemoryError):              # then the file may be as good as ever
        raise
    except Exception as error:                  # a damaged file can raise almost anything
        reason = str(error).split("\n")[0]
        raise ValueError(f"{path} is damaged, or no checkpoint of ours ({reason}): start anew") from None


def load_checkpoint(state, args, rank, world):
    """Put a run back where --resume says it was saved. Returns its step and its log."""
    parameters, ema, optimizer, scaler = state
    path = os.path.join(args.out, "ckpt.pt") if args.resume == "auto" else args.resume
    found = [read_checkpoint(path) if rank == 0 else None]
    if world > 1:
        dist.broadcast_object_list(found)       # only the machine of rank 0 has the file
    found = found[0]
    for name, words in FIXED.items():
        old, new = found["args"].get(name), vars(args).get(name)
        if old != new:
            raise ValueError(f"{path} was made with {words} {old}, now it is {new}: give the old one, or "
                             "start anew in another --out")
    copy_into(parameters, found["model"])
    copy_into(ema, found["ema"])
    optimizer.load_state_dict(found["optimizer"])
    if found["scaler"]:                                 # empty if the run was not in fp16
        scaler.load_state_dict(found["scaler"])
    print(f"resumed {path} at step {found['step']}")
    return found["step"], found["log"]


def finish(model, next_batch, args, minutes, val):
    """Write the trained weights, with the recipe that made them; the VAE's also measure its latents."""
    path, lora = (os.path.join(args.out, f"{name}.safetensors") for name in ("weights", "lora"))
    recipe = {"stage": args.stage, "args": vars(args), "minutes": round(minutes, 1), "val_loss": val}
    about = {"stage": args.stage, "recipes": [*model.about.get("recipes", []), recipe]}
    video, picture = args.stage in VIDEO_STAGES, lambda key: not is_temporal(key)
    kept = {"vae": lambda key: key.startswith(PREFIXES["vae"]), "image": picture}.get(args.stage, is_temporal)
    if args.stage == "vae":
        with torch.no_grad():                 # measure what the other stages will see as latents
            z = torch.cat([model.vae.moments(next_batch(n)["x0"].squeeze(2))[0] for n in range(64)])
        mean, std = (tuple(moment.tolist()) for moment in (z.mean((0, 2, 3)), z.std((0, 2, 3))))
        model.config = replace(model.config, latent_mean=mean, latent_std=std)
    save_weights(path, model, torch.float16 if video else torch.float32, kept, **about)
    print(f"wrote {path}; look at {args.out}/samples/final.png")
    if args.lora_rank:
        with complete(lora) as unfinished:
            save_file(lora_tensors(model), unfinished)
    if args.export:
        whole = load_weights(args.weights)    # its frozen layers: here they may be in half precision
        fill(whole, model.state(), path, only=is_temporal)
        if args.lora_rank:
            merge_lora(whole, lora)
        save_weights(args.export, whole, **about)
    if args.stage in ("vae", "image"):
        then = f"train.py --stage {'image' if args.stage == 'vae' else 'video'} --weights {path}"
        then += f" --data {args.data}" if args.data else ""
    elif args.export:
        then = f"sample.py --frames 121 --weights {args.export}"
    else:
        base = "" if args.weights == TINY_WEIGHTS else f" --weights {args.weights}"
        then = f"sample.py --frames 121{base} --temporal {path}"
    print(f"next: python {then}")


# --- memory -------------------------------------------------------------------------------------------------
@contextmanager
def forward_context(args, device, home="cpu"):
    """Inside this, the flags decide in which precision networks compute, and how they keep activations."""
    dtype, kept = DTYPES[args.mixed_precision], nullcontext()
    if args.activations_8bit or args.offload_activations:
        kept = keep_activations(args.activations_8bit, home if args.offload_activations else None, dtype)
    with torch.autocast(device.type, dtype, enabled=dtype != torch.float32), kept:
        yield


def make_masters(trainable, home="cpu"):
    """Master weights for the optimizer, {name: parameter}, on the CPU. Gradients move there when made."""
    masters = {name: torch.nn.Parameter(p.detach().to(home, copy=True)) for name, p in trainable.items()}
    for name, parameter in trainable.items():
        def take_gradient(parameter, master=masters[name]):
            gradient, parameter.grad = parameter.grad.to(home), None
            master.grad = gradient if master.grad is None else master.grad + gradient
        parameter.register_post_accumulate_grad_hook(take_gradient)
    return masters


class MemoryMeter(TorchDispatchMode):
    """While it is on: the bytes of all tensors made and still alive. `known` tensors do not count."""
    def __init__(self, known):
        super().__init__()
        self.known = weakref.WeakSet(tensor.untyped_storage() for tensor in known)
        self.made, self.peak = weakref.WeakSet(), 0

    def alive(self):
        return sum(storage.nbytes() for storage in self.made)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for tensor in torch.utils._pytree.tree_iter(out):
            if isinstance(tensor, torch.Tensor) and tensor.device.type != "meta":    # meta: offloaded
                if tensor.untyped_storage() not in self.known:
                    self.made.add(tensor.untyped_storage())
        self.peak = max(self.peak, self.alive())
        return out


def dry_run(args, device, why, mode=FakeTensorMode):
    """Run a step of a video stage on tensors without content; print its memory, return the peak in bytes."""
    config, b = PRESETS[args.preset], args.batch_size
    f = max(len(window.frames) for _, windows in window_shapes(args.stage, args.frames) for window in windows)
    print(f"a step of {args.stage} on {device} ({why}), {b} x {f} frames, {args.mixed_precision}:",
          flush=True)
    with mode():
        model = Model.build(config)
        trainable = freeze_the_rest(model, args)
        if args.optimizer_on_cpu:
            make_masters(trainable, "meta")
        known = [*model.unet.parameters(), *model.unet.buffers()]   # VAE, text encoder: on the CPU, or tiny
        trained, size = sum(p.nbytes for p in trainable.values()), config.size // config.vae_factor
        batch = {"x0": torch.zeros(b, 4, f, size, size), "frames": torch.arange(f).repeat(b, 1),
                 "given": torch.zeros(b, f).bool(), "user": torch.zeros(b, f).bool(),
                 "captions": [""] * b, "prompt_start": torch.zeros(b)}
        model.remembered[""] = torch.zeros(TEXT_TOKENS, config.text_width)
        with MemoryMeter(known) as meter:
            with forward_context(args, torch.device("cpu"), "meta"):
                descend, _ = denoising_loss(model, batch, 0, args)
            descend.backward()
    parts = {"frozen weights": sum(t.nbytes for t in known) - trained, "trained weights": trained,
             "optimizer, averaged weights": 0 if args.optimizer_on_cpu else 3 * trained,     # AdamW has two
             "activations and gradients": meter.peak}
    for name, size in parts.items():
        print(f"  {name:30} {size / 1e9:6.2f} GB")
    print(f"predicted peak: {sum(parts.values()) / 1e9:.1f} GB, and about 1 GB for driver and fragments")
    return sum(parts.values())


# --- several processes, on one machine or several: rank 0 validates and writes ------------------------------
def batch_part(args, rank, world):
    """The slice of each batch that this process computes, and the number of slices. ValueError if uneven."""
    if args.pipeline and world % 2:
        raise ValueError(f"--pipeline takes pairs of processes, found {world}: torchrun --nproc_per_node=2")
    place, parts = (rank // 2, world // 2) if args.pipeline else (rank, world)
    if args.batch_size % parts:
        raise ValueError(f"--batch_size {args.batch_size} cannot be shared by {parts}: give a multiple")
    size = args.batch_size // parts
    return slice(place * size, (place + 1) * size), parts


def share_gradients(parameters, loss, parts):
    """Data parallelism: all processes get the mean of their gradients and take the same step. -> mean loss"""
    parameters = list(parameters)
    gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
    together = torch.cat([*(gradient.flatten() for gradient in gradients), gradients[0].new_tensor([loss])])
    dist.all_reduce(together)                                   # one long vector, one message
    *gradients, loss = (together / parts).split([*(p.numel() for p in parameters), 1])
    for parameter, gradient in zip(parameters, gradients):
        parameter.grad = torch.empty_like(parameter).copy_(gradient.view_as(parameter))   # channels last too
    return loss.item()


def pipeline_step(model, batch, seed, part, args, device, scaler):
    """GPipe by hand (Huang et al. 1811.06965): one process goes down the UNet, its peer up and to the loss.

    While the second works on an example, the first makes the next; each keeps half of the activations, and
    `share_gradients` adds up both halves. Returns the loss, 0 in the first process."""
    unet, kept, mail, total = model.unet, [], [], 0.0
    first, peer = dist.get_rank() % 2 == 0, dist.get_rank() ^ 1
    n = (part.stop - part.start) * args.gradient_accumulation_steps

    def half(x, t, context, frames, given, prompt_start, with_prior):
        window = look_around(unet.temporal_embed, x, t, context, frames, given, prompt_start)
        if first:
            kept.append(unet.first_half(x, t, context, window))
            dist.send_object_list([[x.detach().cpu() for x in kept[-1]]], peer)
            return torch.zeros_like(x), torch.zeros_like(x)     # for a loss that is ignored
        received = [None]
        dist.recv_object_list(received, peer)
        kept.append([x.to(device).requires_grad_() for x in received[0]])
        return unet.second_half(x, t, context, window, *kept[-1])

    for i in range(part.start, part.stop):
        with forward_context(args, device):
            descend, error = denoising_loss(model, batch, seed, args, slice(i, i + 1), unet=half)
        if not first:
            scaler.scale(descend / n).backward()
            total += error.item() / n
            # a blocking send would wait for the first process, which waits in its own next send
            mail += [dist.isend(x.grad.cpu().contiguous(), peer) for x in kept.pop()]
    for tensors in kept:                          # in the first process: the gradients come back, in order
        gradients = [torch.empty(x.shape, dtype=x.dtype) for x in tensors]
        for gradient in gradients:
            dist.recv(gradient, peer)
        pairs = [(x, gradient.to(device)) for x, gradient in zip(tensors, gradients) if x.requires_grad]
        torch.autograd.backward(*zip(*pairs))
    for message in mail:
        message.wait()
    return total


def start_profile(args):
    """Watch steps 4 to 6; print what took the time, and write trace.json for ui.perfetto.dev."""
    def show(trace):
        trace.export_chrome_trace(f"{args.out}/trace.json")
        print(trace.key_averages().table("cpu_time_total", row_limit=16, max_name_column_width=32))

    steps = torch.profiler.schedule(wait=2, warmup=1, active=3, repeat=1)
    profiler = torch.profiler.profile(schedule=steps, on_trace_ready=show)
    profiler.start()
    return profiler


def write_scores(args, model, device, world):
    """Write the losses of the clips of --data, on equal windows and noise, for data.py --drop_hardest."""
    if world > 1:
        raise ValueError(f"--score is the work of one process, found {world}: run it without torchrun")
    if not model.unet.temporal_hint.weight.any():               # it starts at zero
        raise ValueError("untrained temporal layers know nothing of clips: give trained ones as --temporal")
    data.cache(args.data, model, device)
    clips, rows = data.folder_clips(args.data, model, args.stage), [["clip", "loss"]]
    shapes = window_shapes(args.stage, min(args.frames, int(clips.lengths.max())))
    for name, parts in tqdm(data.scoring_batches(clips, shapes), desc="scoring", unit="clip"):
        loss = validation_loss(model, [to_device(part, device) for part in parts], args, device)["val_loss"]
        rows.append([name, loss])
    data.write_csv(args.score, rows)
    print(f"wrote {args.score}, {len(rows) - 1} clips; next: "
          f"python data.py --drop_hardest 0.1 --scores {args.score} --out drop.csv")


if __name__ == "__main__":
    with plain_errors("train.py", "--resume auto goes on, or the same command if nothing was saved yet"):
        main()
    if dist.is_initialized():    # not after an error: nccl would wait for the others, for ever
        dist.destroy_process_group()
