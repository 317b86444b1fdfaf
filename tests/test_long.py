"""pytest tests/test_long.py: long videos stop and go on, grow, pass through pictures, share their work."""

import math
import multiprocessing
import os
import socket
import time
from itertools import count
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import sample
from model import load_weights

QUICK = ["--steps", "1", "--guidance_scale", "1", "--batch_size", "4", "--decode_chunk", "4"]


def command(folder, weights, *more, frames=40):
    """The command line of a short run."""
    length = ["--frames", str(frames)] if frames else []
    return [*length, *QUICK, "--weights", weights, "--out", str(folder), *more]


def run(folder, *rest, **options):
    """One short run of sample.py; returns its folder."""
    sample.main(command(folder, *rest, **options))
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


def start(world, *rest):
    """Start a short run by several processes."""
    with socket.create_server(("localhost", 0)) as free:
        port = free.getsockname()[1]
    args = world, port, torch.get_num_threads(), command(*rest)
    children = [multiprocessing.get_context("forkserver").Process(target=one_of_many, args=(rank, *args))
                for rank in range(world)]
    for child in children:
        child.start()
    return children


def finish(children):
    """Wait for processes. If one fails, the others would wait for it for ever."""
    while any(child.is_alive() for child in children) and not any(child.exitcode for child in children):
        time.sleep(0.05)
    codes = [child.exitcode for child in children]
    for child in children:
        child.kill()
        child.join()
    assert codes == [0] * len(children)


@pytest.fixture(scope="module")
def whole(restless_weights, tmp_path_factory, no_films):
    """A run of 40 frames that nothing disturbs."""
    return run(tmp_path_factory.mktemp("whole") / "run", restless_weights)


def dies_at(monkeypatch, owner, name, call):
    """Interrupt the program before the call-th call of a function."""
    function, calls = getattr(owner, name), count(1)

    def dies(*args, **options):
        if next(calls) == call:
            raise KeyboardInterrupt
        return function(*args, **options)

    monkeypatch.setattr(owner, name, dies)


@pytest.mark.parametrize("owner, name, call", [
    (sample.Store, "write", 1), (sample.Sampler, "make", 3), (sample.os, "replace", 10),
    (sample.os, "replace", 55), (sample, "write_metrics", 1)])
def test_a_run_that_dies_anywhere_resumes_to_the_same_bytes(tmp_path, restless_weights, whole, monkeypatch,
                                                            owner, name, call):
    """Between windows, in the middle of a batch, between a frame and its name. What is written is kept."""
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        dies_at(patch, owner, name, call)
        run(tmp_path / "cut", restless_weights)
    kept = {path: path.stat().st_mtime_ns for path in tmp_path.glob("cut/*/*") if ".tmp" not in path.name}
    run(tmp_path / "cut", restless_weights, "--resume", frames=None)
    assert contents(tmp_path / "cut") == contents(whole)
    again = [path for path, time in kept.items() if path.stat().st_mtime_ns != time]
    assert len(again) <= 12   # no more than the batch of windows or frames at work


def test_kill_9_and_resume_give_the_same_bytes(tmp_path, restless_weights, whole):
    """Two processes are killed together in the middle of a run; one goes on."""
    children = start(2, tmp_path, restless_weights)
    while len(list(tmp_path.glob("latents/*.safetensors"))) < 8 and children[0].is_alive():
        time.sleep(0.001)
    for child in children:
        child.kill()
        child.join()
    assert [child.exitcode for child in children] == [-9, -9]
    run(tmp_path, restless_weights, "--resume", frames=None)
    assert contents(tmp_path) == contents(whole)
    with pytest.raises(ValueError, match="--seed 0, now it is 3"):
        run(tmp_path, restless_weights, "--resume", "--seed", "3", frames=None)


def test_two_processes_make_the_bytes_of_one(tmp_path, restless_weights, whole):
    """Windows and decoding are shared out, and nothing in the folder tells."""
    finish(start(2, tmp_path, restless_weights))
    assert contents(tmp_path) == contents(whole)


