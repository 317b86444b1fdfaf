"""pytest tests/test_sample.py: a run leaves what it promises, a seed fixes every byte, metrics see faults."""

import csv
import json
import os
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

import data
import diffusion
import sample
from model import is_temporal, load_weights, save_weights
from sample import write_mp4
from schedule import joint, ladder, seed
from test_long import quick_runs   # noqa: F401


def run(tmp_path, weights, *more, name="run", frames=20):
    """One short run of sample.py; returns its folder."""
    folder = tmp_path / name
    sample.main(["--frames", str(frames), "--steps", "2", "--fill_steps", "2", "--weights", weights,
                 "--out", str(folder), *more])
    return folder


def pixels(folder):
    """All numbered frames of a run, in order."""
    names = sorted(os.listdir(folder / "frames"))
    return np.stack([np.array(Image.open(folder / "frames" / name)) for name in names])


@pytest.mark.parametrize("frames", [1, 2, 20])
def test_a_run_leaves_every_file_it_promises(tmp_path, restless_weights, monkeypatch, frames):
    """N numbered frames, moving pictures, sheet, plot, metrics, latents and arguments, for any N."""
    monkeypatch.setattr(sample, "ANIMATION_FRAMES", 20)
    monkeypatch.setattr(sample, "write_mp4", write_mp4)
    folder = run(tmp_path, restless_weights, frames=frames)
    assert len(os.listdir(folder / "frames")) == frames and (folder / "frames" / "00001.png").exists()
    for name in ("video.gif", "video.webp", "sheet.png", "drift.png"):
        with Image.open(folder / name) as image:
            image.load()
    if shutil.which("ffmpeg"):
        film = data.run_tool(["ffprobe", "-v", "error", "-count_frames", "-show_entries",
                              "stream=width,height,pix_fmt,nb_read_frames", "-of", "csv=p=0",
                              str(folder / "video.mp4")])
        assert film.decode().strip() == f"256,256,yuv420p,{frames}"
    rows = list(csv.DictReader(open(folder / "metrics.csv")))
    assert [int(row["frame"]) for row in rows] == list(range(1, frames + 1))
    assert json.load(open(folder / "args.json"))["frames"] == frames
    assert not [name for name in os.listdir(folder) if ".tmp" in name]


def test_same_seed_same_bytes_and_another_seed_another_video(tmp_path, restless_weights):
    """Two runs with one seed agree in every pixel; another seed does not."""
    first, again = (pixels(run(tmp_path, restless_weights, "--seed", "7", name=name)) for name in ("a", "b"))
    other = pixels(run(tmp_path, restless_weights, "--seed", "8", name="c"))
    assert np.array_equal(first, again) and not np.array_equal(first, other)


@pytest.mark.parametrize("schedule", ["ladder", "seed"])
def test_result_does_not_depend_on_how_windows_are_batched(tmp_path, restless_weights, schedule):
    """Noise belongs to (seed, frame): batches of 1 and of 8 windows agree up to rounding."""
    options = [restless_weights, "--schedule", schedule, "--batch_size"]
    one, many = (pixels(run(tmp_path, *options, size, name=size)).astype(int) for size in ("1", "8"))
    assert abs(one - many).max() <= 1


def test_a_given_picture_comes_back_unchanged(tmp_path, restless_weights):
    """Frame 1 of the video is the picture, bit for bit: no round trip through the VAE."""
    picture = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(picture).save(tmp_path / "photo.png")
    folder = run(tmp_path, restless_weights, "--image", str(tmp_path / "photo.png"))
    assert np.array_equal(pixels(folder)[0], picture)


def test_any_picture_is_cropped_and_resized(tmp_path, restless_weights):
    """A picture of another size and shape, with transparency, is taken too."""
    Image.new("RGBA", (301, 173), (200, 10, 10, 128)).save(tmp_path / "photo.png")
    folder = run(tmp_path, restless_weights, "--image", str(tmp_path / "photo.png"), frames=2)
    assert pixels(folder).shape == (2, 64, 64, 3)


