"""pytest tests/test_data.py: batches are functions of (seed, step), videos become clips, the sky is a sky."""

import math
import os
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

import data
from data import DAY, SPLITS, SkyWorld, sky_clips
from model import Model, load_weights
from schedule import Window, window_shapes


def clips(tmp_path, worlds=3, frames=range(121), key="vae"):
    """Clips whose "latents" are 8x8 thumbnails, so that no VAE is needed."""
    encode = lambda video: torch.nn.functional.avg_pool3d(video, (1, 8, 8))[:, [0, 1, 2, 0]]
    return sky_clips(str(tmp_path / "clips.safetensors"), encode, range(worlds), frames, 64, key)


def test_batches_are_functions_of_seed_and_step(tmp_path):
    """A batch drawn again, or by another thread, is the same; other batches differ."""
    source, shapes = clips(tmp_path), window_shapes("interp", 121)
    for draw in (lambda seed, step: source.windows(window_shapes("image", 1), seed, step, 6)["x0"],
                 lambda seed, step: source.windows(shapes, seed, step, 6)["x0"]):
        plain = [draw(0, step) for step in range(4)]
        with ThreadPoolExecutor(4) as pool:
            assert all(map(torch.equal, plain, pool.map(lambda step: draw(0, step), range(4))))
        assert not any(torch.equal(other, plain[3]) for other in (draw(1, 3), *plain[:3]))
    picture = source.windows(window_shapes("image", 1), 0, 0, 5)         # a window of one frame, which is new
    assert picture["x0"].shape == (5, 4, 1, 8, 8) and len(picture["captions"]) == 5
    assert not any(picture[key].any() for key in ("frames", "given", "user"))


def test_windows_are_drawn_by_their_shares_at_every_place_where_they_fit():
    """The length of a list does not count, and a clip too short for a window is never drawn or scored."""
    source = data.Clips(["a", "b", "c"], np.array([5, 9, 12]), caption=lambda i, place: str(i),
                        read=lambda i, places: (100 * i + places).float()[None, :, None, None])
    often = [Window((0, 2, 8), (2,), "interp", 1)]         # at depth 1 only frame 0 is the user's
    seldom = [Window((n, n + 2, n + 8), (n + 2,), "interp", 0) for n in (3, 4, 5, 6)]
    batch = source.windows([(3, often), (1, seldom)], 0, 0, 2000)
    frames, places = batch["frames"], batch["x0"][:, 0, :, 0, 0]
    assert all((rows - rows[:, :1] == torch.tensor([0, 2, 8])).all() for rows in (frames, places))
    first, given, user = frames[:, 0].tolist(), batch["given"].tolist(), batch["user"].tolist()
    assert abs(first.count(0) / 2000 - 0.75) < 0.03
    assert {*zip(first, places[:, 0].tolist())} == {
        (n, place) for n in (0, 3, 4, 5, 6) for place in (100, 200, 201, 202, 203)}
    assert given == [[True, False, True]] * 2000 and user == [[True, False, n > 0] for n in first]
    source.lengths = np.array([18, 19, 30])
    scored = dict(data.scoring_batches(source, [(1, often + seldom)]))
    assert list(scored) == ["b", "c"] and len(scored["b"]) == 4
    for batch, other in zip(scored["b"], scored["c"]):
        assert torch.equal(batch["frames"], other["frames"])
    source.lengths = np.array([5, 9, 12])                               # none is that long: the longest
    assert list(dict(data.scoring_batches(source, [(1, often + seldom)]))) == ["c"]


def test_where_a_prompt_changes_half_of_the_windows_begin_with_the_change():
    """So that it says something. No window goes on past a change, and the batch says where it was."""
    turns = np.array([150, 300])
    source = data.Clips(["calm", "restless"], np.array([400, 400]), changes=lambda i: turns[:2 * i],
                        caption=lambda i, place: f"{i} {place}",
                        read=lambda i, places: (1000 * i + places).float()[None, :, None, None])
    on, between = Window((0, 16, 32), (16, 32), "starter", 0), Window((0, 16, 32), (16,), "interp", 0)
    # of 368 places, 32 begin with a new prompt, and where windows go on 32 have one in the middle
    for window, expected in (on, 0.5 + 0.5 * 32 / 336), (between, 32 / 368):
        batch = source.windows([(1, [window])], 0, 0, 4000)
        places = batch["x0"][:, 0, :, 0, 0]
        begins, straddles = (
            torch.tensor([any(first < turn <= last for turn in turns) for first, last in pairs])
            for pairs in (places[:, :2] % 1000, places[:, 1:] % 1000))
        restless = places[:, 0] >= 1000
        assert abs(begins[restless].float().mean() - expected) < 0.03
        assert abs(begins[~restless].float().mean() - 32 / 368) < 0.03
        assert straddles[restless].any() == (window is between)
        for first, new, caption, prompt_start in zip(*places[:, :2].long().T.tolist(), batch["captions"],
                                                     batch["prompt_start"].tolist()):
            clip, first, new = first // 1000, first % 1000, new % 1000
            last = max([turn for turn in turns[:2 * clip] if turn <= new], default=-math.inf)
            assert caption == f"{clip} {max(first, last)}" and prompt_start == last - first


