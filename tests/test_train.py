"""pytest tests/test_train.py: a run resumes exactly, trains what it says, starts where the image model is."""

import csv
import os
import random
import shutil

import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import data
import train
from diffusion import NoiseSchedule
from model import PREFIXES, is_temporal, load_weights, read_weights
from schedule import ladder


def arguments(tmp_path, base, stage="interp", **changes):
    """A command line for a run of a few short steps."""
    options = dict(stage=stage, out=tmp_path / stage, max_steps=4, batch_size=2, worlds=2, frames=31,
                   warmup_steps=2, val_every=100, sample_every=0, save_every=100)
    options |= ({"weights": base} if stage != "vae" else {}) | changes
    return [word for name, value in options.items() for word in (f"--{name}", str(value))]


def whole_and_cut(tmp_path, weights, monkeypatch, step, **options):
    """The folders of two runs: one to its end, one that crashes at a step and is resumed."""
    train.main(arguments(tmp_path / "whole", weights, **options))
    update = train.update_ema

    def crash(ema, parameters, decay, now):
        """Average the weights, but not at that step."""
        if now == step:
            raise KeyboardInterrupt
        update(ema, parameters, decay, now)

    with monkeypatch.context() as patch:
        patch.setattr(train, "update_ema", crash)
        with pytest.raises(KeyboardInterrupt):
            train.main(arguments(tmp_path / "cut", weights, **options))
    train.main(arguments(tmp_path / "cut", weights, **options) + ["--resume", "auto"])
    return [tmp_path / run / options.get("stage", "interp") for run in ("whole", "cut")]


def test_short_runs_validate_on_the_way_and_long_ones_not_too_often():
    """A learner sees the loss of the first three minutes fall, and not only where it ended."""
    every = lambda *more: train.parse(["--stage", "interp", *more]).val_every
    assert every() == 60 and every("--max_steps", "4") == 20 and every("--max_steps", "8000") == 250
    assert every("--val_every", "7") == 7


@pytest.mark.usefixtures("quick_validation", "no_sheet")
def test_resumed_run_equals_uninterrupted_run(tmp_path, small_weights, monkeypatch):
    """20 steps == 10 steps, a crash, --resume, 10 steps.

    Weights, average, optimizer, data order and log, bit for bit."""
    folders = whole_and_cut(tmp_path, small_weights, monkeypatch, 12, max_steps=20, save_every=10)
    whole, cut = (torch.load(folder / "ckpt.pt", weights_only=True) for folder in folders)
    assert whole["step"] == cut["step"] == 20
    for part in ("model", "ema"):
        assert all(torch.equal(whole[part][name], cut[part][name]) for name in whole[part])
    for one, other in zip(whole["optimizer"]["state"].values(), cut["optimizer"]["state"].values()):
        assert all(torch.equal(one[key], other[key]) for key in ("step", "exp_avg", "exp_avg_sq"))
    losses = [[row["loss"] for row in csv.DictReader(open(folder / "log.csv"))] for folder in folders]
    assert losses[0] == losses[1] and len(losses[0]) == 21


@pytest.mark.usefixtures("quick_validation", "no_sheet")
def test_a_run_with_an_error_bank_resumes_exactly(tmp_path, small_weights, monkeypatch):
    """The bank is in the checkpoint: 4 steps == 2 steps, a crash, --resume, 2 steps, bit for bit."""
    options = dict(stage="extrap", max_steps=4, save_every=2, error_bank=0.7)
    folders = whole_and_cut(tmp_path, small_weights, monkeypatch, 3, **options)
    whole, cut = (torch.load(folder / "ckpt.pt", weights_only=True) for folder in folders)
    assert torch.equal(whole["errors"], cut["errors"]) and len(whole["errors"]) >= 4 * 2
    assert all(torch.equal(whole["model"][name], cut["model"][name]) for name in whole["model"])
    with pytest.raises(ValueError, match="trained with --error_bank 0.7"):
        train.main(arguments(tmp_path / "cut", small_weights, **options | {"error_bank": 0.5})
                   + ["--resume", "auto"])


