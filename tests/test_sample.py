"""pytest tests/test_sample.py: a window is denoised, a run leaves what it promises, metrics see faults."""

import csv
import json
import math
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import evaluate
import numpy as np
import pytest
import torch
from PIL import Image

import data
import sample
import train
from diffusion import NoiseSchedule, frame_noise
from model import PRESETS, TINY_WEIGHTS, Model, is_temporal, load_weights, save_weights
from schedule import autoregressive, hierarchical, joint
from test_long import dies_at, no_films, run   # noqa: F401

write_video = sample.write_video


def pixels(folder):
    """All numbered frames of a run, in order."""
    return sample.read_frames(folder, range(len(os.listdir(folder / "frames"))))


# --- one window -------------------------------------------------------------------------------------------

B, FRAMES = 2, [0, 4, 8, 12, 16]
LATENTS = torch.randn(B, 4, len(FRAMES), 8, 8, generator=torch.Generator().manual_seed(0))
START = torch.tensor([-math.inf, 8.0])
TEXT = torch.randn(2, B, 77, 32, generator=torch.Generator().manual_seed(1))


def denoise(unet, rows=slice(None), steps=(999, 499, -1), **options):
    """`denoise_window` on two windows of five frames, of which every second is given."""
    frames, options = torch.tensor([FRAMES] * B), {"seeds": [5, 6]} | options
    return sample.denoise_window(unet, NoiseSchedule("v", True), LATENTS[rows], frames[rows],
                                 (frames % 8 != 0)[rows], tuple(TEXT[:, rows]), START[rows], steps, **options)


def test_a_network_that_knows_the_answer_gives_it_and_given_frames_come_back_bit_for_bit():
    """An oracle for v, from x_t and the true x0: every step leads to x0, in DDIM and with fresh noise."""
    schedule, truth = NoiseSchedule("v", True), LATENTS.flip(3)

    def knows(x, t, context, frames, given, prompt_start, clips):
        abar = schedule.alpha_bar[t][:, None, :, None, None]
        return (abar.sqrt() * x - truth) / (1 - abar).sqrt()

    for eta in (0.0, 1.0):
        made = denoise(knows, eta=eta, t_given=torch.full((B, 5), 100))
        assert (made[:, :, [1, 3]] - truth[:, :, [1, 3]]).abs().max() < 1e-4
        assert torch.equal(made[:, :, [0, 2, 4]], LATENTS[:, :, [0, 2, 4]])


def test_given_frames_are_noised_to_their_level_and_the_network_is_told():
    """At every step a frame with a level is the same q_sample of its latents; one at level 0 is untouched."""
    seen, level = [], torch.zeros(B, 5, dtype=torch.long)
    level[0, 0] = 100
    denoise(lambda x, t, context, frames, given, prompt_start, clips: seen.append((x, t)) or x, t_given=level)
    noise = frame_noise(5, 0, LATENTS[0, :, 0].shape, "aug")
    noised = NoiseSchedule("v", True).q_sample(LATENTS[:1, :, 0], torch.tensor([100]), noise[None])[0]
    assert [t[0].tolist() for _, t in seen] == [[100, 999, 0, 999, 0], [100, 499, 0, 499, 0]]
    for x, _ in seen:
        assert torch.allclose(x[0, :, 0], noised) and torch.equal(x[:, :, 2], LATENTS[:, :, 2])
    assert torch.equal(seen[0][0][1, :, 3], frame_noise(6, 12, LATENTS[0, :, 0].shape))


def test_temperature_is_how_much_noise_new_frames_start_from():
    """Half of the noise at 0.5; given frames stay as they are."""
    seen = []
    denoise(lambda x, *_, clips: seen.append(x) or x, temperature=0.5)
    assert torch.equal(seen[0][1, :, 3], 0.5 * frame_noise(6, 12, LATENTS[0, :, 0].shape))
    assert torch.equal(seen[0][:, :, [0, 2, 4]], LATENTS[:, :, [0, 2, 4]])