def test_sky_latents_are_made_once_and_again_when_the_vae_changes(tmp_path):
    """With the same key they are read from disk, bit for bit, and no unfinished file is left."""
    first, path = clips(tmp_path, worlds=2, frames=range(3)), str(tmp_path / "clips.safetensors")
    again = sky_clips(path, None, range(2), range(3), 64, "vae")
    assert torch.equal(first.read(1, torch.arange(3))[:, 1:], again.read(1, torch.tensor([1, 2])))
    with pytest.raises(TypeError):
        sky_clips(path, None, range(2), range(3), 64, "another vae")
    assert [p.name for p in tmp_path.iterdir()] == ["clips.safetensors"]


def test_sky_clips_say_where_their_prompts_change(tmp_path):
    """In every second world of a video, at a frame of 100 to 240 and again."""
    source = sky_clips(str(tmp_path / "x"), lambda video: video[..., :1, :1], range(4), range(481), 64, "x")
    for i in range(4):
        changes = [place for place in source.changes(i) if place < 481]
        assert bool(changes) == (i % 2 == 1)
        for before, change in zip([0, *changes], changes):
            one, other = (source.caption(i, place).split(", ")[2] for place in (before, change))
            assert one != other


# --- your own videos ----------------------------------------------------------------------------------------

def encode(path, *options, pixels=None, fps=5):
    """Write a video of pixels (f, H, W, 3), or of 4 s of a test picture at 25 frames a second."""
    if not shutil.which("ffmpeg"):
        pytest.skip("the program ffmpeg is not installed")
    path.parent.mkdir(parents=True, exist_ok=True)
    given = ["-f", "lavfi", "-i", "testsrc2=size=160x120:rate=25:duration=4"]
    if pixels is not None:
        given = ["-f", "rawvideo", "-pix_fmt", "rgb24", "-r", str(fps), "-s",
                 f"{pixels.shape[2]}x{pixels.shape[1]}", "-i", "-", "-crf", "12"]
        pixels = np.ascontiguousarray(pixels).tobytes()
    subprocess.run(["ffmpeg", "-v", "error", *given, *options, str(path)], input=pixels, check=True)


def sky(seed, frames=40):
    """Pixels of a sky world."""
    return data.to_pixels(SkyWorld(seed).video(np.arange(frames)))


def prepare(videos, out, *options):
    """`python data.py --prepare`. Returns {clip: its json}, and {what is left out: (reason, detail)}."""
    data.main(["--prepare", str(videos), "--out", str(out), *options])
    dropped = [tuple(row.values()) for row in data.read_csv(out / "dropped.csv", "clip", "reason", "detail")]
    return data.read_clips(out, kept=False), {name: why for name, *why in dropped}


def frames_of(out, name):
    """The frames of a prepared clip: (3, f, H, W)."""
    paths = sorted((out / "clips" / name).iterdir())
    return data.from_pixels(map(Image.open, paths))