def test_the_bank_spoils_given_frames_of_windows_that_lead_on_and_nothing_else():
    """A share of these windows, on frames that the model would have made, with an error that it has made."""
    bank, x0 = train.ErrorBank(0.5), torch.randn(400, 4, 5, 2, 2, generator=torch.Generator().manual_seed(0))
    given = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 0, 1, 1]]).bool().repeat(200, 1)     # leads on, fills
    user = torch.tensor([1, 0, 0, 0, 0]).bool().expand(400, 5)
    spoil = lambda: bank.spoil(x0, given, user, torch.Generator().manual_seed(1))
    assert torch.equal(spoil(), x0)                                                    # nothing in it yet
    error = torch.zeros_like(x0)
    error[0::2, :, 3:], error[1::2, :, 2] = 0.25, 9.0
    bank.add(error, given)
    assert len(bank.errors) == 400 and (bank.errors == 0.25).all()                     # no error of fills
    added = (spoil() - x0).abs().amax((1, 3, 4))                                       # (b, f)
    assert torch.equal(spoil(), spoil()) and not added[1::2].any() and not added[:, [0, 3, 4]].any()
    assert torch.equal(added[:, 1] > 0.2, added[:, 2] > 0.2)
    assert abs((added[0::2, 1] > 0.2).float().mean() - 0.5) < 0.1
    for _ in range(3):
        bank.add(2 * error, given)
    assert len(bank.errors) == 1024 and (bank.errors == 0.5).all()                    # the last are kept


def test_an_error_on_given_frames_leaves_the_target_alone(tmp_path, small_weights):
    """With errors of zero the loss is that without a bank; with others only the given frames are changed."""
    args = train.parse(arguments(tmp_path, small_weights, stage="extrap", error_bank=1.0))
    model, device = train.prepare_model(args), torch.device("cpu")
    schedule = NoiseSchedule(model.config.prediction, model.config.zero_terminal_snr)
    batch, seen, unet = train.prepare_data(args, model, "train", device)(0), [], model.unet.forward
    model.unet.forward = lambda x, *rest, **more: (seen.append(x), unet(x, *rest, **more))[1]
    model.unet.temporal_trust.weight.data += 0.1        # so that what is given matters
    prepared = lambda bank: train.prepare_batch(model, batch, 0, args, device, bank=bank)
    plain, none, some = (train.training_loss(model, schedule, prepared(bank), args, bank)[1]
                         for bank in (None, train.ErrorBank(1.0), full_bank()))
    assert torch.equal(plain, none) and not torch.equal(plain, some)
    changed = (seen[2] - seen[0]).abs().amax((1, 3, 4)) > 0
    assert torch.equal(changed, batch["given"] & ~batch["user"]) and changed.any()


def full_bank():
    """An error bank that has one error to give."""
    bank = train.ErrorBank(1.0)
    bank.errors = torch.full((1, 4, 16, 16), 0.5).half()
    return bank


def test_clips_of_481_frames_show_keys_64_apart(tmp_path, small_weights):
    """--frames 481 --max_stride 64 trains windows of stride 64 beside all those of stride 16."""
    wide = data.window_shapes("video", 481, 64)
    narrow = data.window_shapes("video", 481)
    assert wide[:len(narrow)] == narrow
    shown = {tuple(f - w.frames[0] for f in w.frames) for _, windows in wide for w in windows}
    assert tuple(range(0, 385, 64)) in shown and tuple(range(0, 97, 16)) in shown
    for w in ladder(481, max_stride=64):    # whatever sampling asks for
        assert tuple(f - w.frames[0] for f in w.frames) in shown
    assert max(data.reach(w) for _, windows in wide for w in windows) <= 480


def test_video_stage_starts_at_the_loss_of_its_image_model(tmp_path, small_weights):
    """Fresh temporal layers are the identity.

    The first validation loss is that of temporal=False, in every quarter."""
    args = train.parse(arguments(tmp_path, small_weights))
    model = train.prepare_model(args)
    schedule = NoiseSchedule(model.config.prediction, model.config.zero_terminal_snr)
    batches = [train.prepare_data(args, model, "val", torch.device("cpu"))(0)]
    with_time = train.validation_loss(model, schedule, batches, args, torch.device("cpu"))
    args.stage = "image"
    without = train.validation_loss(model, schedule, batches, args, torch.device("cpu"))
    assert with_time[0] == pytest.approx(without[0], abs=1e-6)
    assert with_time[1] == pytest.approx(without[1], abs=1e-6)


