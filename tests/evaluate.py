"""The drift laboratory: make videos of test worlds with several settings and compare them with the truth.

    python tests/evaluate.py                                            both schedules, 64 worlds
    python tests/evaluate.py aug=none,t=20 frames=121,481 --worlds 8    every combination of these values

Every video starts from the first frame and the caption of a world that no training has seen. Flags of
sample.py hold for all videos. --out gets table.md, drift_*.png, sheet.png and, for each row of the table, a
folder with what was measured: the same command goes on where it stopped, also with more worlds.
"""
import argparse
import os
import shutil
import sys
import zlib
from itertools import product

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import data  # noqa: E402
import sample  # noqa: E402
from model import checksum, look_around  # noqa: E402

COMPARED = ("frames", "schedule", "max_stride", "steps", "guidance_scale", "temperature", "aug", "weights",
            "temporal")
BASELINES = ("VAE round trip", "copy first frame", "blend true ends", "cubic, every 4th true")
SPANS = ((1, 8), (30, 43), (60, 73), (108, 121), (228, 241), (468, 481))    # of frames, for the PSNR


# --- metrics: how a video differs from the truth at its end, compared with its start ----------------------
def boundaries(plan, n_frames):
    """Inner frames where two windows meet: given to both, one makes the frame before, one the frame after."""
    maker = {frame: i for i, window in enumerate(plan) for frame in window.new}
    meets = lambda f: (f - 1 in maker and f + 1 in maker and maker[f - 1] != maker[f + 1]
                       and f in plan[maker[f - 1]].given and f in plan[maker[f + 1]].given)
    return [f for f in range(1, n_frames - 1) if meets(f)]


