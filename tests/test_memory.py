"""pytest tests/test_memory.py: flags that save memory train the same, and the prediction is what it takes."""

import argparse
from contextlib import nullcontext

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import convert_sd_weights
import train
from conftest import assert_same_run
from model import (EightBit, Model, UNet, add_lora, is_temporal, keep_activations, load_weights,
                   store_in_8bit, to_8bit)

CPU = torch.device("cpu")


def restless_unet(config, dtype=torch.float32):
    """A UNet that trains its temporal layers, which are no identity any more; frozen layers in `dtype`."""
    torch.manual_seed(0)
    unet = UNet(config).train()
    for name, parameter in unet.named_parameters():
        parameter.requires_grad_(is_temporal(name))
        if is_temporal(name):
            parameter.data += 0.03 * torch.randn(parameter.shape)
        else:
            parameter.data = parameter.data.to(dtype)
    return unet


def gradients(unet, context=nullcontext(), dtype=torch.float32):
    """{name: gradient} of a step on fixed inputs, and the bytes alive between forward and backward."""
    g = torch.Generator().manual_seed(1)
    x, text = torch.randn(2, 4, 5, 16, 16, generator=g), torch.randn(2, 77, 32, generator=g)
    t, given = torch.randint(0, 1000, (2, 5), generator=g), torch.tensor([1, 0, 0, 0, 1]).bool().expand(2, 5)
    with train.MemoryMeter(unet.parameters()) as meter:
        with context, torch.autocast("cpu", torch.bfloat16, enabled=dtype != torch.float32):
            loss = unet(x, t, text, given=given).square().mean()
        alive = meter.alive()
        loss.backward()
    return {name: p.grad for name, p in unet.named_parameters() if p.requires_grad}, alive


@pytest.fixture(scope="module")
def exact(little_config):
    """The gradients of a step that saves nothing, and the bytes it keeps."""
    return gradients(restless_unet(little_config))


def distance(ours, exact):
    """Length of the difference of all gradients, over the length of the exact ones."""
    length = lambda tensors: torch.stack([t.float().square().sum() for t in tensors]).sum().sqrt().item()
    assert ours.keys() == exact.keys() and all(ours[name] is not None for name in ours)
    return length([ours[name] - exact[name] for name in exact]) / length(exact.values())


@pytest.mark.parametrize("way, wrong, kept", [
    ("recompute every stage", 1e-6, 0.5), ("recompute every second stage", 1e-6, 0.95), ("half", 0.03, 0.75),
    ("8-bit activations", 0.02, 0.5), ("8-bit backbone", 0.05, 1.05)])
def test_gradients_are_near_and_less_is_kept(little_config, exact, way, wrong, kept):
    """Recomputed stages give the same gradients. Smaller numbers do not, but those are float32 and good."""
    dtype = torch.bfloat16 if way == "half" else torch.float32      # of frozen layers only
    unet = restless_unet(little_config, dtype)
    unet.checkpoint_every = {"recompute every stage": 1, "recompute every second stage": 2}.get(way, 0)
    if way == "8-bit backbone":
        store_in_8bit(unet)
        assert {p.dtype for name, p in unet.named_parameters() if name.endswith("original0")} == {torch.int8}
    context = keep_activations(True, None, dtype) if way == "8-bit activations" else nullcontext()
    found, alive = gradients(unet, context, dtype)
    assert {gradient.dtype for gradient in found.values()} == {torch.float32}
    assert distance(found, exact[0]) < wrong and alive < kept * exact[1]
    assert way.startswith("recompute") or distance(found, exact[0]) > 1e-4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_8_bit_is_never_wrong_by_more_than_half_a_step(dtype):
    """The largest number of a row least of all, in types whose own rounding is coarse; nor a row of zeros."""
    x = torch.randn(500, 64, generator=torch.Generator().manual_seed(0)).to(dtype)
    x[0] = 0
    whole, scale = to_8bit(x, -1)
    assert (whole.dtype, scale.dtype) == (torch.int8, dtype)
    assert ((whole.double() * scale.double() - x.double()).abs() <= 0.501 * scale.double()).all()
    weight = torch.randn(8, 4, 3, 3)
    whole, scale = EightBit().right_inverse(weight)              # one scale per output channel
    assert scale.numel() == 8 and ((whole * scale - weight).abs() <= scale / 2 + 1e-7).all()


def test_activations_wait_where_they_are_told_to(little_config, exact, monkeypatch):
    """Offloading moves every large tensor out and brings it back: equal gradients."""
    moved, real = [], torch.Tensor.to

    class Home(str):
        """A device that can be told from the others."""

    def to(tensor, *where, **options):
        if where and isinstance(where[0], Home):
            moved.append(tensor.nbytes)
            return real(tensor, "cpu", copy=True)
        return real(tensor, *where, **options)

    monkeypatch.setattr(torch.Tensor, "to", to)
    found, _ = gradients(restless_unet(little_config), keep_activations(False, Home("cpu"), torch.float32))
    assert distance(found, exact[0]) < 1e-6 and sum(moved) > 1e6     # a copy may have another layout


def test_an_optimizer_on_the_cpu_makes_the_same_steps(tmp_path, train_argv):
    """Weights, average and optimizer after some steps, bit for bit; and each goes on where the other was."""
    argv = lambda name: train_argv(tmp_path, out=tmp_path / name, gradient_accumulation_steps=2)
    train.main(argv("there"))
    train.main([*argv("here"), "--optimizer_on_cpu"])
    assert_same_run(tmp_path / "there", tmp_path / "here")
    train.main([*argv("there"), "--optimizer_on_cpu", "--resume", "auto"])