def test_interrupted_run_resumes_to_the_same_video(tmp_path, restless_weights, monkeypatch):
    """A run that dies after a level keeps what it had.

    --resume makes the rest, and the result is the uninterrupted one."""
    whole = pixels(run(tmp_path, restless_weights, name="whole", frames=40))
    windows, calls = sample.Sampler.windows, []

    def dies(self, *rest):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        windows(self, *rest)

    monkeypatch.setattr(sample.Sampler, "windows", dies)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, restless_weights, name="cut", frames=40)
    made = []
    monkeypatch.setattr(sample.Sampler, "windows", lambda self, *rest: (made.append(1), windows(self, *rest)))
    assert np.array_equal(whole, pixels(run(tmp_path, restless_weights, "--resume", name="cut", frames=40)))
    monkeypatch.setattr(sample.Sampler, "windows", windows)
    with pytest.raises(ValueError, match="--seed"):
        run(tmp_path, restless_weights, "--resume", "--seed", "3", name="cut", frames=40)


def test_guidance_of_one_is_off_and_more_changes_the_picture(tmp_path, restless_weights):
    """Scale 1 runs the network once per step.

    A higher scale really leads to another picture, told apart by the prompt."""
    options = ["--prompt", "wind left fast, few clouds, dusk, red balloon", "--guidance_scale"]
    one, more = (pixels(run(tmp_path, restless_weights, *options, scale, name=scale, frames=3))
                 for scale in "14")
    assert not np.array_equal(one, more)


@pytest.mark.parametrize("mode, noised, labelled", [
    ("add", True, True), ("label", False, True), ("none", False, False)])
def test_context_noise_modes(restless_weights, tmp_path, mode, noised, labelled):
    """add: made frames are noised and labelled so; label: only labelled; none: neither.

    The user's frame stays clean at t = 0."""
    args = sample.parse(["--weights", restless_weights, "--steps", "2", "--aug", "t=100",
                         "--context_noise", mode])
    sampler = sample.Sampler(load_weights(restless_weights), args, torch.device("cpu"), {})
    window = ladder(61)[1]
    latents = torch.randn(1, 4, 61, 16, 16, generator=torch.Generator().manual_seed(0))
    seen = {}
    sampler.denoise = lambda x, t, new, *rest: seen.update(x=x, t=t, new=new) or x
    with torch.no_grad():
        sampler.windows([(0, window)], latents.clone(), sampler.contexts(["dusk"]), [0], user=(0,))
    for place, frame in enumerate(window.frames):
        if frame not in window.new:
            same = torch.equal(seen["x"][0, :, place], latents[0, :, frame])
            assert same == (frame == 0 or not noised)
            assert seen["t"][0, place] == (100 if labelled and frame != 0 else 0)


def test_fills_have_steps_and_guidance_of_their_own(restless_weights):
    """--steps and --guidance_scale for windows that start or go on, --fill_... between known frames."""
    args = sample.parse(["--weights", restless_weights, "--steps", "7", "--fill_steps", "2",
                         "--guidance_scale", "3", "--fill_guidance_scale", "1"])
    sampler = sample.Sampler(load_weights(restless_weights), args, torch.device("cpu"), {})
    latents, asked = torch.zeros(1, 4, 121, 16, 16), {}
    for window in ladder(121):
        sampler.denoise = lambda x, t, new, contexts, steps, scale, frames, clips, **more: (
            asked.setdefault(window.stage, (steps, scale)) and x)
        with torch.no_grad():
            sampler.windows([(0, window)], latents, sampler.contexts(["dusk"]), [0], user=(0,))
    assert asked == {"starter": (7, 3), "extrap": (7, 3), "interp": (2, 1)}
    starter, fill = ladder(121)[0], next(window for window in ladder(121) if window.stage == "interp")
    assert sample.cost(starter, args) == len(starter.frames) * 7 * 2
    assert sample.cost(fill, args) == len(fill.frames) * 2