def tree(folder):
    """{path: bytes} of all files in a folder."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_every_kind_of_file_is_prepared_right_or_refused_by_name(tmp_path, capsys):
    """4 s are 20 frames at 5 fps, whatever the container, codec, frame rate, size or sound."""
    v, vp9 = tmp_path / "v", ["-c:v", "libvpx-vp9", "-deadline", "realtime", "-cpu-used", "8"]
    good = {"100%d it's; odd.mp4": ["-vf", "scale=161:123", "-pix_fmt", "yuv444p"],
            "h264.mp4": ["-f", "lavfi", "-i", "sine=duration=9", "-c:a", "aac"], "mpeg4.avi": [],
            "vfr.mkv": ["-vf", "select='lt(t,1)+not(mod(n,7))'", "-fps_mode", "vfr"], "vp9.webm": vp9}
    half = {"half.avi": ["-q:v", "2"], "half.mp4": [], "half.webm": vp9,
            "fast.mp4": ["-movflags", "faststart"]}
    for name, options in (good | half | {"one.mp4": ["-frames:v", "1"]}).items():
        encode(v / name, *options)
    for name in half:
        (v / name).write_bytes((v / name).read_bytes()[:-(v / name).stat().st_size // 2])
    (v / "empty.mp4").write_bytes(b"")
    (v / "words.mp4").write_text("this is not a video\n" * 100)
    (v / "playlist.mp4").write_text("ffconcat version 1.0\nfile h264.mp4\n")     # could name any file
    os.mkfifo(v / "pipe.mp4")
    (v / "metadata.csv").write_text("path,text\nlost.mp4,gone\n")
    shutil.copy(v / "vp9.webm", os.path.join(os.fsencode(v), b"caf\xe9.webm"))    # a name of Latin-1
    (v / os.fsdecode(b"\xff.mp4")).write_bytes(b"")
    found, dropped = prepare(v, tmp_path / "out")
    said = capsys.readouterr().out
    whole = {f"{name}/000": 20 for name in [*good, r"caf\xe9.webm"]}
    frames = {name: clip["frames"] for name, clip in found.items()}
    assert 5 < frames.pop("half.webm/000") < 15 and frames == whole      # its first half is not damaged
    videos = [frames_of(tmp_path / "out", name) for name in whole]
    assert all(video.shape == (3, 20, 64, 64) and video.std() > 0.2 for video in videos)
    bad = {name: why for name, (reason, why) in dropped.items() if reason == "corrupt"}
    assert bad.keys() | {"half.webm"} == {*half, "one.mp4", "empty.mp4", "words.mp4", "playlist.mp4",
                                          "lost.mp4", r"\xff.mp4"}
    assert all(f"refused: {name}: {why}" in said for name, why in bad.items())


def test_a_phone_clip_stands_upright_and_wide_pixels_are_wide(tmp_path):
    """Red left of blue, filmed with the phone on its side: one above the other, in the middle square."""
    pixels = np.zeros((20, 64, 96, 3), np.uint8)
    pixels[:, :, :48, 0] = pixels[:, :, 48:, 2] = 255
    encode(tmp_path / "flat.mp4", pixels=pixels)
    pixels[:, :, 40:56] = 255                                       # 16 of 64 rows: 32 wide as they are shown
    encode(tmp_path / "v" / "wide.mp4", "-vf", "setsar=2", pixels=pixels)
    subprocess.run(["ffmpeg", "-v", "error", "-i", tmp_path / "flat.mp4", "-c", "copy", "-metadata:s:v",
                    "rotate=90", tmp_path / "v" / "phone.mp4"], check=True)
    prepare(tmp_path / "v", tmp_path / "out")
    phone, wide = (frames_of(tmp_path / "out", f"{name}.mp4/000")[:, 0] for name in ("phone", "wide"))
    above, below = phone[:, :24].mean((1, 2)) > 0.8, phone[:, 40:].mean((1, 2)) > 0.8
    assert above[0] != below[0] and above[2] != below[2]
    assert abs((wide[1, 32] > 0).sum() - 32) <= 2


def test_hdr_is_mapped_to_the_colours_of_other_videos(tmp_path):
    """Shown as it is stored, HLG and PQ look pale: mapped, red differs more from blue."""
    flat = np.full((10, 64, 64, 3), 96, np.uint8)
    flat[..., 0] = 160
    for curve in ("bt709", "smpte2084", "arib-std-b67"):
        colours = ["-color_primaries", "bt2020", "-color_trc", curve, "-colorspace", "bt2020nc"]
        if curve == "smpte2084":     # of odd size, and with the curve alone
            colours = ["-vf", "scale=63:65", "-color_trc", curve, "-c:v", "libvpx-vp9"]
        encode(tmp_path / "v" / f"{curve}.mp4", "-pix_fmt", "yuv420p10le", *colours, pixels=flat)
    prepare(tmp_path / "v", tmp_path / "out")
    pixel = lambda name: frames_of(tmp_path / "out", f"{name}.mp4/000")[:, 0, 32, 32] * 127.5
    red, _, blue = torch.stack([pixel(name) for name in ("bt709", "smpte2084", "arib-std-b67")], dim=1)
    assert abs((red - blue)[0] - 64) < 4 and (red - blue)[1:].min() > 84


def test_gifs_and_folders_of_pictures_keep_every_frame_for_its_time(tmp_path):
    """A GIF sets the time of each picture; a folder is read picture by picture, 2.png before 10.png."""
    v, folder = tmp_path / "v", "it's a\nfolder"
    (v / folder).mkdir(parents=True)
    grays = [Image.new("RGB", (48, 36), (10 * i, 10 * i, 10 * i)) for i in range(12)]
    grays[0].save(v / "a.gif", save_all=True, append_images=grays[1:4], duration=[200, 1000, 400, 600])
    for i, gray in enumerate(grays):
        gray.convert("L" if i == 5 else "RGB").save(v / folder / f"{i + 1}.png")
    shutil.copytree(v / folder, v / "broken")
    (v / "broken" / "3.png").write_bytes(b"\x89PNG")
    dropped = prepare(v, tmp_path / "out")[1]
    level = lambda name: (frames_of(tmp_path / "out", name).mean((0, 2, 3)) * 127.5 + 127.5).round().tolist()
    assert level(f"{folder}/000") == [10 * i for i in range(12)]
    assert level("a.gif/000") == [0] + [10] * 5 + [20] * 2 + [30] * 3
    assert dropped["broken"][0] == "corrupt" and "3.png" in dropped["broken"][1]


def test_pictures_beside_folders_of_pictures_are_a_source_too(tmp_path):
    for folder in (tmp_path / "v", tmp_path / "v" / "sub"):
        folder.mkdir()
        for i in range(6):
            Image.new("RGB", (48, 36), (9 * i, 90, 9 * len(folder.parts))).save(folder / f"{i}.png")
    found, dropped = prepare(tmp_path / "v", tmp_path / "out")
    assert {name: clip["frames"] for name, clip in found.items()} == {"sub/000": 6, "v/000": 6}, dropped


def test_captions_and_where_a_clip_comes_from(tmp_path):
    """The caption comes from the text file, metadata.csv or the folder name, in whatever encoding."""
    v = tmp_path / "v"
    for name in ("a.mp4", "b.mp4", "c.mp4", "ApplyEyeMakeup/v_01.avi"):
        encode(v / name, "-t", "3")
    (v / "a.txt").write_text("a red\n balloon ", "utf-16")
    (v / "c.txt").write_text("caf\u00e9", "latin-1")
    (v / "metadata.csv").write_text("path, text\na.mp4,not this\nb.mp4, \"blue, and green\"\n", "utf-8-sig")
    for name in ("old/settings.json", "old/clips/x/1.png", "old/clips/x/2.png", "settings.json"):
        (v / name).parent.mkdir(parents=True, exist_ok=True)     # a folder prepared before is no source,
        (v / name).write_text("{}")                              # one with settings of its own is
    found, _ = prepare(v, tmp_path / "out")
    assert {name: clip["caption"] for name, clip in found.items()} == {
        "ApplyEyeMakeup/v_01.avi/000": "apply eye makeup", "a.mp4/000": "a red balloon",
        "b.mp4/000": "blue, and green", "c.mp4/000": "caf\u00e9"}
    assert {"source": "a.mp4", "start": 0.0, "end": 3.0, "frames": 15}.items() <= found["a.mp4/000"].items()


@pytest.mark.parametrize("rows, words", [
    ("../other/a.mp4,x", "names ../other/a.mp4, not a file in there"), ("/etc/a.mp4,x", "names /etc/a.mp4"),
    ("a.mp4,one, two", "too many columns.*quotes"),
    (f"a.mp4,{'x' * 200_000}", r"csv, line \d: field larger")])
def test_what_metadata_says_stays_in_its_folder_and_its_columns(tmp_path, rows, words):
    (tmp_path / "v").mkdir()
    (tmp_path / "v" / "metadata.csv").write_text(f"path,text\n{rows}\n")
    with pytest.raises(ValueError, match=words):
        prepare(tmp_path / "v", tmp_path / "out")


def test_files_of_yours_are_never_replaced_and_no_clip_at_all_is_an_error(tmp_path):
    (tmp_path / "v").mkdir()
    (tmp_path / "v" / "a.mp4").touch()
    with pytest.raises(ValueError, match="not one source could be read"):
        prepare(tmp_path / "v", tmp_path / "out")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "dropped.csv").touch()
    (tmp_path / "mine" / "report.2.tmp.txt").touch()
    with pytest.raises(ValueError, match="mine already holds a run, or files of yours"):
        prepare(tmp_path / "v", tmp_path / "mine")
    assert len(os.listdir(tmp_path / "mine")) == 3                         # with .lock


def test_a_source_is_not_refused_for_what_ffmpeg_met_and_not_taken_for_another(tmp_path, monkeypatch):
    """Killed, without room on the disk, or too old: the next run makes the clip. A changed file is named."""
    v, out, path = tmp_path / "v", tmp_path / "out", os.environ["PATH"]
    encode(v / "a.mp4", "-t", "3")
    fake = tmp_path / "bin" / "ffmpeg"
    fake.parent.mkdir()
    for does, words in (("kill -9 $$", "signal 9"), ("echo x: No space left on device >&2", "No space left"),
                        ("echo No such filter: scdet >&2", "No such filter")):
        fake.write_text(f"#!/bin/sh\n{does}\n")
        fake.chmod(0o755)
        monkeypatch.setenv("PATH", f"{fake.parent}:{path}")
        with pytest.raises(ValueError, match=f"ffmpeg stopped at a.mp4: .*{words}"):
            prepare(v, out)
        assert not (out / "dropped.csv").exists()
    monkeypatch.setenv("PATH", path)
    assert prepare(v, out)[0].keys() == {"a.mp4/000"}
    encode(v / "a.mp4", "-t", "2", "-y")
    assert "not the file of this name" in prepare(v, out)[1]["a.mp4"][1]


def test_a_picture_is_read_as_a_viewer_shows_it(tmp_path):
    """Turned as the camera was held, transparent parts white, all 16 bits of a gray one."""
    exif, flat = Image.Exif(), Image.new("RGB", (32, 64), (255, 0, 0))
    exif[0x0112] = 6                                                   # the camera lay on its left side
    flat.paste((0, 0, 255), (0, 0, 32, 32))
    flat.save(tmp_path / "phone.jpg", exif=exif)
    Image.new("RGBA", (32, 32), (255, 0, 255, 0)).save(tmp_path / "clear.png")
    Image.fromarray(np.full((32, 32), 128 * 256, np.uint16)).save(tmp_path / "deep.png")
    phone, clear, deep = (np.array(data.read_square(tmp_path / name, 32)) for name in (
        "phone.jpg", "clear.png", "deep.png"))
    assert phone[16, 2, 0] > 200 and phone[16, 29, 2] > 200
    assert (clear == 255).all() and (deep == 128).all()


def test_planted_faults_are_found_and_nothing_else_is(tmp_path):
    """A cut splits a clip at the exact frame; frozen, copied and short clips are left out and shown."""
    v, out, still = tmp_path / "v", tmp_path / "out", sky(7, 60)
    encode(v / "a.mp4", pixels=sky(0))
    encode(v / "b again.mp4", "-vf", "scale=96:96,eq=brightness=0.03", "-crf", "26", pixels=sky(0))
    encode(v / "frozen.mp4", pixels=np.concatenate([still[:25], np.repeat(still[25:26], 20, 0), still[26:]]))
    encode(v / "shuffled.mp4", pixels=sky(5)[np.random.default_rng(0).permutation(40)])
    encode(v / "short.mp4", pixels=sky(6, 4))
    for i in range(10):
        encode(v / f"cut {i}.mp4", pixels=np.concatenate([sky(2 * i + 20, 62), sky(2 * i + 21, 58)]), fps=15)
    found, dropped = prepare(v, out)
    cuts = {f"cut {i}.mp4/{j:03d}": 21 - 2 * j for i in range(10) for j in (0, 1)}   # after 20.67 frames
    assert {name: clip["frames"] for name, clip in found.items()} == cuts | {
        "a.mp4/000": 40, "b again.mp4/000": 40, "frozen.mp4/000": 25, "frozen.mp4/001": 20,
        "frozen.mp4/002": 34, "short.mp4/000": 4, "shuffled.mp4/000": 40}
    assert {name: reason for name, (reason, _) in dropped.items()} == {
        "b again.mp4/000": "duplicate", "frozen.mp4/001": "frozen", "short.mp4/000": "short"}
    assert {path.name: Image.open(path).size for path in out.glob("*.png")} == {
        "dropped.png": (8 * (96 + 4), 3 * (96 + 4))}


# --- a prepared folder --------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def prepared(tmp_path_factory, small_weights):
    """A folder of six prepared clips of 40 frames, encoded with the small weights."""
    root = tmp_path_factory.mktemp("videos")
    for seed in range(6):
        encode(root / "v" / f"{seed}.mp4", pixels=sky(seed))
        (root / "v" / f"{seed}.txt").write_text(f"world {seed}")
    prepare(root / "v", root / "out")
    data.cache(str(root / "out"), load_weights(small_weights), torch.device("cpu"))
    return root / "out"


def test_killed_in_the_middle_and_run_again_is_as_if_never_killed(tmp_path, prepared):
    """Byte for byte, the files are those of an undisturbed run."""
    argv = [sys.executable, data.__file__, "--prepare", prepared.parent / "v", "--out", tmp_path]
    with subprocess.Popen(argv, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as program:
        while not list(tmp_path.glob("clips/*.mp4")):
            time.sleep(0.002)
        program.kill()
    with pytest.raises(ValueError, match="not finished"):
        data.read_clips(tmp_path)
    prepare(prepared.parent / "v", tmp_path)
    whole = {name: content for name, content in tree(prepared).items() if name[:5] not in ("cache", "sheet")}
    # the ffmpeg of the killed run may go on writing where nobody looks
    assert {name: content for name, content in tree(tmp_path).items() if name[:11] != ".unfinished"} == whole


def test_other_settings_are_refused_and_new_sources_join(tmp_path, prepared):
    """A folder holds frames of one size, and adding videos leaves its clips untouched."""
    folder = shutil.copytree(prepared, tmp_path / "copy")
    with pytest.raises(ValueError, match="'size': 64.*'size': 128"):
        prepare(prepared.parent / "v", folder, "--size", "128")
    before = tree(folder / "clips" / "2.mp4")
    encode(tmp_path / "more" / "new.mp4", pixels=sky(5))
    assert prepare(tmp_path / "more", folder)[1] == {"new.mp4/000": ["duplicate", "5.mp4/000"]}
    assert tree(folder / "clips" / "2.mp4") == before


def test_stale_or_damaged_cache_entries_are_made_again(tmp_path, prepared, small_weights, small_config):
    """A changed picture or a damaged file: only these. Another VAE has latents of its own beside them, and
    captions and the words of the text encoder do not count."""
    folder, model = shutil.copytree(prepared, tmp_path / "copy"), load_weights(small_weights)
    entries = sorted((folder / "cache").rglob("*.safetensors"))
    assert len(entries) == 6 and data.latents_key(model) in str(entries[0])

    def made(model):
        before = {path: path.stat().st_mtime_ns for path in entries}
        data.cache(folder, model, "cpu")
        return [path.parent.name for path in entries if path.stat().st_mtime_ns != before[path]]

    assert made(model) == []
    (folder / "clips" / "1.mp4" / "000.txt").write_text("other words\n")
    picture = folder / "clips" / "2.mp4" / "000" / "00007.png"
    Image.fromarray(255 - np.array(Image.open(picture))).save(picture)
    entries[3].write_bytes(entries[3].read_bytes()[:-100])
    entries[4].write_bytes(entries[4].read_bytes()[:-1] + b"?")
    assert made(replace(model, config=replace(model.config, vocabulary=600))) == ["2.mp4", "3.mp4", "4.mp4"]
    assert (prepared / entries[3].relative_to(folder)).read_bytes() == entries[3].read_bytes()
    torch.manual_seed(1)
    assert made(Model.build(small_config)) == [] and len(list((folder / "cache").rglob("*.*s"))) == 12


def test_clips_of_a_folder_are_its_pictures_or_their_latents(prepared, small_weights, tmp_path):
    """The VAE stage sees the pictures; the others latents of every frame, in half precision. Their key
    changes when a picture does."""
    model, places = load_weights(small_weights), torch.tensor([3, 7, 30])
    for stage in ("vae", "interp"):
        source = data.folder_clips(prepared, model, stage)
        i, video = source.names.index("4.mp4/000"), frames_of(prepared, "4.mp4/000")
        with torch.no_grad():
            truth = video if stage == "vae" else model.vae.encode(video[None])[0].half().float()
        assert torch.equal(source.read(i, places), truth[:, places]) and source.caption(i, 9) == "world 4"
    folder = shutil.copytree(prepared, tmp_path / "copy")
    pictures = sorted((folder / "clips" / "4.mp4" / "000").iterdir())
    key = lambda: data.folder_clips(folder, model, "vae").key
    before = key()
    assert before == data.folder_clips(prepared, model, "vae").key
    shutil.copy(pictures[3], pictures[9])
    assert key() != before


def test_frames_to_validate_on_are_chosen_by_what_does_not_change(tmp_path, small_weights):
    """About one source in twenty by its name, and the last tenth of long clips, whatever else is there; and
    each split has 900,000 sky seeds of its own."""
    assert all(b - a > 900_000 for a, b in zip(SPLITS.values(), list(SPLITS.values())[1:]))
    folder, model = tmp_path / "folder", load_weights(small_weights)
    (folder / "clips").mkdir(parents=True)
    (folder / "dropped.csv").write_text("clip,reason,detail\n")
    shades = [Image.new("RGB", (64, 64), (shade, 0, 0)) for shade in range(200)]

    def add(name, frames):
        (folder / "clips" / name / "000").mkdir(parents=True)
        data.write_json(folder / "clips" / name / "000.json", {"source": name, "frames": frames})
        (folder / "clips" / name / "000.txt").write_text("")
        for i in range(frames):
            shades[i].save(folder / "clips" / name / "000" / f"{i + 1:05d}.png")

    clips = lambda split, stage="vae": data.folder_clips(folder, model, stage, split)
    parts = lambda *which: dict(zip(clips(*which).names, clips(*which).lengths.tolist()))
    add("a", 189)
    assert parts("train") == parts("val") == {"a/000": 189}            # nothing to keep apart
    add("b", 200)
    assert parts("train") == {"a/000": 189, "b/000": 180} and parts("val") == {"b/000": 20}
    red = clips("val").read(0, torch.tensor([0, 19]))[0, :, 0, 0]      # frames 180 and 199
    assert torch.allclose(red, torch.tensor([180, 199]) / 127.5 - 1)
    for i in range(100):
        add(str(i), 20)
    train, val = parts("train"), parts("val", "extrap")
    assert (train.pop("a/000"), train.pop("b/000"), val.pop("b/000")) == (189, 180, 20)
    assert not train.keys() & val.keys() and len(train | val) == 100 and 2 <= len(val) <= 8
    assert clips(None, "interp").lengths.sum() == 189 + 200 + 2000
    for name in {path.name for path in (folder / "clips").iterdir()} - {min(val).split("/")[0]}:
        shutil.rmtree(folder / "clips" / name)
    assert parts("train") == parts("val") == {min(val): 20}            # the only one would validate alone
    with pytest.raises(ValueError, match="prepare with --size 32"):
        data.folder_clips(folder, replace(model, config=replace(model.config, size=32)), "vae")


def test_check_says_what_training_will_find(prepared, capsys):
    data.main(["--check", str(prepared)])
    said = capsys.readouterr().out
    assert "6 clips; 240 frames, 40 in the longest" in said
    assert "17 frames: 6, 31 frames: 6, 61 frames: 0" in said
    assert (prepared / "sheet.png").exists()


def test_the_hardest_clips_are_listed(tmp_path):
    """By the loss, or by what it is above that of another model. Ties go by name."""
    def scores(*losses):
        path = tmp_path / f"{losses}.csv"
        path.write_text("clip,loss\n" + "".join(f"{clip},{loss}\n" for clip, loss in zip("wxyz", losses)))
        return str(path)

    def hardest(share, *options):
        data.main(["--drop_hardest", share, "--out", str(tmp_path / "drop.csv"), "--scores", *options])
        return (tmp_path / "drop.csv").read_text()

    assert hardest("0.75", scores(900, 2, 1, 2)) == "clip\nw\nx\nz\n"
    rich = scores(900, 800, 1, 2), "--held_out", scores(890, 100, 1, 2)
    assert hardest("0.9", *rich) == "clip\nx\nw\ny\nz\n"
    with pytest.raises(ValueError, match="has other clips than"):
        hardest("0.5", scores(1, 2), "--held_out", scores(1, 2, 3))
    (tmp_path / "e.csv").write_text("name,loss\nw,1\n")
    with pytest.raises(ValueError, match="e.csv has the columns .*'name'.*: expected clip, loss"):
        hardest("0.5", str(tmp_path / "e.csv"))


@pytest.mark.parametrize("argv, words", [
    (["--prepare", "nowhere", "--out", "x"], "is not a folder"), (["--prepare", "."], "need --out"),
    (["--check", "nowhere"], "not a prepared folder"),
    (["--drop_hardest", "0.1", "--scores", "nowhere", "--out", "x"], "No such file.*nowhere"),
    (["--drop_hardest", "0.1", "--out", "x"], "needs --scores"),
    (["--prepare", ".", "--out", "x", "--size", "20"], "multiple of 8"),
    (["--prepare", ".", "--out", "."], "has the videos: give another folder"),
    (["--preview", "x.txt"], ".txt"), (["--preview", "x.png", "--size", "20"], "multiple of 8")])
def test_bad_input_is_named(argv, words, tmp_path, monkeypatch):
    """The error comes before anything is written."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises((ValueError, OSError), match=words):
        data.main(argv)
    assert not list(tmp_path.iterdir())


