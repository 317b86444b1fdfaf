"""pytest tests/test_data.py: the sky world is a pure function of (seed, frame), batches of (seed, step)."""

import os
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from PIL import Image

import data
import schedule
from data import DAY, SPLITS, SkyWorld, sky_clips
from model import Model, load_weights, save_weights


def clips(tmp_path, worlds=3, frames=range(121), key="vae"):
    """Clips whose "latents" are 8x8 thumbnails, so that no VAE is needed."""
    encode = lambda video: torch.nn.functional.avg_pool3d(video, (1, 8, 8))[:, [0, 1, 2, 0]]
    return sky_clips(str(tmp_path / "clips.safetensors"), encode, range(worlds), frames, 64, key)


def test_a_frame_does_not_depend_on_which_others_are_asked_for():
    """video(frames)[i] == video([frames[i]]), in any order: any stride and any length show the same film."""
    frames = [0, 7, 400, 3]
    whole = SkyWorld(5).video(frames)
    for i, frame in enumerate(frames):
        assert torch.equal(whole[:, i], SkyWorld(5).video([frame])[:, 0])


def test_frames_are_pictures_in_range():
    """(3, f, H, W), float32, in [-1, 1], and using a good part of that range."""
    video = SkyWorld(1, 96).video(np.arange(4))
    assert video.shape == (3, 4, 96, 96) and video.dtype == torch.float32
    assert -1 <= video.min() < -0.5 and 0.5 < video.max() <= 1


def test_a_world_looks_the_same_at_every_size():
    """Twice the size, averaged down, is nearly the small picture: lengths are in widths, not in pixels."""
    small, large = SkyWorld(2, 64).video([30]), SkyWorld(2, 128).video([30])
    assert (torch.nn.functional.avg_pool3d(large[None], (1, 2, 2))[0] - small).abs().mean() < 0.02


def test_splits_never_share_a_world():
    """Training draws seeds below 900,000 above its first: the ranges of the splits do not meet."""
    starts = sorted(SPLITS.values())
    assert all(b - a > 900_000 for a, b in zip(starts, starts[1:]))
    assert not torch.equal(SkyWorld(SPLITS["train"]).video([0]), SkyWorld(SPLITS["test"]).video([0]))


def test_clouds_drift_as_the_caption_says():
    """The cloud layer at frame f is the one at frame 0, moved by wind x f, to the pixel."""
    world = next(w for w in map(SkyWorld, range(99)) if w.pace == "slow")
    frames = np.array([0, 25])                                            # 25 frames x 0.12 pixels = 3 pixels
    light = np.ones((3, 2, 1, 1), np.float32)
    image = np.zeros((3, 2, 64, 64), np.float32)
    world._paint_clouds(image, frames, (np.float32(np.arange(64)) / 64)[:, None], light, light)
    assert np.allclose(np.roll(image[:, 0], round(world.wind * 25 * 64), axis=2), image[:, 1], atol=1e-5)
    assert (world.wind > 0) == ("wind right" in world.caption())


def test_balloons_follow_the_wind_and_keep_apart():
    """Around the cylinder with the wind, up and down between bounds, and never one behind another."""
    world = next(w for w in map(SkyWorld, range(99)) if len(w.colours) == 3)
    tracks = world.balloons(np.arange(2000))
    assert np.allclose(data.sideways(tracks[:, 1:, 0], tracks[:, :-1, 0]), world.wind)
    assert tracks[..., 1].min() >= 0.12 and tracks[..., 1].max() <= 0.55
    steps = np.abs(np.diff(tracks[..., 1], axis=1))
    assert np.allclose(np.median(steps, axis=1), np.abs(world.sinking))
    for i, j in ((0, 1), (0, 2), (1, 2)):
        assert np.abs(data.sideways(tracks[i, :, 0], tracks[j, :, 0])).min() > 2 * data.BALLOON_RADIUS


def test_the_world_is_a_cylinder():
    """The step from the last column back to the first is an ordinary step: no seam."""
    video = SkyWorld(3).video(np.arange(0, 400, 10))
    across = (video[..., 0] - video[..., -1]).abs().mean()
    inside = video.diff(dim=3).abs().mean(dim=(0, 1, 2))
    assert across < 2 * inside.max()