def test_a_lora_is_nothing_at_first_and_is_merged_at_last(tmp_path, train_argv, little_weights):
    """What is trained is in lora.safetensors, in kohya's names: merged by hand it is what --export holds."""
    model = load_weights(little_weights)
    x, t, text = torch.randn(2, 4, 1, 8, 8), torch.tensor([[10], [900]]), torch.randn(2, 77, 32)
    before, start = model.unet(x, t, text), load_weights(little_weights)
    transformers = [name for name, _ in model.unet.named_modules() if name.endswith(".ff")]
    add_lora(model.unet, 2)
    assert sum(hasattr(layer, "lora") for layer in model.unet.modules()) == 8 * len(transformers)
    assert torch.equal(model.unet(x, t, text), before)

    train.main(train_argv(tmp_path, lora_rank=2, learning_rate=0.1, max_steps=6,
                          export=tmp_path / "all.safetensors"))
    exported, merged = load_weights(str(tmp_path / "all.safetensors")), load_weights(little_weights)
    convert_sd_weights.merge_lora(merged, str(tmp_path / "interp" / "lora.safetensors"))
    changed = {name for name, p in exported.unet.named_parameters() if not is_temporal(name)
               and not torch.equal(p, start.unet.get_parameter(name).half().float())}
    assert changed and all(".to_" in name for name in changed)
    trained = merged.unet(x, t, text)
    assert (trained - before).abs().max() > 0.001
    assert torch.allclose(exported.unet(x, t, text), trained, atol=0.01)     # in half precision


def test_the_lora_of_sd15_has_the_names_that_are_usual():
    """Every projection of the 16 spatial transformers, each where SD1.x has it."""
    config = train.PRESETS["sd15"]
    with FakeTensorMode():
        model = argparse.Namespace(config=config, unet=UNet(config))
        add_lora(model.unet, 4)
        names = {name.split(".")[0] for name in convert_sd_weights.lora_tensors(model)}
    assert len(names) == 16 * 8
    assert "lora_unet_up_blocks_3_attentions_2_transformer_blocks_0_attn2_to_out_0" in names


ALL = dict(gradient_checkpointing=1, optimizer_on_cpu=True, offload_activations=True, activations_8bit=True,
           backbone_8bit=True)


@pytest.mark.parametrize("flags", [{}, dict(gradient_checkpointing=1, mixed_precision="bf16"),
                                   dict(backbone_8bit=True)], ids=str)
def test_the_prediction_is_what_a_real_step_takes(tmp_path, little_config, monkeypatch, train_argv, flags):
    """The same number of bytes at the peak on tensors without content and on real ones, to 1 %."""
    monkeypatch.setitem(train.PRESETS, "tiny", little_config)
    args = train.parse(train_argv(tmp_path, **flags))
    real = train.dry_run(args, CPU, "a test", mode=nullcontext)
    assert real > 1e6 and train.dry_run(args, CPU, "a test") == pytest.approx(real, rel=0.01)


def test_every_flag_lowers_the_prediction(tmp_path, little_config, monkeypatch, train_argv):
    """Each alone; but 8-bit weights only where stages are recomputed, and not all unpacked at once."""
    monkeypatch.setitem(train.PRESETS, "tiny", little_config)
    predict = lambda **flags: train.dry_run(train.parse(train_argv(tmp_path, **flags)), CPU, "a test")
    most, checkpointed = predict(), predict(gradient_checkpointing=1)
    assert predict(gradient_checkpointing=1, backbone_8bit=True) < checkpointed < most
    for flag in ("optimizer_on_cpu", "offload_activations", "activations_8bit"):
        assert predict(**{flag: True}) < most, flag


@pytest.mark.parametrize("bf16_is_real, chosen", [(True, "bf16"), (False, "fp16")])
def test_a_dry_run_ends_with_the_peak_and_writes_nothing(
        tmp_path, little_config, monkeypatch, train_argv, capsys, bf16_is_real, chosen):
    """Here with auto, which takes bf16 only where the GPU does not emulate it."""
    monkeypatch.setitem(train.PRESETS, "tiny", little_config)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: bf16_is_real)
    train.main(train_argv(tmp_path, mixed_precision="auto", device="cuda", dry_run=True))
    first, *_, last = capsys.readouterr().out.splitlines()
    assert chosen in first and float(last.split("predicted peak: ")[1].split(" GB")[0]) >= 0
    assert not list(tmp_path.iterdir())


def test_stable_diffusion_fits_its_default_into_a_small_gpu(capsys):
    """The prediction for extrap windows of 512 x 512 pixels, with no flag."""
    train.main(["--stage", "extrap", "--preset", "sd15", "--dry_run"])
    assert 5.5 < float(capsys.readouterr().out.split("predicted peak: ")[1].split(" GB")[0]) < 6.3


def test_all_flags_together_run_and_leave_a_model(tmp_path, little_weights, train_argv):
    """In bfloat16, all at once, with a checkpoint that resumes and an export that loads."""
    options = dict(ALL, lora_rank=2, mixed_precision="bf16", export=tmp_path / "all.safetensors", max_steps=2)
    train.main(train_argv(tmp_path, **options))
    train.main(train_argv(tmp_path, resume="auto", **options))
    frozen, start = load_weights(str(tmp_path / "all.safetensors")), load_weights(little_weights)
    name = "input_blocks.0.0.weight"
    assert torch.equal(frozen.unet.get_parameter(name), start.unet.get_parameter(name).half().float())


def test_networks_that_have_nothing_to_do_stay_where_they_are(little_config):
    """With sd15 the UNet alone goes to the device."""
    model = Model.build(little_config)
    model.to("meta", ("unet",))
    places = {part: next(network.parameters()).device.type for part, network in model.networks().items()}
    assert places == {"unet": "meta", "vae": "cpu", "text": "cpu"}
