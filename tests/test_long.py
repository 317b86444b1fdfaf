"""pytest tests/test_long.py: long videos stop and go on, grow, pass through pictures, share their work."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import sample
from model import load_weights

PICTURES = {0: (200, 40, 40), 19: (40, 40, 200), 39: (40, 160, 40)}


QUICK = ["--steps", "1", "--fill_steps", "1", "--guidance_scale", "1", "--batch_size", "4",
         "--decode_chunk", "4"]


def run(folder, weights, *more, frames=40):
    """One short run of sample.py in one step per window; returns its folder."""
    length = ["--frames", str(frames)] if frames else []
    sample.main([*length, *QUICK, "--weights", weights, "--out", str(folder), *more])
    return folder


def contents(folder):
    """{name: bytes} of everything a run leaves but animations, and its arguments, which say where it lies."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(Path(folder).rglob("*"))
            if path.is_file() and path.name not in ("args.json", "video.gif", "video.webp")}


def make_quick(change=setattr):
    """No GIFs and films of noise, and few steps for a first frame: they take longer than all else."""
    change(sample, "ANIMATION_FRAMES", 0)
    change(sample, "FIRST_FRAME_STEPS", 2)
    change(sample, "write_mp4", lambda *_: None)


@pytest.fixture(autouse=True, scope="module")
def quick_runs():
    """That, for all tests of a file that imports it; one test of test_sample.py looks at animations."""
    with pytest.MonkeyPatch.context() as patch:
        make_quick(patch.setattr)
        yield


