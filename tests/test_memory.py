"""pytest tests/test_memory.py: flags that save memory train the same, and the prediction is what it takes."""

import argparse
from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch._subclasses.fake_tensor import FakeTensorMode

import convert_sd_weights
import train
from model import (EightBit, Model, UNet, add_lora, is_temporal, keep_activations, load_weights, read_weights,
                   save_memory, to_8bit)

CPU = torch.device("cpu")
ROUNDING = 1e-6     # of the largest gradient of a tensor; norms and sums may add up in another order


def arguments(tmp_path, base, **changes):
    """A command line for a run of a few short steps; True stands for a flag without a value."""
    options = dict(stage="interp", out=tmp_path / "interp", weights=base, max_steps=3, batch_size=2, worlds=2,
                   frames=31, warmup_steps=2, val_every=100, sample_every=0, save_every=100) | changes
    return [word for name, value in options.items()
            for word in ([f"--{name}"] if value is True else [f"--{name}", str(value)])]


def restless_unet(config, dtype=torch.float32):
    """A UNet that trains its temporal layers, which are no identity any more; frozen layers in `dtype`."""
    torch.manual_seed(0)
    unet = UNet(config).train()
    for name, parameter in unet.named_parameters():
        parameter.requires_grad_(is_temporal(name))
        if is_temporal(name):
            parameter.data += 0.05 * torch.randn(parameter.shape)
        else:
            parameter.data = parameter.data.to(dtype)
    return unet


def gradients(unet, context=nullcontext(), dtype=torch.float32):
    """{name: gradient} of a step on fixed inputs, and the bytes alive between forward and backward."""
    g = torch.Generator().manual_seed(1)
    x, text = torch.randn(2, 4, 5, 16, 16, generator=g), torch.randn(2, 77, 32, generator=g)
    t, given = torch.randint(0, 1000, (2, 5), generator=g), torch.tensor([1, 0, 0, 0, 1]).bool().expand(2, 5)
    with train.MemoryMeter(unet.parameters(), []) as meter:
        with context, torch.autocast("cpu", torch.bfloat16, enabled=dtype != torch.float32):
            loss = unet(x, t, text, given=given).square().mean()
        alive = meter.live
        loss.backward()
    return {name: p.grad for name, p in unet.named_parameters() if p.requires_grad}, alive


def distance(ours, exact):
    """Length of the difference of all gradients, over the length of the exact ones."""
    length = lambda tensors: torch.stack([t.float().square().sum() for t in tensors]).sum().sqrt().item()
    assert ours.keys() == exact.keys() and all(ours[name] is not None for name in ours)
    return length([ours[name] - exact[name] for name in exact]) / length(exact.values())


@pytest.mark.parametrize("flags, checkpoint_every", [
    (dict(lean=True), 0), (dict(again=True), 0), (dict(lean=True, again=True), 0),
    (dict(lean=True, again=True), 1), (dict(lean=True), 2)], ids=str)
def test_what_is_not_kept_is_computed_again_to_the_same_gradients(small_config, flags, checkpoint_every):
    """Frozen layers that keep nothing, norms and activations run twice, checkpoints: each keeps less."""
    exact, before = gradients(restless_unet(small_config))
    unet = save_memory(restless_unet(small_config), **flags)
    unet.checkpoint_every = checkpoint_every
    found, after = gradients(unet)
    for name in exact:
        assert (found[name] - exact[name]).abs().max() <= ROUNDING * exact[name].abs().max(), name
    assert after < 0.95 * before


def test_half_precision_keeps_less_and_its_gradients_are_near(small_config):
    """Frozen layers in bfloat16, temporal ones in float32: a third less is kept, gradients good to 3 %."""
    exact, before = gradients(save_memory(restless_unet(small_config), lean=True))
    unet = save_memory(restless_unet(small_config, torch.bfloat16), lean=True)
    found, after = gradients(unet, dtype=torch.bfloat16)
    assert {gradient.dtype for gradient in found.values()} == {torch.float32}
    assert 0 < distance(found, exact) < 0.03 and after < 0.67 * before


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_8_bit_is_never_wrong_by_more_than_half_a_step(dtype):
    """The largest number of a row least of all, in types whose own rounding is coarse; nor a row of zeros."""
    x = torch.randn(500, 64, generator=torch.Generator().manual_seed(0)).to(dtype)
    x[0] = 0
    whole, scale = to_8bit(x, -1)
    assert (whole.dtype, scale.dtype) == (torch.int8, dtype)
    assert ((whole.double() * scale.double() - x.double()).abs() <= 0.501 * scale.double()).all()


