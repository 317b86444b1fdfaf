"""pytest tests/test_train.py: a run resumes exactly, trains what it says, starts where the image model is."""

import os
import random
import shutil
import signal
from functools import partial

import pytest
import torch
from PIL import Image

import data
import train
from conftest import assert_same_run
from diffusion import NoiseSchedule
from model import PREFIXES, is_temporal, load_weights, read_weights

CPU = torch.device("cpu")


@pytest.fixture
def prepared(tmp_path, train_argv):
    """A function (**flags) -> arguments, model, what it trains, and training batches of such a run."""
    def prepare(**flags):
        args = train.parse(train_argv(tmp_path, **flags))
        model = train.prepare_model(args)
        trainable = train.freeze_the_rest(model, args)
        return args, model, trainable, train.prepare_data(args, model, "train", CPU)

    return prepare


@pytest.fixture(scope="module")
def own_clips(tmp_path_factory):
    """A prepared folder of 8 clips of 40 sky frames; made without ffmpeg."""
    folder = tmp_path_factory.mktemp("own")
    for seed in range(8):
        clip = folder / "clips" / f"{seed}.mp4" / "000"
        clip.mkdir(parents=True)
        for i, frame in enumerate(data.to_pixels(data.SkyWorld(seed, 32).video(range(40)))):
            Image.fromarray(frame).save(clip / f"{i + 1:05d}.png")
        (clip.parent / "000.txt").write_text(f"world {seed}\n")
        data.write_json(str(clip.parent / "000.json"), {"source": f"{seed}.mp4", "frames": 40})
    (folder / "dropped.csv").write_text("clip,reason,detail\n")
    return folder


def test_short_runs_validate_on_the_way_and_long_ones_not_too_often(tmp_path):
    """A learner sees the loss of the first three minutes fall, and not only where it ended."""
    every = lambda *more: train.parse(["--stage=interp", f"--out={tmp_path / 'interp'}", *more]).save_every
    assert every() == 60 and every("--max_steps", "4") == 20 and every("--max_steps", "8000") == 250
    assert every("--save_every", "7") == 7


@pytest.mark.parametrize("flags", [
    dict(max_steps=8, save_every=4, gradient_accumulation_steps=2, batch_size=1),
    dict(max_steps=4, save_every=2, data="own", drop="drop.csv")], ids=["sky worlds", "own clips"])
def test_a_resumed_run_equals_an_uninterrupted_one(tmp_path, train_argv, own_clips, monkeypatch, flags):
    """Half a run, a step more, a crash, --resume: weights, average, optimizer and log, bit for bit."""
    (tmp_path / "drop.csv").write_text("clip\n3.mp4/000\n")
    paths = {"data": own_clips, "drop": tmp_path / "drop.csv"}
    flags = {key: paths.get(key, value) for key, value in flags.items()}
    train.main(train_argv(tmp_path / "whole", **flags))
    update = train.update_ema

    def crash(ema, parameters, step):
        if step == flags["save_every"] + 2:
            raise KeyboardInterrupt
        update(ema, parameters, step)

    with monkeypatch.context() as patch:
        patch.setattr(train, "update_ema", crash)
        with pytest.raises(KeyboardInterrupt):
            train.main(train_argv(tmp_path / "cut", **flags))
    train.main(train_argv(tmp_path / "cut", resume="auto", **flags))
    assert_same_run(tmp_path / "whole" / "interp", tmp_path / "cut" / "interp")
    checkpoint = tmp_path / "whole" / "interp" / "ckpt.pt"      # in a folder without the sheet of step 0
    train.main(train_argv(tmp_path / "other", resume=checkpoint, **flags))
    assert_same_run(tmp_path / "whole" / "interp", tmp_path / "other" / "interp")