def test_a_first_frame_takes_fresh_noise_at_every_step_if_eta_is_not_0(restless_weights, monkeypatch):
    """At eta 0 one noise alone is drawn, that of frame 0; else another for every step, of the seed alone."""
    assert sample.parse([]).eta == 1 and sample.parse(["--preset", "sd15", "--weights", "x"]).eta == 0
    drawn, frame_noise = [], sample.frame_noise
    monkeypatch.setattr(sample, "frame_noise", lambda seed, frame, shape: (
        drawn.append((seed, frame)), frame_noise(seed, frame, shape))[1])
    made = {}
    for eta in ("0", "1"):
        sampler, *_ = sampler_of(restless_weights, "--eta", eta)
        made[eta] = sampler.first_frames([7, 8], ["dusk", "dusk"])
        assert len(set(drawn)) == len(drawn) == 2 * (1 + sample.FIRST_FRAME_STEPS * int(eta))
        drawn.clear()
    assert not torch.allclose(made["0"], made["1"], atol=0.01)
    assert torch.allclose(sampler.first_frames([8], ["dusk"])[0], made["1"][1], atol=1e-4)
    with pytest.raises(ValueError, match="--eta 1.5"):
        sample.parse(["--eta", "1.5"])


def test_a_batch_has_one_number_of_steps_and_one_guidance(restless_weights):
    """Keyframes 80 apart are led to, others 16 apart filled between: same stage, level and length."""
    args = sample.parse(["--weights", restless_weights, "--fill_steps", "10", "--fill_guidance_scale", "1",
                         "--frames", "97", "--max_stride", "4", "--keyframes", "0:a", "16:b", "96:c"])
    plan, _, _ = sample.frame_plan(args)
    efforts = [{sample.effort(window, args) for _, window in batch}
               for batch in sample.make_batches(plan, 1, args)[0]]
    assert {(10, 1.0), (10, 1.5)} == set().union(*efforts) and all(len(one) == 1 for one in efforts)


def test_untrained_temporal_layers_are_mentioned(tmp_path, small_weights, restless_weights, capsys):
    """A video of a fresh model is a row of unrelated pictures, and the run says why."""
    run(tmp_path, restless_weights, name="trained", frames=2)
    assert "are untrained" not in capsys.readouterr().out
    run(tmp_path, small_weights, name="fresh", frames=2)
    assert "the temporal layers of stage starter, extrap, interp are untrained" in capsys.readouterr().out


def test_each_stage_file_makes_the_windows_of_its_stage(tmp_path, small_weights, restless_weights):
    """--temporal with a file of stage interp: starter windows from --weights, interp from the file."""
    model = load_weights(restless_weights)
    stage_file = str(tmp_path / "interp.safetensors")
    save_weights(stage_file, model, torch.float32, parts=("unet",), only=is_temporal, stage="interp")
    plainly = ("--joins", "plain")                     # or keys would show what is filled around them
    made = lambda name, *more: pixels(run(tmp_path, small_weights, *plainly, *more, name=name, frames=30))
    plain, mixed = made("plain"), made("mixed", "--temporal", stage_file)
    keys = [frame for window in ladder(30) if window.stage == "starter" for frame in window.new]
    filled = [frame for window in ladder(30) if window.stage == "interp" for frame in window.new]
    assert keys and filled
    assert np.array_equal(plain[keys], mixed[keys]) and not np.array_equal(plain[filled], mixed[filled])


def test_truth_measured_against_itself_is_perfect():
    """No drift, ratios of 1, speed 1, all balloons found: the metrics' zero point, on all kinds of worlds."""
    plan, speeds = ladder(61), []
    for i in range(6):
        world = data.SkyWorld(data.SPLITS["test"] + i)
        truth = world.video(np.arange(61))
        row, _ = sample.measure(truth, truth, world, sample.joins(plan, 61))
        assert row["colour"] == 0 and row["sharp"] == 0 and row["flicker"] == 1 and row["seam"] == 1
        assert row["alive"] > 0.95
        speeds.append(row["speed"])
    assert 0.9 <= np.median(speeds) <= 1.1