def test_activations_in_8_bit_are_a_quarter_and_the_gradients_are_near(small_config):
    """In float32: 8 bit and a scale per row, gradients good to 2 %; not equal, or nothing was smaller."""
    exact, before = gradients(save_memory(restless_unet(small_config), lean=True, again=True))
    unet = save_memory(restless_unet(small_config), lean=True, again=True)
    found, after = gradients(unet, keep_activations(True, None, torch.float32))
    assert 0 < distance(found, exact) < 0.02 and after < 0.5 * before


def test_activations_wait_where_they_are_told_to(small_config):
    """Offloading moves every large tensor out and brings it back: equal gradients."""
    moved, real = [], torch.Tensor.to
    exact, _ = gradients(restless_unet(small_config))

    class Home(str):
        pass

    def to(tensor, *where, **options):
        if where and isinstance(where[0], Home):
            moved.append(tensor.nbytes)
            return real(tensor, "cpu", copy=True)
        return real(tensor, *where, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.Tensor, "to", to)
        found, _ = gradients(restless_unet(small_config), keep_activations(False, Home("cpu"), torch.float32))
    assert distance(found, exact) < 1e-6 and sum(moved) > 1e6     # a copy may have another layout


def test_a_backbone_in_8_bit_is_a_byte_per_number_and_says_nearly_the_same(small_config):
    """Weights to 1/254 of the largest of their channel; gradients good to 5 %; temporal layers as before."""
    weight = torch.randn(8, 4, 3, 3)
    whole, scale = EightBit().right_inverse(weight)
    assert whole.dtype == torch.int8 and ((whole * scale - weight).abs() <= scale / 2 + 1e-7).all()
    exact, _ = gradients(restless_unet(small_config))
    unet = save_memory(restless_unet(small_config), eight_bit=True)
    kinds = {p.dtype for name, p in unet.named_parameters() if name.endswith("original0")}
    assert kinds == {torch.int8}
    assert all(p.dtype == torch.float32 for p in unet.parameters() if p.requires_grad)
    found, _ = gradients(unet)
    assert 0 < distance(found, exact) < 0.05


@pytest.mark.usefixtures("quick_validation", "no_sheet")
def test_an_optimizer_on_the_cpu_makes_the_same_steps(tmp_path, small_weights):
    """Weights, average and optimizer state after some steps, bit for bit; and a checkpoint that resumes."""
    run = lambda name, **more: train.main(arguments(tmp_path, small_weights, out=tmp_path / name,
                                                    gradient_accumulation_steps=2, **more))
    run("there")
    run("here", optimizer_on_cpu=True)
    states = [torch.load(tmp_path / name / "ckpt.pt", weights_only=True) for name in ("there", "here")]
    for part in ("model", "ema"):
        assert all(torch.equal(tensor, states[1][part][name]) for name, tensor in states[0][part].items())
    files = [read_weights(str(tmp_path / name / "weights.safetensors"))[3] for name in ("there", "here")]
    assert all(torch.equal(tensor, files[1][name]) for name, tensor in files[0].items())
    run("there", optimizer_on_cpu=True, resume="auto")     # state made there goes on here