def test_guidance_of_one_asks_once_and_more_leads_from_the_negative_prompt_to_the_prompt():
    """Scale 1 is the prompt alone; the output is linear in the scale."""
    asked = []

    def says_its_prompt(x, t, context, frames, given, prompt_start, clips):
        asked.append(len(x))
        assert prompt_start.tolist() == START.tolist() * (len(x) // B)
        return 0 * x + context.mean((1, 2)).view(-1, 1, 1, 1, 1)

    one, two, three = (denoise(says_its_prompt, steps=(999, -1), scale=scale) for scale in (1.0, 2.0, 3.0))
    assert asked == [B, 2 * B, 2 * B] and not torch.allclose(one, two)
    assert torch.allclose(three - two, two - one, atol=1e-5)


def test_fresh_noise_is_another_for_every_step_and_frame_and_batches_do_not_matter(monkeypatch):
    """No noise is drawn twice; a window alone comes out as it does in a batch."""
    drawn, draw = [], sample.frame_noise
    monkeypatch.setattr(sample, "frame_noise", lambda seed, frame, *rest: (
        drawn.append((seed, frame, *rest[1:])), draw(seed, frame, *rest))[1])
    say = lambda x, *_, clips: x.roll(1, 2)
    made = denoise(say, eta=1.0)
    assert len(drawn) == len(set(drawn)) == B * 5 * 3
    assert torch.equal(denoise(say, rows=slice(1, 2), eta=1.0, seeds=[6]), made[1:])
    assert not torch.allclose(denoise(say), made, atol=0.1)


# --- a run ------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("frames", [1, 2, 20])
def test_a_run_leaves_every_file_it_promises(tmp_path, restless_weights, monkeypatch, frames):
    """N numbered frames, moving pictures, sheet, plot, metrics, latents and arguments, for any N."""
    monkeypatch.setattr(sample, "write_video", write_video)
    folder = run(tmp_path, restless_weights, frames=frames)
    assert len(os.listdir(folder / "frames")) == frames == len(os.listdir(folder / "latents"))
    for name in ("frames/00001.png", "video.gif", "video.webp", "sheet.png", "drift.png"):
        with Image.open(folder / name) as image:
            image.load()
    if shutil.which("ffmpeg"):
        command = ["ffprobe", "-v", "error", "-count_frames", "-show_entries",
                   "stream=width,height,pix_fmt,nb_read_frames", "-of", "csv=p=0", str(folder / "video.mp4")]
        assert subprocess.check_output(command).decode().strip() == f"256,256,yuv420p,{frames}"
    rows = list(csv.DictReader(open(folder / "metrics.csv")))
    assert [int(row["frame"]) for row in rows] == list(range(1, frames + 1))
    assert abs(float(rows[-1]["brightness"]) - pixels(folder)[-1].mean()) < 0.01
    assert json.load(open(folder / "args.json"))["frames"] == frames
    assert not [name for _, _, names in os.walk(folder) for name in names if ".tmp" in name]


def test_sheet_and_plot_of_a_world(tmp_path, restless_weights, monkeypatch):
    """17 of 33 frames: the first is given, keyframes are 16 apart, the last is one. And the truth's curve."""
    labels, draw = [], data.contact_sheet
    record = lambda rows, scale, marks: (labels.extend(sum(marks, [])), draw(rows, scale, marks))[1]
    monkeypatch.setattr(data, "contact_sheet", record)
    monkeypatch.setattr(sample, "write_video", write_video)
    curves = {}
    monkeypatch.setattr(data, "line_plot", lambda path, found, *_: (Path(path).touch(), curves.update(found)))
    run(tmp_path, restless_weights, "--world=1", frames=33)
    marked = {0: "given", 16: "keyframe", 32: "keyframe"}
    assert labels == [f"{frame + 1} {marked.get(frame, '')}" for frame in range(0, 33, 2)]
    first, last = data.SkyWorld(data.SPLITS["test"] + 1).video([0, 32]).mean((0, 2, 3)) * 127.5
    assert curves["brightness, truth"][-1] == (33, pytest.approx((last - first).item(), abs=0.01))
    assert curves["brightness"][0] == (1, 0) and len(curves["contrast"]) == 33


def test_words_that_the_model_never_saw_are_named(tmp_path, monkeypatch, capsys):
    """Every word of a sky caption has a token in the shipped weights; others fall into pieces."""
    monkeypatch.setattr(sample.Sampler, "make", lambda *_: exit())
    for prompt in ("wind left slow, many clouds, dusk, violet balloon", "red balloon, a purple submarine"):
        with pytest.raises(SystemExit):
            sample.main(["--frames=1", "--prompt", prompt, "--out", str(tmp_path / prompt)])
        assert ("never seen" in capsys.readouterr().out) == ("purple" in prompt)


@pytest.mark.parametrize("schedule", ["hierarchical", "autoregressive"])
def test_a_seed_fixes_every_byte_and_batches_change_only_rounding(tmp_path, restless_weights, schedule):
    """Runs with one seed agree in every pixel, batches of 1 and 4 to +-1, runs with two seeds do not."""
    make = lambda name, *flags: pixels(run(tmp_path / name, restless_weights, "--schedule", schedule, *flags,
                                           frames=20)).astype(int)
    first, again, other = make("first", "--seed=7"), make("again", "--seed=7"), make("other", "--seed=8")
    single = make("single", "--seed=7", "--batch_size=1")
    assert np.array_equal(first, again) and abs(first - single).max() <= 1 and abs(first - other).max() > 9


def test_without_noise_a_seed_changes_nothing_and_a_first_picture_has_all_of_it(tmp_path, restless_weights):
    """At temperature 0 all follows from the first frame. A picture from nothing has a temperature of 1."""
    make = lambda *flags: pixels(run(tmp_path / " ".join(flags), restless_weights, "--temperature=0", *flags,
                                     frames=5)).astype(int)
    one, two = make("--world=1", "--seed=1"), make("--world=1", "--seed=2")
    assert np.array_equal(one, two)
    one, two = make("--prompt=day"), make("--prompt=day", "--temperature=1")
    assert np.array_equal(one[0], two[0]) and abs(one[1:] - two[1:]).max() > 9


def test_pictures_are_cropped_and_turned_and_one_that_fits_comes_back_unchanged(tmp_path, restless_weights):
    """Frame 1 is the user's picture, bit for bit: no round trip through the VAE."""
    picture = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(picture).save(tmp_path / "fits.png")
    folder = run(tmp_path / "run", restless_weights, "--image", str(tmp_path / "fits.png"), frames=2)
    assert np.array_equal(pixels(folder)[0], picture)
    wide, turned = np.zeros((80, 200, 4), np.uint8), Image.Exif()
    wide[..., 3], wide[40:, :, 0], turned[0x0112] = 255, 255, 3    # lower half red; upside down
    Image.fromarray(wide).save(tmp_path / "wide.png", exif=turned)
    image = data.from_pixels([data.read_square(tmp_path / "wide.png", 64)])
    assert image.shape == (3, 1, 64, 64) and image[0, 0, 5, 5] == 1 and image[0, 0, 60, 5] == -1


def test_the_prompt_is_the_users_or_that_of_the_world_or_one_the_weights_know(small_weights):
    """In this order; weights trained on clips of one's own name a caption of those."""
    model = load_weights(small_weights)
    prompt = lambda *argv: sample.read_inputs(sample.parse(argv), model, [0])[1][0]
    assert prompt("--seed", "4") == data.SkyWorld(4).caption() != prompt()
    model.about["prompt"] = "a street"
    assert prompt() == "a street" and prompt("--prompt", "x", "--world", "2") == "x"
    assert prompt("--world", "2") == data.SkyWorld(data.SPLITS["test"] + 2).caption()


def test_the_model_that_ships_follows_a_new_prompt(tmp_path):
    """From day to night within 40 frames: the picture is half as bright as without the prompt."""
    day, night = (f"wind left slow, few clouds, {time}, red balloon" for time in ("day", "night"))
    with_it, without = (pixels(run(tmp_path / name, sample.TINY_WEIGHTS, "--steps=4", "--prompt", day, *more,
                                   frames=49))[-1].mean()
                        for name, *more in (("with", "--prompts", f"8:{night}"), ("without",)))
    assert with_it < 0.6 * without


def test_half_precision_is_near_and_what_overflows_in_it_is_decoded_again(tmp_path, restless_weights):
    """In bfloat16 with the shipped weights: over 30 dB. Too bright for float16: as in float32."""
    whole, half = (pixels(run(tmp_path / kind, sample.TINY_WEIGHTS, "--mixed_precision", kind, "--world=1",
                              frames=13)).astype(float) for kind in ("no", "bf16"))
    assert 0 < np.square(whole - half).mean() < 255 ** 2 / 1000
    decode = lambda kind: sample.Sampler(sample.parse(
        ["--weights", restless_weights, "--mixed_precision", kind])).vae("decode", 1e6 * LATENTS[0])
    assert torch.isfinite(decode("fp16")).all() and (decode("fp16") - decode("no")).abs().max() < 0.1


def test_a_picture_that_the_vae_cannot_give_back_is_mentioned(tmp_path, capsys):
    """The shipped VAE knows skies, and nothing of noise."""
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    for name, picture in ("noise", noise), ("sky", data.to_pixels(data.SkyWorld(0).video([0]))[0]):
        Image.fromarray(picture).save(tmp_path / "picture.png")
        run(tmp_path / name, TINY_WEIGHTS, "--image", str(tmp_path / "picture.png"), frames=2)
        assert ("cannot give the picture of frame 0 back" in capsys.readouterr().out) == (name == "noise")


def test_stage_files_make_the_windows_of_their_stage_and_untrained_layers_are_mentioned(
        tmp_path, small_weights, restless_weights, capsys):
    """--temporal with a file of stage interp: starter windows from --weights, interp from the file."""
    stage_file = str(tmp_path / "interp.safetensors")
    save_weights(stage_file, load_weights(restless_weights), torch.float32, only=is_temporal, stage="interp")
    plain = pixels(run(tmp_path / "plain", small_weights, frames=30))
    assert "temporal layers of stage starter, extrap, interp are untrained" in capsys.readouterr().out
    mixed = pixels(run(tmp_path / "mixed", small_weights, "--temporal", stage_file, frames=30))
    assert "temporal layers of stage starter, extrap are untrained" in capsys.readouterr().out
    run(tmp_path / "trained", restless_weights, frames=2)
    assert "untrained" not in capsys.readouterr().out
    starter, interp = ([frame for window in hierarchical(30) if window.stage == stage for frame in window.new]
                       for stage in ("starter", "interp"))
    assert np.array_equal(plain[starter], mixed[starter])
    assert not np.array_equal(plain[interp], mixed[interp])


@pytest.mark.parametrize("flags, keyframes", [([], {16, 29}),
                                              (["--loop", "--max_stride=4"], {*range(4, 30, 4)})])
def test_keyframes_take_guidance_and_infill_none(tmp_path, restless_weights, monkeypatch, flags, keyframes):
    """A loop's keyframes, too, which have given frames on both sides."""
    denoise_window, guided = sample.denoise_window, {}

    def recorded(unet, schedule, latents, frames, new, text, prompt_start, levels, scale, *rest):
        guided.update(dict.fromkeys(frames[new].tolist(), scale == 2))
        assert scale in (1, 2)
        return denoise_window(unet, schedule, latents, frames, new, text, prompt_start, levels, scale, *rest)

    monkeypatch.setattr(sample, "denoise_window", recorded)
    run(tmp_path / "run", restless_weights, "--world=0", "--guidance_scale=2", *flags, frames=30)
    assert guided == {frame: frame in keyframes for frame in range(1, 30)}


def test_the_preset_of_the_weights_fills_in_what_the_command_line_leaves_out(restless_weights, monkeypatch):
    """Steps, guidance and noise augmentation; LoRA files are merged at their scale."""
    merged = []
    monkeypatch.setattr(sample, "merge_lora", lambda _, *item: (merged.append(item), (1, []))[1])
    args = sample.parse(["--weights", restless_weights, "--guidance_scale", "2", "--lora", "a.b", "C:c:0.5"])
    sampler = sample.Sampler(args)
    assert (args.steps, args.guidance_scale, args.temperature, args.aug) == (8, 2, 0.1, "none")
    assert sampler.schedule.levels(4) == [999, 749, 499, 249, -1] and merged == [("a.b", 1.0), ("C:c", 0.5)]


@pytest.mark.parametrize("argv, words", [
    (["--aug", "loud=3"], "nsr="),
    (["--image", "nothing.png"], "no picture"), (["--image", __file__], "no picture can be read"),
    (["--weights", "nothing.safetensors"], "no weights file"),
    (["--device", "gpu"], "--device gpu does not work"), (["--device", "meta"], "meta does not work"),
    (["--weights", "."], "no weights file"),
    (["--resume"], "holds no run"), (["--extend", "5"], "holds no run"),
    (["--keyframes", "a.png"], "expected FRAME:VALUE"), (["--prompts", "50:night"], "name frame 50"),
    (["--keyframes", "0:a.png", "0:b.png"], "each frame once"),
    (["--keyframes", "40:a.png"], "name frame 40: the last one is 39"),
    (["--keyframes", "0:a.png", "--world", "3"], "each give frame 0: keep one"),
    (["--image", "a.png", "--world", "3"], "each give frame 0: keep one"),
    (["--keyframes", "3:a.png", "--loop"], "first picture is at 3: add one"),
    (["--keyframes", "5:nothing.png"], "no picture can be read from nothing.png"),
    (["--schedule", "autoregressive", "--loop"], "choose hierarchical")])
def test_bad_input_is_one_sentence_and_writes_nothing(tmp_path, restless_weights, argv, words, monkeypatch):
    """Each error names what was found and what to do, and comes before anything is written."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=words) as error:
        run("run", restless_weights, *argv)
    assert "\n" not in str(error.value) and not os.listdir(tmp_path)


@pytest.mark.parametrize("script, argv", [
    (sample, ["--frames", "0"]), (sample, ["--steps", "1001"]), (sample, ["--max_stride", "-1"]),
    (sample, ["--guidance_scale", "nan"]), (sample, ["--fps", "many"]), (train, ["--batch_size", "-1"]),
    (train, ["--max_steps", "0"]), (train, ["--learning_rate", "inf"]), (train, ["--aug_max", "1000"])])
def test_numbers_out_of_range_are_refused_in_one_line(script, argv, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit):
        script.main([*(["--stage", "interp"] if script is train else []), *argv])
    assert re.search(f"error: argument {argv[0]}: .*{argv[1]}", capsys.readouterr().err)
    assert not os.listdir(tmp_path)


def test_two_runs_never_share_a_folder(tmp_path, restless_weights, monkeypatch):
    """A folder that another run holds is refused; a free number is taken by making its folder."""
    monkeypatch.chdir(tmp_path)
    os.makedirs("out/sample_001")
    argv = ["--frames", "1", "--weights", restless_weights, "--out", "out/sample_002"]
    hold = "import data; lock = data.claim(None, 'out/sample_'); print(lock, flush=True); input()"
    with subprocess.Popen([sys.executable, "-c", hold], stdout=subprocess.PIPE, stdin=subprocess.PIPE,
                          env=os.environ | {"PYTHONPATH": os.path.dirname(data.__file__)}) as other:
        assert b"out/sample_002" in other.stdout.readline()
        with pytest.raises(ValueError, match="another process works in out/sample_002"):
            sample.main(argv)
        other.kill()
    sample.main(argv)


def test_a_run_goes_on_with_its_own_files_only(tmp_path, restless_weights, small_weights):
    """They may have moved since; others are refused."""
    for name, file in {"mine": restless_weights, "other": small_weights}.items():
        shutil.copy(file, tmp_path / name)
    run(tmp_path / "run", str(tmp_path / "mine"), "--frames", "2")
    (tmp_path / "mine").rename(tmp_path / "moved")
    stale = [tmp_path / "run" / name for name in ("frames/00001.99.tmp.png", "latents/.tmpAb12cd")]
    for path in stale:
        path.touch()                                     # of a process that was killed
    resume = ["--resume", "--out", str(tmp_path / "run"), "--weights"]
    sample.main([*resume, str(tmp_path / "moved")])
    assert not any(path.exists() for path in stale)
    with pytest.raises(ValueError, match="other: not what .*run was started with"):
        sample.main([*resume, str(tmp_path / "other")])
    with pytest.raises(ValueError, match="photo.png: not what .*run was started with"):
        Image.new("RGB", (64, 64)).save(tmp_path / "photo.png")
        sample.main([*resume[:-1], "--image", str(tmp_path / "photo.png")])
    latents, told = tmp_path / "run" / "latents" / "00002.safetensors", tmp_path / "run" / "args.json"
    latents.write_bytes(b"damaged")
    (tmp_path / "run" / "frames" / "00002.png").unlink()
    with pytest.raises(ValueError, match="00002.safetensors is damaged: delete it, and --resume"):
        sample.main([*resume, str(tmp_path / "moved")])
    latents.unlink()
    sample.main([*resume, str(tmp_path / "moved")])                      # it is made again
    sample.main(["--extend", "1", "--out", str(tmp_path / "run")])
    latents.unlink()
    with pytest.raises(ValueError, match="lacks some of its first 2 frames or latents"):
        sample.main(resume[:-1])                                         # no plan makes it again
    told.write_text(told.read_text().replace('"frames": 3', '"frames": "abc"'))
    with pytest.raises(ValueError, match="args.json is damaged, or was edited"):
        sample.main(resume[:-1])


def test_an_occupied_folder_is_refused_and_a_free_one_is_found(tmp_path, restless_weights, monkeypatch):
    """--out with a run in it is refused; without --out nothing is overwritten."""
    monkeypatch.chdir(tmp_path)
    for _ in range(2):
        sample.main(["--frames", "1", "--weights", restless_weights])
    assert sorted(os.listdir("out")) == ["sample_001", "sample_002"]
    Path("mine").mkdir()
    Path("mine", "video.mp4").touch()
    for out in ("out/sample_001", "mine"):
        with pytest.raises(ValueError, match="already holds a run, or files of yours"):
            sample.main(["--frames", "1", "--weights", restless_weights, "--out", out])


def test_sampling_stable_diffusion_in_half_precision_takes_less_than_4_gb(monkeypatch, capsys):
    """Windows of 7 frames of 512 x 512, with guidance; weights of one number each take no memory here."""
    with torch.device("meta"):
        model = Model.build(PRESETS["sd15"])
    for network in model.networks().values():
        network.load_state_dict({key: torch.zeros(1, dtype=torch.float16).expand(tensor.shape)
                                 for key, tensor in network.state_dict().items()}, assign=True)
    monkeypatch.setattr(sample, "load_weights", lambda *_, dtype: model)
    sample.main(["--plan", "--frames=121", "--mixed_precision=fp16"])
    unet, vae = re.findall(r"predicted peak .* (\d.*) GB in torch.float16", capsys.readouterr().out)
    assert 2 < float(unet) < 4 and 0.2 < float(vae) < 1


def test_plan_prints_without_weights(capsys):
    sample.main(["--plan", "--frames", "121", "--weights", "nothing", "--keyframes", "0:a", "120:b"])
    printed = capsys.readouterr().out
    assert "#" in printed and "makespan on 1, 2, 4, 8 processes: " in printed


# --- tests/evaluate.py ------------------------------------------------------------------------------------

def measured(i, video=lambda truth, world: truth):
    """The metrics of a video of the i-th test world, by default of the truth itself."""
    world = data.SkyWorld(data.SPLITS["test"] + i)
    truth = world.video(np.arange(61))
    return evaluate.measure(video(truth, world), truth, world, hierarchical(61))[0]


def test_truth_measured_against_itself_is_perfect():
    """No drift, ratios of 1, speed 1, all balloons found: the metrics' zero point, on all kinds of worlds."""
    rows = [measured(i) for i in range(6)]
    for row in rows:
        assert (row["colour"], row["sharp"], row["flicker"], row["boundary"]) == (0, 0, 1, 1)
        assert row["persistence"] > 0.95 and row["psnr 1-7"] == row["psnr 30-42"] == pytest.approx(100)
    assert 0.9 <= np.median([row["speed"] for row in rows]) <= 1.1


def test_a_balloon_that_left_the_picture_is_not_lost():
    """It counts while all of it is inside; after that nothing more is asked of it."""
    world = next(w for w in map(data.SkyWorld, range(99)) if w.pace == "fast")
    assert "balloon" in world.caption(0) and "balloon" not in world.caption(400)
    video = (world.video(np.arange(401)) + 1) / 2
    assert evaluate.persistence(video, world, part=60) == 1


def degraded(kind, video, world):
    """A video with one known fault, most of them growing towards its end."""
    frame = torch.arange(video.shape[1]).view(1, -1, 1, 1)
    strength = frame / frame.max()
    if kind == "blur":
        soft = torch.nn.functional.avg_pool2d(video, 3, stride=1, padding=1, count_include_pad=False)
        return torch.lerp(video, soft, strength)
    if kind == "noise":
        return video + 0.05 * strength * torch.randn(video.shape, generator=torch.Generator().manual_seed(0))
    grey = video.mean(0, keepdim=True).expand_as(video)   # no balloon keeps its hue
    return {"brightness": video + 0.2 * strength, "boundaries": video + 0.03 * (frame // 4 % 2),
            "freeze": video[:, frame.flatten().clamp(max=5)], "half speed": world.video(np.arange(61) / 2),
            "colourless": grey}[kind]


@pytest.mark.parametrize("kind, metric, low, high", [
    ("blur", "sharp", -9, -0.3), ("brightness", "colour", 8, 99), ("noise", "sharp", 0.3, 9),
    ("noise", "flicker", 2, 99), ("freeze", "speed", -0.1, 0.1), ("freeze", "flicker", -0.01, 0.1),
    ("half speed", "speed", 0.4, 0.6), ("boundaries", "boundary", 2, 99),
    ("colourless", "persistence", 0, 0.05)])
def test_each_fault_shows_in_its_metric(kind, metric, low, high):
    """A fault we plant moves the metric that is meant for it out of the range of a good video."""
    rows = [measured(i, lambda truth, world: degraded(kind, truth, world)) for i in range(3)]
    assert low <= np.median([row[metric] for row in rows]) <= high


def test_boundaries_are_the_frames_where_windows_meet():
    """In the hierarchical plan every multiple of 4; in the autoregressive one 2 modulo 4."""
    assert evaluate.boundaries(hierarchical(121), 121) == list(range(4, 120, 4))
    assert evaluate.boundaries(autoregressive(121), 121) == list(range(10, 120, 4))


def test_an_evaluation_compares_all_combinations_and_goes_on_where_it_stopped(tmp_path, restless_weights,
                                                                              monkeypatch, capsys):
    """A row for every cell and baseline, plots and a sheet; stopped and continued, also with more worlds."""
    def run(folder, worlds):
        evaluate.main(["schedule=hierarchical,joint", "frames=9,12", "--steps=1", "--guidance_scale=1",
                       "--weights", restless_weights, f"--worlds={worlds}", "--out", str(tmp_path / folder)])
        return (tmp_path / folder / "table.md").read_text()

    table, printed = run("whole", 2), capsys.readouterr().out
    for row in (*evaluate.BASELINES, "hierarchical 9", "joint 12", "12 frames"):
        assert f"| {row} |" in table and f"| {row} |" in printed
    assert {"sheet.png", "drift_colour.png", "drift_sharp.png", "drift_psnr.png"} <= set(
        os.listdir(tmp_path / "whole"))

    run("cut", 1)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        dies_at(patch, sample.Sampler, "make", 3)
        run("cut", 2)
    made, make = [], sample.Sampler.make
    monkeypatch.setattr(sample.Sampler, "make", lambda *args: (made.extend(args[1]), make(*args))[1])
    assert run("cut", 2) == run("cut", 2) == table
    plans = [plan(n) for plan in (hierarchical, joint) for n in (9, 12)]
    assert len(made) == sum(map(len, plans)) - 2   # those of world 1, less the two that were made before


@pytest.mark.parametrize("argv, words", [
    (["worlds=3"], "found worlds=3"),
    (["--loop"], "leave out pictures")])
def test_an_evaluation_refuses_what_it_cannot_compare(argv, words):
    with pytest.raises(ValueError, match=words):
        evaluate.main(argv)