@pytest.mark.usefixtures("quick_validation", "no_sheet")
def test_video_stage_trains_temporal_layers_and_nothing_else(tmp_path, small_weights):
    """After a run every frozen parameter is untouched, and the stage file holds the temporal layers only."""
    train.main(arguments(tmp_path, small_weights, export=tmp_path / "all.safetensors"))
    before, after = load_weights(small_weights), load_weights(str(tmp_path / "all.safetensors"))
    for name, tensor in before.unet.state_dict().items():
        changed = not torch.equal(tensor.half(), after.unet.state_dict()[name].half())
        assert not changed or is_temporal(name), name
    old, new = before.unet.state_dict(), after.unet.state_dict()
    assert any(not torch.equal(old[name].half(), tensor.half()) for name, tensor in new.items())
    keys = read_weights(str(tmp_path / "interp" / "weights.safetensors"))[3].keys()
    assert keys and all(is_temporal(key) and key.startswith(PREFIXES["unet"]) for key in keys)


@pytest.mark.usefixtures("quick_validation")
def test_every_stage_runs_from_nothing_to_a_model_that_loads(tmp_path, small_config, monkeypatch):
    """vae -> image -> video -> longer, each from the file of the one before; the export holds all recipes."""
    monkeypatch.setitem(train.PRESETS, "tiny", small_config)
    train.main(arguments(tmp_path, None, stage="vae"))
    train.main(arguments(tmp_path, tmp_path / "vae" / "weights.safetensors", stage="image"))
    train.main(arguments(tmp_path, tmp_path / "image" / "weights.safetensors", stage="video",
                         export=tmp_path / "all.safetensors"))
    train.main(arguments(tmp_path / "focus", tmp_path / "image" / "weights.safetensors", stage="video",
                         temporal=tmp_path / "video" / "weights.safetensors", focus=4,
                         export=tmp_path / "longer.safetensors"))
    for name, runs in (("all", ["vae", "image", "video"]), ("longer", ["vae", "image", "video", "video"])):
        model = load_weights(str(tmp_path / f"{name}.safetensors"), "tiny")
        assert [recipe["stage"] for recipe in model.about["recipes"]] == runs
    assert model.config.latent_std != small_config.latent_std
    for stage in ("vae", "image", "video"):
        folder = tmp_path / stage
        assert {"args.json", "ckpt.pt", "log.csv", "weights.safetensors"} <= set(os.listdir(folder))
        assert (folder / "samples" / "final.png").exists()
        header = open(folder / "log.csv").readline().strip().split(",")
        assert header == train.COLUMNS


def test_loss_falls_when_one_batch_is_seen_again_and_again(tmp_path, small_weights, monkeypatch):
    """Overfitting one batch with fixed noise.

    Within 150 steps temporal layers alone bring the loss to a fifth of that of the image model."""
    args = train.parse(arguments(tmp_path, small_weights))
    model = train.prepare_model(args)
    trainable = train.trainable_parameters(model, "interp")
    for parameter in trainable.values():
        parameter.requires_grad_(True)
    schedule = NoiseSchedule(model.config.prediction, model.config.zero_terminal_snr)
    batch = train.prepare_data(args, model, "train", torch.device("cpu"))(0)
    batch = train.prepare_batch(model, batch, 0, args, torch.device("cpu"))
    optimizer = torch.optim.AdamW(trainable.values(), lr=5e-3)
    losses = []
    for _ in range(150):
        descend, loss = train.training_loss(model, schedule, batch, args)
        optimizer.zero_grad()
        descend.backward()
        optimizer.step()
        losses.append(loss.item())
        if losses[-1] < losses[0] / 5:
            break
    assert losses[-1] < losses[0] / 5