@pytest.mark.usefixtures("quick_validation", "no_sheet")
def test_a_lora_starts_as_nothing_and_ends_in_a_file_that_other_programs_read(tmp_path, small_weights):
    """--lora_rank: the image model is what it was at the start.

    What is trained is in lora.safetensors, in kohya's names, and merged into --export."""
    model = load_weights(small_weights)
    x, t, text = torch.randn(2, 4, 16, 16), torch.tensor([10, 900]), torch.randn(2, 77, 32)
    before = model.unet(x, t, text)
    transformers = [name for name, _ in model.unet.named_modules() if name.endswith(".ff")]
    assert len(add_lora(model.unet, 2)) == 8 * len(transformers)
    assert torch.equal(model.unet(x, t, text), before)
    for layer in model.unet.modules():
        if hasattr(layer, "lora"):
            torch.nn.init.normal_(layer.lora[1].weight)
    trained = model.unet(x, t, text)
    save_file(convert_sd_weights.lora_tensors(model), str(tmp_path / "lora.safetensors"))
    merged = load_weights(small_weights)
    convert_sd_weights.merge_lora(merged, str(tmp_path / "lora.safetensors"))
    assert (trained - before).abs().max() > 0.01
    assert torch.allclose(merged.unet(x, t, text), trained, atol=1e-4)

    train.main(arguments(tmp_path, small_weights, lora_rank=2, export=tmp_path / "all.safetensors"))
    with safe_open(tmp_path / "interp" / "lora.safetensors", framework="pt") as file:
        assert any(file.get_tensor(name).any() for name in file.keys() if name.endswith("lora_up.weight"))
    exported, start = load_weights(str(tmp_path / "all.safetensors")), load_weights(small_weights)
    changed = {name for name, p in exported.unet.named_parameters() if not is_temporal(name)
               and not torch.equal(p, start.unet.get_parameter(name).half().float())}
    assert changed and all(".to_" in name for name in changed)


def test_the_lora_of_sd15_has_the_names_that_are_usual():
    """Every projection of the 16 spatial transformers, each where SD1.x has it."""
    config = train.PRESETS["sd15"]
    with FakeTensorMode():
        model = argparse.Namespace(config=config, unet=UNet(config))
        add_lora(model.unet, 4)
        names = {name.split(".")[0] for name in convert_sd_weights.lora_tensors(model)}
    assert len(names) == 16 * 8
    assert "lora_unet_up_blocks_3_attentions_2_transformer_blocks_0_attn2_to_out_0" in names


ALL = dict(gradient_checkpointing=1, recompute=True, optimizer_on_cpu=True, offload_activations=True,
           activations_8bit=True, backbone_8bit=True, lora_rank=2)


@pytest.mark.parametrize("flags", ({}, dict(gradient_checkpointing=1, mixed_precision="bf16"),
                                   dict(recompute=True, backbone_8bit=True)), ids=str)
def test_the_prediction_is_what_a_real_step_takes(tmp_path, small_config, monkeypatch, flags):
    """The meter over fake tensors and over real ones: the same number of bytes at the peak, to 1 %."""
    monkeypatch.setitem(train.PRESETS, "tiny", small_config)
    args = train.parse(arguments(tmp_path, "none", **flags))
    parts = train.predict_memory(args, 5)
    torch.manual_seed(0)
    model = Model.build(small_config)
    trainable = train.freeze_the_rest(model, "interp")
    model.unet.train()
    train.make_smaller(model, args)
    batch = train.fake_batch(args, small_config, 5)
    batch = {key: torch.zeros_like(x) for key, x in batch.items()}
    known = [t for network in model.networks().values() for t in (*network.parameters(), *network.buffers())]
    with train.MemoryMeter(known, trainable.values()) as meter:
        with train.computing(args, CPU):
            loss, _ = train.training_loss(model, train.NoiseSchedule("v", True), batch, args)
        loss.backward()
    assert meter.peak == pytest.approx(parts["gradients"] + parts["activations"], rel=0.01)
    assert parts["trained weights"] == sum(p.nbytes for p in trainable.values())
    assert sum(p.nbytes for p in model.unet.parameters()) < sum(parts.values())