def test_ctrl_c_saves_the_step_at_work(tmp_path, train_argv, monkeypatch, little_weights):
    """Also before the first --save_every. The run then goes on as if nothing had been, with moved weights."""
    rate = train.get_learning_rate

    def press(step, args):
        if step == 1:
            os.kill(os.getpid(), signal.SIGINT)
        return rate(step, args)

    train.main(train_argv(tmp_path / "whole"))
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(train, "get_learning_rate", press)
        train.main(train_argv(tmp_path / "cut"))
    assert torch.load(tmp_path / "cut" / "interp" / "ckpt.pt", weights_only=True)["step"] == 2
    shutil.copy(little_weights, tmp_path / "moved.safetensors")
    train.main(train_argv(tmp_path / "cut", weights=tmp_path / "moved.safetensors", resume="auto"))
    assert_same_run(tmp_path / "whole" / "interp", tmp_path / "cut" / "interp")


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_a_step_that_is_not_finite_leaves_the_last_checkpoint(tmp_path, train_argv, monkeypatch, number):
    """Neither weights nor averages see it."""
    loss = train.denoising_loss

    def broken(model, batch, seed, *rest, **more):
        descend, error = loss(model, batch, seed, *rest, **more)
        return descend * (number if seed == 2 and not more else 1), error

    monkeypatch.setattr(train, "denoising_loss", broken)
    with pytest.raises(ValueError, match="step 2 of stage interp is not finite"):
        train.main(train_argv(tmp_path, save_every=1))
    found = torch.load(tmp_path / "interp" / "ckpt.pt", weights_only=True)
    assert found["step"] == 2
    assert all(tensor.isfinite().all() for part in ("model", "ema") for tensor in found[part].values())


def test_a_run_does_not_change_its_clips(tmp_path, train_argv, own_clips, capsys):
    """Another --drop list, caption or picture: resuming is refused, with a sentence."""
    folder, drop = tmp_path / "own", tmp_path / "drop.csv"
    shutil.copytree(own_clips, folder)
    drop.write_text("clip\n3.mp4/000\n")
    argv = train_argv(tmp_path, data=folder, drop=drop, max_steps=1)
    train.main(argv)
    printed = capsys.readouterr().out
    assert f"train: 280 frames of 7 clips in {folder}" in printed
    assert "the same ones train and validate" in printed
    clip = folder / "clips" / "5.mp4"
    for listed, caption, picture in (("4.mp4/000\n", "world 5", 9), ("", "world 5", 9),
                                     ("3.mp4/000\n", "other words", 9), ("3.mp4/000\n", "world 5", 30)):
        drop.write_text("clip\n" + listed)
        (clip / "000.txt").write_text(caption)
        shutil.copy(own_clips / "clips" / "5.mp4" / "000" / f"{picture:05d}.png", clip / "000" / "00009.png")
        with pytest.raises(ValueError, match="was made with clips"):
            train.main([*argv, "--resume", "auto"])


def test_a_video_stage_starts_at_the_loss_of_its_image_model(prepared):
    """Fresh temporal layers are the identity: the first validation loss is that of temporal=False."""
    args, model, _, next_batch = prepared()
    losses = train.validation_loss(model, [next_batch(0)], args, CPU)
    assert list(losses) == ["val_loss", "val_q1", "val_q2", "val_q3", "val_q4"]
    model.unet.forward = partial(model.unet.forward, temporal=False)
    assert train.validation_loss(model, [next_batch(0)], args, CPU) == pytest.approx(losses, abs=1e-6)


def test_a_video_stage_trains_temporal_layers_and_nothing_else(tmp_path, little_weights, train_argv):
    """After a run every frozen parameter is untouched, and the stage file holds the temporal layers only."""
    train.main(train_argv(tmp_path, export=tmp_path / "all.safetensors"))
    old = load_weights(little_weights).unet.state_dict()
    new = load_weights(str(tmp_path / "all.safetensors")).unet.state_dict()
    changed = {name for name in old if not torch.equal(old[name].half(), new[name].half())}
    assert changed and all(map(is_temporal, changed))
    assert all(map(is_temporal, torch.load(tmp_path / "interp" / "ckpt.pt", weights_only=True)["model"]))
    keys = read_weights(str(tmp_path / "interp" / "weights.safetensors"))[3].keys()
    assert keys and all(is_temporal(key) and key.startswith(PREFIXES["unet"]) for key in keys)


@pytest.mark.parametrize("stage, part", [("vae", "vae"), ("image", "unet"), ("interp", "unet")])
def test_no_stage_trains_the_text_encoder(prepared, stage, part):
    """The VAE, then the image model in the UNet, then its temporal layers; words keep their meaning."""
    trainable = prepared(stage=stage)[2]
    assert {name.split(".")[0] for name in trainable} == {part}
    assert {is_temporal(name) for name in trainable} == {stage == "interp"}