def test_balloon_colours_are_where_the_tracks_say():
    """The pixel in the middle of the topmost balloon has the balloon's hue."""
    world = SkyWorld(6)
    frames = np.arange(0, 100, 20)
    video, centre = (world.video(frames) + 1) / 2, world.balloons(frames)[-1]
    colour = np.array(data.BALLOONS[world.colours[-1]]) / 255
    for i, (x, y) in enumerate(centre):
        pixel = video[:, i, int(y * 64), int(x * 64)].numpy()
        assert np.corrcoef(pixel, colour)[0, 1] > 0.9


def test_a_day_later_the_light_is_the_same():
    """The sun is a clock with a period of DAY frames, in every world."""
    world = SkyWorld(9)
    assert np.allclose(world.lamps([0]), world.lamps([DAY])) and world.caption(0) == world.caption(DAY)


def test_batches_are_pure_functions_of_seed_and_step(tmp_path, small_config):
    """Asked twice, in another order, a batch is the same; another step or seed gives another."""
    source, shapes = clips(tmp_path), [(1, schedule.training_windows("interp", 121))]
    for draw in (lambda seed, step: data.picture_batch("train", seed, step, 6, 64),
                 lambda seed, step: source.images(seed, step, 6)[0],
                 lambda seed, step: source.windows(shapes, seed, step, 6)["latents"]):
        first = draw(0, 5)
        other = draw(0, 6)
        assert torch.equal(first, draw(0, 5)) and not torch.equal(first, draw(1, 5))
        assert first.shape != other.shape or not torch.equal(first, other)


def test_windows_are_cut_from_the_clip_at_the_distances_of_the_plan(tmp_path):
    """latents[i] of a window are those of frame frames[i], shifted by one number for all.

    given and user are as planned."""
    source = clips(tmp_path, worlds=1)
    shapes = [(1, schedule.training_windows("video", 121, ("ladder",)))]
    for step in range(40):
        batch = source.windows(shapes, 0, step, 2)
        columns = (batch[key] for key in ("latents", "frames", "given", "user"))
        for latents, frames, given, user in zip(*columns):
            all_latents = source.read(0, torch.arange(121), False)
            matches = [shift for shift in range(-int(frames[0]), 121 - int(frames[-1]))
                       if torch.equal(all_latents[:, frames + shift], latents)]
            assert len(matches) == 1
            assert any(set(frames.tolist()) == set(w.frames)
                       and given.tolist() == [f not in w.new for f in w.frames] for w in shapes[0][1])
            assert not (user & ~given).any() and (user | (frames != 0)).all()


def test_windows_are_drawn_as_often_as_their_share_says(tmp_path):
    """Three times as often from a list with three times the share, whatever the number of windows in it."""
    source = clips(tmp_path, worlds=1)
    often = [schedule.Window((0, 1, 2), (1,), "interp", 0, ())]
    seldom = [schedule.Window((0, 1, n), (1,), "interp", 0, ()) for n in (5, 6, 7, 8)]
    drawn = source.windows([(3, often), (1, seldom)], 0, 0, 2000)["frames"][:, 2]
    assert abs((drawn == 2).float().mean() - 0.75) < 0.03 and all((drawn == n).any() for n in (5, 6, 7, 8))


def test_training_has_a_list_for_whatever_sampling_asks_for():
    """Every window of both plans, at full length and at a half and a quarter of it, and each stage alone."""
    shape = lambda window: tuple(tuple(frame - window.frames[0] for frame in part)
                                 for part in (window.frames, window.new))
    shown = {shape(window) for _, windows in data.window_shapes("video", 121) for window in windows}
    asked = [plan(n) for plan, n in ((schedule.ladder, 121), (schedule.ladder, 61), (schedule.ladder, 31),
                                     (schedule.seed, 121))]
    assert all(shape(window) in shown for plan in asked for window in plan if max(window.frames) < 121)
    for stage in schedule.STAGES:
        for share, windows in data.window_shapes(stage, 121):
            assert share > 0 and windows and {window.stage for window in windows} == {stage}