# --- pictures and the sky world -----------------------------------------------------------------------------

@pytest.mark.parametrize("log", [False, True])
@pytest.mark.parametrize("ys", [
    [2.0, 2.4], [0.3, 0.3], [1.0], [math.nan, 1, math.inf], [], [1e-9, 0, 5e5]], ids=str)
def test_a_plot_of_anything_is_no_error(tmp_path, ys, log):
    data.line_plot(tmp_path / "plot.png", {"a": list(enumerate(ys)), "b": []}, "x", "y", log)
    assert Image.open(tmp_path / "plot.png").size == (700, 372)


def test_a_preview_shows_nine_frames_of_six_worlds(tmp_path):
    data.main(["--preview", str(tmp_path / "sheet.png"), "--size", "16"])
    assert Image.open(tmp_path / "sheet.png").size == (9 * (16 * 8 + 4), 6 * (16 * 8 + 4))


def test_a_frame_does_not_depend_on_the_others_and_little_on_the_size():
    """video(frames)[i] == video([frames[i]]); twice the size, averaged down, is nearly the small picture."""
    frames = [0, 7, 400, 3]
    whole, large = SkyWorld(5, 96).video(frames), SkyWorld(5, 192).video(frames)
    assert whole.shape == (3, 4, 96, 96) and whole.dtype == torch.float32
    assert -1 <= whole.min() < -0.5 and 0.5 < whole.max() <= 1
    assert all(torch.equal(whole[:, [i]], SkyWorld(5, 96).video([frame])) for i, frame in enumerate(frames))
    assert (torch.nn.functional.avg_pool3d(large[None], (1, 2, 2))[0] - whole).abs().mean() < 0.02


