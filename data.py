"""Where the frames come from: the sky world, a procedural timelapse, and the batches training draws from it.

    python data.py --preview sheet.png          six worlds, one row each, from their first frame to their last
    python data.py --preview clip.gif --seed 7  one world as a moving picture

The sky world needs no download and no disk: every frame is a pure function of (seed, frame, size), so any
length, any stride and any size can be asked for, and the truth (wind, time of day, balloon tracks) is known
exactly. That makes drift something one can measure instead of something one has to judge.

Everything about a world can be read off its first frame and its caption: the sun or the moon shows the hour,
the caption names the wind that clouds and balloons follow, and the trails of the balloons show it too.
The world is a cylinder: what leaves on the right comes back on the left, and nothing unforeseen ever enters.
Length is measured in picture widths and speed in widths per frame, so a world looks the same at every size.
"""

import argparse
import os
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from PIL import Image, ImageDraw
from safetensors import safe_open
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


@dataclass
class Clips:
    """Clips that batches are drawn from, wherever their frames are kept.

    lengths[i] is how many frames clip i has, mirror[i] whether it may be shown mirrored, names[i] its name.
    read(i, places (n,), mirrored) -> those frames of clip i, (c, n, h, w) float32.
    caption(i, place) -> what clip i shows from a place on. context(i) -> its text embedding (77, d), or None
    instead of a function where captions are embedded in training."""

    names: list
    lengths: np.ndarray
    mirror: list
    read: Callable
    caption: Callable
    context: Callable | None = None

    def images(self, seed, step, batch_size):
        """Random single frames: latents (b, 4, h, w) and their captions."""
        rng = np.random.default_rng([seed, step])
        picks = [(int(rng.integers(len(self.names))), int(rng.integers(self.lengths[0])))
                 for _ in range(batch_size)]
        frames = [self.read(clip, torch.tensor([place]), False)[:, 0] for clip, place in picks]
        return torch.stack(frames), [self.caption(clip, place) for clip, place in picks]

    def windows(self, shapes, seed, step, batch_size):
        """Random windows of the shapes that the planners ask for, each at a random place of a random clip.

        shapes: lists of `schedule.Window`; every list is drawn from equally often, so that the few windows
        that start a plan count as much as the many that fill it. The windows of a batch have one length, or
        they would not stack. Returns what `stack` does. ValueError if a window fits in no clip."""
        rng = np.random.default_rng([seed, step])
        pick = lambda options: options[rng.integers(len(options))]
        rows, length = [], None
        while len(rows) < batch_size:
            window = pick(pick(shapes))
            if len(window.frames) != (length or len(window.frames)):
                continue
            length = len(window.frames)
            room = self.lengths - (window.frames[-1] - window.frames[0])   # places where it can be laid
            if room.max() < 1:
                raise ValueError(f"a window over {window.frames[-1] - window.frames[0] + 1} frames fits in no "
                                 f"clip, the longest has {self.lengths.max()}: ask for shorter --frames")
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
        save_file({"latents": latents}, f"{path}.tmp", metadata={"about": about})
        os.replace(f"{path}.tmp", path)  # a crash leaves no half-written cache under this name
    return Clips(names=[f"world {world}" for world in worlds], lengths=np.full(len(worlds), len(frames)),
                 mirror=[False] * len(worlds),                     # captions say which way the wind blows
                 read=lambda i, places, mirrored: latents[i][:, places].float(),
                 caption=lambda i, place: SkyWorld(worlds[i], size).caption(frames.start + place * frames.step))


def _read_latents(path, about):
    """The latents in a cache file, or None if there is none that was made like this."""
    if not os.path.exists(path):
        return None
    with safe_open(path, framework="pt") as file:
        return file.get_tensor("latents") if file.metadata().get("about") == about else None


def prefetch(draw):
    """A function (step) -> batch like `draw`, whose next batch is read while this one is being used.

    One thread, one batch ahead. `draw` is a pure function of the step, so the order stays what it was."""
    pool, ahead = ThreadPoolExecutor(1), {}

    def batch(step):
        wanted = ahead.pop(step, None) or pool.submit(draw, step)
        ahead.clear()
        ahead[step + 1] = pool.submit(draw, step + 1)
        return wanted.result()

    return batch


def window_shapes(stage, n_frames):
    """Lists of windows that a video stage trains on, one list per stage and source.

    Each is drawn from equally often. The sources are both planners at the full length, and the ladder at a
    half and a quarter of it: short videos are asked for too. A source may have no window of a stage (the
    ladder needs none that extrapolates up to 97 frames)."""
    schedule.training_windows(stage, n_frames)             # says so if there is nothing to train on at all
    lists = []
    shorter = tuple(n for n in (n_frames // 2, n_frames // 4) if n > 1)
    for planner, lengths in (("ladder", n_frames), ("seed", n_frames), ("ladder", shorter)):
        windows = schedule.training_windows("video", lengths, (planner,)) if lengths else []
        lists += [[window for window in windows if window.stage == wanted] for wanted in schedule.STAGES
                  if stage in (wanted, "video")]
    return [windows for windows in lists if windows]


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


COLOURS = [(200, 30, 30), (30, 90, 200), (20, 140, 60), (160, 90, 20), (120, 40, 160), (110, 110, 110)]


def line_plot(path, curves, title, log=False):
    """Curves {name: [(x, y), ...]} as a picture of 700x340 pixels, with a legend."""
    change = (lambda y: np.log10(max(y, 1e-12))) if log else float
    back = (lambda v: 10 ** v) if log else float
    points = {name: [(x, change(y)) for x, y in curve] for name, curve in curves.items() if len(curve)}
    xs, ys = zip(*[point for curve in points.values() for point in curve])
    low, high, first, last = min(ys), max(max(ys), min(ys) + 1e-6), min(xs), max(max(xs), min(xs) + 1e-6)
    place = lambda x, y: (70 + 600 * (x - first) / (last - first), 290 - 240 * (y - low) / (high - low))
    image = Image.new("RGB", (700, 340), "white")
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
        draw.text((70 + 105 * i, 318), name, fill=colour)
    image.save(path)


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


def main(argv=None):
    """The command line of data.py."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--preview", required=True, metavar="FILE",
                   help="picture to write: .png, .jpg, .gif or .webp")
    p.add_argument("--seed", type=int, default=0,
                   help="world to show, or the first of six; any number from 0 on")
    p.add_argument("--size", type=int, default=64, help="of a frame in pixels, a multiple of 8")
    args = p.parse_args(argv)
    preview(args.preview, args.seed, args.size)
    print(f"wrote {args.preview}")


if __name__ == "__main__":
    try:
        main()
    except ValueError as error:
        raise SystemExit(f"data.py: {error}") from None
