"""How long a training step takes and what it keeps for the backward pass. Not a test: run it by hand.

    python tests/benchmark.py            the ladder of flags at 512x512, 7 frames, in half precision: shapes
                                         only, so no GPU and hardly any memory, a minute
    python tests/benchmark.py --time     seconds per step on this machine, latents of 32x32
    python tests/benchmark.py --time --type bfloat16 --preset tiny

Both compare with diffusers' UNetMotionModel where diffusers is installed: same width, frames, size and type.
"""

import argparse
import copy
import math
import os
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from multiprocessing import get_context

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import train  # noqa: E402
from diffusion import NoiseSchedule  # noqa: E402
from model import PRESETS, UNet, is_temporal, product  # noqa: E402

try:
    from diffusers import UNetMotionModel
except ImportError:
    UNetMotionModel = None

KINDS = {"float32": "no", "bfloat16": "bf16", "float16": "fp16"}
CPU = torch.device("cpu")


def ours(args, config, flags=()):
    """Our UNet and a function that returns the loss of `train.py` with some of its flags."""
    options = ["--stage", "video", "--preset", config.name, "--batch_size", str(args.batch_size),
               "--mixed_precision", KINDS[args.type], "--gradient_checkpointing", "0", *flags]
    run = train.parse(options)
    unet = UNet(config)
    for name, parameter in unet.named_parameters():
        parameter.requires_grad_(is_temporal(name))
    model = argparse.Namespace(unet=unet.train())
    train.make_smaller(model, run)
    if args.channels_last and not args.fake:
        unet.to(memory_format=torch.channels_last)
    size = args.latents or config.size // config.vae_factor
    batch = train.fake_batch(run, config, args.frames, size)
    batch = {key: torch.randn_like(x) if x.is_floating_point() else x for key, x in batch.items()}
    batch["frames"] = torch.arange(args.frames).expand(args.batch_size, -1)     # all at 0 they give NaN
    schedule = NoiseSchedule(config.prediction, config.zero_terminal_snr)

    def loss():
        with train.computing(run, CPU, "meta" if args.fake else "cpu"):
            return train.training_loss(model, schedule, batch, run)[0]

    return unet, loss


def theirs(args, config, checkpointing=False):
    """diffusers' UNet with motion modules, at the same widths, and a mean square error on the same work."""
    attention = ["CrossAttnDownBlockMotion" if level in config.attention_levels else "DownBlockMotion"
                 for level in range(len(config.widths))]
    unet = UNetMotionModel(
        block_out_channels=config.widths, layers_per_block=config.res_blocks, down_block_types=attention,
        up_block_types=[kind.replace("Down", "Up") for kind in reversed(attention)],
        cross_attention_dim=config.text_width, num_attention_heads=config.heads,
        motion_num_attention_heads=config.heads)
    dtype = getattr(torch, args.type)
    for name, parameter in unet.named_parameters():
        parameter.requires_grad_("motion_modules" in name)
        if not parameter.requires_grad:
            parameter.data = parameter.data.to(dtype)
    unet.train()
    if checkpointing:
        unet.enable_gradient_checkpointing()
    if args.channels_last and not args.fake:
        unet.to(memory_format=torch.channels_last)
    size = args.latents or config.size // config.vae_factor
    x = torch.randn(args.batch_size, 4, args.frames, size, size)
    context = torch.randn(args.batch_size * args.frames, 77, config.text_width)      # a text for every frame
    t = torch.zeros(args.batch_size).long()

    def loss():
        half = dtype != torch.float32
        with torch.autocast("cpu", dtype if half else None, enabled=half):
            return (unet(x, t, context).sample.float() - x).square().mean()

    return unet, loss


def memory(build):
    """(bytes kept for the backward pass, most of activations and gradients) of a step, in shapes only."""
    with FakeTensorMode():
        unet, loss = build()
        trained = [p for p in unet.parameters() if p.requires_grad]
        with train.MemoryMeter([*unet.parameters(), *unet.buffers()], trained) as meter:
            out = loss()
            kept = meter.live
            out.backward()
    return kept, meter.peak