def test_the_cache_is_made_once_and_again_when_the_vae_changes(tmp_path):
    """Same key: read from disk, bit for bit. Another key: made anew.

    Half a file never appears under the name."""
    first = clips(tmp_path, worlds=2, frames=range(3))
    again = sky_clips(str(tmp_path / "clips.safetensors"), None, range(2), range(3), 64, "vae")
    assert all(torch.equal(first.read(i, torch.arange(3), False), again.read(i, torch.arange(3), False))
               for i in range(2))
    with pytest.raises(TypeError):
        sky_clips(str(tmp_path / "clips.safetensors"), None, range(2), range(3), 64, "another vae")
    assert [p.name for p in tmp_path.iterdir()] == ["clips.safetensors"]


def test_pixels_survive_the_way_to_a_tensor_and_back():
    """A given picture must come back bit for bit."""
    pixels = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    assert np.array_equal(data.to_pixels(data.from_pixels(Image.fromarray(pixels)))[0], pixels)


@pytest.mark.parametrize("name", ["sheet.png", "clip.gif"])
def test_preview_writes_a_picture(tmp_path, name, capsys):
    """`python data.py --preview FILE` leaves a file that Pillow can open."""
    data.main(["--preview", str(tmp_path / name), "--size", "16"])
    with Image.open(tmp_path / name) as image:
        assert getattr(image, "n_frames", 1) > 100 if name.endswith("gif") else image.width == 9 * 16 * 8


@pytest.mark.parametrize("argv, words", [
    (["--preview", "x.txt"], ".png"), (["--preview", "x.png", "--size", "20"], "multiples of 8")])
def test_bad_input_is_named(argv, words):
    """One sentence that says what was wrong and what would be right."""
    with pytest.raises(ValueError, match=words):
        data.main(argv)


# ------------------------------------------------------------------------------------------------------------
# Your own videos
# ------------------------------------------------------------------------------------------------------------

needs_ffmpeg = pytest.mark.skipif(not shutil.which("ffmpeg"), reason="the program ffmpeg is not installed")


def encode(path, *options, source="testsrc2=size=160x120:rate=25:duration=2"):
    """A video file made by ffmpeg from one of its own test pictures."""
    os.makedirs(os.path.dirname(path), exist_ok=True)
    command = ["ffmpeg", "-v", "error", "-f", "lavfi", "-i", source, *options, str(path)]
    subprocess.run(command, check=True)


def encode_pixels(path, pixels, *options, fps=5):
    """A video file of frames (f, H, W, 3) uint8."""
    command = ["ffmpeg", "-v", "error", "-f", "rawvideo", "-pix_fmt", "rgb24", "-r", str(fps), "-s",
               f"{pixels.shape[2]}x{pixels.shape[1]}", "-i", "-", "-crf", "12", *options, str(path)]
    subprocess.run(command, input=np.ascontiguousarray(pixels).tobytes(), check=True)


def sky(seed, frames=40, start=0):
    """Pixels of a sky world."""
    return data.to_pixels(SkyWorld(seed).video(np.arange(start, start + frames)))


def prepare(videos, out, *options):
    """`python data.py --prepare`, for small pictures and short clips."""
    data.main(["--prepare", str(videos), "--out", str(out), "--size", "64", "--min_frames", "3", *options])