def test_what_moved_goes_on_learning_where_the_guess_leaves_it_out(tmp_path, small_weights):
    """With the mixture closed the guess is the blend, and its own error teaches no speed any more."""
    args = train.parse(arguments(tmp_path, small_weights))
    model = train.prepare_model(args)
    guess = model.unet.temporal_guess
    guess.to_rest.bias.data[4:8] = -99
    guess.to_speed.weight.requires_grad_(True)
    schedule = NoiseSchedule(model.config.prediction, model.config.zero_terminal_snr)
    batch = train.prepare_data(args, model, "train", torch.device("cpu"))(0)
    batch = train.prepare_batch(model, batch, 0, args, torch.device("cpu"))
    slope = lambda loss: torch.autograd.grad(loss, guess.to_speed.weight, retain_graph=True)[0].abs().max()
    _, (of_guess, of_moved) = train.diffusion_errors(model.unet, schedule, batch, args)
    assert slope(of_guess.square().sum()) == 0 < slope(of_moved.square().sum())
    assert slope(train.training_loss(model, schedule, batch, args)[0]) > 0


def test_accumulated_gradients_equal_those_of_the_whole_batch(tmp_path, small_weights):
    """Two halves of a batch, with the noise of the whole and at half weight, give the gradient of the batch.

    --gradient_accumulation_steps relies on it, and so do several processes, each with its share."""
    args = train.parse(arguments(tmp_path, small_weights, batch_size=4))
    model = train.prepare_model(args)
    trainable = train.trainable_parameters(model, "interp")
    for parameter in trainable.values():
        parameter.requires_grad_(True)
        parameter.data += 0.01 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0))
    schedule = NoiseSchedule("v", True)
    batch = train.prepare_data(args, model, "train", torch.device("cpu"))(0)
    grads = []
    for shares in ([(0, 1)], [(0, 2), (1, 2)]):
        model.unet.zero_grad()
        for share in shares:
            part = train.prepare_batch(model, batch, 0, args, torch.device("cpu"), share)
            assert len(part["latents"]) == 4 / share[1]
            (train.training_loss(model, schedule, part, args)[0] / len(shares)).backward()
        grads.append([parameter.grad.clone() for parameter in trainable.values()])
    for one, other in zip(*grads):
        assert torch.allclose(one, other, rtol=1e-3, atol=1e-6)


def test_the_relative_loss_weighs_what_flickers_and_forgets_the_scale():
    """An error that grows evenly with the frame costs its mean square, one that comes and goes more.

    Frames that are given count for nothing, uneven gaps have no second difference, and ten times the error
    has a tenth of the gradient."""
    given = torch.tensor([[True, False, False, False, True]])
    batch = {"given": given, "frames": torch.tensor([[0, 4, 8, 12, 16]])}
    shape = lambda *rows: torch.tensor(rows).view(1, 1, 5, 1, 1).expand(1, 4, 5, 2, 2).requires_grad_()
    assert train.mean_square(shape(0.0, 1, 2, 3, 0), given).item() == pytest.approx(14 / 3)
    jitter = lambda error, frames: train.jitter(error, torch.tensor([frames])).item()
    assert jitter(shape(0.0, 1, 2, 3, 4), [0, 4, 8, 12, 16]) == 0
    assert jitter(shape(0.0, 1, -1, 1, 0), [0, 4, 8, 12, 16]) == pytest.approx((9 + 16 + 9) / 3)
    assert jitter(shape(0.0, 1, -1, 1, 0), [0, 1, 5, 9, 10]) == pytest.approx(16)
    assert jitter(shape(0.0, 1, -1, 1, 0), [0, 1, 3, 6, 10]) == 0
    even = torch.ones(1)
    slopes = [torch.autograd.grad(train.relative(error, batch, 1e-9, even).sum(), error)[0].abs().max().item()
              for error in (shape(0.0, 1, -1, 1, 0), shape(0.0, 10, -10, 10, 0))]
    assert slopes[0] == pytest.approx(10 * slopes[1])