def table_of_memory(args, config):
    """The ladder, one flag after the other. GB are 10^9 bytes."""
    rows = [("nothing", ["--no-lean"]), ("--lean (default)", []), ("--recompute", ["--recompute"]),
            ("--recompute --activations_8bit", ["--recompute", "--activations_8bit"]),
            *((f"--gradient_checkpointing {k}", ["--gradient_checkpointing", str(k)]) for k in (3, 2, 1)),
            ("... 1 --recompute", ["--gradient_checkpointing", "1", "--recompute"]),
            ("... 1 --offload_activations", ["--gradient_checkpointing", "1", "--offload_activations"])]
    builds = [(name, lambda flags=flags: ours(args, config, flags)) for name, flags in rows]
    if UNetMotionModel:
        builds += [("diffusers UNetMotionModel", lambda: theirs(args, config)),
                   ("  with its gradient checkpointing", lambda: theirs(args, config, True))]
    print(f"{'':38} kept for backward, most of activations and gradients, GB")
    for name, build in builds:
        kept, most = memory(build)
        print(f"{name:38} {kept / 1e9:6.2f} {most / 1e9:6.2f}", flush=True)


@torch.no_grad()
def machine_peak(dtype):
    """FLOP/s of a large matrix product on this machine, in this type: the best of five of either kind."""
    a, best = torch.randn(2048, 2048).to(dtype), 0
    for multiply in (torch.matmul, product) * 5:
        begun = time.perf_counter()
        multiply(a, a)
        best = max(best, 2 * 2048 ** 3 / (time.perf_counter() - begun))
    return best


TIMED = {"ours": ours,
         "ours, --gradient_checkpointing 1": partial(ours, flags=["--gradient_checkpointing", "1"]),
         "diffusers UNetMotionModel": theirs}


def time_of_step(name, args, config):
    """Seconds of a training step, the best of so many."""
    unet, loss = TIMED[name](args, config)
    optimizer = torch.optim.SGD([p for p in unet.parameters() if p.requires_grad], lr=0.0)
    times = []
    for _ in range(args.steps):
        begun = time.perf_counter()
        loss().backward()
        optimizer.step()
        optimizer.zero_grad()
        times.append(time.perf_counter() - begun)
    return min(times)


def flops_of_step(name, args, config):
    """Floating point operations of a training step, those done twice by checkpointing counted twice."""
    shapes = copy.copy(args)
    shapes.fake = True
    with FakeTensorMode(), FlopCounterMode(display=False) as counter:
        TIMED[name](shapes, config)[1]().backward()
    return counter.get_total_flops()


def table_of_time(args, config):
    """Seconds of a step; frames per second; share of what the machine can do. Each model has a process of its
    own, or one would find memory that the one before had asked the system for; and there is a GroupNorm of
    torch's, channels last, that crashes at some widths when its input needs no gradient."""
    peak, rows = machine_peak(getattr(torch, args.type)), {}
    print(f"a matrix product here reaches {peak / 1e9:.0f} GFLOP/s in {args.type}")
    for name in TIMED if UNetMotionModel and args.theirs else [name for name in TIMED if "ours" in name]:
        share = flops_of_step(name, args, config) / peak
        try:
            with ProcessPoolExecutor(1, get_context("spawn")) as alone:
                rows[name] = best = alone.submit(time_of_step, name, args, config).result()
        except BrokenProcessPool:
            print(f"{name:34} crashed, or ran out of memory: try --no-channels_last, --frames or --latents")
            continue
        ratio = best / rows.get("ours", math.nan)
        print(f"{name:34} {best:7.2f} s, {args.batch_size * args.frames / best:6.2f} frames/s, "
              f"{share / best:4.0%} of the machine's peak, {ratio:5.2f} of ours", flush=True)


def main(argv=None):
    """Print one of the two tables."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--preset", default="sd15", choices=list(PRESETS))
    p.add_argument("--time", action="store_true", help="seconds instead of bytes")
    p.add_argument("--type", choices=list(KINDS), help="default bfloat16 for memory, float32 for time")
    p.add_argument("--frames", type=int, default=7)
    p.add_argument("--latents", type=int, help="their height and width; default that of the preset, 32 at "
                   "most with --time")
    p.add_argument("--batch_size", type=int, default=1)
    p.add_argument("--steps", type=int, default=7, help="of which the fastest counts: the first few wait for "
                   "memory that the system has to clear")
    p.add_argument("--channels_last", action=argparse.BooleanOptionalAction, default=True)
    p.add_argument("--theirs", action=argparse.BooleanOptionalAction, default=True,
                   help="time diffusers' model too: 13 GB of memory at the widths of sd15 in float32")
    args = p.parse_args(argv)
    config, args.fake = PRESETS[args.preset], not args.time
    args.type = args.type or ("float32" if args.time else "bfloat16")
    if args.time and not args.latents:
        args.latents = min(32, config.size // config.vae_factor)
    (table_of_time if args.time else table_of_memory)(args, config)


if __name__ == "__main__":
    main()