def tree(folder):
    """{path: bytes} of all files in a folder."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@needs_ffmpeg
def test_every_kind_of_file_is_prepared_right_or_refused_by_name(tmp_path, capsys):
    """2 s are 10 frames at 5 fps, whatever the container, codec, frame rate, size or sound."""
    v = tmp_path / "v"
    encode(v / "h264.mp4", "-f", "lavfi", "-i", "sine=duration=2", "-c:v", "libx264", "-c:a", "aac")
    encode(v / "mpeg4.avi", "-c:v", "mpeg4")
    encode(v / "vp9.webm", "-c:v", "libvpx-vp9", "-deadline", "realtime", "-cpu-used", "8")
    encode(v / "vfr.mkv", "-vf", "select='lt(t,1)+not(mod(n,7))'", "-fps_mode", "vfr", "-c:v", "libx264")
    encode(v / "odd.mp4", "-c:v", "libx264", "-pix_fmt", "yuv444p",
           source="testsrc=size=161x123:rate=25:duration=2")
    encode(v / "wide pixels.mp4", "-vf", "setsar=2", "-c:v", "libx264")
    encode(v / "one.mp4", "-frames:v", "1", "-c:v", "libx264")
    encode(v / "cut off.avi", "-c:v", "mpeg4", "-q:v", "2")
    encode(v / "no end.mp4", "-c:v", "libx264")
    encode(v / "faststart.mp4", "-c:v", "libx264", "-movflags", "faststart")
    encode(v / "cut off.webm", "-c:v", "libvpx-vp9", "-deadline", "realtime", "-cpu-used", "8")
    for name in ("cut off.avi", "no end.mp4", "faststart.mp4", "cut off.webm"):
        (v / name).write_bytes((v / name).read_bytes()[:-(v / name).stat().st_size // 2])
    (v / "empty.mp4").write_bytes(b"")
    (v / "words.mp4").write_text("this is not a video\n" * 100)
    (v / "notes.pdf").write_text("and this is nothing at all")
    prepare(v, tmp_path / "out")
    said, (clips, refused) = capsys.readouterr().out, data.all_clips(str(tmp_path / "out"))
    good = ["h264.mp4", "mpeg4.avi", "odd.mp4", "vfr.mkv", "vp9.webm", "wide pixels.mp4"]
    assert list(clips) == [f"{name}/000" for name in good]
    assert [clip["frames"] for clip in clips.values()] == [10] * len(good)
    for name in clips:
        video = data.read_frames(data.frame_paths(str(tmp_path / "out"), name))
        assert video.shape == (3, 10, 64, 64) and video.std() > 0.2
    assert list(refused) == ["cut off.avi", "cut off.webm", "empty.mp4", "faststart.mp4", "no end.mp4",
                             "one.mp4", "words.mp4"]
    assert all(f"refused: {name}: " in said for name in refused) and "notes.pdf" in said
    assert clips["wide pixels.mp4/000"]["crop"] == [60, 120, 50, 0]   # 120 wide as it is shown
    with pytest.raises(SystemExit) as stop:
        prepare(v, tmp_path / "out", "--strict")
    assert stop.value.code == 1


@needs_ffmpeg
def test_a_phone_clip_stands_upright(tmp_path):
    """Red left of blue, filmed with the phone on its side: red above or below blue, in the middle square."""
    pixels = np.zeros((15, 64, 96, 3), np.uint8)
    pixels[:, :, :48, 0] = pixels[:, :, 48:, 2] = 255
    encode_pixels(tmp_path / "flat.mp4", pixels, "-c:v", "libx264")
    (tmp_path / "v").mkdir()
    subprocess.run(["ffmpeg", "-v", "error", "-i", tmp_path / "flat.mp4", "-c", "copy", "-metadata:s:v",
                    "rotate=90", tmp_path / "v" / "phone.mp4"], check=True)
    prepare(tmp_path / "v", tmp_path / "out", "--frozen_seconds", "99")
    video = data.read_frames(data.frame_paths(str(tmp_path / "out"), "phone.mp4/000"))
    above, below = video[:, 0, :24].mean((1, 2)), video[:, 0, 40:].mean((1, 2))
    assert (above[0] > 0.8) != (below[0] > 0.8) and (above[2] > 0.8) != (below[2] > 0.8)


@needs_ffmpeg
def test_gifs_and_folders_of_pictures_keep_every_frame_for_its_time(tmp_path):
    """A GIF's pictures are shown as long as it says; a folder's are taken one by one, as people count."""
    v = tmp_path / "v"
    (v / "it's a folder").mkdir(parents=True)
    grays = [Image.new("RGB", (48, 36), (20 * i, 20 * i, 20 * i)) for i in range(12)]
    grays[0].save(v / "a.gif", save_all=True, append_images=grays[1:4], duration=[200, 1000, 400, 600])
    for i, gray in enumerate(grays):
        gray.save(v / "it's a folder" / f"{i + 1}.png")
    prepare(v, tmp_path / "out", "--cut_change", "99", "--frozen_seconds", "99")
    level = lambda name: [round(float(frame.mean() + 1) * 127.5) for frame in data.read_frames(
        data.frame_paths(str(tmp_path / "out"), name)).transpose(0, 1)]
    assert level("it's a folder/000") == [20 * i for i in range(12)]
    assert level("a.gif/000") == [0] + [20] * 5 + [40] * 2 + [60] * 3


@needs_ffmpeg
def test_captions_and_where_a_clip_comes_from(tmp_path):
    """A text file of its name, else metadata.csv, else the folder; times count from the source's start."""
    v = tmp_path / "v"
    for name in ("a.mp4", "b.mp4", "ApplyEyeMakeup/v_01.avi"):
        encode(v / name, source="testsrc2=size=96x64:rate=25:duration=3")
    (v / "a.txt").write_text("a red\n balloon ")
    (v / "metadata.csv").write_text("path,text\na.mp4,not this\nb.mp4,\"blue, and green\"\nlost.mp4,gone\n")
    prepare(v, tmp_path / "out", "--skip_start", "1", "--skip_end", "0.6", "--alike", "2", "--format", "jpg")
    clips = data.kept_clips(str(tmp_path / "out"))
    assert {name: clip["caption"] for name, clip in clips.items()} == {
        "ApplyEyeMakeup/v_01.avi/000": "apply eye makeup", "a.mp4/000": "a red balloon",
        "b.mp4/000": "blue, and green"}
    clip = clips["a.mp4/000"]
    assert (clip["start"], clip["end"], clip["frames"], clip["crop"]) == (1.0, 2.4, 7, [64, 64, 16, 0])
    frames = data.frame_paths(str(tmp_path / "out"), "a.mp4/000")
    assert frames[0].endswith("00001.jpg") and data.read_frames(frames).shape == (3, 7, 64, 64)
    assert data.all_clips(str(tmp_path / "out"))[1]["lost.mp4"].startswith("metadata.csv names it")


