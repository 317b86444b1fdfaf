"""pytest tests/test_joint.py: a window as long as a video, attention in scopes, processes that share it."""

import math
import multiprocessing
import os
import socket
import time
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file

import sample
from model import Around, SharedWindow, TemporalAttention, load_weights, scope_mask
from schedule import assign, gain, joint, ladder, share, verify
from test_long import contents, make_quick, quick_runs, run   # noqa: F401

SCOPES = {"full": (math.inf, 0), "local": (4, 0), "dual": (3, 5), "nothing near": (0, 2)}
CLIPS = ([10, 10], [7, 9, 4], [3, 8, 2, 7])   # uneven, and shorter than a radius
TOTAL = 20
CASES = [(name, torch.float32) for name in ("full", "local", "dual")] + [("dual", torch.float64)]


# ------------------------------------------------------------------------------------------------------------
# Scopes of attention
# ------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("radius, n_global", SCOPES.values(), ids=SCOPES)
@torch.no_grad()
def test_a_scope_is_softmax_over_exactly_the_frames_in_it(radius, n_global):
    """Frame by frame, with the others taken out of the sums by hand: near, global, each once."""
    torch.manual_seed(0)
    layer, clips = TemporalAttention(8, 2, 4).double(), SharedWindow([TOTAL], 0, radius, n_global)
    for parameter in layer.parameters():
        parameter.normal_()
    x, frames = torch.randn(TOTAL, 8, 2, 2).double(), torch.arange(TOTAL)
    window = window_of(clips, frames, torch.randn(1, TOTAL, 4).double())
    everywhere = {round(i * (TOTAL - 1) / max(1, n_global - 1)) for i in range(n_global)}
    assert n_global == 0 or 0 in everywhere               # an anchor that never drifts
    out = layer(x, window)
    for i in range(TOTAL):
        seen = [j for j in range(TOTAL) if abs(i - j) <= radius or j in everywhere]
        place = seen.index(i)
        alone = window_of(SharedWindow([len(seen)]), frames[seen], window.emb[:, seen])
        assert (layer(x[seen], alone)[place] - out[i]).abs().max() <= 1e-12


def window_of(clips, frames, emb):
    """The `Around` of one window as far as temporal attention reads it."""
    distance = (frames[:, None] - frames).double()[None]
    return Around(1, len(frames), clips, None, distance, emb, *[None] * 4)


def test_the_mask_by_hand():
    """Queries 2 and 3 of 6 frames, radius 1, frames 0 and 5 everywhere; -inf is out of sight."""
    queries, keys = torch.tensor([2, 3]), torch.arange(6)
    far = -math.inf
    assert scope_mask(queries, keys, 1, torch.tensor([0, 5])).tolist() == [
        [0, 0, 0, 0, far, 0], [0, far, 0, 0, 0, 0]]
    assert not scope_mask(queries, keys, math.inf, torch.tensor([])).any()
    assert SharedWindow([6]).mask is None and SharedWindow([6], 0, 5).mask is None


def test_softmax_over_halves_of_the_keys_merges_by_log_sum_exp_and_not_by_the_mean():
    """To save memory attention may go over the keys in two halves. Their mean is wrong: each softmax has
    been divided by a sum of its own, so a half without any likeness counts as much as one that is all alike.
    Weighted by these sums, each in the share exp(l) of its logarithm l = log sum exp, they are exact."""
    generator = torch.Generator().manual_seed(0)
    k, v = torch.randn(2, 64, 1024, 40, generator=generator)
    q = torch.randn(64, 16, 40, generator=generator)
    attend = lambda k, v: ((logits := q @ k.mT / 40 ** 0.5).softmax(-1) @ v, logits.logsumexp(-1))
    exact, _ = attend(k, v)
    (a, log_a), (b, log_b) = (attend(k[:, half], v[:, half]) for half in (slice(0, 512), slice(512, None)))
    share_a = (log_a - torch.logaddexp(log_a, log_b)).exp()[..., None]
    assert ((a + b) / 2 - exact).abs().max() > 0.02
    assert (share_a * a + (1 - share_a) * b - exact).abs().max() <= 1e-6


