"""Where the frames come from: the sky world, a procedural timelapse, or videos of your own; and the batches
that training draws from them.

    python data.py --preview sheet.png          six worlds, one row each, from their first frame to their last
    python data.py --preview clip.gif --seed 7  one world as a moving picture

    python data.py --prepare VIDEOS --out DIR   a folder of videos, in any mix, becomes a folder of clips
    python data.py --check DIR                  what is in it, and what training will find there
    python data.py --cache DIR --weights FILE   latents of the clips, for train.py --data DIR
    python data.py --drop_hardest 0.1 --scores A.csv B.csv --out drop.txt    what not to train on (--drop)

The sky world needs no download and no disk: every frame is a pure function of (seed, frame, size), so any
length, any stride and any size can be asked for, and the truth (wind, time of day, balloon tracks) is known
exactly. That makes drift something one can measure instead of something one has to judge.

Everything about a world can be read off its first frame and its caption: the sun or the moon shows the hour,
the caption names the wind that clouds and balloons follow, and the trails of the balloons show it too.
The world is a cylinder: what leaves on the right comes back on the left, and nothing unforeseen ever enters.
Length is measured in picture widths and speed in widths per frame, so a world looks the same at every size.
"""

import argparse
import csv
import hashlib
import io
import json
import os
import re
import shutil
import subprocess
import tempfile
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from statistics import mode

import numpy as np
import torch
from PIL import Image, ImageDraw
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from tqdm import tqdm

import schedule

DAY = 480                                      # frames from one midnight to the next, in every world
WIND = {"slow": 0.12 / 64, "fast": 0.24 / 64}  # cloud speed, widths per frame
SPLITS = {"train": 0, "val": 1_000_000, "test": 2_000_000}  # first seed of each split: the ranges never meet
BALLOON_RADIUS = 0.095
TRAIL = (10, 20, 30, 40, 50)                   # the trail shows where the balloon was so many frames ago
BALLOONS = {"red": (226, 38, 44), "green": (38, 170, 70), "violet": (166, 52, 200), "yellow": (252, 206, 32)}
CLOUDS = {"few": 76, "some": 60, "many": 42}   # percentile of the cloud texture that stays clear sky

# time of day (0 midnight, 0.5 noon): colour of the zenith, the horizon, and the light that falls on things
PALETTE = [
    (0.00, (26, 32, 74), (58, 66, 118), (104, 116, 168)),
    (0.17, (32, 36, 84), (78, 74, 128), (112, 112, 160)),
    (0.25, (98, 104, 170), (250, 168, 158), (255, 190, 176)),
    (0.33, (92, 150, 220), (246, 222, 200), (255, 240, 224)),
    (0.50, (66, 132, 220), (178, 214, 242), (255, 255, 250)),
    (0.67, (84, 140, 210), (222, 220, 206), (255, 246, 220)),
    (0.75, (82, 78, 146), (252, 146, 70), (255, 172, 104)),
    (0.83, (42, 42, 100), (138, 82, 120), (156, 116, 146)),
    (1.00, (26, 32, 74), (58, 66, 118), (104, 116, 168)),
]


@contextmanager
def complete(path):
    """A name to write to. The file gets its own name when it is complete, and not if anything fails."""
    root, ending = os.path.splitext(path)
    yield f"{root}.tmp{ending}"
    os.replace(f"{root}.tmp{ending}", path)


def palette(hour):
    """Colours at times of day in [0, 1), shape (f,): zenith, horizon, light, each (3, f, 1, 1) in [0, 1]."""
    keys = np.array([key[0] for key in PALETTE])
    colours = np.array([key[1:] for key in PALETTE], dtype=np.float64).reshape(len(PALETTE), 9) / 255
    mixed = np.float32([np.interp(hour, keys, colours[:, i]) for i in range(9)])[..., None, None]
    return mixed[0:3], mixed[3:6], mixed[6:9]


def time_word(hour):
    """The word a caption uses for a time of day."""
    return ("dawn" if 0.2 <= hour < 0.31 else "day" if 0.31 <= hour < 0.69 else
            "dusk" if 0.69 <= hour < 0.81 else "night")


def bounce(x, low, high):
    """Position of a point that moves freely and is reflected at `low` and `high` (a triangle wave)."""
    span = high - low
    return low + span - np.abs((x - low) % (2 * span) - span)


def fractal(rng, shape, cutoff, falloff):
    """Tileable random texture with mean 0 and std 1.

    Noise whose spectrum falls like k^-falloff, cut off smoothly at `cutoff` cycles per width (one number per
    axis). The cut-off keeps detail finer than a latent cell out of the world, because a small VAE could not
    carry it."""
    spectrum = np.fft.fftn(rng.standard_normal(shape))
    k = np.meshgrid(*[np.fft.fftfreq(n, 1 / n) / c for n, c in zip(shape, cutoff)], indexing="ij")
    k = np.sqrt(sum(axis ** 2 for axis in k))
    gain = np.exp(-k ** 2) / np.maximum(k, 1e-6) ** falloff
    gain.flat[0] = 0
    texture = np.fft.ifftn(spectrum * gain).real
    return texture / texture.std()


def over(image, colour, alpha):
    """Paint `colour` on `image` (3, f, H, W), in place, as far as `alpha` (f, H, W) says.

    colour: (3, f or 1, H or 1, W or 1)."""
    image += alpha * (colour - image)


def sideways(x, centre):
    """How far x lies to the right of `centre`, in widths, the shorter way around the cylinder."""
    return (x - centre + 0.5) % 1 - 0.5


def distance_to(centre, x, y):
    """Distance of every pixel (x (W,), y (H, 1)) from a moving centre (f, 2, 1, 1): (f, H, W), in widths."""
    return np.sqrt(sideways(x, centre[:, 0]) ** 2 + (y - centre[:, 1]) ** 2)


def rgb(*colour):
    """A fixed colour in the shape that `over` wants."""
    return np.float32(colour).reshape(3, 1, 1, 1)