@needs_ffmpeg
def test_planted_faults_are_found_and_nothing_else_is(tmp_path):
    """A cut splits; a frozen stretch, a copy and a short piece are left out; each reason has its sheet."""
    v = tmp_path / "v"
    v.mkdir()
    encode_pixels(v / "a.mp4", sky(0))
    encode_pixels(v / "b again.mp4", sky(0), "-vf", "scale=96:96,eq=brightness=0.03", "-crf", "26")
    encode_pixels(v / "cut.mp4", np.concatenate([sky(1, 25), sky(2, 15)]))
    flash = np.full((1, 64, 64, 3), 255, np.uint8)
    encode_pixels(v / "flash.mp4", np.concatenate([sky(3, 20), flash, sky(3, 20, 20)]))
    still = sky(4)
    encode_pixels(v / "frozen.mp4", np.concatenate([still[:15], np.repeat(still[15:16], 20, 0), still[16:]]))
    encode_pixels(v / "shuffled.mp4", sky(5)[np.random.default_rng(0).permutation(40)])
    encode_pixels(v / "short.mp4", sky(6, 4))
    prepare(v, tmp_path / "out", "--min_frames", "5")
    clips, out = data.all_clips(str(tmp_path / "out"))[0], tmp_path / "out"
    assert {name: clip["frames"] for name, clip in clips.items()} == {
        "a.mp4/000": 40, "b again.mp4/000": 40, "cut.mp4/000": 25, "cut.mp4/001": 15, "flash.mp4/000": 41,
        "frozen.mp4/000": 16, "frozen.mp4/001": 19, "frozen.mp4/002": 24, "short.mp4/000": 4,
        "shuffled.mp4/000": 40}
    assert [name for name, clip in clips.items() if clip["after_cut"]] == ["cut.mp4/001"]
    assert {name: reason for name, reason, _ in data.read_dropped(str(out))} == {
        "b again.mp4/000": "duplicate", "frozen.mp4/001": "frozen", "short.mp4/000": "short"}
    assert {path.name for path in out.glob("*.png")} == {f"dropped_{reason}.png" for reason in (
        "cut", "duplicate", "frozen", "short")}
    assert all(Image.open(path).width == 8 * 96 for path in out.glob("*.png"))