def test_every_flag_lowers_the_prediction(tmp_path, small_config, monkeypatch):
    """Each alone, against none of them, for a UNet of one level."""
    monkeypatch.setitem(train.PRESETS, "tiny", replace(small_config, widths=(32,), attention_levels=(0,)))

    def predict(**flags):
        return sum(train.predict_memory(train.parse(arguments(tmp_path, "none", **flags)), 5).values())

    most = predict(**{"no-lean": True})
    for flag in ("lean", "gradient_checkpointing", "recompute", "optimizer_on_cpu", "offload_activations",
                 "activations_8bit", "backbone_8bit"):
        wanted = {"gradient_checkpointing": 1}.get(flag, True)
        assert predict(**({} if flag == "lean" else {"no-lean": True, flag: wanted})) < most, flag


def test_a_dry_run_says_what_to_add_and_ends_with_the_peak(tmp_path, monkeypatch, capsys):
    """With --vram: as few flags as it takes, in the order of SAVINGS, here where each halves 64 GB."""
    flags = ["--lean", "--gradient_checkpointing 1", "--optimizer_on_cpu", "--offload_activations",
             "--backbone_8bit", "--activations_8bit"]
    saved = lambda args: sum(getattr(args, name) == value for name, value in train.SAVINGS)
    monkeypatch.setattr(train, "predict_memory", lambda args, f: {"all": 64e9 / 2 ** saved(args)})
    for n in range(7):
        options = {"no-lean": True, "dry_run": True, "vram": train.RESERVE + 64 / 2 ** n}
        train.main(arguments(tmp_path, "none", **options))
        lines = capsys.readouterr().out.splitlines()
        added = f" with {' '.join(flags[:n])}: {64 / 2 ** n:.1f} GB" if n else ""
        assert lines[-2].endswith(f": it fits{added}") and lines[-1] == "predicted peak: 64.0 GB"
    train.main(arguments(tmp_path, "none", **options | {"vram": 1.5}))
    assert f"it does not fit, with {' '.join(flags)} neither: 1.0 GB" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())


@pytest.mark.usefixtures("quick_validation", "no_sheet")
def test_all_flags_together_run_and_leave_a_model(tmp_path, small_weights):
    """In bfloat16, all at once, with a checkpoint that resumes and an export that loads."""
    options = dict(ALL, mixed_precision="bf16", export=tmp_path / "all.safetensors")
    train.main(arguments(tmp_path, small_weights, **options))
    train.main(arguments(tmp_path, small_weights, resume="auto", **options))
    frozen, start = load_weights(str(tmp_path / "all.safetensors")), load_weights(small_weights)
    name = "input_blocks.0.0.weight"
    assert torch.equal(frozen.unet.get_parameter(name), start.unet.get_parameter(name).half().float())


def test_bf16_is_only_taken_where_it_is_real(monkeypatch, capsys):
    """auto is bf16 where the device has it, else fp16; emulated bf16 becomes fp16, and it says so."""
    device = torch.device("cuda")
    for real in (True, False):
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation, real=real: real)
        assert train.choose_precision("auto", device) == ("bf16" if real else "fp16")
        assert train.choose_precision("bf16", device) == ("bf16" if real else "fp16")
        assert all(train.choose_precision(kind, device) == kind for kind in ("no", "fp16"))
    assert "emulated" in capsys.readouterr().out
    assert train.parse(["--stage", "interp"]).mixed_precision == "no"
    assert train.parse(["--stage", "interp", "--preset", "sd15"]).mixed_precision == "auto"


def test_networks_that_have_nothing_to_do_stay_where_they_are(small_config):
    """With --data the UNet alone goes to the device."""
    model = Model.build(small_config).to("meta", ("unet",))
    places = {part: next(network.parameters()).device.type for part, network in model.networks().items()}
    assert places == {"unet": "meta", "vae": "cpu", "text": "cpu"}


@pytest.mark.parametrize("flags, words", [
    (dict(stage="image", lora_rank=2), "--lora_rank is for the stages"),
    (dict(preset="sd15"), "preset tiny")])
def test_flags_that_do_not_go_together_are_refused(tmp_path, small_weights, flags, words):
    """In one sentence, before anything is spent."""
    with pytest.raises(ValueError, match=words):
        train.main(arguments(tmp_path, small_weights, **flags))
