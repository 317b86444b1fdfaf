"""Memory and time of this project, beside another checkout and beside diffusers. Not a test: run it by hand.

    python tests/benchmark.py             memory of a training step at 512x512, by flag; needs no GPU
    python tests/benchmark.py --time      seconds of a training step of the UNet on this machine
    python tests/benchmark.py --sample    seconds of a whole run of sample.py, 121 frames of the tiny preset
    python tests/benchmark.py --sample --other ../old --other_flags "--frames 121 --steps 4 --fill_steps 4"

--other measures another checkout beside this one, each in processes of its own. Where diffusers is installed,
its UNetMotionModel is measured too, with the same widths, frames, size and type.
"""

import argparse
import importlib.util
import os
import re
import shlex
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

HERE = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
TYPES = {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
K = "--gradient_checkpointing"
LADDER = ([K, "0"], [K, "0", "--activations_8bit"], [K, "3"], [K, "2"], [K, "1"], [K, "1", "--backbone_8bit"],
          [K, "1", "--offload_activations"], [K, "1", "--offload_activations", "--optimizer_on_cpu"],
          [K, "1", "--offload_activations", "--optimizer_on_cpu", "--backbone_8bit"])


# --- memory: the dry run of train.py ----------------------------------------------------------------------

def dry_run(root, args, flags):
    """GB of activations and gradients, and of everything, at the peak of a training step; or None, error."""
    command = [sys.executable, "train.py", "--stage", args.stage, "--preset", args.preset, "--data", "none",
               "--mixed_precision", args.type, "--batch_size", str(args.batch_size), "--dry_run", *flags]
    said = subprocess.run(command, cwd=root, capture_output=True, text=True)
    if said.returncode:
        return None, said.stderr.strip().splitlines()[-1]
    parts = re.findall(r"^  (.+?) +([\d.]+) GB", said.stdout, re.MULTILINE)
    step = sum(float(size) for name, size in parts if re.search("activations|gradients", name))
    return step, sum(float(size) for _, size in parts)


def dry_run_of_diffusers(args, checkpointing):
    """The same for diffusers' model: shapes only, counted alike."""
    sys.path.insert(0, HERE)
    from train import MemoryMeter
    with FakeTensorMode():
        unet, step = theirs(args, checkpointing)
        known = [*unet.parameters(), *unet.buffers()]
        with MemoryMeter(known) as meter:
            step()
    weights, trained = sum(x.nbytes for x in known), sum(x.nbytes for x in known if x.requires_grad)
    return meter.peak / 1e9, (meter.peak + weights + 3 * trained) / 1e9     # AdamW has two, and one average


def print_memory(args):
    """The ladder of flags, a line each: two numbers for each checkout."""
    numbers = lambda step, peak: f"   {peak}" if step is None else f"{step:11.2f}{peak:11.2f}"
    print("at the peak of a training step, in GB: activations and gradients; everything")
    print("\n".join(f"{name}: {root}" for name, root in args.roots.items()))
    for flags in LADDER:
        row = [numbers(*dry_run(root, args, flags)) for root in args.roots.values()]
        print(f"{' '.join(flags):89}{''.join(row)}", flush=True)
    for checkpointing in (False, True) if args.diffusers else ():
        name = f"diffusers UNetMotionModel{', its gradient checkpointing' * checkpointing}"
        print(f"{name:89}{numbers(*alone(dry_run_of_diffusers, args, checkpointing))}", flush=True)


# --- time of a training step ------------------------------------------------------------------------------

def inputs(args, config):
    """Latents (b, 4, f, h, w) and text of a window."""
    h = args.latents or config.size // config.vae_factor
    return (torch.randn(args.batch_size, 4, args.frames, h, h),
            torch.randn(args.batch_size, 77, config.text_width))


def ours(args, root):
    """The UNet of a checkout, and a function that does a training step of its temporal layers."""
    sys.path.insert(0, root)
    from model import PRESETS, UNet, is_temporal
    config = PRESETS[args.preset]
    unet = UNet(config).to(memory_format=torch.channels_last)        # as train.py has it
    freeze(unet, is_temporal, args)
    unet.checkpoint_every = args.gradient_checkpointing
    x, context = inputs(args, config)
    frames = torch.arange(args.frames).expand(args.batch_size, -1)
    t, given = torch.full(frames.shape, 500), frames == 0
    return unet, lambda: step(unet, args, x, lambda: unet(x, t, context, frames, given))


def theirs(args, checkpointing):
    """The same for diffusers' UNet with motion modules, of the same widths."""
    sys.path.insert(0, HERE)
    from diffusers import UNetMotionModel
    from model import PRESETS
    config = PRESETS[args.preset]
    down = ["CrossAttnDownBlockMotion" if level in config.attention_levels else "DownBlockMotion"
            for level in range(len(config.widths))]
    unet = UNetMotionModel(
        block_out_channels=config.widths, layers_per_block=config.res_blocks, down_block_types=down,
        up_block_types=[kind.replace("Down", "Up") for kind in reversed(down)],
        cross_attention_dim=config.text_width, num_attention_heads=config.heads,
        motion_num_attention_heads=config.heads)
    freeze(unet, lambda name: "motion_modules" in name, args)
    if checkpointing:
        unet.enable_gradient_checkpointing()
    x, context = inputs(args, config)
    context, t = context.repeat_interleave(args.frames, dim=0), torch.zeros(args.batch_size).long()
    return unet, lambda: step(unet, args, x, lambda: unet(x, t, context).sample)


def freeze(unet, trains, args):
    """Train some parameters; store the others in half precision, norms and biases aside, as train.py does."""
    for name, parameter in unet.named_parameters():
        parameter.requires_grad_(trains(name))
        if not parameter.requires_grad and parameter.dim() > 1:
            parameter.data = parameter.data.to(TYPES[args.type])
    unet.train()


def step(unet, args, target, forward):
    """Forward, backward, and forget the gradients."""
    with torch.autocast("cpu", TYPES[args.type], enabled=args.type != "no"):
        loss = (forward().float() - target).square().mean()
    loss.backward()
    unet.zero_grad()


def seconds_per_step(build, args, *which):
    """The fastest of some steps: the first ones wait for memory that the system has to clear."""
    (_, run), times = build(args, *which), []
    for _ in range(args.steps):
        begun = time.perf_counter()
        run()
        times.append(time.perf_counter() - begun)
    return min(times)


def alone(function, *values):
    """Call a function in a process of its own: no memory and no imports of the one before."""
    with ProcessPoolExecutor(1, get_context("spawn")) as process:
        return process.submit(function, *values).result()


def print_times(args):
    """Seconds of a training step, per checkout."""
    rows = [(name, ours, root) for name, root in args.roots.items()]
    rows += [("diffusers UNetMotionModel", theirs, args.gradient_checkpointing > 0)] * args.diffusers
    print(f"a training step of {args.preset}, {args.batch_size} x {args.frames} frames, {args.type}, "
          f"{torch.get_num_threads()} threads")
    for name, build, which in rows:
        try:
            seconds = alone(seconds_per_step, build, args, which)
            print(f"{name:40} {seconds:8.3f} s", flush=True)
        except BrokenProcessPool:
            print(f"{name:40} crashed, or ran out of memory: try smaller --latents or --frames")


# --- time of a whole run ----------------------------------------------------------------------------------

def print_runs(args):
    """Seconds of sample.py, start to end."""
    for name, root in args.roots.items():
        flags = args.other_flags if root != HERE and args.other_flags is not None else args.flags
        with tempfile.TemporaryDirectory() as folder:
            command = [sys.executable, "sample.py", *shlex.split(flags), "--out", os.path.join(folder, "run")]
            begun = time.perf_counter()
            subprocess.run(command, cwd=root, check=True, capture_output=True)
            print(f"{name:40} {time.perf_counter() - begun:8.1f} s   sample.py {flags}", flush=True)


def main(argv=None):
    """Print the tables that are asked for."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flag = p.add_argument
    flag("--time", action="store_true", help="seconds of a training step")
    flag("--sample", action="store_true", help="seconds of a run of sample.py")
    flag("--other", metavar="PATH", help="another checkout of this project to measure")
    flag("--flags", default="--frames 121", help="of sample.py; default %(default)s")
    flag("--other_flags", metavar="FLAGS", help="of the other sample.py; default those of --flags")
    flag("--preset", default="sd15", choices=("sd15", "tiny"))
    flag("--stage", default="starter", help="of the memory table: starter has 7 frames; default %(default)s")
    flag("--type", choices=list(TYPES), help="default bf16 for memory, no for time")
    flag("--frames", type=int, default=7, help="of the window; default %(default)s")
    flag("--latents", type=int, help="height and width; default those of the preset, 32 for --time of sd15")
    flag("--batch_size", type=int, default=1)
    flag("--steps", type=int, default=7, help="of which the fastest counts; default %(default)s")
    flag(K, type=int, default=0, help="for --time; default %(default)s")
    args = p.parse_args(argv)
    if args.time and not args.latents:
        args.latents = 32 if args.preset == "sd15" else 16
    args.type = args.type or ("no" if args.time else "bf16")
    args.roots = {"this checkout": HERE} | ({args.other: os.path.abspath(args.other)} if args.other else {})
    args.diffusers = importlib.util.find_spec("diffusers") is not None
    if args.time:
        print_times(args)
    if args.sample:
        print_runs(args)
    if not (args.time or args.sample):
        print_memory(args)


if __name__ == "__main__":
    main()
