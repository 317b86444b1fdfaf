"""Stable Diffusion 1.5 on a GPU: memory predicted and measured, and seconds. Not a test: run it by hand.

    python tests/gpu_check.py

Random weights take the memory and the time of trained ones. Prints a table in Markdown for README.md. Where
diffusers is installed, a forward pass of its UNetMotionModel, of the same widths, is measured beside ours.
"""
import argparse
import contextlib
import importlib.util
import io
import os
import re
import sys
import tempfile
import time

import torch

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import sample  # noqa: E402
import train  # noqa: E402
from benchmark import theirs  # noqa: E402
from model import PRESETS, Model, UNet, save_weights  # noqa: E402
from schedule import hierarchical  # noqa: E402

DEVICE = torch.device("cuda")
TRAINING = ([], ["--offload_activations"], ["--optimizer_on_cpu"],
            ["--optimizer_on_cpu", "--backbone_8bit", "--offload_activations"])


def row(*cells):
    """A line of the table."""
    print(f"| {' | '.join(cells)} |", flush=True)


def seconds(work, repeats=3):
    """The fastest of some calls, after one to warm up."""
    times = []
    for _ in range(repeats + 1):
        torch.cuda.synchronize()
        begun = time.perf_counter()
        work()
        torch.cuda.synchronize()
        times.append(time.perf_counter() - begun)
    return min(times[1:])


def quietly(work):
    """What a function prints."""
    with contextlib.redirect_stdout(io.StringIO()) as said:
        work()
    return said.getvalue()


def train_steps(flags):
    """Some steps of a stage with wide windows, as train.py does them: (predicted, measured, seconds)."""
    args = train.parse(["--stage", "starter", "--preset", "sd15", "--data", "none", "--dry_run",
                        "--mixed_precision", "bf16", *flags])
    said = quietly(lambda: train.dry_run(args, DEVICE, "check"))
    predicted = float(re.search(r"peak: ([\d.]+) GB", said)[1])
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    model = Model.build(PRESETS["sd15"])
    trainable = train.freeze_the_rest(model, args)
    model.to(DEVICE, ["unet"])
    masters = train.make_masters(trainable) if args.optimizer_on_cpu else trainable
    ema = {name: parameter.detach().clone() for name, parameter in masters.items()}
    optimizer = torch.optim.AdamW(masters.values(), fused=not args.optimizer_on_cpu)
    f, side = 7, model.config.size // model.config.vae_factor
    batch = {"x0": torch.randn(1, 4, f, side, side), "frames": torch.arange(f)[None] * 16,
             "given": torch.arange(f)[None] == 0, "user": torch.arange(f)[None] == 0, "captions": [""],
             "prompt_start": torch.full((1,), -torch.inf)}
    batch, model.remembered[""] = train.to_device(batch, DEVICE), torch.randn(77, model.config.text_width)

    def step():
        with train.forward_context(args, DEVICE):
            loss, _ = train.denoising_loss(model, batch, 0, args)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(masters.values(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        train.copy_into(trainable, masters)
        train.update_ema(ema, masters, 1)

    took = seconds(step)
    return predicted, torch.cuda.max_memory_allocated() / 1e9, took


def sample_windows(weights, precision):
    """A window of 7 frames, and a frame decoded: [(network, predicted, measured, seconds per frame)]."""
    argv = ["--weights", weights, "--mixed_precision", precision, "--frames", "121"]
    said = quietly(lambda: sample.main([*argv, "--plan"]))
    predicted = [float(peak) for peak in re.findall(r"predicted peak .* ([\d.]+) GB in", said)]
    with contextlib.redirect_stdout(io.StringIO()):
        sampler, rows = sample.Sampler(sample.parse(argv)), []
    window = max(hierarchical(121), key=lambda window: len(window.frames))
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        store, text = sample.Store(folder, sampler.shape), sampler.text([""])
        store.write(range(121), torch.randn(4, 121, *sampler.shape[1:]))
        work = (("UNet", len(window.new), lambda: sampler.make([window], store, text, 0)),
                ("VAE", 1, lambda: sampler.vae("decode", store.read([0]))))
        for (name, frames, run), expected in zip(work, predicted):
            run()
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            took = seconds(run, repeats=1) / frames
            rows.append((name, expected, torch.cuda.max_memory_allocated() / 1e9, took))
    return rows


def forward_times():
    """Seconds of a forward pass in fp16 with guidance, 2 x 7 frames: ours, and diffusers' if it is there."""
    x, t = torch.randn(2, 4, 7, 64, 64, device=DEVICE), torch.zeros(2, 7, dtype=torch.long, device=DEVICE)
    text = torch.randn(2, 77, 768, device=DEVICE)
    unet = UNet(PRESETS["sd15"]).half().to(DEVICE, memory_format=torch.channels_last).eval()
    networks = {"nanovideo": lambda: unet(x, t, text)}
    if importlib.util.find_spec("diffusers"):
        args = argparse.Namespace(preset="sd15", batch_size=2, frames=7, latents=64, type="fp16")
        other = theirs(args, False)[0].half().to(DEVICE).eval()
        networks["diffusers UNetMotionModel"] = lambda: other(x, t[:, 0], text.repeat_interleave(7, dim=0))
    with torch.no_grad(), torch.autocast("cuda", torch.float16):
        return {name: seconds(run) for name, run in networks.items()}


def main():
    """Print the table, a line at a time."""
    if not torch.cuda.is_available():
        raise SystemExit("gpu_check.py: no GPU that torch can use was found; there is nothing to check")
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}\n")
    row("what", "predicted GB", "measured GB", "seconds")
    row("---", "---", "---", "---")
    for flags in TRAINING:
        predicted, measured, took = train_steps(flags)
        row(f"a training step, bf16 {' '.join(flags)}", f"{predicted:.1f}", f"{measured:.2f}", f"{took:.2f}")
    with tempfile.TemporaryDirectory() as folder:
        weights = os.path.join(folder, "sd15.safetensors")
        save_weights(weights, Model.build(PRESETS["sd15"]))
        for precision in ("fp16", "bf16", "no"):
            for name, predicted, measured, took in sample_windows(weights, precision):
                row(f"sampling, {precision}: {name}, per frame", f"{predicted:.2f}", f"{measured:.2f}",
                    f"{took:.2f}")
    for name, took in forward_times().items():
        row(f"a forward pass, fp16, 2 x 7 frames: {name}", "", "", f"{took:.3f}")


if __name__ == "__main__":
    main()