def test_an_extension_leaves_what_exists_and_can_be_interrupted_too(tmp_path, restless_weights, monkeypatch):
    """Old frames and latents are not touched; the longer video is the same however it came about."""
    once, cut = (run(tmp_path / name, restless_weights, frames=30) for name in ("once", "cut"))
    old = {path: path.stat().st_mtime_ns for path in once.glob("*/*")}
    run(once, restless_weights, "--extend", "17", frames=None)
    assert len(old) == 60 and all(path.stat().st_mtime_ns == time for path, time in old.items())
    assert len(os.listdir(once / "frames")) == 47
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        dies_at(patch, sample.Sampler, "make", 3)
        run(cut, restless_weights, "--extend", "17", frames=None)
    with pytest.raises(ValueError, match="needs a finished video and no loop: --resume"):
        run(cut, restless_weights, "--extend", "17", frames=None)
    run(cut, restless_weights, "--resume", frames=None)
    assert contents(cut) == contents(once)


@pytest.fixture
def windows(monkeypatch):
    """What `denoise_window` gets: (latents, frames, new, text, prompt_start, t_given) of each window."""
    seen, denoise = [], sample.denoise_window

    def spy(*args):
        _, _, latents, frames, new, text, prompt_start, _, _, _, t_given, *_ = args
        seen.extend(zip(latents, frames.tolist(), new, zip(*text), prompt_start.tolist(), t_given))
        return denoise(*args)

    monkeypatch.setattr(sample, "denoise_window", spy)
    return seen


def test_keyframes_come_back_unchanged_and_are_never_noised(tmp_path, restless_weights, windows):
    """First, middle and last picture: bit for bit in the video, and clean for every window that sees them."""
    pictures = {0: (200, 40, 40), 19: (40, 40, 200), 39: (40, 160, 40)}
    for frame, colour in pictures.items():
        Image.new("RGB", (64, 64), colour).save(tmp_path / f"{frame}.png")
    folder = run(tmp_path / "run", restless_weights, "--aug", "t=100", "--keyframes",
                 *[f"{frame}:{tmp_path / str(frame)}.png" for frame in pictures])
    for frame, colour in pictures.items():
        assert (sample.read_frames(folder, [frame]) == colour).all()
    levels = {(frame in pictures, int(t)) for _, frames, new, *_, t_given in windows
              for frame, is_new, t in zip(frames, new, t_given) if not is_new}
    made = [frame for _, frames, new, *_ in windows for frame, is_new in zip(frames, new) if is_new]
    assert sorted(made) == sorted(set(range(40)) - set(pictures)) and levels == {(True, 0), (False, 100)}


def test_the_last_frame_of_a_loop_is_given_the_first(tmp_path, restless_weights, windows):
    """The window that makes the end sees, right behind it, a frame with the latents of frame 0."""
    folder = run(tmp_path / "run", restless_weights, "--loop", frames=24)
    (latents, frames), = [(latents, frames) for latents, frames, new, *_ in windows
                          if 23 in frames and new[frames.index(23)]]
    first = load_file(folder / "latents" / "00001.safetensors")["latents"]
    assert torch.equal(latents[:, frames.index(24)], first) and first.abs().max() > 0
    assert len(os.listdir(folder / "frames")) == 24
    with pytest.raises(ValueError, match="finished video and no loop"):
        run(folder, restless_weights, "--extend", "5", frames=None)


def test_each_frame_is_made_under_the_prompt_of_its_segment(tmp_path, restless_weights, windows):
    """The network sees the embedding of its prompt and of the negative prompt, and when the former began."""
    run(tmp_path, restless_weights, "--negative_prompt", "day", "--prompts", "0:dawn", "17:night, at 12:30")
    dawn, night, day = load_weights(restless_weights).context(["dawn", "night, at 12:30", "day"])
    assert len(windows) > 10
    for _, frames, new, (prompt, negative), prompt_start, _ in windows:
        late, = {frame >= 17 for frame, is_new in zip(frames, new) if is_new}
        assert torch.allclose(prompt, night if late else dawn, atol=1e-5)
        assert prompt_start == (17 if late else -math.inf)
        assert torch.allclose(negative, day, atol=1e-5)


def test_what_is_held_at_once_does_not_grow_with_the_video(tmp_path, restless_weights, monkeypatch):
    """Never more latents or pixels than a window or a chunk needs."""
    held, latents, pixels = [], sample.Store.read, sample.read_frames
    watch = lambda read: lambda place, frames: (held.append(len(frames)), read(place, frames))[1]
    monkeypatch.setattr(sample.Store, "read", watch(latents))
    monkeypatch.setattr(sample, "read_frames", watch(pixels))
    run(tmp_path, restless_weights, frames=60)
    assert sum(held) > 2 * 60 and max(held) <= 8    # latents to decode, and pixels to measure
