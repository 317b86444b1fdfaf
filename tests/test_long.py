"""pytest tests/test_long.py: long videos stop and go on, grow, pass through pictures, share their work."""

import multiprocessing
import os
import socket
import time
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import sample
from model import load_weights

PICTURES = {0: (200, 40, 40), 19: (40, 40, 200), 39: (40, 160, 40)}
QUICK = ["--steps", "1", "--guidance_scale", "1", "--batch_size", "4", "--decode_chunk", "4"]


def run(folder, weights, *more, frames=40):
    """One short run of sample.py; returns its folder."""
    length = ["--frames", str(frames)] if frames else []
    sample.main([*length, *QUICK, "--weights", weights, "--out", str(folder), *more])
    return folder


def contents(folder):
    """{name: bytes} of everything a run leaves but args.json, which says where it lies."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(Path(folder).rglob("*"))
            if path.is_file() and path.name != "args.json"}


@pytest.fixture(autouse=True, scope="module")
def no_films():
    """No animations: those of noise take longer than all else. test_sample.py looks at some."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sample, "write_video", lambda *_: None)
        yield


def one_of_many(rank, world, port, threads, argv):
    """A process of a run, started as torchrun does it."""
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port), "RANK": str(rank),
                   "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world)}
    torch.set_num_threads(threads)      # sums that are shared out otherwise round otherwise
    sample.write_video = lambda *_: None
    sample.main(argv)


def start(world, argv):
    """Start a run by several processes."""
    with socket.create_server(("localhost", 0)) as free:
        port = free.getsockname()[1]
    children = [multiprocessing.get_context("forkserver").Process(
        target=one_of_many, args=(rank, world, port, torch.get_num_threads(), argv)) for rank in range(world)]
    for child in children:
        child.start()
    return children


def finish(children):
    """Wait for processes. If one fails, the others would wait for it for ever."""
    while any(child.is_alive() for child in children) and not any(child.exitcode for child in children):
        time.sleep(0.05)
    for child in children:
        child.kill() if any(child.exitcode for child in children) else None
        child.join()
    assert [child.exitcode for child in children] == [0] * len(children)


@pytest.fixture(scope="module")
def whole(restless_weights, tmp_path_factory, no_films):
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
    (sample.data, "write_json", 1, True), (sample.Store, "write", 1, False),
    (sample.Sampler, "make", 3, False), (sample, "save_file", 9, True), (Image.Image, "save", 7, True),
    (sample.os, "replace", 55, False),
    (sample, "write_metrics", 1, False)])
def test_a_run_that_dies_anywhere_resumes_to_the_same_bytes(tmp_path, restless_weights, whole, monkeypatch,
                                                            owner, name, call, after):
    """Between windows, in the middle of a batch, between a frame and its name. What is written is kept."""
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        dies_at(patch, owner, name, call, after)
        run(tmp_path / "cut", restless_weights)
    kept = {path: path.stat().st_mtime_ns for path in tmp_path.glob("cut/*/*") if ".tmp" not in path.name}
    run(tmp_path / "cut", restless_weights, "--resume", frames=None)
    assert contents(tmp_path / "cut") == contents(whole)
    again = [path for path, time in kept.items() if path.stat().st_mtime_ns != time]
    assert len(again) <= 12   # no more than the batch of windows or frames at work


def test_kill_9_and_resume_give_the_same_bytes(tmp_path, restless_weights, whole):
    """Two processes are killed together in the middle of a run; one goes on."""
    argv = ["--frames", "40", *QUICK, "--weights", restless_weights, "--out", str(tmp_path / "run")]
    children = start(2, argv)
    while len(list((tmp_path / "run").glob("latents/*.safetensors"))) < 8 and children[0].is_alive():
        time.sleep(0.001)
    for child in children:
        child.kill()
        child.join()
    assert [child.exitcode for child in children] == [-9, -9]
    run(tmp_path / "run", restless_weights, "--resume", frames=None)
    assert contents(tmp_path / "run") == contents(whole)
    with pytest.raises(ValueError, match="--seed 0, now it is 3"):
        run(tmp_path / "run", restless_weights, "--resume", "--seed", "3", frames=None)


def test_two_processes_make_the_bytes_of_one(tmp_path, restless_weights, whole):
    """Windows and decoding are shared out, and nothing in the folder tells."""
    argv = ["--frames", "40", *QUICK, "--weights", restless_weights, "--out", str(tmp_path / "run")]
    finish(start(2, argv))
    assert contents(tmp_path / "run") == contents(whole)


def test_an_extension_leaves_what_exists_and_can_be_interrupted_too(tmp_path, restless_weights, monkeypatch):
    """Old frames and latents are not touched; the longer video is the same however it came about."""
    once = run(tmp_path / "once", restless_weights, frames=30)
    old = {path: path.stat().st_mtime_ns for path in once.glob("*/*")}
    run(once, restless_weights, "--extend", "17", frames=None)
    assert len(old) == 60 and all(path.stat().st_mtime_ns == time for path, time in old.items())
    assert len(os.listdir(once / "frames")) == 47

    cut = run(tmp_path / "cut", restless_weights, frames=30)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        dies_at(patch, sample.Sampler, "make", 3)
        run(cut, restless_weights, "--extend", "17", frames=None)
    with pytest.raises(ValueError, match="needs a finished video and no loop: --resume"):
        run(cut, restless_weights, "--extend", "17", frames=None)
    run(cut, restless_weights, "--resume", frames=None)
    assert contents(cut) == contents(once)
    with pytest.raises(ValueError, match="at least 1"):
        run(cut, restless_weights, "--extend", "0", frames=None)