class SkyWorld:
    """One procedural timelapse: sky, sun and moon, two ridges, clouds and one to three balloons on the wind.

    seed: any int >= 0. size: height and width of a frame in pixels, a multiple of 8.
    `wind` is the signed speed of clouds and balloons in widths per frame, `colours` names the balloons.
    """

    def __init__(self, seed, size=64):
        if size < 16 or size % 8:
            raise ValueError(f"the sky world was asked for frames of {size} pixels; "
                             "sizes are multiples of 8 from 16 on")
        rng = np.random.default_rng([20230709, seed])
        self.seed, self.size = seed, size
        self.start = rng.random()
        self.heading, self.pace = ["left", "right"][rng.integers(2)], ["slow", "fast"][rng.integers(2)]
        self.wind = WIND[self.pace] * (1 if self.heading == "right" else -1)
        self.cover = list(CLOUDS)[rng.integers(3)]
        self.colours = list(rng.permutation(list(BALLOONS))[:rng.integers(1, 4)])
        n = len(self.colours)
        self.columns = rng.random() + (np.arange(n) + rng.uniform(-0.15, 0.15, n)) / 3  # x, never too close
        self.heights = rng.uniform(0.14, 0.52, n)                                       # y at frame 0 and
        self.sinking = rng.uniform(-0.06, 0.06, n) / 64                                 # its speed

    @cached_property
    def clouds(self):
        """Cloud texture and how brightly each place is lit from above: (2, H, 256), periodic to the right."""
        rng = np.random.default_rng([20230710, self.seed])
        texture = fractal(rng, (256, 256), cutoff=(10, 7), falloff=1.5)  # flat clouds: wider than high
        texture -= np.percentile(texture, CLOUDS[self.cover])  # below 0: clear sky
        lit = texture - np.roll(texture, 7, axis=0)
        rows = (np.arange(self.size) + 0.5) / self.size * 256 - 0.5
        return np.float32(_interpolate(np.stack([texture, lit]), rows, axis=1))

    @cached_property
    def ridges(self):
        """Height of the far and the near ridge in each column: two (W,), in picture heights from the top."""
        rng = np.random.default_rng([20230711, self.seed])
        columns = (np.arange(self.size) + 0.5) / self.size * 256 - 0.5
        far, near = (_interpolate(fractal(rng, (256,), cutoff=(cut,), falloff=1.2), columns, axis=0)
                     for cut in (7, 4))
        return 0.70 + 0.045 * far, 0.85 + 0.045 * near

    def hour(self, frames):
        """Time of day in [0, 1) at absolute frame indices."""
        return (self.start + np.asarray(frames) / DAY) % 1

    def caption(self, frame=0):
        """What the world shows at a frame, as the words that the text encoder is trained on."""
        balloons = ", ".join(f"{colour} balloon" for colour in self.colours)
        time = time_word(self.hour(frame))
        return f"wind {self.heading} {self.pace}, {self.cover} clouds, {time}, {balloons}"

    def balloons(self, frames):
        """Centres of the balloons at frames (f,): (n, f, 2) as (x, y) in widths. They follow the wind."""
        frames = np.asarray(frames, dtype=np.float64)[None]
        x, y, speed = (values[:, None] for values in (self.columns, self.heights, self.sinking))
        return np.stack([(x + self.wind * frames) % 1, bounce(y + speed * frames, 0.12, 0.55)], axis=-1)

    def lamps(self, frames):
        """Centres of the sun and the moon at frames (f,): (2, f, 2) as (x, y).

        Each is up for half a day, from left to right; below the far ridge it is hidden by the land."""
        way = [(self.hour(frames) - rise) % 1 / 0.5 for rise in (0.25, 0.75)]
        return np.stack([np.stack([0.06 + 0.88 * w, 0.74 - 0.6 * np.sin(np.pi * w)], axis=-1) for w in way])

    def video(self, frames):
        """Frames at the given absolute indices: float32 tensor (3, f, H, W) in [-1, 1]."""
        frames = np.asarray(frames)
        x = np.float32(np.arange(self.size) + 0.5) / self.size  # pixel centres, (W,)
        y = x[:, None]                                          # and (H, 1)
        zenith, horizon, light = palette(self.hour(frames))
        column = zenith + np.clip(y / 0.75, 0, 1) ** 1.3 * (horizon - zenith)  # (3, f, H, 1)
        image = np.repeat(column, self.size, axis=3)                           # (3, f, H, W)
        self._paint_lamps(image, frames, x, y)
        self._paint_clouds(image, frames, y, light, horizon)
        self._paint_land(image, y, light, horizon)
        self._paint_balloons(image, frames, x, y, light)
        return torch.from_numpy(np.clip(image, 0, 1) * 2 - 1)

    def _paint_lamps(self, image, frames, x, y):
        sun, moon = np.float32(self.lamps(frames))[..., None, None]  # (f, 2, 1, 1)
        for centre, radius, colour, glow in ((sun, 0.062, rgb(1, 0.95, 0.74), 0.5),
                                             (moon, 0.05, rgb(0.92, 0.93, 1), 0.2)):
            distance = distance_to(centre, x, y)
            halo = glow * np.exp(-(distance / 0.16) ** 2)
            over(image, colour, np.maximum(halo, self._inside(radius - distance)))

    def _paint_clouds(self, image, frames, y, light, horizon):
        columns = (np.arange(self.size) + 0.5) / self.size * 256 - 0.5
        columns = columns - self.wind * 256 * frames[:, None]  # (f, W)
        moved = _interpolate(self.clouds, columns.ravel(), axis=2).reshape(2, self.size, *columns.shape)
        texture, lit = moved.transpose(0, 2, 1, 3)  # (f, H, W) each
        alpha = np.clip(texture / 0.9, 0, 1) * np.clip((0.72 - y) / 0.2, 0, 1)
        colour = light * (0.86 + 0.14 * np.clip(lit, -1, 1)) + 0.12 * (horizon - light)
        over(image, colour, 0.88 * alpha * (2 - alpha))

    def _paint_land(self, image, y, light, horizon):
        far, near = np.float32(self.ridges)
        over(image, 0.52 * horizon + light * rgb(0.10, 0.14, 0.18), self._inside(y - far))
        grass = light * rgb(0.20, 0.30, 0.22) * (1 + 0.9 * np.clip((y - near) / 0.2, 0, 1))
        over(image, grass, self._inside(y - near))

    def _paint_balloons(self, image, frames, x, y, light):
        centres = lambda lag: np.float32(self.balloons(frames - lag))[..., None, None]  # (n, f, 2, 1, 1)
        now, *past = [centres(lag) for lag in (0, *TRAIL)]
        r = np.float32(BALLOON_RADIUS)
        below = np.float32([0, 1.15 * r])[:, None, None]
        up_left = np.float32([-0.35 * r, -0.4 * r])[:, None, None]
        for i, name in enumerate(self.colours):
            # lit from inside like a lantern: a balloon keeps its colour at night and can be found again
            colour = rgb(*BALLOONS[name]) / 255 * (0.72 + 0.28 * light.mean(0))
            puffs = [(0.8 - 0.12 * age) *
                     self._inside((0.24 - 0.02 * age) * r - distance_to(centre[i] + below, x, y))
                     for age, centre in enumerate(past)]
            over(image, 0.5 + 0.5 * colour, np.maximum.reduce(puffs))
            dx, dy = abs(sideways(x, now[i, :, 0])), abs(y - now[i, :, 1] - 1.3 * r)
            over(image, light * rgb(0.35, 0.24, 0.16), self._inside(np.minimum(0.24 * r - dx, 0.2 * r - dy)))
            shine = np.exp(-(distance_to(now[i] + up_left, x, y) / (0.5 * r)) ** 2)
            over(image, colour + 0.45 * shine * (1 - colour), self._inside(r - distance_to(now[i], x, y)))

    def _inside(self, distance):
        """Coverage of a pixel by a shape, from the signed distance to its edge in widths.

        Edges are 1.5 pixels soft: a pixel's own width for anti-aliasing, and a little more because no lens
        and no small VAE is sharper."""
        return np.clip(distance * self.size / 1.5 + 0.5, 0, 1)


def _interpolate(texture, at, axis):
    """Linear, periodic interpolation of a texture at fractional indices along one axis."""
    left = np.floor(at).astype(int)
    shape = [1] * texture.ndim
    shape[axis] = len(at)
    part = np.float32(at - left).reshape(shape)
    n = texture.shape[axis]
    return np.take(texture, left % n, axis) * (1 - part) + np.take(texture, (left + 1) % n, axis) * part


# ------------------------------------------------------------------------------------------------------------
# Batches, pure functions of (seed, step): a resumed run sees what the uninterrupted one would have seen
# ------------------------------------------------------------------------------------------------------------