def degraded(kind, video, world):
    """A video with one known fault, growing towards its end."""
    n = video.shape[1]
    strength = torch.linspace(0, 1, n).view(1, n, 1, 1)
    if kind == "blur":
        soft = torch.nn.functional.avg_pool2d(video, 3, stride=1, padding=1, count_include_pad=False)
        return video + strength * (soft - video)
    if kind == "brightness":
        return video + 0.2 * strength
    if kind == "noise":
        return video + 0.05 * strength * torch.randn(video.shape, generator=torch.Generator().manual_seed(0))
    if kind == "freeze":
        return video[:, torch.arange(n).clamp(max=5)]
    if kind == "half speed":
        return world.video(np.arange(n) / 2)
    if kind == "seams":
        return video + 0.03 * (torch.arange(n) // 4 % 2).view(1, n, 1, 1)
    grey = video.mean(0, keepdim=True).expand_as(video)  # no balloon keeps its hue
    return torch.where(torch.arange(n).view(1, n, 1, 1) > n // 2, grey, video)


@pytest.mark.parametrize("kind, metric, low, high", [
    ("blur", "sharp", -9, -0.3), ("brightness", "colour", 8, 99), ("noise", "sharp", 0.3, 9),
    ("noise", "flicker", 2, 99), ("freeze", "speed", -0.1, 0.1), ("freeze", "flicker", -0.01, 0.1),
    ("half speed", "speed", 0.4, 0.6), ("seams", "seam", 2, 99), ("colourless", "alive", 0, 0.05)])
def test_each_fault_shows_in_its_metric(kind, metric, low, high):
    """A fault we plant moves the metric that is meant for it out of the range of a good video."""
    rows = []
    for i in range(3):
        world = data.SkyWorld(data.SPLITS["test"] + i)
        truth = world.video(np.arange(61))
        video = degraded(kind, truth, world)
        rows.append(sample.measure(video, truth, world, sample.joins(ladder(61), 61))[0][metric])
    assert low <= np.median(rows) <= high


def test_joins_are_the_frames_where_windows_meet():
    """In the ladder windows meet at every multiple of 4, in the seed at 3 modulo 4 (1-based).

    Counted from 0: 2 modulo 4."""
    assert sample.joins(ladder(121), 121) == list(range(4, 120, 4))
    assert sample.joins(seed(121), 121) == list(range(10, 120, 4))


@pytest.mark.parametrize("argv, words", [
    (["--frames", "0"], "at least 1 frame"), (["--aug", "loud=3"], "nsr="),
    (["--image", "nothing.png"], "no picture"), (["--weights", "nothing.safetensors"], "no weights file"),
    (["--steps", "0"], "steps"), (["--preset", "sd15"], "convert_sd_weights")])
def test_bad_input_is_one_sentence_and_writes_nothing(tmp_path, restless_weights, argv, words, monkeypatch):
    """Each error names what was found and what to do, and comes before anything is written."""
    monkeypatch.chdir(tmp_path)
    given = ["--frames", "3", "--out", "run"]
    if argv[0] not in ("--weights", "--preset"):
        given += ["--weights", restless_weights]
    with pytest.raises(ValueError, match=words):
        sample.main(given + argv)
    assert not os.listdir(tmp_path)


def test_files_that_are_no_pictures_and_occupied_folders_are_refused(tmp_path, restless_weights):
    """A text named .png is named; a folder that holds a run keeps it."""
    (tmp_path / "photo.png").write_text("not a picture")
    with pytest.raises(ValueError, match="not a picture"):
        run(tmp_path, restless_weights, "--image", str(tmp_path / "photo.png"))
    folder = run(tmp_path, restless_weights, frames=2)
    before = (folder / "sheet.png").read_bytes()
    with pytest.raises(ValueError, match="already holds a run"):
        run(tmp_path, restless_weights, frames=2)
    assert (folder / "sheet.png").read_bytes() == before


def test_evaluation_compares_all_combinations_and_goes_on_where_it_stopped(tmp_path, restless_weights,
                                                                           monkeypatch, capsys):
    """--evaluate: a row for every cell and baseline, plots and a sheet; what is done is not done again.

    Stopped in the middle and continued, with more worlds, it says the same as when done at once."""
    lists = ["--evaluate", "schedule=ladder,seed_key,joint", "frames=9,12", "--batch_size", "1",
             "--steps", "1", "--fill_steps", "1", "--guidance_scale", "1", "--worlds"]
    whole = run(tmp_path, restless_weights, *lists, "2", name="whole")
    table, printed = (whole / "table.md").read_text(), capsys.readouterr().out
    for row in (*sample.BASELINES, "ladder 9", "seed_key 12", "12 frames",
                "farther from the truth than ladder 12 (below 0: closer)"):
        assert f"| {row} |" in table and f"| {row} |" in printed
    assert {"sheet.png", "drift_colour.png", "drift_sharp.png", "drift_psnr.png"} <= set(os.listdir(whole))

    run(tmp_path, restless_weights, *lists, "1", name="cut")
    windows, made = sample.Sampler.windows, []

    def counts(self, jobs, *rest):
        made.append(jobs)
        if len(made) == 3:
            raise KeyboardInterrupt
        windows(self, jobs, *rest)

    monkeypatch.setattr(sample.Sampler, "windows", counts)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, restless_weights, *lists, "2", name="cut")
    run(tmp_path, restless_weights, *lists, "2", name="cut")
    plans = [sample.SCHEDULES[name](n) for name in ("ladder", "seed_key", "joint") for n in (9, 12)]
    assert len(made) == 1 + sum(map(len, plans))   # of the second world: one was interrupted, others are kept
    assert (tmp_path / "cut" / "table.md").read_text() == table
    with pytest.raises(ValueError, match="other seed: give the same"):
        run(tmp_path, restless_weights, *lists, "2", "--seed", "1", name="cut")
    for argv, words in ((["ladder"], "expected FLAG=VALUE,VALUE"), (["worlds=3"], "'worlds' = '3'"),
                        (["--loop"], "leave --keyframes, --loop")):
        with pytest.raises(ValueError, match=words):
            run(tmp_path, restless_weights, "--evaluate", *argv, name="cut")


def sampler_of(weights, *argv):
    """A sampler of one step with guidance off, a window of the ladder, latents and contexts for it."""
    args = sample.parse(["--weights", weights, "--steps", "1", "--fill_steps", "1", "--guidance_scale", "1",
                         *argv])
    sampler = sample.Sampler(load_weights(weights), args, torch.device("cpu"), {})
    latents = torch.randn(1, 4, 61, 16, 16, generator=torch.Generator().manual_seed(0))
    return sampler, latents, sampler.contexts(["dusk"])


@torch.no_grad()
def made_by(weights, window, *argv):
    """The new latents of one window."""
    sampler, latents, contexts = sampler_of(weights, *argv)
    sampler.windows([(0, window)], latents, contexts, [0], user=(0,))
    return latents[0][:, list(window.new)]


def test_history_guidance_of_one_is_off_and_of_zero_says_what_a_weak_history_says(restless_weights):
    """Scale 1 is the plain sampler; 0 the one whose given frames are at HISTORY_LEVEL, noise and label."""
    window = ladder(61)[1]
    plain, one, zero, half = (made_by(restless_weights, window, *argv) for argv in (
        [], ["--history_guidance", "1"], ["--history_guidance", "0"], ["--history_guidance", "0.5"]))
    assert torch.equal(plain, one) and not torch.allclose(plain, zero, atol=1e-3)
    assert torch.allclose((plain + zero) / 2, half, atol=1e-4)   # one step is linear in what is said
    window = ladder(61, given=(0, 16))[0]   # where both given frames were made by the model
    sampler, latents, contexts = sampler_of(restless_weights, "--aug", f"t={sample.HISTORY_LEVEL}")
    with torch.no_grad():
        sampler.windows([(0, window)], latents, contexts, [0], user=())
    zero = sampler_of(restless_weights, "--history_guidance", "0")
    with torch.no_grad():
        zero[0].windows([(0, window)], zero[1], zero[2], [0], user=())
    assert torch.allclose(latents, zero[1], atol=1e-4)


def test_a_fill_can_start_from_the_blend_of_its_ends(restless_weights, monkeypatch):
    """What is denoised is q_sample of the blend at that level, where the walk starts; keys do as always.

    So does a window that processes share, however close its given frames are."""
    seen = []
    monkeypatch.setattr(sample, "ddim_sample", lambda schedule, say, x, t_given, new, levels, *_: (
        seen.append((x, new, levels)), x)[1])
    plan = ladder(61)
    for window in (plan[0], plan[-1], joint(17, (0, 16), 1)[0]):
        made_by(restless_weights, window, "--fill_start", "t=599", "--fill_steps", "2")
    (_, _, key_levels), (x, new, levels), (_, _, joint_levels) = seen
    assert key_levels == [999, -1] and levels == [599, 299, -1] and joint_levels == [999, 499, -1]
    sampler, latents, _ = sampler_of(restless_weights)
    window = plan[-1]
    a, b = window.new[0] - 1, window.new[-1] + 1
    for place, frame in enumerate(window.frames):
        if frame in window.new:
            blend = latents[0][:, a] + (latents[0][:, b] - latents[0][:, a]) * (frame - a) / (b - a)
            noise = diffusion.frame_noise(0, frame, blend.shape)
            wanted = sampler.schedule.q_sample(blend[None], torch.tensor([599]), noise[None])[0]
            assert torch.allclose(x[0, :, place], wanted, atol=1e-5)


def test_colours_are_matched_to_the_first_frame_and_a_video_to_itself_stays():
    """Mean and deviation of every channel become those of the first frame; share 0 and a match: identity."""
    video = torch.rand(3, 5, 16, 16, generator=torch.Generator().manual_seed(0))
    still, first = video[:, :1].expand_as(video), video[:, :1]
    assert torch.allclose(sample.match_colours(still, first, 1.0), still, atol=1e-6)
    assert torch.equal(sample.match_colours(video, first, 0.0), video)
    matched = sample.match_colours(0.5 * video + 0.3, first, 1.0)
    assert torch.allclose(matched.mean((2, 3)), first.mean((2, 3)).expand(3, 5), atol=1e-5)
    assert torch.allclose(matched.std((2, 3)), first.std((2, 3)).expand(3, 5), atol=1e-5)
    half = sample.match_colours(video, first, 0.5)
    assert torch.allclose(half, (video + sample.match_colours(video, first, 1.0)) / 2, atol=1e-6)


def test_plan_prints_without_weights(capsys):
    """--plan needs no model."""
    sample.main(["--plan", "--frames", "30", "--weights", "nothing"])
    assert "#" in capsys.readouterr().out


def test_smooth_joins_show_a_cubic_and_change_nothing_else(tmp_path, restless_weights):
    """Of a video that is a cubic in time nothing changes; of another only frames where two windows meet.

    Given pictures come back unchanged, and latents stay."""
    store = sample.Store.create(str(tmp_path / "x.safetensors"), 9, (4, 2, 2))
    f = torch.arange(9.0)
    store[:, range(9)] = ((f - 3) ** 3 / 10 + f).view(1, 9, 1, 1).expand(4, 9, 2, 2)
    assert torch.allclose(sample.shown(store, range(9), [4]), store[:, range(9)], atol=1e-5)
    store[:, [4]] = torch.zeros(4, 1, 2, 2)
    smooth = sample.shown(store, [3, 4, 5], [4])
    assert torch.allclose(smooth[:, 1], torch.full((4, 2, 2), 4.1), atol=1e-5)
    assert torch.equal(smooth[:, [0, 2]], store[:, [3, 5]])

    Image.new("RGB", (64, 64), (200, 40, 40)).save(tmp_path / "a.png")
    keys = ["--keyframes", f"0:{tmp_path / 'a.png'}", f"8:{tmp_path / 'a.png'}", "--decode_chunk", "3"]
    plain = run(tmp_path, restless_weights, *keys, "--joins", "plain", name="plain")
    smooth = run(tmp_path, restless_weights, *keys, name="smooth")                # the default of tiny
    changed = [i for i, (a, b) in enumerate(zip(pixels(plain), pixels(smooth))) if not np.array_equal(a, b)]
    assert changed == [i for i in sample.joins(ladder(20, given=(0, 8)), 20) if i != 8] and changed
    latents = [(folder / "latents.safetensors").read_bytes() for folder in (plain, smooth)]
    assert latents[0] == latents[1]