def killed_when(done, *command):
    """Run a program of ours and kill it, as kill -9 does, as soon as `done()`, before it has finished."""
    program = subprocess.Popen([sys.executable, *map(str, command)], stdout=subprocess.DEVNULL,
                               stderr=subprocess.DEVNULL)
    while not done() and program.poll() is None:
        time.sleep(0.002)
    assert program.poll() is None, "it had finished before it could be killed"
    program.kill()
    program.wait()


@needs_ffmpeg
def test_killed_in_the_middle_and_run_again_is_as_if_never_killed(tmp_path, small_weights):
    """--prepare, then --cache: the files of both are the same, byte for byte, as of an undisturbed run."""
    v = tmp_path / "v"
    v.mkdir()
    for seed in range(6):
        encode_pixels(v / f"{seed}.mp4", sky(seed, 60))
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    prepare(v, whole)
    options = ["--out", cut, "--size", 64, "--min_frames", 3, "--workers", 1]
    killed_when(lambda: len(list(cut.glob("clips/*.mp4"))) > 1, data.__file__, "--prepare", v, *options)
    assert not (cut / "dropped.csv").exists()
    prepare(v, cut)
    assert tree(whole) == tree(cut)

    data.main(["--cache", str(whole), "--weights", small_weights])
    killed_when(lambda: len(list(cut.glob("cache/*/*.safetensors"))) > 1, data.__file__, "--cache", cut,
                "--weights", small_weights)
    assert data.cache(str(cut), small_weights) > 0
    assert tree(whole) == tree(cut)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory, small_weights):
    """A folder of six prepared clips of 40 frames, encoded with the small weights."""
    if not shutil.which("ffmpeg"):
        pytest.skip("the program ffmpeg is not installed")
    root = tmp_path_factory.mktemp("videos")
    for seed in range(6):
        encode_pixels(root / f"{seed}.mp4", sky(seed), "-c:v", "libx264")
        (root / f"{seed}.txt").write_text(f"world {seed}" + (", wind left" if seed == 0 else ""))
    prepare(root, root / "out")
    data.cache(str(root / "out"), small_weights)
    return root / "out"


def test_sources_that_change_are_prepared_again_and_other_settings_refused(tmp_path, prepared):
    """A new caption or another file is taken up; frames of two sizes never meet in one folder."""
    folder = tmp_path / "copy"
    shutil.copytree(prepared, folder)
    with pytest.raises(ValueError, match="--size 64 .now 128."):
        data.main(["--prepare", str(prepared.parent), "--out", str(folder), "--size", "128"])
    videos = tmp_path / "videos"
    shutil.copytree(prepared.parent, videos, ignore=shutil.ignore_patterns("out"))
    (videos / "3.txt").write_text("another")
    (videos / "4.mp4").write_bytes((videos / "5.mp4").read_bytes())
    before = (folder / "clips" / "2.mp4").stat().st_ino
    prepare(videos, folder)
    assert (folder / "clips" / "3.mp4" / "000.txt").read_text() == "another\n"
    assert [row[:2] for row in data.read_dropped(str(folder))] == [["5.mp4/000", "duplicate"]]
    assert (folder / "clips" / "2.mp4").stat().st_ino == before    # what has not changed is not touched