def balloon_pixels(video, colour):
    """Which pixels have the hue of a balloon, that is its direction away from grey: bool (f, H, W)."""
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
    hidden = F.max_pool2d(hidden.float(), 7, stride=1, padding=3) > 0  # the basket too
    x, y = (torch.arange(w) + 0.5) / w, (torch.arange(h)[:, None] + 0.5) / h
    for lamp in torch.from_numpy(world.lamps(np.arange(f))).float()[..., None, None]:  # (f, 2, 1, 1)
        hidden |= (x - lamp[:, 0]) ** 2 + (y - lamp[:, 1]) ** 2 < 0.15 ** 2            # with its glow
    return ~hidden[:, : h // 2]


def speed(video, world, lag=8):
    """How fast the clouds drift, as a multiple of the true wind: 1 is right, 0 is frozen.

    The shift that best explains the sky `lag` frames later, searched from -0.5 to 2 times the truth."""
    sky = video.mean(0)[:, : video.shape[2] // 2]  # (f, rows, W)
    sky = sky - F.avg_pool1d(F.pad(sky, (12, 12), mode="circular"), 25, stride=1)   # light does not drift;
    # circular: clouds that leave on one side come back on the other
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


def persistence(video, world, part):
    """Share of frames and balloons where at least a third of the balloon's disc can be found: 0 to 1. For
    each balloon, the last `part` frames count that should show all of its disc."""
    n, r = video.shape[1], data.BALLOON_RADIUS
    found = []
    for colour, x in zip(world.colours, world.balloons(np.arange(n))):
        frames = np.flatnonzero((r < x) & (x < 1 - r))[-part:]
        size = balloon_pixels(video[:, frames], colour).sum((1, 2))
        found.append(size > torch.pi * (r * video.shape[-1]) ** 2 / 3)
    return torch.cat(found).float().mean().item()


def measure(video, truth, world, plan):
    """Metrics of a video against the truth, (3, f, H, W) in [-1, 1] each: {name: number}, {name: (f,)}.

    The numbers: drift of the colours (of 255) and of the sharpness (in bits) from the first 15 % of frames to
    the last; flicker over the truth's, everywhere and at boundaries; speed; persistence; PSNR in dB."""
    video, truth = (video + 1) / 2, (truth + 1) / 2
    n, part = video.shape[1], max(1, round(0.15 * video.shape[1]))
    drift = lambda values: (values[-part:].mean() - values[:part].mean()).item()
    colour = 255 * (sample.statistics(video) - sample.statistics(truth)).abs().mean(1)
    laplacian = torch.tensor([[0.0, 1, 0], [1, -4, 1], [0, 1, 0]])[None, None]
    sharp, true_sharp = (F.conv2d(x.mean(0)[:, None], laplacian).var((1, 2, 3)) for x in (video, truth))
    sharp = (sharp.clamp(min=1e-9) / true_sharp).log2()
    psnr = -10 * (video - truth).square().mean((0, 2, 3)).clamp(min=1e-10).log10()
    # |x_{f+1} - 2 x_f + x_{f-1}| of inner frames: flicker counts, steady motion hardly
    bends, true_bends = (x.diff(n=2, dim=1).abs().mean((0, 2, 3)) for x in (video, truth))
    at = [f - 1 for f in boundaries(plan, n)]
    return {
        "colour": drift(colour), "sharp": drift(sharp),
        "flicker": (bends.median() / true_bends.median()).item(),
        "boundary": (bends[at].median() / true_bends[at].median()).item() if at else float("nan"),
        "speed": speed(video, world), "persistence": persistence(video, world, part),
        **{f"psnr {a}-{b - 1}": psnr[a:b].mean().item() for a, b in SPANS if b <= n},
    }, {"colour": colour, "sharp": sharp, "psnr": psnr}


def combinations(lists, flags):
    """["steps=1,4", "aug=none"] -> {"1 none": arguments of sample.py, "4 none": ...}, every combination."""
    pairs = [item.partition("=")[::2] for item in lists]
    for flag, values in pairs:
        if flag not in COMPARED or not values:
            raise ValueError(f"found {flag}={values}: expected FLAG=VALUE,VALUE with {', '.join(COMPARED)}")
    cells = {}
    for values in product(*(values.split(",") for _, values in pairs)):
        given = [f"--{flag}={value}" for (flag, _), value in zip(pairs, values)]
        cells[" ".join(values)] = sample.parse([*flags, *given])
    return cells


def make(name, cell, plan, sampler, world, truth, seed, folder):
    """The video of a cell or baseline, (3, f, H, W); latents of unfinished ones are kept in `folder`."""
    n = truth.shape[1]
    if name == "VAE round trip":
        return sampler.vae("decode", sampler.vae("encode", truth))
    if name == "copy first frame":
        return truth[:, :1].expand_as(truth)
    if name == "blend true ends":
        return torch.lerp(truth[:, :1], truth[:, -1:], torch.linspace(0, 1, n)[:, None, None])
    if name == "cubic, every 4th true":        # the blend that the model's prior begins with
        latents, given = sampler.vae("encode", truth)[None], torch.arange(n)[None] % 4 == 0
        no_network = lambda *_: torch.zeros(1, n, 1)
        window = look_around(no_network, latents, torch.zeros_like(given).long(), None, given=given)
        return sampler.vae("decode", window.blend.transpose(0, 1))
    store = sample.Store(folder, sampler.shape)
    store.write([0], sampler.vae("encode", truth[:, :1]))
    sampler.run(plan, store, sampler.text([world.caption()]), seed)
    return sampler.vae("decode", store.read(range(n)))


@torch.no_grad()
def measure_cell(args, name, cell, sampler):
    """Make and measure a cell or baseline on all worlds where that is not done yet; returns its folder.

    It is that of these settings and weights, with a file per world: {"row": its metrics, "errors": those of
    each frame}, and a strip of frames."""
    flags = ("frames",) if name in BASELINES else (*COMPARED, "lora", "negative_prompt")
    settings = {flag: getattr(cell, flag) for flag in flags}
    settings |= {"baseline": name if name in BASELINES else None, "split": args.split,
                 "checksum": checksum(sampler.model.state())}
    folder = os.path.join(args.out, f"{zlib.crc32(str(settings).encode()):08x}")
    os.makedirs(folder, exist_ok=True)
    data.write_json(os.path.join(folder, "settings.json"), settings)
    plan = sample.frame_plan(cell)[0]
    for i in range(args.worlds):
        path = os.path.join(folder, f"{i:03d}")
        if os.path.exists(f"{path}.json"):
            continue
        world = data.SkyWorld(data.SPLITS[args.split] + i, sampler.model.config.size)
        truth = world.video(np.arange(cell.frames))
        video = make(name, cell, plan, sampler, world, truth, i, path)
        row, errors = measure(video, truth, world, plan)
        places = np.linspace(0, cell.frames - 1, 16).round().astype(int)
        strip = np.concatenate(list(data.to_pixels(video[:, places])), axis=1)
        Image.fromarray(strip).save(f"{path}.png")
        measured = {"row": row, "errors": {key: values.tolist() for key, values in errors.items()}}
        data.write_json(f"{path}.json", measured)
        shutil.rmtree(path, ignore_errors=True)
        print(f"world {i}, {cell.frames} frames, {name}", flush=True)
    return folder


def interval(values):
    """Median of a list, and the bootstrap interval that holds it with 95 %: "median [low, high]"."""
    values = np.array(values)
    picks = np.random.default_rng(0).integers(len(values), size=(1000, len(values)))
    low, high = np.percentile(np.median(values[picks], axis=1), (2.5, 97.5))
    return f"{np.median(values):.2f} [{low:.2f}, {high:.2f}]"


def table(title, rows):
    """A Markdown table of {name: [{metric: number} of each world]}."""
    metrics = list(next(iter(rows.values()))[0])
    lines = [[title, *metrics], ["---"] * (len(metrics) + 1)]
    lines += [[name, *(interval([row[key] for row in worlds]) for key in metrics)]
              for name, worlds in rows.items()]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def write(args, cells, measured):
    """table.md; drift_*.png, errors against the frame; sheet.png, the first worlds."""
    first = next(iter(cells.values()))
    strips, parts = {}, [
        f"{args.worlds} {args.split} worlds, {first.steps} steps, guidance {first.guidance_scale:g}, "
        f"temperature {first.temperature:g}, --aug {first.aug} unless a row says otherwise: "
        "median [95 % interval]"]
    for n, results in measured.items():
        parts.append(table(f"{n} frames", {name: [world["row"] for world in worlds]
                                           for name, (_, worlds) in results.items()}))
        for i in range(min(4, args.worlds)):
            strips |= {f"world {i}, {n} frames: {name}": np.array(Image.open(f"{folder}/{i:03d}.png"))
                       for name, (folder, _) in results.items()}
    print("\n\n".join(parts))
    data.write_whole(os.path.join(args.out, "table.md"), "\n\n".join(parts) + "\n")
    rows = [np.split(strip, 16, axis=1) for strip in strips.values()]
    data.contact_sheet(np.array(rows), 1, [[name] for name in strips]).save(f"{args.out}/sheet.png")
    for key, title in {"colour": "colour error of 255", "sharp": "sharpness less that of the truth in bits",
                       "psnr": "PSNR in dB"}.items():
        errors = {name: [world["errors"][key][1:] for world in measured[cell.frames][name][1]]
                  for name, cell in cells.items()}                                      # frame 0 is given
        curves = {name: list(enumerate(np.mean(rows, axis=0).tolist(), 2)) for name, rows in errors.items()}
        data.line_plot(f"{args.out}/drift_{key}.png", curves, "frame", f"{title}, mean over the worlds")


def main(argv=None):
    """The command line of tests/evaluate.py."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                usage="evaluate.py [FLAG=VALUE,... ...] [flags]", allow_abbrev=False)
    p.add_argument("--worlds", type=int, default=64, help="try 8 first (default: 64)")
    p.add_argument("--split", default="test", choices=("val", "test"), help="choose settings on val")
    p.add_argument("--out", default="out/evaluate", help="(default: out/evaluate)")
    argv = sys.argv[1:] if argv is None else argv
    lists = [word for before, word in zip(["", *argv], argv) if "=" in word and "--" not in before + word]
    args, flags = p.parse_known_args([word for word in argv if word not in lists])
    cells = combinations(lists or ["schedule=hierarchical,autoregressive"], flags)
    measured = {}   # {frames: {name: (folder, results)}}, baselines first
    for name, cell in cells.items():
        if cell.keyframes or cell.loop or cell.prompts or cell.image or cell.resume:
            raise ValueError("videos start from frame 0 of a test world: leave out pictures and prompts")
        sampler = sample.Sampler(cell)
        results = measured.setdefault(cell.frames, {})
        for row in [row for row in (*BASELINES, name) if row not in results]:
            folder = measure_cell(args, row, cell, sampler)
            results[row] = folder, [data.read_json(os.path.join(folder, f"{i:03d}.json"))
                                    for i in range(args.worlds)]
    write(args, cells, measured)


if __name__ == "__main__":
    try:
        main()
    except ValueError as error:
        raise SystemExit(f"evaluate.py: {error}") from None