def picture_batch(split, seed, step, batch_size, size, per_world=4):
    """Pictures (b, 3, H, W) in [-1, 1]: `per_world` random moments of each of a few worlds of a split."""
    rng = np.random.default_rng([seed, step])
    world = lambda: SkyWorld(SPLITS[split] + int(rng.integers(900_000)), size)
    pictures = [world().video(rng.integers(0, 4 * DAY, per_world))
                for _ in range(-(-batch_size // per_world))]
    return torch.cat(pictures, dim=1)[:, :batch_size].transpose(0, 1).contiguous()


def reach(window):
    """How many frames lie from the first frame of a `schedule.Window` to its last: it needs one more."""
    return window.frames[-1] - window.frames[0]


@dataclass
class Clips:
    """Clips that batches are drawn from, wherever their frames are kept.

    lengths[i] is how many frames clip i has, mirror[i] whether it may be shown mirrored, names[i] its name.
    read(i, places (n,), mirrored) -> those frames of clip i, (c, n, h, w) float32.
    caption(i, place) -> what clip i shows from a place on. context(i) -> its text embedding (77, d), or None
    instead of a function where captions are embedded in training. key: a hash of all that batches depend on,
    where it is not in the command line."""

    names: list
    lengths: np.ndarray
    mirror: list
    read: Callable
    caption: Callable
    context: Callable | None = None
    key: str | None = None

    def images(self, seed, step, batch_size):
        """Random single frames: latents (b, 4, h, w) and their captions."""
        rng = np.random.default_rng([seed, step])
        picks = [(int(rng.integers(len(self.names))), int(rng.integers(self.lengths[0])))
                 for _ in range(batch_size)]
        frames = [self.read(clip, torch.tensor([place]), False)[:, 0] for clip, place in picks]
        return torch.stack(frames), [self.caption(clip, place) for clip, place in picks]

    def windows(self, shapes, seed, step, batch_size):
        """Random windows of the shapes that the planners ask for, each at a random place of a random clip.

        shapes: [(share, windows)], lists of `schedule.Window` and how often each is drawn from, so that the
        few windows that start a plan count for more than the many that fill it. The windows of a batch have
        one length, or they would not stack. Returns what `stack` does. ValueError if a window fits in no
        clip."""
        rng = np.random.default_rng([seed, step])
        pick = lambda options: options[rng.integers(len(options))]
        rows, length, shares = [], None, np.array([share for share, _ in shapes])
        shares = shares / shares.sum()
        while len(rows) < batch_size:
            window = pick(shapes[rng.choice(len(shapes), p=shares)][1])
            if len(window.frames) != (length or len(window.frames)):
                continue
            length = len(window.frames)
            room = self.lengths - reach(window)                  # places where it can be laid
            if room.max() < 1:
                raise ValueError(f"a window over {reach(window) + 1} frames fits in no clip, the longest has "
                                 f"{self.lengths.max()}: ask for shorter --frames")
            place, clip = int(rng.integers(room.max())), int(pick(np.flatnonzero(room > 0)))
            place = place * int(room[clip]) // int(room.max())             # the same part of a shorter clip
            mirrored = self.mirror[clip] and rng.random() < 0.5
            rows.append(self.cut(window, clip, place, mirrored))
        return self.stack(rows)

    def cut(self, window, clip, place, mirrored=False):
        """One window (a `schedule.Window`) of a clip, its first frame laid on `place`: a row for `stack`.

        Frame 0 of a plan is the user's, wherever in the clip the plan is laid."""
        frames = torch.tensor(window.frames)
        given = torch.tensor([frame not in window.new for frame in window.frames])
        row = dict(latents=self.read(clip, frames - frames[0] + place, mirrored), frames=frames, given=given,
                   user=given & ((frames == 0) | (window.level == 0)),
                   caption=self.caption(clip, place - window.frames[0]))
        return row | ({"contexts": self.context(clip)} if self.context else {})

    def stack(self, rows):
        """Windows of one length as a batch, a dict: latents (b, c, f, h, w), frames (b, f), given and user
        (b, f) bool (user: given, and not made by the model), captions, and contexts (b, 77, d) if known."""
        batch = {key: torch.stack([row[key] for row in rows]) for key in rows[0] if key != "caption"}
        return batch | {"captions": [row["caption"] for row in rows]}


def sky_clips(path, encode, worlds, frames, size, key):
    """Clips of the same moments of many sky worlds. Their latents are made once and kept on disk.

    path: the cache file. encode: video (1, 3, f, H, W) -> latents (1, 4, f, h, w). worlds: their seeds.
    frames: which moments, a range. key: says what the latents were made with; a cache with another key is
    made anew. The latents are (worlds, 4, f, h, w) float16."""
    worlds = list(worlds)
    looks = SkyWorld(worlds[0], size).video(np.array([frames[0], frames[-1]]))
    about = (f"{key} worlds {worlds[0]}+{len(worlds)} frames {frames[0]}:{frames[-1]}:{len(frames)} "
             f"looks {zlib.crc32(looks.numpy().tobytes()):08x}")   # of a changed world, latents are stale
    latents = _read_latents(path, about)
    if latents is None:
        moments = np.array(frames)
        latents = torch.cat([encode(SkyWorld(world, size).video(moments)[None]).half()
                             for world in tqdm(worlds, desc="encoding worlds", unit="world")])
        os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
        with complete(path) as unfinished:
            save_file({"latents": latents}, unfinished, metadata={"about": about})
    moment = lambda place: frames.start + place * frames.step
    return Clips(names=[f"world {world}" for world in worlds], lengths=np.full(len(worlds), len(frames)),
                 mirror=[False] * len(worlds),                  # captions say which way the wind blows
                 read=lambda i, places, mirrored: latents[i][:, places].float(),
                 caption=lambda i, place: SkyWorld(worlds[i], size).caption(moment(place)))


def _read_latents(path, about):
    """The latents in a cache file, or None if there is none that was made like this."""
    if not os.path.exists(path):
        return None
    with safe_open(path, framework="pt") as file:
        return file.get_tensor("latents") if file.metadata().get("about") == about else None


def prefetch(draw):
    """A function (step) -> batch like `draw`, whose next batch is read while this one is being used.

    One thread, one batch ahead. `draw` is a pure function of the step, so the order stays what it was."""
    pool, ahead, threads = ThreadPoolExecutor(1), {}, torch.get_num_threads()
    # A thread that computes in parallel has helpers of its own. With more helpers than cores, OpenMP puts all
    # to sleep after every operation, those of the training loop too: a step took 1.3 times as long. A number
    # of threads is the thread's own once it has been read there; unread, it would change with the next line.
    pool.submit(lambda: torch.set_num_threads(1) or torch.get_num_threads()).result()
    torch.set_num_threads(threads)

    def batch(step):
        """The batch of a step, drawn already if the steps come in order."""
        wanted = ahead.pop(step, None) or pool.submit(draw, step)
        ahead.clear()
        ahead[step + 1] = pool.submit(draw, step + 1)
        return wanted.result()

    return batch


def window_shapes(stage, n_frames, max_stride=16):
    """What a video stage trains on: [(share, windows)], lists of windows and how often each is drawn from.

    The sources are both planners at the full length, and the ladder at a half and a quarter of it: short
    videos are asked for too; and where keys may be more than 16 frames apart, the ladder with such keys
    besides. A source has a list for each stage, and for its coarse and fine fills, where it has any (the
    ladder needs no window that extrapolates up to 97 frames).

    One window starts a video, and all others build on it. It is the hardest too, and the others hardly help
    to learn it; fills between frames that are nearly alike are soon known. So the shares differ, most of all
    those of the ladder at the full length, which is the default."""
    schedule.training_windows(stage, n_frames)             # says so if there is nothing to train on at all
    default = {"starter": 6, "extrap": 4, "coarse": 6, "fine": 2}
    short = {"starter": 1, "extrap": 3, "coarse": 1, "fine": 1}        # they end on windows of their own
    lengths_of_short = tuple(n for n in ((n_frames + 1) // 2, (n_frames + 3) // 4) if n > 1)
    sources = [("ladder", n_frames, 16, default), ("seed", n_frames, 16, dict.fromkeys(default, 2)),
               ("ladder", lengths_of_short, 16, short), ("ladder", n_frames, max_stride, default)]
    shapes = []
    for planner, lengths, stride, shares in sources if max_stride > 16 else sources[:3]:
        kinds = {kind: [] for kind in default}
        for window in schedule.training_windows("video", lengths, (planner,), stride) if lengths else []:
            if stage in (window.stage, "video"):
                fill = "fine" if window.gap <= 4 else "coarse"
                kinds[fill if window.stage == "interp" else window.stage].append(window)
        shapes += [(shares[kind], windows) for kind, windows in kinds.items() if windows]
    return shapes


# ------------------------------------------------------------------------------------------------------------
# Pictures of what happened: contact sheets, moving pictures, line plots. All with Pillow
# ------------------------------------------------------------------------------------------------------------

def to_pixels(video):
    """video (3, f, H, W) in [-1, 1] -> uint8 array (f, H, W, 3).

    Rounds, so that a picture survives the way there and back."""
    return ((video.clamp(-1, 1) + 1) * 127.5).round().byte().permute(1, 2, 3, 0).cpu().numpy()


def from_pixels(image):
    """A Pillow picture -> tensor (3, 1, H, W) in [-1, 1]."""
    return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)[:, None].float() / 127.5 - 1


def contact_sheet(rows, scale=1, labels=None):
    """Rows of frames, each (n, H, W, 3) uint8, as one Pillow picture.

    `labels` writes a text over the start of each row."""
    width = max(len(row) for row in rows)
    blank = lambda row: np.full((width - len(row), *row.shape[1:]), 255, np.uint8)
    lines = [np.concatenate([*row, *blank(row)], axis=1) for row in rows]
    sheet = Image.fromarray(np.concatenate(lines))
    sheet = sheet.resize((sheet.width * scale, sheet.height * scale), Image.Resampling.BICUBIC)
    for i, label in enumerate(labels or []):
        place = (4, (2 + sum(line.shape[0] for line in lines[:i]) * scale))
        ImageDraw.Draw(sheet).text(place, label, fill="white", stroke_width=2, stroke_fill="black")
    return sheet


def save_animation(path, pixels, fps, scale=1):
    """Frames (f, H, W, 3) as an endless GIF or animated WebP, by the ending of the path.

    Both formats may merge equal frames."""
    size = (pixels.shape[2] * scale, pixels.shape[1] * scale)
    images = [Image.fromarray(frame).resize(size, Image.Resampling.BICUBIC) for frame in pixels]
    more = {"quality": 85, "method": 2} if path.endswith(".webp") else {}
    images[0].save(path, save_all=True, append_images=images[1:], duration=round(1000 / fps), loop=0, **more)


COLOURS = [(200, 30, 30), (30, 90, 200), (20, 140, 60), (160, 90, 20), (120, 40, 160), (110, 110, 110),
           (230, 120, 160), (0, 160, 170), (170, 160, 0), (60, 60, 60), (250, 120, 0), (130, 170, 230)]


def line_plot(path, curves, title, log=False):
    """Curves {name: [(x, y), ...]} as a picture 700 pixels wide, with a legend of as many rows as needed."""
    change = (lambda y: np.log10(max(y, 1e-12))) if log else float
    back = (lambda v: 10 ** v) if log else float
    points = {name: [(x, change(y)) for x, y in curve] for name, curve in curves.items() if len(curve)}
    xs, ys = zip(*[point for curve in points.values() for point in curve])
    low, high, first, last = min(ys), max(max(ys), min(ys) + 1e-6), min(xs), max(max(xs), min(xs) + 1e-6)
    place = lambda x, y: (70 + 600 * (x - first) / (last - first), 290 - 240 * (y - low) / (high - low))
    widest = max(105, 8 + 6 * max(map(len, points)))          # a letter is 6 pixels wide
    columns = max(1, 620 // widest)
    image = Image.new("RGB", (700, 340 + 18 * ((len(points) - 1) // columns)), "white")
    draw = ImageDraw.Draw(image)
    draw.text((70, 8), title, fill="black")
    for part in (0, 0.25, 0.5, 0.75, 1):
        value, x = low + (high - low) * part, first + (last - first) * part
        draw.line([place(first, value), place(last, value)], fill=(228, 228, 228))
        draw.text((6, place(first, value)[1] - 6), f"{back(value):.4g}", fill="black")
        draw.text((place(x, low)[0] - 8, 296), f"{x:.0f}", fill="black")
    for i, (name, curve) in enumerate(points.items()):
        colour = COLOURS[i % len(COLOURS)]
        draw.line([place(*point) for point in curve], fill=colour, width=2)
        draw.text((70 + widest * (i % columns), 318 + 18 * (i // columns)), name, fill=colour)
    image.save(path)


# ------------------------------------------------------------------------------------------------------------
# Your own videos: any mix of files becomes a folder of clips, judged, checked, and kept as latents
#
#   OUT/settings.json               what the folder was prepared with
#   OUT/clips/SOURCE/source.json    a video, GIF or folder of pictures; `refused`: why it could not be read
#   OUT/clips/SOURCE/000/00001.png  the frames of its first clip; 000.txt its caption, yours to edit; 000.json
#                                   where it comes from
#   OUT/dropped.csv                 clips that are left out, and why; a dropped_REASON.png for each reason
#   OUT/cache/SOURCE/000.safetensors  its latents, made by --cache
# ------------------------------------------------------------------------------------------------------------

VIDEOS = (".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".mpg", ".mpeg", ".ts", ".wmv", ".flv", ".3gp",
          ".ogv", ".gif")
PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
THUMB = 32          # clips are judged by pictures of this size
MOMENTS = 5         # and compared at so many moments, in gray, at half that size
SETTINGS = ("size", "fps", "skip_start", "skip_end", "format", "cut_change", "cut_ratio", "frozen",
            "frozen_seconds")   # what the frames of a prepared folder depend on
REASONS = {"corrupt": "sources refused", "cut": "cuts", "frozen": "frozen stretches",
           "duplicate": "near duplicates", "short": "too short"}


def write_whole(path, text):
    """Write a text file that is complete or not there."""
    with complete(path) as unfinished, open(unfinished, "w", encoding="utf-8") as file:
        file.write(text)


def write_json(path, value):
    """The same for JSON, with sorted keys: equal values give equal files."""
    write_whole(path, json.dumps(value, indent=1, sort_keys=True, ensure_ascii=False) + "\n")


def read_json(path):
    """A JSON file of ours. ValueError if it is none."""
    try:
        with open(path, encoding="utf-8") as file:
            return json.load(file)
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read ({error}): prepare the folder again") from None


def in_order(names):
    """Names sorted as people count: 2.png before 10.png."""
    return sorted(names, key=lambda name: [(part.isdigit(), int(part) if part.isdigit() else 0, part)
                                           for part in re.split(r"(\d+)", name)])


def read_text(path):
    """A caption file as one line."""
    with open(path, encoding="utf-8-sig", errors="replace") as file:
        return " ".join(file.read().split())


def read_metadata(root):
    """metadata.csv of a folder (columns path and text): {path relative to the folder: caption}."""
    path = os.path.join(root, "metadata.csv")
    if not os.path.exists(path):
        return {}
    with open(path, newline="", encoding="utf-8-sig") as file:
        reader = csv.DictReader(file)
        rows = [row for row in reader if row.get("path")]
    if not {"path", "text"} <= set(reader.fieldnames or ()):
        raise ValueError(f"{path} has the columns {reader.fieldnames}, expected path and text: rename them")
    outside = [row["path"] for row in rows if os.path.normpath(row["path"]).startswith(("..", os.sep))]
    if outside:
        raise ValueError(f"{path} names {outside[0]}, which lies outside {root}: give paths inside it")
    return {os.path.normpath(row["path"]): " ".join((row["text"] or "").split()) for row in rows}


def find_sources(root, out):
    """What lies in a folder and below, but for `out`: ({name: caption} of the sources, names of other files).

    A source is a video file, a GIF, or a folder that holds pictures and no videos; its name is its path. Its
    caption: the text file of its name, else metadata.csv, else the name of the folder it is in, in words
    (UCF101 has a folder for each class). What metadata.csv names is a source even if it is not there: then
    it is refused later, by name."""
    if not os.path.isdir(root):
        raise ValueError(f"{root} is not a folder: give the folder that your videos are in")
    table, sources, others = read_metadata(root), [], []
    for folder, folders, files in os.walk(root):
        path = lambda name: os.path.normpath(os.path.relpath(os.path.join(folder, name), root))
        kind = lambda *endings: [name for name in files if name.lower().endswith(endings)]
        files = [name for name in files if not name.startswith(".") and name != "metadata.csv"]
        folders[:] = [name for name in folders if not name.startswith(".") and
                      os.path.abspath(os.path.join(folder, name)) != os.path.abspath(out)]
        if len(kind(*PICTURES)) > 1 and not kind(*VIDEOS):
            sources.append(path(""))
        else:
            sources += map(path, kind(*VIDEOS))
            others += map(path, set(files) - set(kind(*VIDEOS, ".txt")))
    if "." in sources:
        raise ValueError(f"{root} is itself a folder of pictures: give the folder that it lies in")
    captions = {}
    for name in in_order({*sources, *table}):
        path = os.path.join(root, name)
        beside = (path if os.path.isdir(path) else os.path.splitext(path)[0]) + ".txt"
        folder = os.path.basename(os.path.dirname(name))
        words = re.sub(r"(?<=[a-z0-9])(?=[A-Z])|[_\s]+", " ", folder).lower().strip()
        captions[name] = read_text(beside) if os.path.exists(beside) else table.get(name, words)
    return captions, in_order(others)


def run_tool(command):
    """What a program prints, as bytes. ValueError with the first thing it complains about when it fails."""
    done = subprocess.run(command, capture_output=True, stdin=subprocess.DEVNULL)
    if done.returncode:
        said = done.stderr.decode(errors="replace").strip() or f"exit code {done.returncode}"
        raise ValueError(re.sub(r"\[[^\]]* @ 0x[0-9a-f]+\] ", "", said.splitlines()[0]))   # no addresses
    return done.stdout


def open_video(path, args):
    """How ffmpeg is to read a video file: (input options, filter, (width, height, aspect), frames expected).

    Size and aspect of a pixel are those of the picture turned upright."""
    if not os.path.isfile(path):
        raise ValueError("metadata.csv names it, but there is no such file")
    entries = "stream=width,height,sample_aspect_ratio,duration:stream_side_data=rotation:format=duration"
    about = json.loads(run_tool(["ffprobe", "-v", "error", "-select_streams", "V:0", "-show_entries", entries,
                                 "-of", "json", path]))
    if not about.get("streams"):
        raise ValueError("there is no video in it")
    stream = about["streams"][0]
    seconds = stream.get("duration") or about["format"].get("duration")
    if seconds is None:
        raise ValueError("it does not say how long it is: copy it with ffmpeg -i OLD -c copy NEW.mp4")
    across, down = (int(n) for n in stream.get("sample_aspect_ratio", "1:1").split(":"))
    size = (stream["width"], stream["height"], across / down if across and down else 1.0)
    if any(side.get("rotation", 0) % 180 for side in stream.get("side_data_list", [])):
        size = (size[1], size[0], 1 / size[2])
    seconds = float(seconds) - args.skip_start - args.skip_end
    part = ["-ss", f"{args.skip_start:g}", "-t", f"{seconds:.3f}"] if args.skip_start or args.skip_end else []
    return [*part, "-i", path], f"fps={args.fps:g}", size, seconds * args.fps


def open_pictures(path, args, listing):
    """The same for a folder of pictures, each one frame, whose list is written to the file `listing`."""
    names = in_order(name for name in os.listdir(path) if name.lower().endswith(PICTURES))
    names = names[round(args.skip_start * args.fps):len(names) - round(args.skip_end * args.fps)]
    sizes = {}
    for name in names:
        try:
            with Image.open(os.path.join(path, name)) as image:
                sizes[image.size] = name
                image.verify()
        except (OSError, SyntaxError) as error:   # Pillow says SyntaxError of a broken PNG
            raise ValueError(f"{name} in it is not a picture that can be read ({error})") from None
    if len(sizes) > 1:
        (one, a), (other, b), *_ = sizes.items()
        raise ValueError(f"its pictures differ in size: {a} has {one[0]}x{one[1]}, {b} {other[0]}x{other[1]}")
    with open(listing, "w", encoding="utf-8") as file:
        for name in names:
            quoted = os.path.abspath(os.path.join(path, name)).replace("'", "'\\''")
            file.write(f"file '{quoted}'\n")
    size = (*next(iter(sizes), (0, 0)), 1.0)
    return ["-f", "concat", "-safe", "0", "-i", listing], f"settb=1/{args.fps:g},setpts=N", size, len(names)


def extract(path, folder, args):
    """All frames of a source, written by one pass of ffmpeg, and small copies to judge them by.

    Writes FOLDER/00001.png and so on: the middle square, resized, at args.fps; of a folder of pictures, every
    one. Returns thumbs (n, 32, 32, 3) uint8 and the crop [width, height, left, top]. ValueError if the source
    is damaged, or ends before it says it does."""
    source, rate, (width, height, aspect), expected = (
        open_pictures(path, args, os.path.join(folder, "list.txt")) if os.path.isdir(path)
        else open_video(path, args))
    if expected <= 0:
        raise ValueError("nothing is left of it after --skip_start and --skip_end")
    wide = int(min(width, height / aspect)) // 2 * 2       # even numbers: colours are stored for 2x2 pixels
    high = int(min(height, width * aspect)) // 2 * 2
    crop = [wide, high, (width - wide) // 4 * 2, (height - high) // 4 * 2]
    chain = (f"[0:V:0]{rate},crop={':'.join(map(str, crop))},scale={args.size}:{args.size}:flags=lanczos,"
             f"setsar=1,split[frames][more];[more]scale={THUMB}:{THUMB}:flags=area,format=rgb24[thumbs]")
    ending = ["-pix_fmt", "rgb24"] if args.format == "png" else ["-pix_fmt", "yuvj444p", "-q:v", "2"]
    thumbs = run_tool(["ffmpeg", "-v", "error", "-xerror", "-nostdin", "-threads", "1", *source,
                       "-filter_complex", chain, "-map", "[frames]", "-fps_mode", "passthrough", *ending,
                       os.path.join(folder.replace("%", "%%"), f"%05d.{args.format}"),
                       "-map", "[thumbs]", "-fps_mode", "passthrough", "-f", "rawvideo", "pipe:1"])
    thumbs = np.frombuffer(thumbs, np.uint8).reshape(-1, THUMB, THUMB, 3)
    if not len(thumbs):
        raise ValueError(f"it is too short to have a frame at {args.fps:g} fps")
    if len(thumbs) < 0.9 * expected - 1:
        raise ValueError(f"it breaks off: {len(thumbs)} of about {expected:.0f} frames can be read")
    return thumbs, crop


def differences(a, b):
    """Mean absolute difference of the pictures in two rows of them (n, H, W, 3) uint8: (n,)."""
    return np.array([np.abs(x.astype(np.int16) - y).mean() for x, y in zip(a, b)])


def find_shots(thumbs, args):
    """Where a video is cut and where it stands still: [(first, stop, after a cut, frozen)], all of it.

    The change between frames is the mean difference of the thumbs (n, 32, 32, 3), of 255. At a cut the three
    frames before all differ from the three after, several times more than frames change in the 5 steps before
    and after it, of which one may be another cut. So flashes, fast motion and frames shown several times are
    no cuts. A frozen stretch changes less than args.frozen for args.frozen_seconds."""
    frames = np.arange(len(thumbs))
    differ = lambda before, after: differences(thumbs[np.maximum(frames - before, 0)],
                                               thumbs[np.minimum(frames + after, len(thumbs) - 1)])
    change = differ(1, 0)
    across = np.minimum.reduce([differ(before, after) for before in (1, 2, 3) for after in (0, 1, 2)])
    around = np.lib.stride_tricks.sliding_window_view(np.pad(change, 5, "reflect"), 11)
    usual = np.sort(np.delete(around, 5, axis=1))[:, -2]
    cuts = np.flatnonzero((across > args.cut_change) & (across > args.cut_ratio * usual))
    still = np.r_[False, change[1:] < args.frozen, False]
    starts, stops = np.flatnonzero(~still[:-1] & still[1:]) + 1, np.flatnonzero(still[:-1] & ~still[1:]) + 1
    long = stops - starts >= round(args.frozen_seconds * args.fps)
    starts, stops = starts[long], stops[long]
    edges = sorted({0, len(thumbs), *cuts.tolist(), *starts.tolist(), *stops.tolist()})
    return [(a, b, a in cuts, a in starts) for a, b in zip(edges, edges[1:])]


def signature(thumbs):
    """What a clip looks like at 5 moments from its first frame to its last, (5, 16, 16) uint8, as text."""
    moments = thumbs[np.linspace(0, len(thumbs) - 1, MOMENTS).round().astype(int)]
    half = moments.reshape(MOMENTS, THUMB // 2, 2, THUMB // 2, 2, 3).mean((2, 4, 5))
    return half.round().astype(np.uint8).tobytes().hex()


def prepare_source(name, caption, args):
    """All clips of one source, in a folder of its own that gets its name when it is complete, not before.

    Returns its source.json: `refused` says why it has no clips, or is None."""
    path, final = os.path.join(args.prepare, name), os.path.join(args.out, "clips", name)
    about = {"source": name, "bytes": source_bytes(path), "caption": caption, "refused": None}
    before = read_json(os.path.join(final, "source.json")) if os.path.exists(final) else {}
    if before == about | {"refused": before.get("refused")}:
        return before
    # a new name each time: the ffmpeg of a killed run may live on for a moment and write to the old one
    folder = tempfile.mkdtemp(dir=os.path.join(args.out, "unfinished"))
    if before:                               # the source has changed since: all of it goes at once
        os.rename(final, f"{folder}.old")
    frames = os.path.join(folder, "frames")
    os.mkdir(frames)
    try:
        thumbs, crop = extract(path, frames, args)
        for i, shot in enumerate(find_shots(thumbs, args)):
            write_clip(os.path.join(folder, f"{i:03d}"), frames, shot, thumbs, about, crop, args)
    except ValueError as error:
        about["refused"] = str(error).replace(path, name).replace(frames, "")
    shutil.rmtree(frames)
    write_json(os.path.join(folder, "source.json"), about)
    os.chmod(folder, 0o755)                  # mkdtemp lets only the owner in
    os.makedirs(os.path.dirname(final), exist_ok=True)
    os.rename(folder, final)
    return about


def source_bytes(path):
    """Size of a file, or of all files in a folder: tells a source that has changed. 0 if it is not there."""
    if os.path.isdir(path):
        return sum(os.path.getsize(os.path.join(path, name)) for name in os.listdir(path))
    return os.path.getsize(path) if os.path.exists(path) else 0


def write_clip(folder, frames, shot, thumbs, source, crop, args):
    """Move the frames of a shot to a folder of their own, with its caption and where it comes from beside."""
    first, stop, after_cut, frozen = shot
    os.mkdir(folder)
    for i in range(first, stop):
        os.rename(os.path.join(frames, f"{i + 1:05d}.{args.format}"),
                  os.path.join(folder, f"{i - first + 1:05d}.{args.format}"))
    write_whole(f"{folder}.txt", source["caption"] + "\n")
    write_json(f"{folder}.json", {
        "source": source["source"], "start": round(args.skip_start + first / args.fps, 3),
        "end": round(args.skip_start + stop / args.fps, 3), "crop": crop, "size": args.size, "fps": args.fps,
        "frames": stop - first, "after_cut": after_cut, "frozen": frozen,
        "signature": signature(thumbs[first:stop])})


def prepare(args):
    """A folder of videos (args.prepare) as a folder of clips (args.out). True if no source was refused.

    Interrupt it whenever you like: sources that are done stay done, and the result is the same. What is in
    args.out already stays there, so several folders of videos can be prepared into one."""
    for program in ("ffmpeg", "ffprobe"):
        if not shutil.which(program):
            raise ValueError(f"the program {program} was not found: install ffmpeg 5.1 or newer")
    captions, others = find_sources(args.prepare, args.out)
    if not captions:
        raise ValueError(f"{args.prepare} holds no videos, GIFs or folders of pictures: videos end in "
                         f"{' '.join(VIDEOS)}")
    settings = {name: getattr(args, name) for name in SETTINGS}
    path, unfinished = os.path.join(args.out, "settings.json"), os.path.join(args.out, "unfinished")
    if os.path.exists(path) and read_json(path) != settings:
        old = read_json(path)
        raise ValueError(f"{args.out} was prepared with " + ", ".join(
            f"--{name} {old.get(name)} (now {settings[name]})" for name in SETTINGS
            if old.get(name) != settings[name]) + ": give the old values, or another --out folder")
    shutil.rmtree(unfinished, ignore_errors=True)
    os.makedirs(unfinished, exist_ok=True)
    write_json(path, settings)
    with ThreadPoolExecutor(args.workers) as pool:   # threads: the work is done by ffmpeg
        work = pool.map(lambda item: prepare_source(*item, args), captions.items())
        sources = list(tqdm(work, total=len(captions), desc="preparing", unit="source"))
    shutil.rmtree(unfinished, ignore_errors=True)
    clean(args.out, args.min_frames, args.alike)
    if others:
        print(f"left alone, not videos: {', '.join(others[:8])}{' ...' if len(others) > 8 else ''}")
    refused = [source for source in sources if source["refused"]]
    for source in refused:
        print(f"refused: {source['source']}: {source['refused']}")
    if len(refused) == len(sources):
        raise ValueError(f"all {len(sources)} sources were refused: see above")
    return not refused


def all_clips(folder):
    """(clips, refused) of a prepared folder: {name: what NAME.json says}, {source: why}; in order."""
    clips, refused, root = {}, {}, os.path.join(folder, "clips")
    if not os.path.isdir(root):
        raise ValueError(f"{folder} is not a prepared folder: make one with "
                         f"python data.py --prepare VIDEOS --out {folder}")
    for place, _, files in os.walk(root):
        for file in (file for file in files if file.endswith(".json")):
            about, path = read_json(os.path.join(place, file)), os.path.join(place, file[:-5])
            if file != "source.json":
                clips[os.path.relpath(path, root).replace(os.sep, "/")] = about
            elif about["refused"]:
                refused[about["source"]] = about["refused"]
    ordered = lambda table: {name: table[name] for name in in_order(table)}
    return ordered(clips), ordered(refused)


def find_duplicates(clips, alike):
    """{clip: (the earlier clip that it shows again, how alike they are)}, of {name: what its json says}.

    Alike is the correlation of the edges in both at 5 moments: other sizes, qualities, light and colours keep
    the edges. Clips of one source are not compared, for a pause in a still scene cuts it into likenesses."""
    if not clips:
        return {}
    names = list(clips)
    looks = np.float32([np.frombuffer(bytes.fromhex(clip["signature"]), np.uint8) for clip in clips.values()])
    looks = looks.reshape(-1, MOMENTS, THUMB // 2, THUMB // 2)
    edges = np.concatenate([np.diff(looks, axis=axis).reshape(len(looks), MOMENTS, -1) for axis in (2, 3)], 2)
    edges /= np.maximum(np.linalg.norm(edges, axis=2, keepdims=True), 1e-3) * MOMENTS ** 0.5
    edges, found = edges.reshape(len(names), -1), {}
    for i, name in enumerate(names):
        for j in np.flatnonzero(edges[:i] @ edges[i] > alike):
            if names[j] not in found and clips[names[j]]["source"] != clips[name]["source"]:
                found[name] = (names[j], float(edges[j] @ edges[i]))
                break
    return found


def clean(folder, min_frames, alike):
    """Decide which clips are left out of training: dropped.csv and a contact sheet for each reason.

    Nothing is deleted: run it with other thresholds, or take lines out of dropped.csv, and they are back."""
    clips, refused = all_clips(folder)
    dropped = [(name, "corrupt", why) for name, why in refused.items()]
    for name, clip in clips.items():
        if clip["frozen"]:
            dropped.append((name, "frozen", f"{clip['end'] - clip['start']:.1f} s without change"))
        elif clip["frames"] < min_frames:
            dropped.append((name, "short", f"{clip['frames']} of {min_frames} frames"))
    out = {name for name, _, _ in dropped}
    twins = find_duplicates({name: clip for name, clip in clips.items() if name not in out}, alike)
    dropped += [(name, "duplicate", f"of {other}, {how:.2f} alike") for name, (other, how) in twins.items()]
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([("clip", "reason", "detail"), *dropped])
    write_whole(os.path.join(folder, "dropped.csv"), text.getvalue())

    half, whole = (lambda name, n=n: moments_of(folder, name, n) for n in (4, 8))
    blank = [np.full((96, 96, 3), 128, np.uint8)] * 8
    rows = {"corrupt": [(blank, f"{name}: {why}") for name, why in refused.items()],
            "cut": [(half(before) + half(name), f"{name} | after a cut") for before, name in
                    zip(clips, list(clips)[1:]) if clips[name]["after_cut"]]}
    for name, reason, detail in dropped[len(refused):]:
        frames = half(name) + half(twins[name][0]) if reason == "duplicate" else whole(name)
        rows.setdefault(reason, []).append((frames, f"{name}: {detail}"))
    for reason in REASONS:
        write_sheet(os.path.join(folder, f"dropped_{reason}.png"), rows.get(reason, []))
    counts = ", ".join(f"{len(rows.get(reason, []))} {word}" for reason, word in REASONS.items())
    print(f"{len(clips) - len(dropped) + len(refused)} clips in {folder}; {counts}")


def moments_of(folder, name, n):
    """n frames of a clip, from its first to its last, small: uint8 arrays (96, 96, 3)."""
    paths = frame_paths(folder, name)
    small = lambda path: np.array(Image.open(path).convert("RGB").resize((96, 96)))
    return [small(paths[i]) for i in np.linspace(0, len(paths) - 1, n).round().astype(int)]


def write_sheet(path, rows, most=48):
    """A contact sheet of (frames, label) rows, complete or not there; no rows, no file."""
    if os.path.exists(path):
        os.remove(path)
    if rows:
        frames, labels = zip(*rows[:most])
        with complete(path) as unfinished:
            contact_sheet([np.stack(row) for row in frames], 1, labels).save(unfinished)


# ------------------------------------------------------------------------------------------------------------
# A prepared folder, looked at, turned into latents, and drawn from
# ------------------------------------------------------------------------------------------------------------

def frame_paths(folder, name):
    """The pictures of a clip, in order."""
    place = os.path.join(folder, "clips", name)
    files = in_order(os.listdir(place))
    return [os.path.join(place, file) for file in files if file.endswith((".png", ".jpg"))]


def read_frames(paths):
    """Pictures -> tensor (3, f, H, W) in [-1, 1]. ValueError names the one that cannot be read."""
    frames = []
    for path in paths:
        try:
            with Image.open(path) as image:
                frames.append(from_pixels(image))
        except (OSError, SyntaxError) as error:
            raise ValueError(f"{path} cannot be read ({error}): delete the folder of its source and "
                             "prepare again") from None
    return torch.cat(frames, dim=1)


def kept_clips(folder):
    """{name: what its json says, and `caption`} of the clips that dropped.csv leaves in."""
    clips, _ = all_clips(folder)
    for name, _, _ in read_dropped(folder):
        clips.pop(name, None)
    if not clips:
        raise ValueError(f"{folder} has no clip left: dropped.csv says why; prepare with other thresholds")
    return {name: clip | {"caption": read_text(os.path.join(folder, "clips", f"{name}.txt"))}
            for name, clip in clips.items()}


def read_dropped(folder):
    """dropped.csv of a prepared folder: [(clip or source, reason, detail)]."""
    path = os.path.join(folder, "dropped.csv")
    if not os.path.exists(path):
        raise ValueError(f"{path} is not there: python data.py --prepare was not finished; run it again")
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.reader(file))[1:]


def split_names(names, split):
    """The clips of a split: a twentieth of the sources, chosen by name, is held out to validate on ("val").

    All clips of a source go together. Of a single source, both splits are all clips."""
    sources = sorted({os.path.dirname(name) for name in names}, key=lambda name: zlib.crc32(name.encode()))
    held_out = sources[:max(1, len(sources) // 20)]
    return [name for name in names if (os.path.dirname(name) in held_out) == (split == "val")] or list(names)


def may_mirror(caption):
    """A clip may be shown mirrored unless its caption tells left from right."""
    return not re.search(r"\b(left|right)", caption.lower())


def folder_clips(folder, clips, flips=True):
    """Clips of a prepared folder as pictures: read gives (3, n, H, W). clips: some of `kept_clips`."""
    names, about = list(clips), list(clips.values())

    def read(i, places, mirrored):
        """Frames of clip i from its pictures."""
        paths = frame_paths(folder, names[i])
        frames = read_frames([paths[place] for place in places.tolist()])
        return frames.flip(-1) if mirrored else frames

    return Clips(names, np.array([clip["frames"] for clip in about]),
                 [flips and may_mirror(clip["caption"]) for clip in about], read,
                 caption=lambda i, place: about[i]["caption"])


def probes(shapes, n_frames, count=4):
    """What clips are scored on: [(window, place in the clip, 0 to 1)], of windows that fit in n_frames.

    Short and long windows of the commonest number of frames; if there are few, each at several places."""
    windows = {(window.frames, window.new): window for _, windows in shapes for window in windows
               if reach(window) < n_frames}.values()
    size = mode(sorted(len(window.frames) for window in windows))
    alike = [window for window in windows if len(window.frames) == size]
    alike.sort(key=lambda window: (reach(window), window.frames, window.new))
    return [(alike[i * len(alike) // count], (i + 0.5) / count) for i in range(count)]


def shortest_clip(stage):
    """The fewest frames a clip needs to hold any window of a stage: the seed has all of them in 19."""
    n = 2
    while True:
        try:
            schedule.training_windows(stage, n)
            return n
        except ValueError:
            n += 1


def count_windows(stage, lengths, n_frames):
    """{stride: (windows, clips that hold one of them, places for them in all clips)} of a stage.

    The stride of a window is the commonest distance between its new frames and their neighbours."""
    longest = min(n_frames, max(lengths))
    if longest < shortest_clip(stage):
        return {}
    table = {}
    for window in (window for _, windows in window_shapes(stage, longest) for window in windows):
        gaps = [b - a for a, b in zip(window.frames, window.frames[1:]) if a in window.new or b in window.new]
        stride, span = mode(sorted(gaps)), reach(window)
        windows, holders, places = table.get(stride, (0, set(), 0))
        table[stride] = (windows + 1, holders | {i for i, n in enumerate(lengths) if n > span},
                         places + sum(max(0, n - span) for n in lengths))
    return {stride: (n, len(holders), places) for stride, (n, holders, places) in sorted(table.items())}


def unreadable_clips(folder, clips):
    """{clip: what is wrong}, of clips that are not what their json says. Reads every picture."""
    def problem(item):
        """A clip (name, about) -> its name and what is wrong with it, or None."""
        name, clip = item
        try:
            shape = tuple(read_frames(frame_paths(folder, name)).shape)
        except (ValueError, OSError) as error:
            return name, str(error)
        wanted = (3, clip["frames"], clip["size"], clip["size"])
        return name, None if shape == wanted else f"found {shape}, expected {wanted}"
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        found = tqdm(pool.map(problem, clips.items()), total=len(clips), desc="reading", unit="clip")
        return {name: what for name, what in found if what}


def mark(frames, given):
    """Frames (f, H, W, 3) uint8 with a border: green around given ones, red around new ones."""
    wide = max(2, frames.shape[1] // 32)
    framed = np.empty((len(frames), frames.shape[1] + 2 * wide, frames.shape[2] + 2 * wide, 3), np.uint8)
    framed[:] = np.where(np.asarray(given)[:, None, None, None], (30, 160, 60), (210, 40, 40))
    framed[:, wide:-wide, wide:-wide] = frames
    return framed


def check(folder, n_frames):
    """Say what is in a prepared folder and what training will find in it; write FOLDER/sheet.png.

    Returns whether every clip can be read."""
    clips, dropped = kept_clips(folder), read_dropped(folder)
    lengths = [clip["frames"] for clip in clips.values()]
    captions = [clip["caption"] for clip in clips.values()]
    size, fps = (", ".join(f"{n:g}" for n in sorted({clip[key] for clip in clips.values()}))
                 for key in ("size", "fps"))
    print(f"{folder}: {len(clips)} clips of {len({clip['source'] for clip in clips.values()})} sources, "
          f"{sum(lengths)} frames of {size}x{size} pixels at {fps} fps")
    print(f"lengths {min(lengths)} to {max(lengths)}, median {int(np.median(lengths))} frames; captions: "
          f"{sum(map(bool, captions))} clips, {len(set(captions) - {''})} different")
    print("left out: " + (", ".join(f"{sum(row[1] == reason for row in dropped)} {word}"
                                    for reason, word in REASONS.items() if reason != "cut")))
    for name, reason, detail in dropped:
        if reason == "corrupt":
            print(f"refused: {name}: {detail}")
    say_windows(lengths, n_frames)
    broken = unreadable_clips(folder, clips)
    for name, what in broken.items():
        print(f"unreadable: {name}: {what}")
    if len(broken) < len(clips):
        sheet_of_batch(folder, {name: clip for name, clip in clips.items() if name not in broken}, n_frames)
    return not broken


def say_windows(lengths, n_frames):
    """Print what training for plans of n_frames will find in clips of such lengths, by stage and stride."""
    print("stage    needs  stride  windows  clips  places")
    for stage in schedule.STAGES:
        table = count_windows(stage, lengths, n_frames)
        for stride, (windows, holders, places) in table.items():
            print(f"{stage:8s} {shortest_clip(stage):5d} {stride:7d} {windows:8d} {holders:6d} {places:7d}")
        if not table:
            print(f"{stage:8s} {shortest_clip(stage):5d}  none: the longest clip has {max(lengths)} frames")
    if max(lengths) < n_frames:
        print(f"the longest clip has {max(lengths)} frames, plans for {n_frames} need {n_frames}: training "
              f"will draw from plans for {max(lengths)}")


def sheet_of_batch(folder, clips, n_frames):
    """Write FOLDER/sheet.png: the first batch of --stage video as pictures, given and new frames marked."""
    source = folder_clips(folder, {name: clips[name] for name in split_names(clips, "train")})
    batch = source.windows(window_shapes("video", min(n_frames, int(source.lengths.max()))), 0, 0, 6)
    rows = [mark(to_pixels(video), given) for video, given in zip(batch["latents"], batch["given"])]
    path = os.path.join(folder, "sheet.png")
    with complete(path) as unfinished:
        contact_sheet(rows, max(1, 192 // rows[0].shape[1]), batch["captions"]).save(unfinished)
    print(f"wrote {path}: the first batch of --stage video, given frames green, new ones red")


def weights_hash(model):
    """What latents and text embeddings depend on: SHA-256 of the VAE, the text encoder, their config."""
    digest = hashlib.sha256(f"{model.config} {model.tokenizer.merges}".encode())
    for network in (model.vae, model.text):
        for name, tensor in network.state_dict().items():
            digest.update(name.encode() + tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def clip_hash(folder, name):
    """SHA-256 of the pictures of a clip."""
    digest = hashlib.sha256()
    for path in frame_paths(folder, name):
        with open(path, "rb") as file:
            digest.update(file.read())
    return digest.hexdigest()


def cache_path(folder, name):
    """Where the latents of a clip are kept."""
    return os.path.join(folder, "cache", f"{name}.safetensors")


def read_entry(path):
    """What the header of a cache entry says (source, weights, caption, frames); {}: there is no whole one."""
    try:
        with safe_open(path, framework="pt") as file:
            return json.loads((file.metadata() or {}).get("about", "{}"))
    except (SafetensorError, OSError):
        return {}


@torch.no_grad()
def cache(folder, weights, device=None):
    """Latents, mirrored latents and text embedding of every clip, one safetensors file each, float16.

    Entries that fit the pictures, the caption and the weights stay; all others are made anew. An entry is
    there as a whole or not at all. Returns how many were made."""
    from model import choose_device, load_weights   # here and not above: nothing else in this file needs it
    model, (device, why) = load_weights(weights), choose_device(device)
    print(f"device: {device} ({why})")
    model.to(device)
    key, made, clips = weights_hash(model), 0, kept_clips(folder)
    for name, clip in tqdm(clips.items(), desc="encoding", unit="clip"):
        about = {"source": clip_hash(folder, name), "weights": key,
                 "caption": clip["caption"], "frames": clip["frames"]}
        path = cache_path(folder, name)
        if read_entry(path) == about:
            continue
        video = read_frames(frame_paths(folder, name))[None].to(device)
        encode = lambda video: model.vae.encode(video)[0].half().cpu().contiguous()
        tensors = {"latents": encode(video), "mirrored": encode(video.flip(-1)),
                   "context": model.context([clip["caption"]])[0].half().cpu().contiguous()}
        os.makedirs(os.path.dirname(path), exist_ok=True)
        # one entry in the header: safetensors writes several in an order that changes from run to run
        with complete(path) as unfinished:
            save_file(tensors, unfinished, metadata={"about": json.dumps(about, sort_keys=True)})
            os.chmod(unfinished, 0o644)               # safetensors makes files that only their owner can read
        made += 1
    print(f"{made} of {len(clips)} clips encoded, the others were there; latents in {folder}/cache")
    return made


def cached_clips(folder, model, stage, split=None, drop=None, flips=True):
    """Clips of a prepared folder as latents, long enough for a window of a stage; None as split: all of them.

    drop: file with names of clips not to train on; validation stays what it is, to be comparable. ValueError
    if the cache was made from other captions or by another model."""
    entries, clips = {}, kept_clips(folder)
    dropped = set(read_list(drop, clips)) if drop and split == "train" else set()
    needed, key = shortest_clip(stage), weights_hash(model)
    usable = [name for name in clips if clips[name]["frames"] >= needed]
    if not usable:
        longest = max(clip["frames"] for clip in clips.values())
        raise ValueError(f"no clip in {folder} has the {needed} frames that --stage {stage} needs, the "
                         f"longest has {longest}: see data.py --check {folder}")
    for name in split_names(usable, split) if split else usable:
        entry, clip = read_entry(cache_path(folder, name)), clips[name]
        if (entry.get("weights"), entry.get("caption"), entry.get("frames")) != (
                key, clip["caption"], clip["frames"]):
            raise ValueError(f"the latents of clip {name} are missing or were made with other weights or "
                             f"captions: run python data.py --cache {folder} --weights FILE with this model")
        if name not in dropped:
            entries[name] = entry
    if not entries:
        raise ValueError(f"{drop} leaves no clip to train on: drop a smaller share")
    names, captions = list(entries), [entry["caption"] for entry in entries.values()]
    mirror = [flips and may_mirror(caption) for caption in captions]

    def part(i, key, frames):
        """Frames (a slice) of one of the tensors of a clip, read from disk."""
        with safe_open(cache_path(folder, names[i]), framework="pt") as file:
            return file.get_slice(key)[:, frames].float()

    def read(i, places, mirrored):
        """Latents of clip i from its cache entry."""
        first, last = int(places[0]), int(places[-1])
        return part(i, "mirrored" if mirrored else "latents", slice(first, last + 1))[:, places - first]

    return Clips(names, np.array([entry["frames"] for entry in entries.values()]), mirror, read,
                 caption=lambda i, place: captions[i], context=lambda i: part(i, "context", slice(None)),
                 key=hashlib.sha256(json.dumps([entries, mirror]).encode()).hexdigest()[:16])


# ------------------------------------------------------------------------------------------------------------
# Clips that training does not get to grips with
# ------------------------------------------------------------------------------------------------------------

def read_list(path, known):
    """The names in a list that --drop_hardest wrote. ValueError if it names clips that are not `known`."""
    if not os.path.exists(path):
        raise ValueError(f"no list of clips at {path}: make one with data.py --drop_hardest")
    with open(path, encoding="utf-8") as file:
        names = file.read().split("\n")[:-1]
    strange = [name for name in names if name not in known]
    if strange:
        raise ValueError(f"{path} names {len(strange)} clips that are not there, such as {strange[0]}: "
                         "score this folder and make the list again")
    return names


def read_scores(path):
    """(stage, {clip: loss}) of a file that train.py --score wrote."""
    try:
        with open(path, newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
        return rows[0]["stage"], {row["clip"]: float(row["loss"]) for row in rows}
    except (OSError, KeyError, IndexError, ValueError) as error:
        raise ValueError(f"{path} holds no scores ({error!r}): make them with train.py --score") from None


def hardness(scores, held_out=()):
    """{clip: how hard it is, 0 to 1}: its rank among the losses of a stage, averaged over the stages.

    scores, held_out: files by train.py --score, one per stage, in the same order. held_out are those of
    models that never saw these clips. What is left of the loss is highest where training on the clip has not
    helped: there was nothing in it to learn. A clip that is only rich is hard for both."""
    if held_out and [read_scores(path)[0] for path in held_out] != [read_scores(path)[0] for path in scores]:
        raise ValueError(f"--held_out needs one file for each of --scores, of the same stages in the same "
                         f"order; found {len(held_out)} for {len(scores)}")
    ranks = {}
    for i, path in enumerate(scores):
        losses = read_scores(path)[1]
        if held_out:
            others = read_scores(held_out[i])[1]
            if others.keys() != losses.keys():
                raise ValueError(f"{held_out[i]} and {path} score different clips: score the same folder")
            losses = {clip: loss - others[clip] for clip, loss in losses.items()}
        for rank, clip in enumerate(sorted(losses, key=lambda clip: (losses[clip], clip))):
            ranks.setdefault(clip, []).append(rank / max(1, len(losses) - 1))
    return {clip: sum(all_ranks) / len(all_ranks) for clip, all_ranks in ranks.items()}


def drop_hardest(share, scores, held_out, path):
    """Write the names of the hardest clips to a file, the hardest first: one list for all stages."""
    if not 0 < share < 1:
        raise ValueError(f"--drop_hardest is a share between 0 and 1, found {share:g}: 0.1 drops a tenth")
    hard = hardness(scores, held_out)
    names = sorted(hard, key=lambda clip: (-hard[clip], clip))[:round(share * len(hard))]
    write_whole(path, "".join(f"{name}\n" for name in names))
    print(f"wrote {path}: {len(names)} of {len(hard)} clips, for train.py --drop {path}")


# ------------------------------------------------------------------------------------------------------------

def preview(path, seed, size):
    """A sheet of six worlds, or one world as a moving picture, by the ending of the path."""
    if path.endswith((".gif", ".webp")):
        save_animation(path, to_pixels(SkyWorld(seed, size).video(np.arange(121))), 12, max(1, 256 // size))
    elif path.endswith((".png", ".jpg")):
        worlds = [SkyWorld(seed + i, size) for i in range(6)]
        rows = [to_pixels(world.video(np.arange(0, 121, 15))) for world in worlds]
        contact_sheet(rows, max(1, 128 // size), [world.caption() for world in worlds]).save(path)
    else:
        raise ValueError(f"cannot preview into {path}: name a .png or .jpg for a sheet, "
                         "a .gif or .webp for a moving picture")


def parse(argv):
    """The command line of data.py: one of five things to do, and what it needs."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    todo = p.add_mutually_exclusive_group(required=True)
    todo.add_argument("--preview", metavar="FILE", help="picture to write: .png, .jpg, .gif or .webp")
    todo.add_argument("--prepare", metavar="VIDEOS", help="folder of videos, GIFs and folders of pictures to "
                      "make clips of, in --out; captions are NAME.txt beside NAME.mp4, or metadata.csv (path,"
                      "text), or else the folder's name")
    todo.add_argument("--check", metavar="DIR", help="say what is in a prepared folder and what training "
                      "will find there, and write DIR/sheet.png")
    todo.add_argument("--cache", metavar="DIR", help="encode the clips of a prepared folder with --weights")
    todo.add_argument("--drop_hardest", type=float, metavar="SHARE",
                      help="list the clips that --scores say are hardest, 0.1 for a tenth, in --out")
    p.add_argument("--out", help="folder to prepare in, or file for the list of --drop_hardest")
    p.add_argument("--seed", type=int, default=0,
                   help="world to show, or the first of six; any number from 0 on")
    p.add_argument("--size", type=int, default=64,
                   help="of a frame in pixels, a multiple of 8; 64 for the tiny preset, 512 for sd15")
    # preparing
    p.add_argument("--fps", type=float, default=5.0, help="frames to keep per second; pictures in folders "
                   "are taken one by one. A timelapse moves enough at 5")
    p.add_argument("--skip_start", type=float, default=0.0, help="seconds to leave out at the start: titles")
    p.add_argument("--skip_end", type=float, default=0.0, help="seconds to leave out at the end: credits")
    p.add_argument("--format", default="png", choices=("png", "jpg"), help="of frames; jpg takes less room")
    p.add_argument("--workers", type=int, default=os.cpu_count(), help="sources prepared at the same time")
    p.add_argument("--strict", action="store_true", help="exit with 1 if a source was refused")
    # what is left out: the changes from frame to frame are means over the picture, of 255
    p.add_argument("--cut_change", type=float, default=10.0,
                   help="a cut changes at least so much (%(default)g)")
    p.add_argument("--cut_ratio", type=float, default=3.0,
                   help="and so many times what the frames around it do (%(default)g)")
    p.add_argument("--frozen", type=float, default=0.15, help="less change is standing still (%(default)g)")
    p.add_argument("--frozen_seconds", type=float, default=2.0, help="if it lasts so long (%(default)g)")
    p.add_argument("--alike", type=float, default=0.9,
                   help="clips whose edges correlate more are duplicates (%(default)g); 2 keeps all")
    p.add_argument("--min_frames", type=int, default=19,
                   help="shorter clips are left out; 19 is what --stage extrap needs")
    # after preparing
    p.add_argument("--weights", help="model to --cache with: assets/tiny.safetensors, or your sd15 file")
    p.add_argument("--device", help="to --cache on; default: cuda, else mps, else cpu")
    p.add_argument("--frames", type=int, default=121, help="--check for plans of so many, as train.py has it")
    p.add_argument("--scores", nargs="+", metavar="FILE", help="by train.py --score, one per stage")
    p.add_argument("--held_out", nargs="+", default=[], metavar="FILE", help="the same by models trained on "
                   "other data, in the same order: taken off")
    args = p.parse_args(argv)
    for name, needed in (("prepare", "out"), ("cache", "weights"), ("drop_hardest", "scores"),
                         ("drop_hardest", "out")):
        if getattr(args, name) is not None and not getattr(args, needed):
            raise ValueError(f"--{name} needs --{needed}: see data.py --help")
    if args.prepare and (args.size < 16 or args.size % 8 or args.fps <= 0 or args.workers < 1):
        raise ValueError(f"found --size {args.size} --fps {args.fps:g} --workers {args.workers}: expected a "
                         "multiple of 8 from 16 on, more than 0, and at least 1")
    return args


def main(argv=None):
    """The command line of data.py. Leaves with exit code 1 where something could not be read."""
    args = parse(argv)
    fine = True
    if args.preview:
        preview(args.preview, args.seed, args.size)
        print(f"wrote {args.preview}")
    elif args.prepare:
        fine = prepare(args) or not args.strict
    elif args.check:
        fine = check(args.check, args.frames)
    elif args.cache:
        cache(args.cache, args.weights, args.device)
    else:
        drop_hardest(args.drop_hardest, args.scores, args.held_out, args.out)
    if not fine:
        raise SystemExit(1)


if __name__ == "__main__":
    try:
        main()
    except ValueError as error:
        raise SystemExit(f"data.py: {error}") from None
