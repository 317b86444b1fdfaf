"""Where training batches come from: the sky world, a procedural timelapse, or videos of your own.

    python data.py --prepare VIDEOS --out DIR     turn a folder of videos into a folder of clips
    python data.py --check DIR                    show what is in it
    python data.py --drop_hardest 0.1 --scores A.csv --out drop.csv    list clips that cannot be learned
    python data.py --preview sheet.png            draw six sky worlds

A batch is a dict: x0 (b, 4, f, h, w), latents, or pictures (b, 3, 1, H, W) for the VAE; frames (b, f), their
numbers in the plan; given (b, f), which of them exist already; user (b, f), which of those the user gave; and
captions, a list of b, and prompt_start (b,), the frame at which each took over from another, or -inf. A
batch is a pure function of (seed, step), so a resumed run sees what an uninterrupted run would have seen.

Read `Clips.windows` first. How videos become clips, and how the sky is painted, can be skipped.
"""
import argparse
import csv
import hashlib
import io
import json
import math
import os
import re
import shutil
import subprocess
import tempfile
import zlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageOps
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from tqdm import tqdm

try:
    import fcntl
except ImportError:     # on Windows nothing notices two runs in one folder
    fcntl = None

from model import checksum, complete, plain_errors
from schedule import reach, shortest_clip


@dataclass
class Clips:
    """Clips to draw batches from, wherever their frames are stored."""
    names: list
    lengths: np.ndarray              # frames of each clip
    read: callable                   # (clip, rising places (n,)) -> latents or pictures, (c, n, h, w)
    caption: callable                # (clip, place) -> the prompt of a video that begins, or turns, there
    changes: callable = lambda clip: np.array([], int)    # (clip) -> places where the prompt changes
    key: str = None                  # a hash of everything that batches depend on beyond the command line

    def windows(self, shapes, seed, step, batch_size):
        """A batch of random windows of a plan, all of one length, at random places of clips. Where the
        prompt can change between the given and the new frames, it does half of the time. shapes: [(share,
        windows)], from `schedule.window_shapes` for videos no longer than the longest clip."""
        rng = np.random.default_rng([seed, step])
        pick = lambda options: options[rng.integers(len(options))]
        shares, rows = np.array([share for share, _ in shapes]), []
        while len(rows) < batch_size:
            window = pick(shapes[rng.choice(len(shapes), p=shares / shares.sum())][1])
            if rows and len(window.frames) != len(rows[0][0].frames):
                continue
            room = self.lengths - reach(window)                  # places in each clip where the window fits
            clip = int(pick(np.flatnonzero(room > 0)))
            starts = np.arange(room[clip]) - window.frames[0]
            changes = self.changes(clip) - starts[:, None]       # (starts, changes), as frames of the plan
            between = lambda a, b: ((a < changes) & (changes <= b)).any(axis=1)
            whole = ~between(window.new[0], window.new[-1])      # sampling cuts windows at a new prompt, too
            fresh = whole & between(max(window.given, default=0), window.new[0])
            if whole.any():
                start = pick(starts[fresh if fresh.any() and rng.random() < 0.5 else whole])
                rows.append((window, clip, int(start)))
        return self.batch(rows)

    def batch(self, rows):
        """A batch of rows (window, clip, start: where its plan begins in the clip), all of one length."""
        frames = torch.tensor([window.frames for window, _, _ in rows])
        given = torch.tensor([[frame in window.given for frame in window.frames] for window, _, _ in rows])
        first = torch.tensor([[window.depth == 0] for window, _, _ in rows])   # nothing is made before these
        x0 = [self.read(clip, row + start) for row, (_, clip, start) in zip(frames, rows)]
        # the new frames have the prompt with which the video began, or the one that took over last
        turns = [max([turn for turn in self.changes(clip) - start if turn <= window.new[0]],
                     default=-math.inf) for window, clip, start in rows]
        captions = [self.caption(clip, start + max(0, turn)) for turn, (_, clip, start) in zip(turns, rows)]
        return {"x0": torch.stack(x0), "frames": frames, "given": given,
                "user": given & ((frames == 0) | first), "captions": captions,
                "prompt_start": torch.tensor(turns, dtype=torch.float32)}


def made_from(path, check=True):
    """The note in a file of latents: what they were made from. None if the file is missing or damaged; only
    `check` reads all of it to know."""
    try:
        with safe_open(path, framework="pt") as file:
            about, _, stated = file.metadata()["about"].rpartition(" ")
            return None if check and checksum({"x0": file.get_tensor("x0")}) != stated else about
    except (SafetensorError, OSError, KeyError, TypeError):
        return None


def keep_latents(path, x0, about):
    """Write latents (c, n, h, w), or of many worlds, in float16, with a note for `made_from`."""
    x0 = x0.half()
    with complete(path) as unfinished:
        save_file({"x0": x0}, unfinished, {"about": f"{about} {checksum({'x0': x0})}"})


def sky_clips(path, encode, seeds, frames, size, key):
    """Clips of the same moments (frames, a range) of many sky worlds (a range of seeds), made once: `encode`
    makes videos (1, 3, f, H, W) into what clips hold. A file made with another key is made again."""
    note = f"{key} {seeds} {frames} {size}"
    # in videos the light of every second world is restless, so that captions change and the video follows
    worlds = [SkyWorld(seed, size, restless=frames.step == 1 and seed % 2 == 1) for seed in seeds]
    if made_from(path) != note:
        videos = (world.video(frames)[None] for world in tqdm(worlds, "drawing worlds", unit="world"))
        keep_latents(path, torch.cat([encode(video).half() for video in videos]), note)
    x0 = load_file(path)["x0"]    # (worlds, c, f, h, w)
    return Clips([f"world {seed}" for seed in seeds], np.full(len(seeds), len(frames)),
                 lambda i, places: x0[i][:, places].float(),
                 lambda i, place: worlds[i].caption(frames[0] + place * frames.step),
                 lambda i: worlds[i].rushes)