# ------------------------------------------------------------------------------------------------------------
# Plans
# ------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("n, given, stride", [
    (1, (0,), 16), (2, (0,), 1), (121, (0,), 16), (121, (0,), 4), (300, (0,), 1), (100, (0, 40, 99), 4)])
def test_a_joint_plan_is_the_ladder_with_its_keys_in_one_window(n, given, stride):
    """All at level 0; what fills the gaps is the same, and every frame is made once."""
    plan, rungs = joint(n, given, stride), ladder(n, given, stride)
    verify(plan, n, given)
    fills = lambda plan: [(w.frames, w.new) for w in plan if w.gap <= stride and len(w.new) <= 3]
    assert sum(w.level == 0 for w in plan) <= 1 and fills(plan) == fills(rungs)
    assert plan == [] or set(plan[0].frames) == {*given, *range(n)[::stride], n - 1}


def test_devices_share_a_joint_window_and_the_rest_is_shared_out():
    """It begins when all are free, ends with all; its gain counts, its inner traffic does not."""
    plan = joint(121, max_stride=4)
    batches, work = [[window] for window in plan], [len(window.frames) for window in plan]
    for devices in (1, 2, 3):
        places = assign(batches, work, devices)
        assert places[0] == (None, 31 / devices)
        assert {device for device, _ in places[1:]} == set(range(devices))
    slow, _ = gain(batches, work, 2, together=1)
    fast, reads = gain(batches, work, 2)
    assert slow < fast <= 2 and sum(work) / slow - sum(work) / fast == pytest.approx(31 / 2) and reads > 0
    assert share(11, 4) == [3, 3, 3, 2] and share(3, 3) == [1, 1, 1]
    with pytest.raises(ValueError, match="4 processes cannot share a window of 3 frames"):
        share(3, 4)


@pytest.mark.parametrize("argv, words", [
    (["--global_frames", "4"], "without --radius"), (["--radius", "-1"], "neither can be below 0"),
    (["--guidance_rescale", "0.7", "--frames", "20"], "measures whole windows, and 11 processes share one"),
    (["--frames", "10"], "11 processes cannot share a window of 10 frames")])