def test_clouds_drift_as_the_caption_says():
    """Edges in the upper half of a frame match an earlier frame best when the wind has moved them."""
    for world in [w for w in map(SkyWorld, range(60)) if w.pace == "slow" and w.cover == "many"]:
        world.colours, world.lamps = [], lambda frames: np.full((2, len(frames), 2), 9.0)    # only clouds
        upper = world.video([0, 25])[:, :, :32]                        # 25 frames x 0.08 pixels = 2 pixels
        edges = upper - upper.roll(1, 3)
        match = [(edges[:, 0].roll(shift, 2) * edges[:, 1]).sum() for shift in range(-8, 9)]
        assert int(np.argmax(match)) - 8 == round(world.wind * 25 * 64)
        assert (world.wind > 0) == ("wind right" in world.caption())


def test_balloons_follow_the_wind_keep_apart_and_are_where_the_tracks_say():
    """They begin whole inside the picture, never hide each other, show their own colour where the track is
    and are named while they are there."""
    world = next(w for w in map(SkyWorld, range(99)) if len(w.colours) == 3)
    tracks, r = world.balloons(np.arange(2000)), data.BALLOON_RADIUS
    assert np.allclose(np.diff(tracks), world.wind) and np.diff(tracks[:, 0]).min() > 2 * r
    assert r < tracks[0, 0] and tracks[-1, 0] < 1 - r
    assert 0.14 <= world.heights.min() < world.heights.max() <= 0.52
    frames = np.arange(0, 1000, 50)         # by then the slowest have left
    video = (world.video(frames) + 1) / 2
    for name, track, y in zip(world.colours, tracks[:, frames], world.heights):
        assert 0 < track[0] < 1 and not 0 < track[-1] < 1
        for i, x in enumerate(track):
            assert (0 < x < 1) == (name in world.caption(frames[i]))
            if 0 < x < 1:
                pixel = video[:, i, int(y * 64), int(x * 64)].numpy()
                assert np.corrcoef(pixel, data.BALLOONS[name])[0, 1] > 0.9