@pytest.mark.parametrize("own", [False, True], ids=["sky worlds", "own clips"])
def test_every_stage_runs_and_the_last_leaves_a_model_that_loads(
        tmp_path, little_config, train_argv, monkeypatch, own_clips, own):
    """vae -> image -> video -> video, each from the file of the one before; the export holds all recipes."""
    monkeypatch.setitem(train.PRESETS, "tiny", little_config)
    file = {stage: tmp_path / stage / "weights.safetensors" for stage in ("vae", "image", "video")}
    more = dict(max_steps=2) | ({"data": shutil.copytree(own_clips, tmp_path / "clips")} if own else {})
    run = lambda stage, **flags: train.main(train_argv(tmp_path, stage=stage, **more, **flags))
    run("vae")
    run("image", weights=file["vae"])
    run("video", weights=file["image"])
    run("video", weights=file["image"], temporal=file["video"], out=tmp_path / "longer",
        export=tmp_path / "all.safetensors")
    model = load_weights(str(tmp_path / "all.safetensors"), "tiny")
    assert [recipe["stage"] for recipe in model.about["recipes"]] == ["vae", "image", "video", "video"]
    assert model.config.latent_std != little_config.latent_std
    assert model.about.get("prompt") == ("world 0" if own else None)      # sample.py's when none is given
    assert len(model.tokenizer.pieces("world" if own else "balloon")) == 1
    for stage in file:
        found = {str(path.relative_to(tmp_path / stage)) for path in (tmp_path / stage).rglob("[!.]*.*")}
        assert found == {"args.json", "ckpt.pt", "log.csv", "loss.png", "weights.safetensors",
                         "samples/before.safetensors", "samples/000000.png", "samples/final.png"}


def test_the_loss_falls_when_one_batch_is_seen_again_and_again(prepared):
    """Within 150 steps temporal layers alone bring the loss to a fifth of that of the image model."""
    args, model, trainable, next_batch = prepared()
    optimizer, losses = torch.optim.AdamW(trainable.values(), lr=5e-3), []
    while len(losses) < 150 and (not losses or losses[-1] > losses[0] / 5):
        descend, loss = train.denoising_loss(model, next_batch(0), 0, args)
        optimizer.zero_grad()
        descend.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 5


@pytest.mark.parametrize("levels", [None, (700, 40)])
def test_the_loss_is_what_one_computes_by_hand(prepared, levels):
    """New frames share a level; given ones have one of their own, or are clean at 0; the user's are clean.

    The loss is that of new frames, of the output and the prior, each over its own size."""
    args, model, _, next_batch = prepared(batch_size=4)
    batch, seen, schedule, g = next_batch(3), {}, NoiseSchedule("v", True), torch.Generator().manual_seed(5)
    x0, given = batch["x0"], batch["given"]
    batch["user"] = user = given & (torch.arange(given.shape[1]) == 0)
    outputs = torch.randn(2, *x0.shape)

    def unet(x, t, context, frames, given, prompt_start, with_prior):
        seen.update(x=x, t=t)
        assert torch.equal(prompt_start, batch["prompt_start"])
        return tuple(outputs)

    descend, error = train.denoising_loss(model, batch, 5, args, levels=levels, unet=unet)
    eps, t_new = torch.randn(x0.shape, generator=g), torch.randint(0, 1000, (4,), generator=g)
    t_given = (250 * torch.rand(4, generator=g) ** 3).round().long()
    t_given[torch.rand(4, generator=g) <= 0.2] = 0
    if levels:
        t_new[:], t_given[:] = levels
    expected, errors = [], []
    for b in range(4):
        for f in range(x0.shape[2]):
            t = 0 if user[b, f] else t_given[b] if given[b, f] else t_new[b]
            abar, clean = schedule.alpha_bar[t], x0[b, :, f]
            noised = abar.sqrt() * clean + (1 - abar).sqrt() * eps[b, :, f]
            assert seen["t"][b, f] == t
            assert torch.allclose(seen["x"][b, :, f], clean if t == 0 and given[b, f] else noised, atol=1e-6)
        abar = schedule.alpha_bar[t_new[b]]
        truths = abar.sqrt() * eps[b] - (1 - abar).sqrt() * x0[b], x0[b]
        wrong = [(output[b] - truth)[:, ~given[b]].square().mean() for output, truth in zip(outputs, truths)]
        errors.append(wrong[0])
        expected.append(sum(e / (e + floor) for e, floor in zip(wrong, (1e-4, 2e-5))))
    assert descend.item() == pytest.approx(torch.stack(expected).mean().item(), rel=1e-5)
    assert error.item() == pytest.approx(torch.stack(errors).mean().item(), rel=1e-5)