def test_focus_weighs_what_moves_and_not_a_change_of_light():
    """Weights are 1 in the mean of a window, and 1 everywhere where nothing moves, or all changes alike.

    A spot that moves over still ground: where it is and was weighs more, the more so the more is asked for.
    An error there costs more then, and an error on the ground less."""
    ground = torch.randn(2, 4, 1, 8, 8, generator=torch.Generator().manual_seed(0)).double()
    still = ground.expand(2, 4, 5, 8, 8)
    for window in (still, still + torch.arange(5.0)[:, None, None]):
        assert torch.allclose(train.focus(window, 3.0), torch.ones(2, 1, 5, 8, 8).double())
    moving = still.clone()
    for i in range(5):
        moving[1, :, i, 3, i] += 5.0
    assert torch.equal(train.focus(moving, 0.0), torch.ones(2, 1, 5, 8, 8).double())
    weak, strong = train.focus(moving, 0.5), train.focus(moving, 4.0)
    for weights in (weak, strong):
        assert torch.allclose(weights.mean((1, 2, 3, 4)), torch.ones(2).double())
        assert torch.allclose(weights[0], torch.ones(1, 5, 8, 8).double())       # each window by itself
    spot, path, far = strong[1, 0, 2, 3, 2], strong[1, 0, 2, 3, 4], strong[1, 0, 2, 7, 7]
    assert spot > path > 1 > far and spot > weak[1, 0, 2, 3, 2] > 1
    batch = {"given": torch.zeros(2, 5).bool(), "frames": torch.arange(5).expand(2, 5)}
    one = torch.ones(2, 4, 5, 1, 1).double()
    error_at = lambda row, column: F.pad(one, (column, 7 - column, row, 7 - row))
    cost = lambda error, share: train.relative(error, batch, 1e6, train.focus(moving, share))[1]
    assert cost(error_at(3, 2), 4.0) > cost(error_at(3, 2), 0.0) > cost(error_at(7, 7), 4.0)


def test_learning_rate_warms_up_and_comes_down_to_zero(tmp_path):
    """A line up over the warm-up, half a cosine down to 0 at the last step, never above the peak."""
    args = train.parse(["--stage", "vae", "--max_steps", "100", "--warmup_steps", "10",
                        "--learning_rate", "1"])
    rates = [train.get_learning_rate(step, args) for step in range(101)]
    assert rates[0] < 0.11 and max(rates) < 1 and rates.index(max(rates)) == 9 and rates[100] < 1e-6
    assert rates[9:] == sorted(rates[9:], reverse=True)


def test_dry_run_touches_nothing(tmp_path, small_weights, capsys):
    """--dry_run says what would be trained and what memory it would take, and leaves no file."""
    train.main(arguments(tmp_path, small_weights) + ["--dry_run"])
    printed = capsys.readouterr().out
    assert "trainable" in printed and float(printed.split("predicted peak: ")[1].removesuffix(" GB\n")) > 0
    assert not os.listdir(tmp_path)


def test_user_frames_are_clean_and_only_made_frames_are_noised(tmp_path, small_weights):
    """The UNet is shown t = 0 and untouched latents for the user's frames.

    t_aug where the plan made them, t_new else."""
    args = train.parse(arguments(tmp_path, small_weights, batch_size=3))
    model = train.prepare_model(args)
    batch = train.prepare_data(args, model, "train", torch.device("cpu"))(3)
    batch["user"] = batch["given"] & (torch.arange(batch["given"].shape[1]) == 0)
    seen = {}

    def unet(x, t, context, frames, given, with_guess):
        seen.update(x=x, t=t)
        return (torch.zeros_like(x),) * 3

    t_new, t_aug = torch.tensor([900, 800, 700]), torch.tensor([100, 50, 0])
    noise = {"t_new": t_new, "t_aug": t_aug, "eps": torch.randn(batch["latents"].shape), "context": None}
    train.diffusion_errors(unet, NoiseSchedule("v", True), batch | noise, args)
    for row in range(3):
        for place in range(batch["given"].shape[1]):
            given, user = batch["given"][row, place], batch["user"][row, place]
            wanted = 0 if user else t_aug[row] if given else t_new[row]
            same = torch.equal(seen["x"][row, :, place], batch["latents"][row, :, place])
            assert seen["t"][row, place] == wanted and same == (wanted == 0)