def test_what_does_not_combine_is_refused(tmp_path, restless_weights, monkeypatch, argv, words):
    """In one sentence, before anything is written."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sample, "processes", lambda: (0, 11))
    with pytest.raises(ValueError, match=words):
        run("run", restless_weights, "--schedule", "joint", "--max_stride", "1", *argv)
    assert not os.listdir(tmp_path)


# ------------------------------------------------------------------------------------------------------------
# Processes that share a window
# ------------------------------------------------------------------------------------------------------------

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
    clips, (x, t, context, frames, given) = SharedWindow(lens, rank, *scope), window(unet.out[2].weight.dtype)
    own = lambda numbers: numbers[:, clips.here]
    return unet(x[:, :, clips.here], own(t), context, own(frames), own(given), clips=clips)


def process(rank, ports, folder, weights):
    """One of up to four processes: its clips of the window in groups of 2, 3 and 4, and its part of a run."""
    torch.set_num_threads(1)
    unet, received, irecv = load_weights(weights).unet, [], dist.irecv
    dist.irecv = lambda tensor, source: (received.append(tensor.nbytes), irecv(tensor, source))[1]
    for lens, port in zip(CLIPS, ports):
        if rank < len(lens):
            world = str(len(lens))
            os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port), "RANK": str(rank),
                           "LOCAL_RANK": str(rank), "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world}
            if len(lens) == 3:   # it makes a process group of its own
                run_joint(f"{folder}/run", weights)
            else:
                dist.init_process_group("gloo")
            for name, dtype in CASES:
                received.clear()
                out = part(unet.to(dtype), lens, rank, SCOPES[name])
                torch.save((out, sum(received)), f"{folder}/{lens} {name} {dtype} {rank}.pt")
            dist.destroy_process_group()


def run_joint(folder, weights):
    """A run of sample.py whose keys are one window, dual-scope; fills are shared out as ever."""
    make_quick()   # there are no fixtures in a child
    return run(folder, weights, "--world", "1", "--schedule", "joint", "--max_stride", "4", "--radius", "3",
               "--global_frames", "3", "--steps", "2", "--guidance_scale", "2")


@pytest.fixture(scope="module")
def shared(restless_weights, tmp_path_factory):
    """The folder where four processes have left what they said and made."""
    folder, context = tmp_path_factory.mktemp("shared"), multiprocessing.get_context("forkserver")
    sockets = [socket.create_server(("localhost", 0)) for _ in CLIPS]
    ports = [s.getsockname()[1] for s in sockets]
    for s in sockets:
        s.close()
    processes = [context.Process(target=process, args=(rank, ports, str(folder), restless_weights))
                 for rank in range(4)]
    for p in processes:
        p.start()
    for _ in range(6000):   # five minutes, should they wait for each other
        if None not in (codes := [p.exitcode for p in processes]) or any(codes):
            break
        time.sleep(0.05)
    for p in processes:
        p.kill()   # if one has failed, the others wait for it
    assert codes == [0] * 4
    return folder


@pytest.mark.parametrize("lens", CLIPS, ids=str)
@pytest.mark.parametrize("name, dtype", CASES)
def test_clips_on_several_processes_are_the_window_on_one(shared, restless_weights, lens, name, dtype):
    """To 1e-5 in float32; in float64 to 1e-12, so what is left is rounding and nothing else."""
    parts = [torch.load(f"{shared}/{lens} {name} {dtype} {rank}.pt")[0] for rank in range(len(lens))]
    whole = part(load_weights(restless_weights).unet.to(dtype), [TOTAL], 0, SCOPES[name])
    assert [p.shape[2] for p in parts] == lens and whole.abs().max() > 1
    assert (torch.cat(parts, 2) - whole).abs().max() <= (1e-5 if dtype == torch.float32 else 1e-12)


@pytest.mark.parametrize("lens", ([10, 10], [3, 8, 2, 7]), ids=str)
@pytest.mark.parametrize("name", ("full", "dual"))
def test_traffic_is_what_the_plan_says(shared, restless_weights, small_config, monkeypatch, lens, name):
    """Of the process that receives most: what temporal layers exchange, and 5 % more at most, which is the
    numbers of the frames and the latents of given ones."""
    radius, n_global = SCOPES[name]
    scope = ["--radius", str(radius), "--global_frames", str(n_global)] if name != "full" else []
    args = sample.parse(["--weights", restless_weights, "--guidance_scale", "2", *scope])   # two videos
    monkeypatch.setattr(sample, "share", lambda n_frames, devices: lens)
    config = replace(small_config, size=8 * small_config.vae_factor)
    faster, expected = sample.clip_gain(config, TOTAL, len(lens), args)
    said = [torch.load(f"{shared}/{lens} {name} torch.float32 {rank}.pt") for rank in range(len(lens))]
    counted = max(received for _, received in said)
    assert expected < counted < 1.05 * expected and 0 < faster < len(lens)


def test_a_joint_run_by_three_processes_is_that_by_one(shared, restless_weights, tmp_path):
    """Latents to 1e-5 after all steps, pixels to 1 of 255, and the same files."""
    one = run_joint(tmp_path / "one", restless_weights)
    latents, others = (load_file(f"{path}/latents.safetensors") for path in (one, shared / "run"))
    assert others["made"].all() and (latents["latents"] - others["latents"]).abs().max() <= 1e-5
    pixels, others = (sample.read_frames(path, range(40)).astype(int) for path in (one, shared / "run"))
    assert abs(pixels - others).max() <= 1 and contents(one).keys() == contents(shared / "run").keys()
