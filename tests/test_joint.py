"""pytest tests/test_joint.py: a window as long as a video, attention in scopes, processes that share it."""

import math
import multiprocessing
import os
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file

import sample
from model import ClipParallel, TemporalAttention, load_weights
from test_long import contents, finish, no_films, run, start   # noqa: F401

TOTAL = 20
SCOPES = {"full": (math.inf, 0), "local": (4, 0), "dual": (3, 5), "nothing near": (0, 2)}
CLIPS = ([10, 10], [3, 8, 2, 7])   # even; and uneven, some shorter than a radius
CASES = [(name, torch.float32) for name in ("full", "local", "dual")] + [("dual", torch.float64)]


@pytest.mark.parametrize("radius, n_global", SCOPES.values(), ids=SCOPES)
@torch.no_grad()
def test_a_scope_is_softmax_over_exactly_the_frames_in_it(radius, n_global):
    """Frame by frame, with the others taken out of the window by hand: near, global, each counted once."""
    torch.manual_seed(0)
    layer = TemporalAttention(8, 2, 4).double()
    for parameter in layer.parameters():
        parameter.normal_()
    x, emb = torch.randn(TOTAL, 8, 2, 2).double(), torch.randn(1, TOTAL, 4).double()
    frames = torch.arange(TOTAL)
    window = lambda clips, frames: SimpleNamespace(
        b=1, clips=clips, distance=(frames[:, None] - frames).double()[None], emb=emb[:, frames])
    everywhere = {round(i * (TOTAL - 1) / max(1, n_global - 1)) for i in range(n_global)}
    assert n_global == 0 or 0 in everywhere               # an anchor that never drifts
    out = layer(x, window(ClipParallel([TOTAL], 0, radius, n_global), frames))
    for i in range(TOTAL):
        seen = [j for j in range(TOTAL) if abs(i - j) <= radius or j in everywhere]
        alone = layer(x[seen], window(ClipParallel([len(seen)]), frames[seen]))
        assert (alone[seen.index(i)] - out[i]).abs().max() <= 1e-12


def test_the_mask_by_hand():
    """Process 1 has frames 2 and 3 of 6, radius 1, frames 0 and 5 everywhere; -inf is out of sight."""
    clips, far = ClipParallel([2, 2, 2], 1, 1, 2), -math.inf
    assert clips.seen_places[1] == [0, 1, 2, 3, 4, 5]
    assert clips.mask.tolist() == [[0, 0, 0, 0, far, 0], [0, far, 0, 0, 0, 0]]
    assert ClipParallel([6]).mask is None and ClipParallel([6], 0, 5).mask is None


# --- processes that share a window ------------------------------------------------------------------------

def window(dtype):
    """A window of TOTAL frames for two videos, unevenly spaced: x, t, context, frames, given."""
    g = torch.Generator().manual_seed(3)
    given = torch.zeros(2, TOTAL, dtype=torch.bool)
    given[0, [0, 4, 5, 17]] = given[1, [9, 19]] = True     # nearest ones lie in other clips, or nowhere
    frames = torch.randint(1, 5, (2, TOTAL), generator=g).cumsum(1)
    x, context = torch.randn(2, 4, TOTAL, 8, 8, generator=g), torch.randn(2, 77, 32, generator=g)
    return x.to(dtype), torch.randint(0, 1000, (2, TOTAL), generator=g), context.to(dtype), frames, given


@torch.no_grad()
def part(unet, lens, rank, scope):
    """What the UNet says about one clip of that window."""
    clips, (x, t, context, frames, given) = ClipParallel(lens, rank, *scope), window(unet.out[2].weight.dtype)
    own = lambda numbers: numbers[:, clips.here]
    return unet(x[:, :, clips.here], own(t), context, own(frames), own(given), clips=clips)


def process(rank, folder, weights):
    """One of up to four processes: its clips of the window in a group of two, then of four."""
    torch.set_num_threads(1)
    unet = load_weights(weights).unet
    for lens in CLIPS:
        if rank < len(lens):
            dist.init_process_group("gloo", f"file://{folder}/group_of_{len(lens)}", rank=rank,
                                    world_size=len(lens))
            for name, dtype in CASES:
                out = part(unet.to(dtype), lens, rank, SCOPES[name])
                torch.save(out, f"{folder}/{lens} {name} {dtype} {rank}")
            dist.destroy_process_group()


def test_clips_on_several_processes_are_the_window_on_one(restless_weights, tmp_path):
    """To 1e-5 in float32; in float64 to 1e-12, so what is left is rounding and nothing else."""
    context = multiprocessing.get_context("forkserver")
    children = [context.Process(target=process, args=(rank, tmp_path, restless_weights)) for rank in range(4)]
    for child in children:
        child.start()
    finish(children)
    for name, dtype in CASES:
        whole = part(load_weights(restless_weights).unet.to(dtype), [TOTAL], 0, SCOPES[name])
        assert whole.abs().max() > 1
        for lens in CLIPS:
            parts = [torch.load(tmp_path / f"{lens} {name} {dtype} {rank}") for rank in range(len(lens))]
            assert [p.shape[2] for p in parts] == lens, name
            difference = (torch.cat(parts, 2) - whole).abs().max()
            assert difference <= (1e-5 if dtype == torch.float32 else 1e-12), (name, lens)


def test_a_joint_run_by_three_processes_is_that_by_one(restless_weights, tmp_path):
    """Keyframes in a window that they share, the rest shared out: latents to 1e-5 of the largest."""
    flags = ["--world", "1", "--schedule", "joint", "--max_stride", "4", "--scope", "3", "3", "--aug", "t=50",
             "--steps", "2", "--guidance_scale", "2",
             "--temperature", "1"]    # the norms divide by the size of the noise: less enlarges rounding
    one = run(tmp_path / "one", restless_weights, *flags)
    finish(start(3, tmp_path / "three", restless_weights, *flags))
    assert contents(one).keys() == contents(tmp_path / "three").keys()
    for name in os.listdir(one / "latents"):
        latents, others = (load_file(tmp_path / n / "latents" / name)["latents"] for n in ("one", "three"))
        assert (latents - others).abs().max() <= 1e-5 * others.abs().max()     # values up to 4, in float32
    pixels, others = (sample.read_frames(tmp_path / n, range(40)).astype(int) for n in ("one", "three"))
    assert abs(pixels - others).max() <= 1


def test_more_processes_than_frames_and_several_machines_are_refused(tmp_path, restless_weights, monkeypatch):
    monkeypatch.setattr(sample, "processes", lambda: (0, 11))
    monkeypatch.setattr(dist, "barrier", lambda: None)
    monkeypatch.setattr(dist, "broadcast_object_list", lambda shared: None)
    joint = ["--schedule", "joint", "--max_stride", "1"]
    with pytest.raises(ValueError, match="11 processes cannot share a window of 10 frames"):
        run(tmp_path, restless_weights, *joint, frames=10)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="several machines share no folder"):
        run(tmp_path, restless_weights, *joint)
