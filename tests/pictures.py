"""The pictures of README.md, made anew from the model that ships. Not a test: run it by hand.

    python tests/pictures.py           assets/levels.webp, assets/skies.webp, assets/interp.webp

The last one takes `python train.py --stage interp` first. assets/results.md says how drift.png was made.
"""
import os
import sys

import torch
from PIL import Image

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)

import data  # noqa: E402
import sample  # noqa: E402

ASSETS = os.path.join(ROOT, "assets")


def levels(n_frames=5, gap=8, world=0):
    """The levels of a window while it is denoised, a row per step: the first and the last frame are given.
    Fewer steps and more noise than by default, to show more."""
    sampler = sample.Sampler(sample.parse(["--steps=4"]))
    frames = torch.arange(n_frames)[None] * gap
    sky = data.SkyWorld(data.SPLITS["test"] + world)
    latents = sampler.vae("encode", sky.video(frames[0]))[None]
    new = (frames > 0) & (frames < frames.max())
    text, start = sampler.text([sky.caption()]), torch.tensor([-torch.inf])
    walk, rows, labels = sampler.schedule.levels(sampler.args.steps), [], []
    for step in range(len(walk)):        # before the first step: noise
        x = sample.denoise_window(sampler.model.unet, sampler.schedule, latents, frames, new, text, start,
                                  walk[:step + 1])
        rows.append(data.to_pixels(sampler.vae("decode", x[0])))
        level = f"t = {walk[step]}" if walk[step] >= 0 else "clean"
        labels.append([level if mark else "given, t = 0" for mark in new[0]])
    data.contact_sheet(rows, 2, labels).save(f"{ASSETS}/levels.webp", quality=90)


def skies(n_worlds=4):
    """Videos of 121 frames side by side, from the first frames of test worlds."""
    folders = [f"out/sky{n}" for n in range(n_worlds)]
    for n, folder in enumerate(folders):
        sample.main(["--world", str(n), "--out", folder, *(["--resume"] if os.path.exists(folder) else [])])
    frames = [Image.new("RGB", (205 * n_worlds - 12, 196), "white") for _ in range(121)]
    for f, frame in enumerate(frames):
        for n, folder in enumerate(folders):
            picture = Image.open(sample.frame_path(folder, f))
            frame.paste(picture.resize((192, 192), Image.Resampling.BICUBIC), (205 * n, 2))
    frames[0].save(f"{ASSETS}/skies.webp", save_all=True, append_images=frames[1:], duration=83, loop=0,
                   quality=80)


def interp():
    """The first window of the final sheet of a run of --stage interp: the truth, before, after."""
    sheet = Image.open("out/interp/samples/final.png")
    sheet.crop((0, 0, sheet.width, 3 * sheet.height // 12)).save(f"{ASSETS}/interp.webp", quality=90)


if __name__ == "__main__":
    levels()
    skies()
    interp()