def test_stale_or_damaged_cache_entries_are_made_anew(tmp_path, prepared, small_weights, small_config):
    """Another caption, another picture, half a file, other weights: noticed, and only those are redone."""
    folder = tmp_path / "copy"
    shutil.copytree(prepared, folder)
    assert data.cache(str(folder), small_weights) == 0
    (folder / "clips" / "1.mp4" / "000.txt").write_text("other words\n")
    picture = folder / "clips" / "2.mp4" / "000" / "00007.png"
    Image.fromarray(255 - np.array(Image.open(picture))).save(picture)
    entry = folder / "cache" / "3.mp4" / "000.safetensors"
    entry.write_bytes(entry.read_bytes()[:-100])
    with pytest.raises(ValueError, match="python data.py --cache"):
        data.cached_clips(str(folder), load_weights(small_weights), "interp")
    assert data.cache(str(folder), small_weights) == 3
    assert (prepared / "cache/3.mp4/000.safetensors").read_bytes() == entry.read_bytes()
    torch.manual_seed(1)
    save_weights(str(tmp_path / "other.safetensors"), Model.build(small_config), torch.float32, stage="image")
    assert data.cache(str(folder), str(tmp_path / "other.safetensors")) == 6


def test_cached_latents_are_those_of_the_pictures(prepared, small_weights):
    """Half precision latents of every frame, and of its mirror image, and the embedding of the caption."""
    model = load_weights(small_weights)
    clips = data.cached_clips(str(prepared), model, "interp")
    video = data.read_frames(data.frame_paths(str(prepared), "4.mp4/000"))[None]
    places, i = torch.tensor([3, 7, 30]), clips.names.index("4.mp4/000")
    with torch.no_grad():
        for mirrored in (False, True):
            latents = model.vae.encode(video.flip(-1) if mirrored else video)[0].half().float()
            assert torch.equal(clips.read(i, places, mirrored), latents[:, places])
        assert torch.equal(clips.context(i), model.context(["world 4"])[0].half().float())
    assert clips.mirror == [False] + [True] * 5    # the caption of the first tells left from right


def test_batches_of_own_clips_do_not_depend_on_who_draws_them(prepared, small_weights):
    """Any order, any thread, ahead or not, and as pictures or latents: step and seed decide alone."""
    model = load_weights(small_weights)
    clips = data.cached_clips(str(prepared), model, "video", "train")
    shapes = data.window_shapes("video", 40)
    draw = lambda step: clips.windows(shapes, 7, step, 4)
    plain = [draw(step) for step in range(12)]
    ahead = data.prefetch(draw)
    with ThreadPoolExecutor(4) as pool:
        for others in ([ahead(step) for step in range(12)], list(pool.map(draw, range(12))),
                       list(reversed([draw(step) for step in reversed(range(12))]))):
            for one, other in zip(plain, others):
                assert one["captions"] == other["captions"]
                assert all(torch.equal(one[key], other[key]) for key in one if key != "captions")
    kept = data.kept_clips(str(prepared))
    pictures = data.folder_clips(str(prepared), {name: kept[name] for name in clips.names})
    for step in range(3):
        seen = pictures.windows(shapes, 7, step, 4)
        with torch.no_grad():
            latents = model.vae.encode(seen["latents"])
        assert torch.allclose(latents, plain[step]["latents"], atol=1e-3)   # half precision


def test_reading_ahead_leaves_the_loop_its_threads():
    """The thread that reads has one for its tensor operations: with helpers of its own there would be more
    threads than cores, and OpenMP would slow all of them down."""
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        ahead = data.prefetch(lambda step: torch.get_num_threads())
        assert [ahead(0), ahead(1), torch.get_num_threads()] == [1, 1, 2]
    finally:
        torch.set_num_threads(threads)


def test_short_clips_are_drawn_from_as_far_as_they_reach():
    """Clips of unlike lengths: every clip that can hold a window is drawn, at every place, and no other."""
    clips = data.Clips(["a", "b", "c"], np.array([5, 9, 12]), [False] * 3,
                       lambda i, places, mirrored: (100 * i + places).float()[None, :, None, None],
                       lambda i, place: str(i))
    shapes = [(1, [schedule.Window((3, 5, 11), (5,), "interp", 0, ())])]   # over 9 frames
    seen = [clips.windows(shapes, 0, step, 2)["latents"][:, 0, :, 0, 0].tolist() for step in range(60)]
    starts = {int(row[0]) for batch in seen for row in batch}
    assert starts == {100, 200, 201, 202, 203}
    assert all(row == [row[0], row[0] + 2, row[0] + 8] for batch in seen for row in batch)
    with pytest.raises(ValueError, match="over 21 frames fits in no clip, the longest has 12"):
        clips.windows([(1, [schedule.Window((0, 20), (20,), "starter", 0, ())])], 0, 0, 1)