@pytest.fixture(scope="module")
def whole(restless_weights, tmp_path_factory, quick_runs):
    """A run of 40 frames that nothing disturbs."""
    return run(tmp_path_factory.mktemp("whole") / "run", restless_weights)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Three plain pictures, as --keyframes wants them."""
    folder = tmp_path_factory.mktemp("pictures")
    for frame, colour in PICTURES.items():
        Image.new("RGB", (64, 64), colour).save(folder / f"{frame}.png")
    return [f"{frame}:{folder / str(frame)}.png" for frame in PICTURES]


def dies_at(monkeypatch, owner, name, call, after=False):
    """Make the call-th call of a function the last thing that happens, before or after it has run."""
    function, calls = getattr(owner, name), []

    def dies(*args, **options):
        calls.append(1)
        if len(calls) == call and not after:
            raise KeyboardInterrupt
        result = function(*args, **options)
        if len(calls) == call:
            raise KeyboardInterrupt
        return result

    monkeypatch.setattr(owner, name, dies)


@pytest.mark.parametrize("owner, name, call, after", [
    (sample, "open_run", 1, True), (sample.Store, "__setitem__", 1, False),
    (sample.Sampler, "windows", 3, False), (sample.Store, "__setitem__", 9, True),
    (Image.Image, "save", 7, True), (sample.os, "replace", 15, False), (sample, "write_metrics", 1, False)])
def test_a_run_that_dies_anywhere_resumes_to_the_same_bytes(tmp_path, restless_weights, whole, monkeypatch,
                                                            owner, name, call, after):
    """Between windows, in the middle of a batch, between a frame and its name: every file comes out the same.

    What had been written is not written again."""
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        dies_at(patch, owner, name, call, after)
        run(tmp_path / "cut", restless_weights)
    frames = {path: path.stat().st_mtime_ns for path in (tmp_path / "cut" / "frames").glob("?????.png")}
    path = tmp_path / "cut" / "latents.safetensors"
    load = path.exists() and load_file(path)
    assert not load or not load["latents"][load["made"] == 0].any()   # readable, and only marked frames
    run(tmp_path / "cut", restless_weights, "--resume", frames=None)
    assert contents(tmp_path / "cut") == contents(whole)
    kept = [path for path, time in frames.items() if path.stat().st_mtime_ns == time]
    assert len(kept) >= len(frames) - 4   # all but those of the chunk that was at work


def test_marks_come_after_the_latents(tmp_path, monkeypatch):
    """A store whose write is cut short has no mark on that frame; others stay."""
    store = sample.Store.create(str(tmp_path / "x.safetensors"), 5, (4, 2, 2))
    store[:, [1, 3]] = torch.full((4, 2, 2, 2), 7.0)
    rows = iter([torch.ones(4, 2, 2)])
    monkeypatch.setattr(torch.Tensor, "contiguous", lambda self: next(rows))   # there is no second row
    with pytest.raises(StopIteration):
        store[:, [0, 2]] = torch.ones(4, 2, 2, 2)
    monkeypatch.undo()
    again = sample.Store(str(tmp_path / "x.safetensors"))
    assert [again.made([frame]) for frame in range(5)] == [False, True, False, True, False]
    assert torch.equal(again[:, [3, 1]], torch.full((4, 2, 2, 2), 7.0)) and again[:, [2]].max() == 0
    assert load_file(tmp_path / "x.safetensors")["latents"].shape == (5, 4, 2, 2)


def test_an_extension_leaves_what_exists_and_can_be_interrupted_too(tmp_path, restless_weights, monkeypatch):
    """Frames and latents of the old video keep their bytes; the longer one is the same however it came about.

    An unfinished video is not extended, and a finished one not by nothing."""
    once = run(tmp_path / "once", restless_weights, frames=30)
    before, times = contents(once), {path: path.stat().st_mtime_ns for path in (once / "frames").iterdir()}
    old = load_file(once / "latents.safetensors")["latents"]
    run(once, restless_weights, "--extend", "17", frames=None)
    after = contents(once)
    assert all(after[name] == before[name] for name in before if name.startswith("frames"))
    assert all(path.stat().st_mtime_ns == time for path, time in times.items())
    assert len(os.listdir(once / "frames")) == 47
    assert torch.equal(load_file(once / "latents.safetensors")["latents"][:30], old)

    cut = run(tmp_path / "cut", restless_weights, frames=30)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        dies_at(patch, sample.Sampler, "windows", 3)
        run(cut, restless_weights, "--extend", "17", frames=None)
    with pytest.raises(ValueError, match="not finished: --resume it first"):
        run(cut, restless_weights, "--extend", "17", frames=None)
    run(cut, restless_weights, "--resume", frames=None)
    assert contents(cut) == after
    with pytest.raises(ValueError, match="at least 1"):
        run(cut, restless_weights, "--extend", "0", frames=None)


def test_keyframes_come_back_unchanged_and_are_leaned_on(tmp_path, restless_weights, pictures, monkeypatch):
    """First, middle and last picture: bit for bit in the video, never made, known to all windows."""
    seen, windows = [], sample.Sampler.windows
    monkeypatch.setattr(sample.Sampler, "windows", lambda self, jobs, latents, contexts, seeds, user, *rest: (
        seen.append((jobs, user)), windows(self, jobs, latents, contexts, seeds, user, *rest)))
    folder = run(tmp_path / "run", restless_weights, "--keyframes", ",".join(pictures))   # one string
    for frame, colour in PICTURES.items():
        assert (sample.read_frames(folder, [frame]) == colour).all()
    made = [f for jobs, _ in seen for _, window in jobs for f in window.new]
    assert sorted(made) == sorted(set(range(40)) - set(PICTURES)) and all(u == [0, 19, 39] for _, u in seen)
    same = run(tmp_path / "same", restless_weights, "--keyframes", *pictures)             # or several
    assert contents(same)["latents.safetensors"] == contents(folder)["latents.safetensors"]


def test_the_last_frame_of_a_loop_is_given_the_first(tmp_path, restless_weights, monkeypatch):
    """The window that makes the end sees, right behind it, a frame with the latents of frame 0."""
    seen, windows = [], sample.Sampler.windows
    monkeypatch.setattr(sample.Sampler, "windows", lambda self, jobs, latents, *rest: (
        seen.extend((w, latents[0][:, [0, 24]]) for _, w in jobs if 23 in w.new),
        windows(self, jobs, latents, *rest)))
    folder = run(tmp_path / "run", restless_weights, "--loop", frames=24)
    (window, ends), = seen
    assert 24 in window.given and torch.equal(ends[:, 0], ends[:, 1]) and ends.abs().max() > 0
    assert len(os.listdir(folder / "frames")) == 24
    with pytest.raises(ValueError, match="holds a loop"):
        run(folder, restless_weights, "--extend", "5", frames=None)


def test_each_frame_is_made_under_the_prompt_of_its_segment(restless_weights, monkeypatch, tmp_path):
    """The context that the network sees for a window is that of the prompt that holds at its new frames."""
    contexts = load_weights(restless_weights).context(["dawn", "night, red balloon"])
    seen, denoise, windows = [], sample.Sampler.denoise, sample.Sampler.windows
    monkeypatch.setattr(sample.Sampler, "windows", lambda self, jobs, *rest: (
        seen.append([w.new for _, w in jobs]), windows(self, jobs, *rest)))
    monkeypatch.setattr(sample.Sampler, "denoise", lambda self, x, t, new, context, *rest, **more: (
        seen.append(context[0]), denoise(self, x, t, new, context, *rest, **more))[1])
    run(tmp_path / "run", restless_weights, "--prompts", "0:dawn,17:night, red balloon")
    batches = zip(seen[1::2], seen[2::2])   # the first context is that of the first frame
    for news, rows in batches:
        for new, context in zip(news, rows):
            segment = {frame >= 17 for frame in new}
            assert len(segment) == 1 and torch.allclose(context, contexts[int(segment.pop())], atol=1e-5)


def test_what_is_held_at_once_does_not_grow_with_the_video(tmp_path, restless_weights, monkeypatch, capsys):
    """Never more latents or pixels than a batch or a chunk needs; longer videos leave the animations out."""
    most, read, pixels = [], sample.Store.__getitem__, sample.read_frames
    monkeypatch.setattr(sample.Store, "__getitem__", lambda self, key: (
        most.append(len(key[1])), read(self, key))[1])
    monkeypatch.setattr(sample, "read_frames", lambda folder, frames: (
        most.append(len(frames)), pixels(folder, frames))[1])
    folder = run(tmp_path / "run", restless_weights, "--world", "1", frames=60)
    assert max(most) <= 17 and "no video.gif" in capsys.readouterr().out
    assert not (folder / "video.gif").exists() and (folder / "sheet.png").exists()


def test_two_processes_make_the_bytes_of_one(tmp_path, restless_weights, whole):
    """torchrun shares the windows out, and nothing in the folder tells."""
    program = "import test_long; test_long.make_quick(); test_long.sample.main()"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
               "--no-python", sys.executable, "-c", program, "--frames", "40", *QUICK,
               "--weights", restless_weights, "--out", str(tmp_path / "run")]
    env = {"PYTHONPATH": str(Path(sample.__file__).parent),
           "OMP_NUM_THREADS": str(torch.get_num_threads())}    # sums over other shares round differently
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | env,
                          cwd=Path(__file__).parent)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("40 frames in") == 1
    assert contents(tmp_path / "run") == contents(whole)


@pytest.mark.parametrize("argv, words", [
    (["--keyframes", "a.png"], "expected FRAME:VALUE"),
    (["--keyframes", "0:a.png", "0:b.png"], "each frame once"),
    (["--keyframes", "40:a.png"], "frames 0 to 39 of 40, found 40"), (["--prompts", "50:night"], "found 50"),
    (["--keyframes", "0:a.png", "--world", "3"], "leave one away"),
    (["--keyframes", "3:a.png", "--loop"], "add one at 0"),
    (["--schedule", "seed", "--loop"], "leave it away"), (["--resume"], "holds no run"),
    (["--keyframes", "5:nothing.png"], "no picture at nothing.png"), (["--extend", "5"], "holds no run"),
    (["--max_stride", "0"], "max_stride >= 1")])
def test_impossible_requests_say_what_to_do(tmp_path, restless_weights, monkeypatch, argv, words):
    """What was found, what was expected, what to do; and nothing is written."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=words):
        run("run", restless_weights, *argv)
    assert not os.listdir(tmp_path)


def test_plan_says_what_more_processes_gain(capsys):
    """--plan prints efficiency and traffic on 2, 4 and 8 devices, for the plan that the options make."""
    sample.main(["--plan", "--frames", "121", *QUICK, "--batch_size", "1", "--keyframes", "0:a,120:b"])
    printed = capsys.readouterr().out
    for devices in (2, 4, 8):
        assert f"{devices} processes: " in printed
    assert "2 processes: 1.9" in printed and "MB of latents" in printed