ONE_STEP = dict(max_steps=1, batch_size=1)


@pytest.fixture(scope="module")
def one_step(tmp_path_factory, small_weights):
    """The folder that holds, as interp/, a run of one step."""
    folder = tmp_path_factory.mktemp("one_step")
    train.main(arguments(folder, small_weights, **ONE_STEP))
    return folder


def test_a_folder_that_holds_a_run_is_not_overwritten(one_step, small_weights):
    """A second run into the same folder is refused, and the first stays as it was."""
    before = (one_step / "interp" / "ckpt.pt").read_bytes()
    with pytest.raises(ValueError, match="already holds a run"):
        train.main(arguments(one_step, small_weights, **ONE_STEP))
    assert (one_step / "interp" / "ckpt.pt").read_bytes() == before


@pytest.mark.parametrize("change, words", [
    ({"stage": "extrap", "resume": "interp/ckpt.pt"}, "checkpoint of stage interp"),
    ({"learning_rate": 1e-5, "resume": "auto"}, "learning_rate"),
    ({"resume": "missing.pt"}, "no checkpoint"),
    ({"weights": "missing.safetensors"}, "no weights file"),
    ({"weights": "interp/weights.safetensors"}, "only the temporal layers"),
])
def test_wrong_files_are_named(one_step, small_weights, change, words):
    """A checkpoint of another stage or with other settings, or weights that are none: nothing is started.

    One sentence says why."""
    is_path = lambda key, value: isinstance(value, str) and value != "auto" and key != "stage"
    fixed = {key: one_step / value if is_path(key, value) else value for key, value in change.items()}
    with pytest.raises(ValueError, match=words):
        train.main(arguments(one_step, small_weights, **ONE_STEP | fixed))


def test_weights_of_another_preset_are_refused(tmp_path, small_weights):
    """--preset sd15 does not take tiny weights."""
    with pytest.raises(ValueError, match="preset tiny"):
        train.main(arguments(tmp_path, small_weights, preset="sd15"))


@pytest.fixture(scope="module")
def own_clips(tmp_path_factory, small_weights):
    """A prepared folder of 8 clips of 40 sky frames, encoded with the small weights; made without ffmpeg."""
    folder = tmp_path_factory.mktemp("own")
    for seed in range(8):
        place = folder / "clips" / f"{seed}.mp4"
        (place / "000").mkdir(parents=True)
        pixels = data.to_pixels(data.SkyWorld(seed).video(range(40)))
        for i, frame in enumerate(pixels):
            Image.fromarray(frame).save(place / "000" / f"{i + 1:05d}.png")
        (place / "000.txt").write_text(f"world {seed}\n")
        data.write_json(str(place / "source.json"), {"source": f"{seed}.mp4", "refused": None})
        about = {"source": f"{seed}.mp4", "frames": 40, "size": 64, "fps": 5}
        data.write_json(str(place / "000.json"), about)
    (folder / "dropped.csv").write_text("clip,reason,detail\n")
    data.cache(str(folder), small_weights)
    return folder


@pytest.mark.usefixtures("quick_validation", "no_sheet")
def test_own_clips_are_trained_on_and_resumed_exactly(tmp_path, small_weights, own_clips, monkeypatch):
    """--data: 4 steps == 2 steps, a crash, --resume, 2 steps; and no clip is read that --drop names."""
    (tmp_path / "drop.txt").write_text("3.mp4/000\n")
    own = dict(data=own_clips, drop=tmp_path / "drop.txt", max_steps=4, save_every=2)
    folders = whole_and_cut(tmp_path, small_weights, monkeypatch, 3, **own)
    whole, cut = (torch.load(folder / "ckpt.pt", weights_only=True) for folder in folders)
    assert all(torch.equal(whole["model"][name], cut["model"][name]) for name in whole["model"])
    model = load_weights(small_weights)
    clips = lambda split: data.cached_clips(str(own_clips), model, "interp", split, str(own["drop"])).names
    assert len(clips("train")) == 6 and "3.mp4/000" not in clips("train") and len(clips("val")) == 1