def test_the_world_has_a_clock():
    """A day later the light is the same."""
    world = SkyWorld(3)
    assert np.allclose(world.lamps([0]), world.lamps([DAY]))
    grass = world.video([7, 7 + DAY // 2, 7 + DAY])[..., -1, :]
    assert torch.allclose(grass[:, 0], grass[:, 2]) and not torch.allclose(grass[:, 0], grass[:, 1], atol=0.1)


def test_the_light_of_a_restless_world_goes_where_the_captions_say():
    """Rushes of 32 frames lead on or back to another time of day; a caption holds from there to the next."""
    for seed in range(1, 60, 4):
        world, calm = SkyWorld(seed, restless=True), SkyWorld(seed)
        before, after = world.rushes - 1, world.rushes + data.RUSH - 1
        assert 0 < before[0] and np.diff(world.rushes).min() >= 100 and after[-1] > 2 * DAY
        whole = world.hour(after) - world.hour(before) - data.RUSH / DAY - world.skipped        # days
        assert np.allclose(whole, whole.round()) and np.abs(world.skipped).max() <= 0.5
        assert np.allclose(calm.hour(np.arange(before[0])), world.hour(np.arange(before[0])))
        names = [data.time_of_day(hour) for hour in world.hour(after) - (data.RUSH - 1) / DAY]
        prompts = [world.caption(frame) for frame in world.rushes]
        assert all(name in caption.split(", ") for name, caption in zip(names, prompts))
        times = [caption.split(", ")[2] for caption in (calm.caption(), *prompts)]
        assert all(one != other for one, other in zip(times, times[1:]))
        assert calm.caption(33) == world.caption(33)


def test_a_contact_sheet_has_gaps_and_labels():
    """White between the pictures, and a label on the one it is for."""
    black = np.zeros((2, 20, 20, 3), np.uint8)
    draw = lambda labels: np.array(data.contact_sheet([black, black], 2, labels))
    plain, labelled = draw([]), draw([["", "a"]])
    assert plain.shape == (2 * 44, 2 * 44, 3) and (plain[[0, 1, 42, 43, 44, 45]] == 255).all()
    assert (plain[2:42, 2:42] == 0).all() and (plain[:, [42, 43, 44, 45]] == 255).all()
    different = (plain != labelled).any(axis=2)
    assert different[:44, 44:].any() and not different[44:].any() and not different[:, :44].any()