@pytest.fixture
def windows(monkeypatch):
    """What `denoise_window` is called with: (latents, frames, new, text, t_given) of each window."""
    seen, denoise = [], sample.denoise_window

    def spy(unet, schedule, latents, frames, new, text, levels, scale, seeds, t_given, *rest):
        seen.extend(zip(latents, frames.tolist(), new, zip(*text), t_given))
        return denoise(unet, schedule, latents, frames, new, text, levels, scale, seeds, t_given, *rest)

    monkeypatch.setattr(sample, "denoise_window", spy)
    return seen


def test_keyframes_come_back_unchanged_and_are_never_noised(tmp_path, restless_weights, pictures, windows):
    """First, middle and last picture: bit for bit in the video, and clean for every window that sees them."""
    folder = run(tmp_path / "run", restless_weights, "--keyframes", *pictures, "--aug", "t=100")
    for frame, colour in PICTURES.items():
        assert (sample.read_frames(folder, [frame]) == colour).all()
    levels = {(frame in PICTURES, int(t)) for _, frames, new, _, t_given in windows
              for frame, is_new, t in zip(frames, new, t_given) if not is_new}
    made = [frame for _, frames, new, _, _ in windows for frame, is_new in zip(frames, new) if is_new]
    assert sorted(made) == sorted(set(range(40)) - set(PICTURES)) and levels == {(True, 0), (False, 100)}


def test_the_last_frame_of_a_loop_is_given_the_first(tmp_path, restless_weights, windows):
    """The window that makes the end sees, right behind it, a frame with the latents of frame 0."""
    folder = run(tmp_path / "run", restless_weights, "--loop", frames=24)
    (latents, frames), = [(latents, frames) for latents, frames, new, _, _ in windows
                          if 23 in frames and new[frames.index(23)]]
    first = load_file(folder / "latents" / "00001.safetensors")["latents"]
    assert torch.equal(latents[:, frames.index(24)], first) and first.abs().max() > 0
    assert len(os.listdir(folder / "frames")) == 24
    with pytest.raises(ValueError, match="finished video and no loop"):
        run(folder, restless_weights, "--extend", "5", frames=None)


def test_each_frame_is_made_under_the_prompt_of_its_segment(tmp_path, restless_weights, windows):
    """The network sees the embedding of the prompt of the segment, and the negative prompt's."""
    run(tmp_path / "run", restless_weights, "--negative_prompt", "day",
        "--prompts", "0:dawn", "17:night, at 12:30")
    wanted = load_weights(restless_weights).context(["dawn", "night, at 12:30", "day"])
    assert len(windows) > 10
    for _, frames, new, text, _ in windows:
        segment, = {frame >= 17 for frame, is_new in zip(frames, new) if is_new}
        assert torch.allclose(text[0], wanted[int(segment)], atol=1e-5)
        assert torch.allclose(text[1], wanted[2], atol=1e-5)


def test_what_is_held_at_once_does_not_grow_with_the_video(tmp_path, restless_weights, monkeypatch):
    """Never more latents or pixels than a window or a chunk needs."""
    most, read, pixels = [], sample.Store.read, sample.read_frames
    monkeypatch.setattr(sample.Store, "read", lambda self, frames: (
        most.append(len(frames)), read(self, frames))[1])
    monkeypatch.setattr(sample, "read_frames", lambda folder, frames: (
        most.append(len(frames)), pixels(folder, frames))[1])
    run(tmp_path / "run", restless_weights, frames=60)
    assert len(most) > 60 and max(most) <= 8


@pytest.mark.parametrize("argv, words", [
    (["--keyframes", "a.png"], "expected FRAME:VALUE"),
    (["--keyframes", "0:a.png", "0:b.png"], "each frame once"),
    (["--keyframes", "40:a.png"], "name frame 40: the last one is 39"),
    (["--prompts", "50:night"], "name frame 50"),
    (["--keyframes", "0:a.png", "--world", "3"], "both give frame 0: drop one"),
    (["--keyframes", "3:a.png", "--loop"], "first picture is at 3: add one"),
    (["--schedule", "autoregressive", "--loop"], "choose hierarchical"), (["--resume"], "holds no run"),
    (["--keyframes", "5:nothing.png"], "no picture can be read from nothing.png"),
    (["--extend", "5"], "holds no run"), (["--max_stride", "0"], "give 1 or more")])
def test_impossible_requests_say_what_to_do(tmp_path, restless_weights, monkeypatch, argv, words):
    """What was found, what was expected, what to do; and nothing is written."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=words):
        run("run", restless_weights, *argv)
    assert not os.listdir(tmp_path)