@pytest.mark.usefixtures("quick_validation", "no_sheet")
def test_what_is_trained_on_does_not_change_in_the_middle_of_a_run(tmp_path, small_weights, own_clips):
    """Another --drop list, none, or clips that were encoded anew: resuming is refused, with a sentence."""
    folder, drop = tmp_path / "own", tmp_path / "drop.txt"
    shutil.copytree(own_clips, folder)
    drop.write_text("3.mp4/000\n")
    options = arguments(tmp_path, small_weights, data=folder, drop=drop, max_steps=1) + ["--resume", "auto"]
    train.main(options[:-2])
    train.main(options)
    for words in ("4.mp4/000\n", "", "3.mp4/000\n4.mp4/000\n"):
        drop.write_text(words)
        with pytest.raises(ValueError, match="trained on other clips"):
            train.main(options)
    drop.write_text("3.mp4/000\n")
    (folder / "clips" / "5.mp4" / "000.txt").write_text("other words")
    data.cache(str(folder), small_weights)
    with pytest.raises(ValueError, match="trained on other clips"):
        train.main(options)


def test_cached_text_embeddings_are_what_the_model_would_say(small_weights):
    """Contexts of a batch are used as they are, but where a caption was dropped it is the empty one's."""
    model = load_weights(small_weights)
    known = model.context(["a", "b", "c"])
    assert torch.equal(train.embed(model, {"contexts": known}, ["a", "b", "c"]), known)
    mixed = train.embed(model, {"contexts": known}, ["a", "", "c"])
    assert torch.allclose(mixed, model.context(["a", "", "c"]), atol=1e-5)
    assert torch.allclose(train.embed(model, {}, ["a", "b", "c"]), known, atol=1e-5)


def test_scores_are_the_same_every_time_and_find_what_was_shuffled(tmp_path, own_clips):
    """--score with the shipped weights, twice: the same file. A clip out of order is the hardest of all."""
    folder, frames = tmp_path / "own", list(range(40))
    shutil.copytree(own_clips, folder)
    random.Random(0).shuffle(frames)
    place = folder / "clips" / "6.mp4" / "000"
    pictures = {i: (place / f"{i + 1:05d}.png").read_bytes() for i in range(40)}
    for i, frame in enumerate(frames):
        (place / f"{i + 1:05d}.png").write_bytes(pictures[frame])
    few = "".join(f"{i}.mp4/000,short,\n" for i in range(4))
    (folder / "dropped.csv").write_text("clip,reason,detail\n" + few)
    data.cache(str(folder), train.TINY_WEIGHTS)
    files = [str(tmp_path / name) for name in ("a.csv", "b.csv")]
    for file in files:
        train.main(["--stage", "interp", "--data", str(folder), "--score", file])
    a, b = (open(file).read() for file in files)
    assert a == b and a.count("\n") == 5
    assert max(data.hardness(files[:1]).items(), key=lambda item: item[1]) == ("6.mp4/000", 1.0)
    data.main(["--drop_hardest", "0.25", "--scores", files[0], "--out", str(tmp_path / "drop.txt")])
    assert (tmp_path / "drop.txt").read_text() == "6.mp4/000\n"


@pytest.mark.parametrize("change, words", [
    ({"stage": "image", "data": "x"}, "for the stages starter"), ({"drop": "x"}, "give it as --data"),
    ({"data": "nowhere"}, "not a prepared folder"), ({"data": "own", "drop": "strange"}, "such as not there"),
    ({"data": "own", "score": "x.csv"}, "untrained")])
def test_wrong_folders_and_lists_are_named(tmp_path, small_weights, own_clips, change, words):
    """Before a step is spent, in one sentence."""
    (tmp_path / "strange").write_text("not there\n")
    paths = {"own": own_clips, "strange": tmp_path / "strange"}
    with pytest.raises(ValueError, match=words):
        train.main(arguments(tmp_path, small_weights, **{key: paths.get(value, value)
                                                         for key, value in change.items()}))