def test_accumulated_gradients_equal_those_of_the_whole_batch(prepared):
    """Two halves of a batch, with the noise of the whole and at half weight, give the gradient of the batch.

    --gradient_accumulation_steps relies on it, and so do several processes, each with its part."""
    args, model, trainable, next_batch = prepared(batch_size=4)
    for parameter in trainable.values():
        parameter.data += 0.01 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0))
    gradients = []
    for parts in ([slice(0, 4)], [slice(0, 2), slice(2, 4)]):
        model.unet.zero_grad()
        for part in parts:
            (train.denoising_loss(model, next_batch(0), 0, args, part)[0] / len(parts)).backward()
        gradients.append([parameter.grad.clone() for parameter in trainable.values()])
    for one, other in zip(*gradients):
        assert torch.allclose(one, other, rtol=1e-3, atol=1e-6)


def test_another_seed_trains_on_other_windows_and_validates_on_the_same(tmp_path, train_argv):
    """Or the losses of two runs would not compare."""
    args = [train.parse(train_argv(tmp_path, seed=seed)) for seed in (0, 1)]
    model = train.prepare_model(args[0])
    batches = lambda split: [train.prepare_data(each, model, split, CPU)(0) for each in args]
    same = [all(torch.equal(one[key], other[key]) for key in ("x0", "frames", "given"))
            for one, other in map(batches, ("val", "train"))]
    assert same == [True, False]


def test_the_learning_rate_warms_up_and_comes_down_to_zero(tmp_path):
    """A line up over 50 steps, half a cosine down to 0 at the last step, never above the peak."""
    args = train.parse(["--stage=vae", "--max_steps=500", "--learning_rate=1", f"--out={tmp_path / 'vae'}"])
    rates = [train.get_learning_rate(step, args) for step in range(501)]
    assert rates[0] < 0.021 and max(rates) < 1 and rates.index(max(rates)) == 49 and rates[500] < 1e-6
    assert rates[49:] == sorted(rates[49:], reverse=True)


def test_the_text_encoder_reads_a_caption_once(little_weights, monkeypatch):
    """What it said is used again; a caption that was dropped has the embedding of none."""
    model, batch = load_weights(little_weights), {"captions": ["a", "b", "c"], "x0": torch.zeros(3)}
    model.text.requires_grad_(False)                                   # as every stage does
    known, none = (torch.cat([model.context([caption]) for caption in captions]).detach()
                   for captions in ("abc", [""]))
    assert torch.equal(train.embed(model, batch), known)
    monkeypatch.setattr(train, "CAPTION_DROPOUT", 0.5)
    draws = [train.embed(model, batch, seed) for seed in range(9)]
    monkeypatch.setattr(model, "context", None)
    for seed, again in enumerate(draws):
        assert torch.equal(train.embed(model, batch, seed), again)
    dropped = torch.stack([(again == none).all((1, 2)) for again in draws])
    assert all(torch.equal(again[~drop], known[~drop]) for again, drop in zip(draws, dropped))
    assert 5 < dropped.sum() < 22


def test_scores_are_the_same_every_time_and_find_what_was_shuffled(tmp_path, own_clips):
    """--score with the shipped weights, twice: the same file. A clip out of order is the hardest of all."""
    folder, clip, frames = tmp_path / "own", tmp_path / "own" / "clips" / "6.mp4" / "000", list(range(40))
    shutil.copytree(own_clips, folder)
    random.Random(0).shuffle(frames)
    for i, frame in enumerate(frames):
        shutil.copy(own_clips / "clips" / "6.mp4" / "000" / f"{frame + 1:05d}.png", clip / f"{i + 1:05d}.png")
    for picture in folder.rglob("*.png"):
        Image.open(picture).resize((64, 64)).save(picture)
    few = "".join(f"{i}.mp4/000,short,\n" for i in range(4))
    (folder / "dropped.csv").write_text("clip,reason,detail\n" + few)
    files = [str(tmp_path / name) for name in ("a.csv", "b.csv")]
    for file in files:
        train.main(["--stage", "interp", "--data", str(folder), "--score", file, "--device", "cpu"])
    a, b = (open(file).read() for file in files)
    assert a == b and a.count("\n") == 5
    data.main(["--drop_hardest", "0.25", "--scores", files[0], "--out", str(tmp_path / "drop.csv")])
    assert (tmp_path / "drop.csv").read_text() == "clip\n6.mp4/000\n"