def test_sources_are_never_split_between_training_and_validation():
    """A twentieth of the sources, at least one, whatever else is there."""
    names = [f"{source}.mp4/{i:03d}" for source in range(60) for i in range(3)]
    train, val = (set(data.split_names(names, split)) for split in ("train", "val"))
    assert len(val) == 9 and not train & val and train | val == set(names)
    assert not {name[:-4] for name in train} & {name[:-4] for name in val}
    assert data.split_names(names[:3], "train") == data.split_names(names[:3], "val") == names[:3]


def test_check_says_what_training_will_find(tmp_path, prepared, capsys):
    """Counts, the longest clip against the plan, every stage. A damaged picture is named; exit code 1."""
    folder = tmp_path / "copy"
    shutil.copytree(prepared, folder)
    data.main(["--check", str(folder)])
    said = capsys.readouterr().out
    assert "6 clips of 6 sources, 240 frames of 64x64 pixels at 5 fps" in said
    assert "the longest clip has 40 frames, plans for 121 need 121" in said
    shapes = [window for _, windows in data.window_shapes("extrap", 40) for window in windows]
    places = 6 * sum(40 - window.frames[-1] + window.frames[0] for window in shapes)
    assert data.count_windows("extrap", [40] * 6, 121) == {4: (len(shapes), 6, places)}
    assert data.count_windows("extrap", [18] * 6, 121) == {}
    assert (folder / "sheet.png").exists()
    picture = folder / "clips" / "2.mp4" / "000" / "00007.png"
    picture.write_bytes(picture.read_bytes()[:200])
    with pytest.raises(SystemExit) as stop:
        data.main(["--check", str(folder)])
    assert stop.value.code == 1 and str(picture) in capsys.readouterr().out


def scores(path, stage, losses):
    """A file as train.py --score writes it."""
    rows = "".join(f"{clip},{stage},{loss}\n" for clip, loss in losses.items())
    path.write_text("clip,stage,loss\n" + rows)
    return str(path)


def test_the_hardest_clips_are_listed_by_their_ranks(tmp_path):
    """Ranks, not losses, are averaged: a stage of large losses says no more than another. Ties go by name."""
    a = scores(tmp_path / "a.csv", "starter", {"w": 900, "x": 800, "y": 1, "z": 2})
    b = scores(tmp_path / "b.csv", "interp", {"w": 0.1, "x": 0.4, "y": 0.3, "z": 0.2})
    out = tmp_path / "drop.txt"
    data.main(["--drop_hardest", "0.5", "--scores", a, b, "--out", str(out)])
    assert out.read_text() == "x\nw\n"                  # ranks 2+3, 3+0, 0+2, 1+1: w before y and z by rank
    rich = scores(tmp_path / "c.csv", "starter", {"w": 890, "x": 100, "y": 1, "z": 2})
    assert list(data.hardness([a], [rich])) == ["y", "z", "w", "x"]   # w is hard for everyone
    with pytest.raises(ValueError, match="score different clips"):
        data.hardness([a], [scores(tmp_path / "d.csv", "starter", {"w": 1})])
    with pytest.raises(ValueError, match="one file for each"):
        data.hardness([a], [b])


@pytest.mark.parametrize("argv, words", [
    (["--prepare", "nowhere", "--out", "x"], "is not a folder"), (["--prepare", "."], "needs --out"),
    (["--check", "nowhere"], "not a prepared folder"), (["--cache", "nowhere"], "needs --weights"),
    (["--drop_hardest", "0.1", "--scores", "nowhere", "--out", "x"], "holds no scores"),
    (["--drop_hardest", "10", "--scores", "nowhere", "--out", "x"], "between 0 and 1")])
def test_bad_folders_are_named(argv, words, tmp_path, monkeypatch):
    """One sentence, before anything is written."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=words):
        data.main(argv)
    assert not list(tmp_path.iterdir())