# --- your own videos ----------------------------------------------------------------------------------------
#
#   DIR/clips/SOURCE/000/00001.png      the first clip of a video, GIF or folder of pictures
#   DIR/clips/SOURCE/000.txt, 000.json  its caption, yours to edit, and where it comes from
#   DIR/dropped.csv                     clips to leave out, and why; dropped.png shows them
#   DIR/cache/KEY/SOURCE/000.safetensors    its latents; KEY: of a VAE
FORMATS = "mov,matroska,avi,mpeg,mpegvideo,mpegts,asf,flv,ogg,gif"   # ffmpeg's names of these:
VIDEOS = tuple(".mp4 .m4v .mov .mkv .webm .avi .mpg .mpeg .ts .wmv .flv .3gp .ogv .gif".split())
PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")
ALIKE = 0.9         # clips whose edges correlate more are duplicates


def files_in(folder, endings):
    """The visible files of a folder with these endings, in the order people count: 2.png before 10.png."""
    number = lambda path: [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", path.name)]
    return sorted([path for path in Path(folder).iterdir() if path.name.lower().endswith(endings)
                   and path.name[0] != "." and path.is_file()], key=number)


def read_csv(path, *columns, **style):
    """The rows of a csv file as dicts. ValueError if it lacks one of the columns, or a row has one more."""
    reader = csv.DictReader(io.StringIO(read_text(path), newline=""), **style)
    try:
        rows = list(reader)
    except csv.Error as error:
        raise ValueError(f"{path}, line {reader.line_num}: {error}") from None
    if not set(columns) <= set(reader.fieldnames or ()):
        raise ValueError(f"{path} has the columns {reader.fieldnames}: expected {', '.join(columns)}")
    if wide := [row for row in rows if None in row]:
        raise ValueError(f"{path} has a row with too many columns, {list(wide[0].values())}: put text with "
                         "commas in quotes")
    return rows


def decode(name, path, work, args):
    """Write the frames of a source, and where ffmpeg finds cuts and frozen stretches, into the folder `work`.

    Returns why the source was refused, or None."""
    source = ["-format_whitelist", FORMATS, "-i", f"file:{path.resolve()}"]    # no playlists of other files
    if path.is_dir():
        source = ["-framerate", f"{args.fps:g}", "-i", "pictures/%05d.png"]
        (work / "pictures").mkdir()
        for i, file in enumerate(files_in(path, PICTURES), 1):
            try:
                read_square(file, args.size).save(work / "pictures" / f"{i:05d}.png")
            except ValueError as error:
                return str(error)
    # in a session of its own, or Ctrl-C would end ffmpeg too and the video would look damaged
    run = partial(subprocess.run, cwd=work, capture_output=True, stdin=subprocess.DEVNULL,
                  start_new_session=True)
    curve = run(["ffprobe", "-v", "error", *source, "-select_streams", "V:0", "-show_entries",
                 "stream=color_transfer"]).stdout
    tone = []
    if re.search(b"arib-std-b67|smpte2084", curve):    # HDR as phones film it, HLG or PQ: ITU-R BT.2100
        tone = ["setparams=color_primaries=bt2020:colorspace=bt2020nc", "zscale=transfer=linear:npl=100",
                "format=gbrpf32le", "zscale=primaries=bt709", "tonemap=hable",
                "zscale=transfer=bt709:matrix=bt709:range=tv", "format=yuv420p"]
    # Cuts show best at the video's own frame rate, where neighbours are most alike. Frozen stretches show in
    # the frames that are kept: a file may store a picture that lasts for seconds only once.
    filters = ["settb=AVTB", "setpts=PTS-STARTPTS", f"scdet=threshold={args.cut:g}",
               "metadata=print:key=lavfi.scd.time:file=cuts.txt", f"fps={args.fps:g}", "freezedetect",
               "metadata=print:file=freezes.txt", "crop='min(iw,ih/sar)':'min(ih,iw*sar)'",
               f"scale={args.size}:{args.size}:flags=lanczos", *tone, "setsar=1"]
    done = run(["ffmpeg", "-v", "error", "-xerror", "-threads", "1", *source, "-map", "0:V:0",
                "-vf", ",".join(filters), "-pix_fmt", "rgb24", "%07d.png"])
    said = done.stderr.decode(errors="replace").splitlines()
    ours = [line for line in said if re.search(
        "No space left|quota exceeded|Cannot allocate|No such filter|Unrecognized option", line)]
    if done.returncode in (-2, -9, -15) or ours:    # the source is not to blame, and is not refused
        raise ValueError(f"ffmpeg stopped at {name}: {(ours or [f'signal {-done.returncode}'])[0]}; it takes "
                         "version 4.4, zscale for HDR, and room on the disk; then run this again")
    if done.returncode or not any(work.glob("*.png")):
        no_frame = f"it has no frame; ffmpeg ended with {done.returncode}"
        return re.sub(r"\[[^\]]* @ \w+\] ", "", said[0]) if said else no_frame


def prepare_source(name, path, caption, unfinished, args):
    """Make the clips of one source unless they exist. Returns why the source was refused, or None."""
    clips, folder = args.out / "clips" / name, unfinished / "clips" / name
    files = files_in(path, PICTURES) if path.is_dir() else [path]
    size = sum(file.stat().st_size for file in files if file.exists())    # knows a source again
    if clips.exists():
        changed = any(read_json(path).get("bytes", size) != size for path in clips.glob("*.json"))
        return f"not the file of this name that {args.out} has: give another --out" if changed else None
    work = folder / "work"
    work.mkdir(parents=True)
    if refused := decode(name, path, work, args):
        return refused
    frames = sorted(work.glob("*.png"))
    place = lambda seconds: int(float(seconds) * args.fps + 0.5)    # rounds as ffmpeg does
    found = lambda file, pattern: re.findall(pattern, (work / file).read_text())
    cuts = {place(int(pts) / 1e6) for pts in found("cuts.txt", r"pts:(\d+)")}
    starts = {place(seconds) for seconds in found("freezes.txt", r"freeze_start=(\S+)")}
    stops = {place(seconds) for seconds in found("freezes.txt", r"freeze_end=(\S+)")}
    early = [cut for cut in cuts if cut <= min(args.fps / 5, len(frames) - 1)]    # many files open on black
    black = max(early, default=0)
    borders = sorted(i for i in {black, len(frames)} | cuts | starts | stops if black <= i <= len(frames))
    for i, (start, stop) in enumerate(zip(borders, borders[1:])):
        clip = folder / f"{i:03d}"
        clip.mkdir()
        for number, frame in enumerate(frames[start:stop], 1):
            frame.rename(clip / f"{number:05d}.png")
        write_whole(f"{clip}.txt", caption + "\n")
        write_json(f"{clip}.json", {
            "source": name, "start": round(start / args.fps, 3), "end": round(stop / args.fps, 3),
            "frames": stop - start, "frozen": start in starts, "bytes": size})
    shutil.rmtree(work)    # the clips appear all at once: a killed run leaves no half
    clips.parent.mkdir(parents=True, exist_ok=True)
    folder.rename(clips)


def prepare(args):
    """Turn a folder of videos into a folder of clips. If it was interrupted, just run it again."""
    if not (shutil.which("ffmpeg") and shutil.which("ffprobe")):
        raise ValueError("the programs ffmpeg and ffprobe were not found: install version 4.4 or newer")
    root, out, paths, texts, sources = args.prepare, args.out, set(), {}, {}
    if root.resolve() == out.resolve():
        raise ValueError(f"{root} has the videos: give another folder as --out")
    for folder, folders, files in os.walk(root):
        prepared, sampled = {"settings.json", "clips"}, {"args.json", "latents"}
        ours = folder != str(root) and any(signs <= {*files, *folders} for signs in (prepared, sampled))
        folders[:] = [name for name in folders if name[0] != "." and not ours]
        paths.update(files_in(folder, VIDEOS) if not ours else [])
        if not ours and not files_in(folder, VIDEOS) and len(files_in(folder, PICTURES)) > 1:
            paths.add(Path(folder))
    if (root / "metadata.csv").exists():
        rows = read_csv(root / "metadata.csv", "path", "text", skipinitialspace=True)
        for row in [row for row in rows if row["path"]]:
            inside = os.path.relpath(root / row["path"], root)
            if inside.split(os.sep)[0] == "..":
                raise ValueError(f"{root}/metadata.csv names {row['path']}, not a file in there: remove it")
            texts[root / inside] = row["text"] or ""
    for path in sorted(paths | texts.keys()):    # a file that does not exist is refused below, by name
        # names may be bytes of any kind; those of clips are UTF-8, as they stand in csv files
        inside = path.relative_to(root) if path != root else root.resolve().name
        name = Path(os.fsencode(inside).decode("utf-8", "backslashreplace"))
        beside = Path(f"{path}.txt") if path.is_dir() else path.with_suffix(".txt")
        words = re.sub(r"(?<=[a-z0-9])(?=[A-Z])|_", " ", name.parent.name).lower()    # UCF101: ApplyEyeMakeup
        text = read_text(beside) if beside.exists() else texts.get(path, words)
        sources[name.as_posix()] = path, " ".join(text.split())
    if not sources:
        raise ValueError(f"{root} is not a folder with videos, GIFs or folders of pictures in it")
    settings = {flag: getattr(args, flag) for flag in ("size", "fps", "cut")}
    path = out / "settings.json"
    _, lock = claim(out, goes_on=path.exists())
    if path.exists() and read_json(path) != settings:
        raise ValueError(f"{out} was prepared with {read_json(path)}, not {settings}: give another --out")
    (out / "dropped.csv").unlink(missing_ok=True)    # without it the folder counts as unfinished
    write_json(path, settings)
    for folder in out.glob(".unfinished_*"):
        shutil.rmtree(folder, ignore_errors=True)
    # a folder of this run's own: the ffmpeg of a run that was killed may still be writing to the old one
    unfinished = Path(tempfile.mkdtemp(prefix=".unfinished_", dir=out))
    with ThreadPoolExecutor(os.cpu_count()) as pool:    # threads will do: ffmpeg does the work
        work = pool.map(lambda name: prepare_source(name, *sources[name], unfinished, args), sources)
        refused = {name: why for name, why in zip(sources, tqdm(work, "preparing", len(sources))) if why}
    shutil.rmtree(unfinished)
    drop_clips(out, refused)


def read_clips(folder, kept=True):
    """{name: what NAME.json says, and caption} of the clips of a prepared folder; kept: not the dropped."""
    root, listed, clips = Path(folder, "clips"), Path(folder, "dropped.csv"), {}
    if kept and not listed.exists():
        raise ValueError(f"{folder} is not a prepared folder, or not finished: run data.py --prepare")
    dropped = {row["clip"] for row in read_csv(listed, "clip")} if kept else ()
    for path in sorted(root.rglob("[0-9]*.json")):
        name = path.relative_to(root).with_suffix("").as_posix()
        frames = len(pictures_of(folder, name))      # the user may have deleted some, or all
        if frames and name not in dropped:
            caption = " ".join(read_text(path.with_suffix(".txt")).split())
            clips[name] = read_json(path, "source") | {"caption": caption, "frames": frames}
    return clips


def pictures_of(folder, name):
    """The files of a clip, in order."""
    return sorted(Path(folder, "clips", name).glob("*.png"))


def moments(folder, name, n, size):
    """n frames of a clip, from its first to its last, small: (n, size, size, 3) uint8."""
    paths = pictures_of(folder, name)
    places = np.linspace(0, len(paths) - 1, n).round().astype(int)
    return np.stack([np.array(Image.open(paths[i]).convert("RGB").resize((size, size))) for i in places])


def show_clips(folder, file, rows):
    """A contact sheet of up to 48 rows (clip, label, "" or another clip to show beside it)."""
    path, shown = Path(folder, file), rows[:48]
    path.unlink(missing_ok=True)
    pictures = [np.concatenate([moments(folder, other, 4, 96), moments(folder, name, 4, 96)]) if other else
                moments(folder, name, 8, 96) for name, _, other in shown]
    if shown:
        with complete(path) as unfinished:
            contact_sheet(pictures, labels=[[" ".join(row)] for row in shown]).save(unfinished)


def drop_clips(folder, refused):
    """List clips to leave out in dropped.csv, and show them in dropped.png. A duplicate has the edges of
    another source's clip, at 5 moments: edges survive new sizes and colours."""
    clips, rows = read_clips(folder, kept=False), []
    stay = {}    # {name: edges} of the clips that stay
    for name, clip in clips.items():
        gray = moments(folder, name, 5, 16).mean(axis=3)
        edges = np.concatenate([np.diff(gray, axis=axis).reshape(5, 240) for axis in (1, 2)], axis=1)
        edges /= np.maximum(np.linalg.norm(edges, axis=1, keepdims=True), 1e-3) * 5 ** 0.5
        twins = [other for other in stay
                 if clips[other]["source"] != clip["source"] and np.vdot(stay[other], edges) > ALIKE]
        if clip["frozen"] or clip["frames"] < 5:    # two given, three between
            rows.append((name, "frozen" if clip["frozen"] else "short", ""))
        elif twins:
            rows.append((name, "duplicate", twins[0]))
        else:
            stay[name] = edges
    show_clips(folder, "dropped.png", rows)
    reasons = [reason for _, reason, _ in rows]
    counts = ", ".join(f"{reasons.count(reason)} {reason}" for reason in ("frozen", "short", "duplicate"))
    print(f"{counts}, {len(refused)} sources refused; {len(clips) - len(rows)} clips in {folder}")
    for name, why in refused.items():
        print(f"refused: {name}: {why}")
    corrupt = [(name, "corrupt", why) for name, why in refused.items()]
    write_csv(Path(folder, "dropped.csv"), [("clip", "reason", "detail"), *corrupt, *rows])
    if not clips:
        raise ValueError(f"not one source could be read, see {folder}/dropped.csv: do you have ffmpeg 4.4?")
    print(f"next: python data.py --check {folder}")


# --- a prepared folder: checked, encoded, drawn from --------------------------------------------------------
def check(folder):
    """Print what is in a prepared folder, and show the clips in sheet.png."""
    clips = read_clips(folder)
    lengths = [clip["frames"] for clip in clips.values()]
    print(f"{folder}: {len(clips)} clips; {sum(lengths)} frames, {max(lengths, default=0)} in the longest")
    print("clips long enough for a video of",
          ", ".join(f"{n} frames: {sum(frames >= n for frames in lengths)}" for n in (17, 31, 61, 121, 241)),
          "(shorter ones train its shorter windows)")
    show_clips(folder, "sheet.png", [(name, clip["caption"], "") for name, clip in clips.items()])
    if clips:
        print(f"look at {folder}/sheet.png; next: python train.py --stage vae --data {folder}")


def content(folder, name):
    """A hash of the pictures of a clip."""
    total = hashlib.sha256()
    for picture in pictures_of(folder, name):
        total.update(picture.read_bytes())
    return total.hexdigest()


def latents_key(model):
    """A checksum of all that latents depend on but the pictures."""
    return checksum(model.vae.state_dict(), str(model.config.latent_mean), str(model.config.latent_std))


@torch.no_grad()
def cache(folder, model, device):
    """Keep latents of all clips of a prepared folder on disk, in float16. What did not change stays."""
    home, key = next(model.vae.parameters()).device, latents_key(model)
    model.vae.to(device)
    for name in tqdm(read_clips(folder), desc="encoding clips", unit="clip"):
        pictures, path = pictures_of(folder, name), Path(folder, "cache", key, f"{name}.safetensors")
        note = content(folder, name)
        if made_from(path) != note:
            check_size(folder, pictures[0], model)
            parts = (from_pixels(map(Image.open, pictures[i:i + 16])) for i in range(0, len(pictures), 16))
            latents = torch.cat([model.vae.encode(part[None].to(device)).cpu() for part in parts], dim=2)
            keep_latents(path, latents[0], note)
    model.vae.to(home)


def check_size(folder, picture, model):
    """Raise ValueError unless a picture of a prepared folder has the size of the model."""
    if Image.open(picture).width != model.config.size:
        raise ValueError(f"{folder} has not the size of the model: prepare with --size {model.config.size}")


def folder_clips(folder, model, stage, split=None, drop=None):
    """Clips of a prepared folder: pictures for the VAE, else latents, which `cache` has made.

    split: "train", "val", or None for all. About one source in twenty validates, by a hash of its name, and
    the last tenth of long clips: what else is in the folder does not count. drop: a list by --drop_hardest of
    clips not to train on. ValueError if no clip is long enough, or they have not the model's size."""
    clips, needed, parts = read_clips(folder), shortest_clip(stage), {}    # {name: range of frames}
    left_out = {row["clip"] for row in read_csv(drop, "clip")} if drop else set()
    if gone := left_out - clips.keys():
        raise ValueError(f"{drop} names clips that are gone, such as {min(gone)}: make the list again")
    for name, clip in clips.items():
        end, held_out = clip["frames"], zlib.crc32(clip["source"].encode()) % 20 == 0
        tail = end // 10 if end >= 190 else 0                              # 19 hold windows of all stages
        border = 0 if held_out else end - tail
        part = {"train": range(border), "val": range(border, end), None: range(end)}[split]
        if len(part) >= needed and (split == "val" or name not in left_out):
            parts[name] = part
    if not parts and split:
        print(f"no clip of {folder} is kept apart: the same ones train and validate")
        return folder_clips(folder, model, stage, None, drop)
    if not parts:
        raise ValueError(f"no clip of {folder} is left to train on: --stage {stage} needs {needed} frames, "
                         f"see data.py --check {folder}")
    names, key = list(parts), latents_key(model)
    pictures = [pictures_of(folder, name) for name in names]
    check_size(folder, pictures[0][0], model)
    files = [Path(folder, "cache", key, f"{name}.safetensors") for name in names]

    def read(i, places):
        places = places + parts[names[i]].start
        if stage == "vae":
            return from_pixels(Image.open(pictures[i][place]) for place in places)
        # load_file maps the file into memory: only the frames of the window are read from the disk
        return load_file(files[i])["x0"][:, places].float()

    found = [(name, parts[name], clips[name]["caption"], content(folder, name) if stage == "vae" else
              made_from(file, check=False)) for name, file in zip(names, files)]    # `cache` has checked them
    return Clips(names, np.array([len(part) for part in parts.values()]), read,
                 lambda i, place: clips[names[i]]["caption"], key=checksum({}, str(found)))


def scoring_batches(clips, shapes):
    """Yield (name, 4 batches) of clips of 19 frames or more: the same windows at the same relative places."""
    order = lambda window: (reach(window), window.frames, window.new)
    windows = {order(window): window for _, windows in shapes for window in windows}
    scored = np.flatnonzero(clips.lengths >= max(min(windows)[0] + 1, min(19, clips.lengths.max())))
    fitting = [windows[key] for key in sorted(windows) if key[0] < clips.lengths[scored].min()]
    # short and long ones, and a place for each, from the start of a clip to its end
    chosen = [(fitting[k * len(fitting) // 4], (k + 0.5) / 4) for k in range(4)]
    for i in scored:
        start = lambda window, place: int(place * (clips.lengths[i] - reach(window))) - window.frames[0]
        yield clips.names[i], [clips.batch([(window, i, start(window, place))]) for window, place in chosen]


def drop_hardest(share, scores, held_out, path):
    """List the clips with the highest reducible loss, by files from train.py --score.

    RHO-LOSS (2206.07137): reducible loss = loss - irreducible loss, that of a model trained on other data
    (held_out). A rich clip is high in both; what training leaves reducible, the model could not learn."""
    if not (0 < share < 1 and scores):
        raise ValueError(f"--drop_hardest needs --scores and a share between 0 and 1, found {share:g}")
    read = lambda file: {row["clip"]: float(row["loss"]) for row in read_csv(file, "clip", "loss")}
    loss = read(scores)
    irreducible = read(held_out) if held_out else dict.fromkeys(loss, 0)
    if irreducible.keys() != loss.keys():
        raise ValueError("--held_out has other clips than --scores: score the same folder twice")
    names = sorted(loss, key=lambda clip: (irreducible[clip] - loss[clip], clip))[:round(share * len(loss))]
    write_csv(path, [("clip",), *((name,) for name in names)])
    print(f"wrote {path}: {len(names)} of {len(loss)} clips; next: train.py --drop {path}")


# --- pictures and files -------------------------------------------------------------------------------------
def to_pixels(video):
    """video (3, f, H, W) in [-1, 1] -> uint8 array (f, H, W, 3), rounded: `from_pixels` and back is exact."""
    return ((video.clamp(-1, 1) + 1) * 127.5).round().byte().permute(1, 2, 3, 0).cpu().numpy()


def from_pixels(images):
    """Pillow pictures of one size -> tensor (3, f, H, W) in [-1, 1]."""
    pixels = np.stack([np.array(image.convert("RGB")) for image in images])
    return torch.from_numpy(pixels).permute(3, 0, 1, 2).contiguous().float() / 127.5 - 1


def read_square(path, size):
    """The middle square of a picture file, as the camera was held, resized: a Pillow picture in RGB."""
    try:
        if not os.path.isfile(path):
            raise OSError("no such file")
        image = Image.open(path, formats=("PNG", "JPEG", "WEBP", "BMP", "TIFF", "GIF"))
        if image.mode.startswith("I"):         # 16 bits, which Pillow would cut off, not scale
            image = Image.fromarray((np.array(image) >> 8).astype(np.uint8))
        image = ImageOps.exif_transpose(image).convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    except Exception as error:                 # a damaged file can raise almost anything
        raise ValueError(f"no picture can be read from {path} ({error}): give a PNG or JPG file") from None
    return ImageOps.fit(image, (size, size), Image.Resampling.LANCZOS)


def contact_sheet(rows, scale=1, labels=()):
    """Rows of pictures of one size, each (n, H, W, 3) uint8, as one Pillow picture with gaps between them.

    labels: for every row the labels of its pictures, from the first on; it may have fewer than pictures."""
    height, width = (scale * side + 4 for side in rows[0].shape[1:3])
    sheet = Image.new("RGB", (width * max(map(len, rows)), height * len(rows)), "white")
    for i, row in enumerate(rows):
        for j, picture in enumerate(row):
            sheet.paste(ImageOps.scale(Image.fromarray(picture), scale), (j * width + 2, i * height + 2))
    for i, row in enumerate(labels):
        for j, label in enumerate(row):
            place = j * width + 5, i * height + 3
            ImageDraw.Draw(sheet).text(place, label, fill="white", stroke_width=2, stroke_fill="black")
    return sheet


def line_plot(path, curves, x_name, y_name, log=False):
    """Up to six curves {name: [(x, y), ...]} as a picture, the legend below; log: the scale of y."""
    def ticks(low, high):    # four to ten numbers 1, 2 or 5 times a power of ten apart
        power = 10.0 ** math.floor(math.log10((high - low) / 4))
        step = max((m * power for m in (1, 2, 5) if m * power <= (high - low) / 4), default=power)
        return step * np.arange(math.ceil(low / step), math.floor(high / step) + 1)

    scale = (lambda y: math.log10(max(y, 1e-12))) if log else float
    points = {name: [(x, scale(y)) for x, y in curve if math.isfinite(y)] for name, curve in curves.items()}
    xs, ys = zip(*([point for curve in points.values() for point in curve] or [(0, 0)]))
    low, high, first, last = min(ys), max(max(ys), min(ys) + 1e-6), min(xs), max(max(xs), min(xs) + 1)
    place = lambda x, y: (70 + 600 * (x - first) / (last - first), 290 - 250 * (y - low) / (high - low))
    image = Image.new("RGB", (700, 340 + 16 * len(points)), "white")
    draw = ImageDraw.Draw(image)
    draw.text((8, 8), y_name, fill="black")
    draw.text((370, 322), x_name, fill="black", anchor="mm")
    y_ticks = ticks(10 ** low, 10 ** high) if log else ticks(low, high)
    if log and high - low > 1:
        y_ticks = [m * 10.0 ** e for e in range(math.floor(low), math.ceil(high)) for m in (1, 2, 5)]
    for y in y_ticks:
        if low <= scale(y) <= high:
            draw.line([place(first, scale(y)), place(last, scale(y))], fill="lightgray")
            draw.text((64, place(first, scale(y))[1]), f"{y:.6g}", fill="black", anchor="rm")
    for x in ticks(first, last):
        draw.line([place(x, low), place(x, high)], fill="lightgray")
        draw.text((place(x, low)[0], 304), f"{x:.6g}", fill="black", anchor="mm")
    colours = ["firebrick", "royalblue", "seagreen", "lightcoral", "lightskyblue", "lightgreen"]
    for i, (name, curve) in enumerate(points.items()):
        draw.line([place(*point) for point in curve], fill=colours[i % 6], width=2)
        draw.text((70, 336 + 16 * i), name, fill=colours[i % 6])
    image.save(path)


def write_whole(path, text):
    """Write a text file that is complete or not there."""
    with complete(path) as unfinished:
        Path(unfinished).write_text(text, "utf-8")


def write_csv(path, rows):
    """Write lists as the rows of a table that is complete or not there."""
    with complete(path) as unfinished, open(unfinished, "w", newline="", encoding="utf-8") as file:
        csv.writer(file, lineterminator="\n").writerows(rows)


def write_json(path, value):
    """Write JSON in the same way."""
    write_whole(path, json.dumps(value, indent=1) + "\n")


def read_text(path):
    """A text file, in any of the encodings that editors write. ValueError if it is not a file."""
    if not os.path.isfile(path):
        raise ValueError(f"No such file: {path}")       # reading a named pipe would wait for ever
    text = Path(path).read_bytes()
    if text.startswith((b"\xff\xfe", b"\xfe\xff")):
        return text.decode("utf-16", "replace")
    try:
        return text.decode("utf-8-sig")
    except UnicodeDecodeError:
        return text.decode("latin-1")


def read_json(path, *keys):
    """Read a JSON file. ValueError, with its name, if it holds no object, or one without these keys."""
    try:
        found = dict(json.loads(read_text(path)))
        return found | {key: found[key] for key in keys}
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{path} is damaged or not a JSON object: {error}") from None


def claim(folder, prefix=None, goes_on=True):
    """Create a folder, or without one the next free PREFIX001, and hold it as long as the lock lives.

    Returns (folder, lock). ValueError if another process holds it or, unless a run goes on there, if anything
    is in it."""
    n = 1
    while prefix and not folder:
        try:
            os.makedirs(f"{prefix}{n:03d}")
            folder = f"{prefix}{n:03d}"
        except FileExistsError:
            n += 1
    try:
        os.makedirs(folder, exist_ok=True)
        lock = open(os.path.join(folder, ".lock"), "w")
    except OSError as error:
        raise ValueError(f"--out {folder} cannot be a folder to write in: {error.strerror}") from None
    try:
        if fcntl:
            fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)    # the system takes it from a killed process
    except (BlockingIOError, PermissionError):                  # systems differ in which
        raise ValueError(f"another process works in {folder}: wait for it, or give another --out") from None
    except OSError:      # a file system without locks
        pass
    if not goes_on and [name for name in os.listdir(folder) if name[0] != "." and ".tmp" not in name]:
        raise ValueError(f"{folder} already holds a run, or files of yours: give another --out, or go on as "
                         "--help says")
    for place in ("", "latents/", "frames/", "samples/") if goes_on else ():    # what killed runs left
        for pattern in "*.[0-9]*.tmp.*", ".tmp??????":     # names by `complete`, and by safetensors in it
            for stale in Path(folder).glob(place + pattern):
                stale.unlink(missing_ok=True)
    return folder, lock


def check_writable(path):
    """Raise OSError or ValueError now, not after the work, if no file can be written there."""
    folder = os.path.dirname(path) or "."
    os.makedirs(folder, exist_ok=True)
    tempfile.TemporaryFile(dir=folder).close()
    if os.path.isdir(path):
        raise ValueError(f"{path} is a folder: give the name of a file to write")


def file_name(text):
    """A type for argparse: a name that is not empty, as that of a shell variable without a value is."""
    if not text:
        raise argparse.ArgumentTypeError("is empty: give a name, or leave the flag out")
    return text


def number(kind, low, high=10 ** 9):
    """A type for argparse: an int or a float from low to high."""
    def convert(text):
        if not low <= kind(text) <= high:      # nan fails every comparison
            raise argparse.ArgumentTypeError(f"{text} is not from {low} to {high}")
        return kind(text)

    convert.__name__ = kind.__name__           # argparse names it where kind cannot read the text
    return convert


# --- the sky world: lengths in picture widths, speeds in widths per frame -----------------------------------
SPLITS = {"train": 0, "val": 1_000_000, "test": 2_000_000}  # first seed of each split: the ranges never meet
DAY = 480                                      # frames from one midnight to the next, in every world
TIMES = {"dawn": (0.2, 0.31), "day": (0.31, 0.69), "dusk": (0.69, 0.81), "night": (0.81, 1.2)}   # in days
RUSH = 32                                      # frames in which a restless world skips a part of a day
WIND = {"slow": 0.08 / 64, "fast": 0.16 / 64}  # speed of clouds and balloons
CLOUDS = {"few": 76, "some": 60, "many": 42}   # percentile of the cloud texture that stays clear sky
BALLOONS = {"red": (226, 38, 44), "green": (38, 170, 70), "violet": (166, 52, 200), "yellow": (252, 206, 32)}
BALLOON_RADIUS = 0.095
PALETTE = np.array([  # time of day (0 midnight, 0.5 noon); colours of the zenith, the horizon, the light
    (0.00, 26, 32, 74, 58, 66, 118, 104, 116, 168),
    (0.17, 32, 36, 84, 78, 74, 128, 112, 112, 160),
    (0.25, 98, 104, 170, 250, 168, 158, 255, 190, 176),
    (0.33, 92, 150, 220, 246, 222, 200, 255, 240, 224),
    (0.50, 66, 132, 220, 178, 214, 242, 255, 255, 250),
    (0.67, 84, 140, 210, 222, 220, 206, 255, 246, 220),
    (0.75, 82, 78, 146, 252, 146, 70, 255, 172, 104),
    (0.83, 42, 42, 100, 138, 82, 120, 156, 116, 146)])


def fractal(rng, shape, cutoff, falloff):
    """Tileable random texture, mean 0, std 1; spectrum k^-falloff up to a cutoff in cycles per width."""
    k = np.meshgrid(*[np.fft.fftfreq(n, 1 / n) / c for n, c in zip(shape, cutoff)], indexing="ij")
    k = np.sqrt(sum(axis ** 2 for axis in k))
    gain = np.exp(-k ** 2) / np.maximum(k, 1e-6) ** falloff
    gain.flat[0] = 0
    texture = np.fft.ifftn(np.fft.fftn(rng.standard_normal(shape)) * gain).real
    return texture / texture.std()


def interpolate(texture, places, axis):
    """Linear, periodic interpolation of a texture at fractional indices along one axis."""
    left, n = np.floor(places).astype(int), texture.shape[axis]
    part = np.expand_dims(np.float32(places - left), tuple(range(1, texture.ndim - axis)))
    return np.take(texture, left % n, axis) * (1 - part) + np.take(texture, (left + 1) % n, axis) * part


def time_of_day(hour):
    """The word for an hour from 0 to 1, midnight to midnight."""
    hour = (hour - 0.2) % 1 + 0.2
    return next(name for name, (begin, end) in TIMES.items() if begin <= hour < end)


class SkyWorld:
    """A procedural timelapse: sun, moon, clouds, two ridges and one to three balloons on the wind.

    A frame is a pure function of (seed, frame, size): the truth is known, so drift can be measured. `wind` is
    the signed speed of clouds and balloons. Clouds that leave on one side come back on the other; balloons
    that leave are gone. In a restless world the light now and then runs fast, to another time of day."""
    def __init__(self, seed, size=64, restless=False):
        rng = np.random.default_rng([20230709, seed])
        self.seed, self.size = seed, size
        self.start = rng.random()
        self.heading, self.pace = ["left", "right"][rng.integers(2)], ["slow", "fast"][rng.integers(2)]
        self.wind = WIND[self.pace] * (1 if self.heading == "right" else -1)
        self.cover = list(CLOUDS)[rng.integers(3)]
        self.colours = list(rng.permutation(list(BALLOONS))[:rng.integers(1, 4)])
        n, r = len(self.colours), BALLOON_RADIUS
        self.columns = np.arange(n) / n + rng.uniform(r, 1 / n - r, n)    # x of the balloons, never too close
        self.heights = rng.uniform(0.14, 0.52, n)                         # y of the balloons
        rng, frame, told = np.random.default_rng([20230712, seed]), 0, time_of_day(self.start)
        self.rushes, self.skipped = np.array([], int), np.array([])    # first frames; parts of a day
        while restless and frame < 2 * DAY:
            frame += rng.integers(100, 240)   # longer than most windows, and than a rush
            now = self.hour(frame)
            told = rng.choice([name for name in TIMES if name not in (told, time_of_day(now))])
            self.rushes = np.append(self.rushes, frame)
            ahead = (rng.uniform(*TIMES[told]) - now + 0.5) % 1 - 0.5      # or back, the shorter way
            self.skipped = np.append(self.skipped, ahead)

    def hour(self, frames, rush=RUSH):
        """Time of day in [0, 1) at absolute frame indices; rush: frames that a rush takes, 1 for a jump."""
        frames = np.asarray(frames)
        done = ((frames[..., None] - self.rushes + 1) / rush).clip(0, 1)
        return (self.start + frames / DAY + done @ self.skipped) % 1

    def caption(self, frame=0):
        """What the world shows at a frame, in words; during a rush, where that leads."""
        parts = [f"wind {self.heading} {self.pace}", f"{self.cover} clouds", time_of_day(self.hour(frame, 1))]
        inside = [0 < x < 1 for x in self.balloons([frame])[:, 0]]
        return ", ".join(parts + [f"{colour} balloon" for colour, seen in zip(self.colours, inside) if seen])

    def balloons(self, frames):
        """x of the balloons' centres at frames (f,): (n, f). They ride the wind and keep their height."""
        return self.columns[:, None] + self.wind * np.asarray(frames)

    def lamps(self, frames):
        """Centres of the sun and the moon at frames (f,): (2, f, 2) as (x, y). Each is up for half a day."""
        way = np.stack([(self.hour(frames) - rise) % 1 / 0.5 for rise in (0.25, 0.75)])
        return np.stack([0.06 + 0.88 * way, 0.74 - 0.6 * np.sin(np.pi * way)], axis=-1)

    def video(self, frames):
        """Frames at absolute indices: tensor (3, f, H, W) in [-1, 1]. Far things are painted first."""
        frames = np.asarray(frames)
        x = np.float32(np.arange(self.size) + 0.5) / self.size      # pixel centres, (W,)
        y = x[:, None]                                              # and (H, 1)
        cells = (np.arange(self.size) + 0.5) / self.size * 256 - 0.5    # pixels on the textures
        rgb = lambda *colour: np.float32(colour).reshape(3, 1, 1, 1)
        inside = lambda distance: np.clip(distance * self.size / 1.5 + 0.5, 0, 1)        # edges are soft
        hour, hours, colours = self.hour(frames), PALETTE[:, 0], PALETTE[:, 1:].T / 255
        mixed = np.float32([np.interp(hour, hours, colour, period=1) for colour in colours])
        zenith, horizon, light = mixed.reshape(3, 3, -1, 1, 1)                           # each (3, f, 1, 1)
        column = zenith + np.clip(y / 0.75, 0, 1) ** 1.3 * (horizon - zenith)            # (3, f, H, 1)
        image = np.repeat(column, self.size, axis=3)                                     # (3, f, H, W)
        paint = lambda colour, opacity: np.add(image, opacity * (colour - image), out=image)

        sun, moon = np.float32(self.lamps(frames))[..., None, None]                      # (f, 2, 1, 1)
        for centre, radius, colour, glow in ((sun, 0.085, rgb(1, 0.95, 0.74), 0.5),
                                             (moon, 0.07, rgb(0.92, 0.93, 1), 0.2)):
            distance = np.hypot(x - centre[:, 0], y - centre[:, 1])
            halo = glow * np.exp(-(distance / 0.16) ** 2)
            paint(colour, np.maximum(halo, inside(radius - distance)))

        rng = np.random.default_rng([20230710, self.seed])
        clouds = fractal(rng, (256, 256), cutoff=(10, 7), falloff=1.5)                   # wider than high
        clouds -= np.percentile(clouds, CLOUDS[self.cover])                              # below 0: clear sky
        clouds = np.stack([clouds, clouds - np.roll(clouds, 7, axis=0)])                 # light from above
        clouds = np.float32(interpolate(clouds, cells, axis=1))                          # (2, H, 256)
        columns = cells - self.wind * 256 * frames[:, None]                              # (f, W)
        moved = interpolate(clouds, columns.ravel(), axis=2).reshape(2, self.size, *columns.shape)
        texture, lit = moved.transpose(0, 2, 1, 3)                                       # (f, H, W) each
        alpha = np.clip(texture / 0.9, 0, 1) * np.clip((0.72 - y) / 0.2, 0, 1)
        colour = light * (0.86 + 0.14 * np.clip(lit, -1, 1)) + 0.12 * (horizon - light)
        paint(colour, 0.88 * alpha * (2 - alpha))

        rng = np.random.default_rng([20230711, self.seed])
        ridges = [interpolate(fractal(rng, (256,), (cutoff,), 1.2), cells, axis=0) for cutoff in (7, 4)]
        far, near = np.float32([0.70 + 0.045 * ridges[0], 0.85 + 0.045 * ridges[1]])     # heights, (W,)
        paint(0.52 * horizon + light * rgb(0.10, 0.14, 0.18), inside(y - far))
        grass = light * rgb(0.20, 0.30, 0.22) * (1 + 0.9 * np.clip((y - near) / 0.2, 0, 1))
        paint(grass, inside(y - near))

        # balloons are lit from inside and keep their colour at night
        r = np.float32(BALLOON_RADIUS)
        for name, columns, height in zip(self.colours, np.float32(self.balloons(frames)), self.heights):
            dx, dy = x - columns[:, None, None], y - np.float32(height)      # from its centre
            basket = np.minimum(0.24 * r - abs(dx), 0.2 * r - abs(dy - 1.3 * r))
            paint(light * rgb(0.35, 0.24, 0.16), inside(basket))
            colour = rgb(*BALLOONS[name]) / 255 * (0.72 + 0.28 * light.mean(0))
            shine = np.exp(-((dx + 0.35 * r) ** 2 + (dy + 0.4 * r) ** 2) / (0.5 * r) ** 2)
            paint(colour + 0.45 * shine * (1 - colour), inside(r - np.hypot(dx, dy)))
        return torch.from_numpy(np.clip(image, 0, 1) * 2 - 1)


# --- command line -------------------------------------------------------------------------------------------
def main(argv=None):
    """The command line of data.py: one of four things to do, and what it needs."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                usage="data.py --prepare | --check | --drop_hardest | --preview ... [flags]")
    group = p.add_argument_group("what to do, one of these")
    todo = group.add_mutually_exclusive_group(required=True).add_argument
    folder = lambda text: Path(file_name(text))
    todo("--prepare", metavar="VIDEOS", type=folder, help="make clips of the videos, GIFs and folders of "
         "pictures in a folder; captions: NAME.txt beside NAME.mp4, metadata.csv (path,text), or the folder")
    todo("--check", metavar="DIR", type=file_name, help="show what is in a prepared folder")
    todo("--drop_hardest", type=number(float, 0, 1), metavar="SHARE", help="list the clips of "
         "highest loss, 0.1: a tenth")
    todo("--preview", metavar="FILE", type=file_name, help="draw six sky worlds, a row each, into a picture")
    flag = p.add_argument_group("how").add_argument
    flag("--out", type=folder, help="folder to prepare in, or file for the list of --drop_hardest")
    flag("--fps", type=number(float, 0.001, 1000), default=5.0, help="frames a second to keep (default: 5)")
    flag("--size", type=number(int, 16, 4096), default=64, help="of a frame; for sd15 512 (default: 64)")
    flag("--cut", type=number(float, 0, 100), default=5.0,
         help="score of a cut; lower it if some are missed (default: 5)")
    flag("--scores", metavar="FILE", help="losses of the clips, from train.py --score")
    flag("--held_out", metavar="FILE", help="the same by a model trained on other data (default: none)")
    flag("--seed", type=number(int, 0), default=0, help="the first of the six worlds (default: 0)")
    args = p.parse_args(argv)
    if (args.prepare or args.drop_hardest) and not args.out:
        raise ValueError("--prepare and --drop_hardest need --out: see data.py --help")
    if args.size % 8:
        raise ValueError(f"--size must be a multiple of 8, found {args.size}")
    if args.prepare:
        prepare(args)
    elif args.check is not None:
        check(args.check)
    elif args.preview is not None:
        worlds = [SkyWorld(args.seed + i, args.size) for i in range(6)]
        rows = [to_pixels(world.video(np.arange(0, 121, 15))) for world in worlds]
        captions = [[world.caption()] for world in worlds]
        contact_sheet(rows, max(1, 128 // args.size), captions).save(args.preview)
    else:
        drop_hardest(args.drop_hardest, args.scores, args.held_out, args.out)


if __name__ == "__main__":
    with plain_errors("data.py", "the same command goes on"):
        main()