@pytest.fixture(scope="module")
def one_step(tmp_path_factory, train_argv):
    """A folder that holds, as interp/, a run of one step."""
    folder = tmp_path_factory.mktemp("one_step")
    train.main(train_argv(folder, max_steps=1))
    return folder


@pytest.mark.parametrize("change, words", [
    ({}, "already holds a run"), ({"stage": "extrap", "resume": "interp/ckpt.pt"}, "with stage interp"),
    ({"learning_rate": 1e-5, "resume": "auto"}, "learning_rate"), ({"resume": "none.pt"}, "already holds"),
    ({"resume": "none.pt", "out": "elsewhere"}, "no checkpoint"),
    ({"weights": "none.pt"}, "no weights file"), ({"preset": "sd15"}, "on your own clips"),
    ({"preset": "sd15", "data": "own"}, "preset tiny"), ({"preset": "sd15", "stage": "vae"}, "video stages"),
    ({"weights": "interp/weights.safetensors"}, "only the temporal layers"),
    ({"stage": "image", "lora_rank": 2}, "--lora_rank is for video"), ({"drop": "x"}, "give the folder"),
    *(({"stage": stage, "data": "none.pt"}, "not a prepared folder") for stage in ("vae", "image", "interp")),
    ({"data": "own", "drop": "strange"}, "such as not there"), ({"data": "own", "score": "x"}, "untrained"),
    ({"export": "folder"}, "is a folder: give the name"), ({"out": "weights"}, "already holds a run"),
    ({"stage": "vae", "temporal": "x"}, "--temporal is for video"),
], ids=str)
def test_wrong_input_is_one_sentence_and_changes_nothing(one_step, own_clips, train_argv, change, words):
    """Runs, checkpoints, weights, folders and flags that do not go together."""
    before = (one_step / "interp" / "ckpt.pt").read_bytes()
    (one_step / "strange").write_text("clip\nnot there\n")
    paths = {name: one_step / name for name in (
        "strange", "elsewhere", "interp/ckpt.pt", "none.pt", "interp/weights.safetensors")}
    paths |= {"own": own_clips, "folder": one_step / "interp", "weights": one_step / "weights"}
    (one_step / "weights").mkdir(exist_ok=True)
    (one_step / "weights" / "weights.safetensors").touch()
    out = one_step / ("interp" if not change or "resume" in change else "new")
    flags = {"max_steps": 1, "out": out} | {key: paths.get(value, value) for key, value in change.items()}
    with pytest.raises(ValueError, match=words):
        train.main(train_argv(one_step, **flags))
    assert (one_step / "interp" / "ckpt.pt").read_bytes() == before


def test_a_full_disk_is_one_sentence(tmp_path, train_argv, monkeypatch):
    """torch says it in this way, when its own writer closes a file that is too short."""
    def save(*_):
        raise RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 3985088 vs 3984976")

    monkeypatch.setattr(torch, "save", save)
    with pytest.raises(OSError, match="ckpt.pt cannot be written, is the disk full"):
        train.main(train_argv(tmp_path))


@pytest.mark.parametrize("damage", [lambda file: file[:-100], lambda file: b"", lambda file: (
    file[:len(file) // 2] + bytes([file[len(file) // 2] ^ 1]) + file[len(file) // 2 + 1:])],
    ids=["short", "empty", "a flipped bit"])
def test_a_damaged_checkpoint_is_named(one_step, tmp_path, train_argv, damage):
    (tmp_path / "ckpt.pt").write_bytes(damage((one_step / "interp" / "ckpt.pt").read_bytes()))
    with pytest.raises(ValueError, match="ckpt.pt is damaged"):
        train.main(train_argv(one_step, max_steps=1, out=tmp_path, resume="auto"))
