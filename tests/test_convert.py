"""Run: python -m pytest -q tests/test_convert.py

Checkpoints are made here, in SD1.5's layout but with the narrow networks of oracle_weights.py ("mini"): 2.8
million parameters instead of 1.07 billion. fixtures/sd15_keys.json.gz has the names of all tensors of SD1.5,
its own and diffusers'.
"""

import gzip
import hashlib
import json
import pickle
import random
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import oracle_weights as oracle
import pytest
import torch
from safetensors.torch import load_file, save_file

import convert_sd_weights as C
from convert_sd_weights import CONV_IN, UNET, VAE, convert, main, rename
from model import PREFIXES, PRESETS, Model, load_weights

FIXTURES = Path(__file__).parent / "fixtures"
SD15 = json.loads(gzip.decompress((FIXTURES / "sd15_keys.json.gz").read_bytes()))
CLIP = json.loads(gzip.decompress((FIXTURES / "tokenizer.json.gz").read_bytes()))
MINI = oracle.config("mini")
# mini grows at other levels than SD1.5 and has three shortcuts of its own, under names of the same kind
SHORTCUTS = {
    "unet": {"down_blocks.3.resnets.0.conv_shortcut.": UNET + "input_blocks.10.0.skip_connection."},
    "vae": {"encoder.down_blocks.3.resnets.0.conv_shortcut.": VAE + "encoder.down.3.block.0.nin_shortcut.",
            "decoder.up_blocks.1.resnets.0.conv_shortcut.": VAE + "decoder.up.2.block.0.nin_shortcut."},
    "text": {}}
OLD_NAMES = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}   # until mid-2023
MERGES = [CLIP["merges"][str(i)] for i in range(MINI.vocabulary - 514)]   # CLIP's first 86
TEXT_IDS = "cond_stage_model.transformer.text_model.embeddings.position_ids"


@pytest.fixture(scope="module")
def weights():
    """The 964 weights of a mini SD1.5, by SD's names."""
    with torch.device("meta"):
        networks = Model.build(MINI).networks()
    parts = [oracle.weights("mini", part, network) for part, network in networks.items()]
    return {**parts[0], **parts[1], **parts[2]}


@pytest.fixture
def mini(monkeypatch, weights, tmp_path):
    """Makes the command line expect a mini SD1.5; is a checkpoint like v1-5-pruned-emaonly.safetensors."""
    monkeypatch.setitem(PRESETS, "sd15", MINI)
    monkeypatch.setattr(C, "PARAMETERS", {part: c["params"] for part, c in oracle.MANIFEST["mini"].items()})
    (tmp_path / "merges.txt").write_text("#version: 0.2\n" + "\n".join(MERGES) + "\n")
    return like_emaonly(weights)


def like_emaonly(weights):
    """With what else is in the real file: 12 tables of the schedule (here two), positions, two counters."""
    betas = torch.linspace(0.00085 ** 0.5, 0.012 ** 0.5, 1000) ** 2
    return {**weights, "betas": betas, "alphas_cumprod": (1 - betas).cumprod(0),
            TEXT_IDS: torch.arange(77)[None], "model_ema.decay": torch.tensor(0.9999),
            "model_ema.num_updates": torch.tensor(840000)}


def averages(weights, factor=1.0):
    """The UNet again, under the names of averaged weights."""
    return {"model_ema." + key.removeprefix("model.").replace(".", ""): tensor * factor
            for key, tensor in weights.items() if key.startswith(UNET)}


def write_folder(folder, weights, old_names=False, ending="safetensors"):
    """The same weights as a diffusers folder, by the fixture's names and not by our rules."""
    for part, name in (("unet", "unet/diffusion_pytorch_model"), ("vae", "vae/diffusion_pytorch_model"),
                       ("text", "text_encoder/" + ("model" if ending == "safetensors" else "pytorch_model"))):
        tensors = {}
        more = {key + leaf: ldm + leaf for key, ldm in SHORTCUTS[part].items() for leaf in ("weight", "bias")}
        for key, ldm in {**SD15["diffusers"][part], **more}.items():
            if ldm not in weights:
                continue
            for new, old in OLD_NAMES.items() if old_names and part == "vae" else ():
                key = key.replace(new, old)
            linear = ".mid.attn_1." in ldm and weights[ldm].dim() == 4
            tensors[key] = weights[ldm][:, :, 0, 0].contiguous() if linear else weights[ldm]
        path = folder / f"{name}.{ending}"
        path.parent.mkdir(parents=True, exist_ok=True)
        if ending == "safetensors":
            save_file(tensors, path)
        else:
            torch.save(tensors, path)
    (folder / "tokenizer").mkdir()
    (folder / "tokenizer" / "merges.txt").write_text("#version: 0.2\n" + "\n".join(MERGES) + "\n")


def run(tmp_path, source, *more):
    """Write `source` where it is a dict, convert it, and return what is in the result."""
    if isinstance(source, dict):
        save_file(source, tmp_path / "sd.safetensors")
        source = tmp_path / "sd.safetensors"
    out = tmp_path / "out" / "sd15.safetensors"
    main([str(source), "--out", str(out), "--merges", str(tmp_path / "merges.txt"), *more])
    assert [file.name for file in out.parent.iterdir()] == [out.name]
    return load_file(out)


def assert_same(got, expected):
    assert got.keys() == expected.keys()
    assert all(torch.equal(got[key].float(), expected[key]) for key in expected)


def assert_refused(tmp_path, source, message, *more):
    """In one sentence that names the file, and without leaving anything behind."""
    with pytest.raises(ValueError, match=message) as error:
        run(tmp_path, source, *more)
    assert "\n" not in str(error.value) and not list(tmp_path.glob("out/*"))


# ------------------------------------------------------------------------------------------------------------
# What comes in comes out
# ------------------------------------------------------------------------------------------------------------

def test_every_diffusers_name_of_sd15_is_mapped_to_sds_own():
    """All 686 + 248 + 196 of them, at full size, each to a name of its own."""
    names = set()
    for part, keys in SD15["diffusers"].items():
        for key, ldm in keys.items():
            assert rename(key, part, PRESETS["sd15"]) == ldm
            names.add(ldm)
    real = {key for key in SD15["shapes"] if key.startswith(tuple(PREFIXES.values()))}
    assert names == real - {TEXT_IDS} and len(names) == 686 + 248 + 196


def test_everything_else_in_the_real_file_is_ignored_by_name():
    """12 tables, positions and two counters; not one weight."""
    ignored = {key for key in SD15["shapes"] if C.IGNORED.fullmatch(key)}
    assert len(ignored) == 15
    assert [key for key in ignored if key.startswith(tuple(PREFIXES.values()))] == [TEXT_IDS]


def test_what_a_training_program_leaves_in_a_ckpt_is_skipped(mini, weights, tmp_path, monkeypatch):
    """Objects of PyTorch Lightning and NumPy scalars, as in sd-v1-4-full-ema.ckpt and files trained on it."""
    for name in ("pytorch_lightning", "pytorch_lightning.callbacks"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    module = sys.modules["pytorch_lightning.callbacks"]
    module.ModelCheckpoint = type("ModelCheckpoint", (), {"__module__": module.__name__})
    module.ModelCheckpoint.__qualname__ = "ModelCheckpoint"
    left = module.ModelCheckpoint()
    left.best = np.float64(0.5)
    path = tmp_path / "model.ckpt"
    torch.save({"callbacks": {module.ModelCheckpoint: left}, "best": np.float32(1), "state_dict": mini}, path)
    monkeypatch.undo()                                          # here, PyTorch Lightning is not installed
    assert C.read_tensors(path).keys() == mini.keys()
    assert all(torch.equal(tensor, mini[key]) for key, tensor in C.read_tensors(path).items())


@torch.no_grad()
def test_a_single_file_becomes_a_model_that_says_what_sd_says(mini, weights, tmp_path, capsys):
    """Every tensor bit for bit, the outputs of SD's own code, the tokenizer inside, and fit for video."""
    assert_same(run(tmp_path, mini), weights)
    printed = capsys.readouterr().out
    assert "SD1.x, single file, float32, no averages, with VAE, with text encoder" in printed
    assert "unet   1,670,884 parameters, all finite: OK" in printed
    assert "alpha_bar[0]=0.99915 [999]=0.00466" in printed
    model = load_weights(tmp_path / "out" / "sd15.safetensors")
    assert model.config == MINI and model.tokenizer.merges == MERGES
    assert tuple(model.context(["thin"]).shape) == (1, 77, 32)
    case, expected = oracle.CASES["mini.unet.0"], oracle.EXPECTED["mini.unet.0"]
    x, context = oracle.noise("mini.unet.0.x", case["x"]), oracle.noise("mini.unet.0.ctx", case["ctx"])
    t = torch.tensor(case["t"])
    got = model.unet(x, t, context)
    assert (got - expected).abs().max() <= 3e-5 * expected.abs().max()
    video = model.unet(x[None].transpose(1, 2), t[None], context[:1])
    assert (video[0, :, 0] - got[0]).abs().max() <= 1e-5


@pytest.mark.parametrize("old_names, ending", ((False, "safetensors"), (True, "safetensors"), (True, "bin")))
def test_a_diffusers_folder_gives_the_same_file(mini, weights, tmp_path, old_names, ending):
    """With new and old names and linear layers in the VAE's attention, as pickles too, with its tokenizer."""
    write_folder(tmp_path / "folder", weights, old_names, ending)
    out = tmp_path / "new.safetensors"
    main([str(tmp_path / "folder"), "--out", str(out)])
    assert_same(load_file(out), weights)
    assert load_weights(out).tokenizer.merges == MERGES


@pytest.mark.parametrize("zipped", (True, False))
def test_a_ckpt_gives_the_same_file(mini, weights, tmp_path, zipped):
    """Nested as LDM saves it, even twice, beside training state; in today's format or the one before 2020."""
    path = tmp_path / "model.ckpt"
    torch.save({"epoch": 3, "state_dict": {"state_dict": mini}}, path, _use_new_zipfile_serialization=zipped)
    assert_same(run(tmp_path, path), weights)


def test_the_averages_are_taken_if_asked_for(mini, weights, tmp_path, capsys):
    """And left, but mentioned, if not."""
    both = {**mini, **averages(weights, 0.5)}
    halved = {key: tensor / 2 if key.startswith(UNET) else tensor for key, tensor in weights.items()}
    assert_same(run(tmp_path, both, "--ema"), halved)
    assert "averages taken" in capsys.readouterr().out
    assert_same(run(tmp_path, both), weights)
    assert "averages not used" in capsys.readouterr().out
    (tmp_path / "out" / "sd15.safetensors").unlink()
    both.popitem()
    assert_refused(tmp_path, both, "lacks 1 tensors: model.diffusion_model", "--ema")
    assert_refused(tmp_path, mini, "has no averaged weights .*leave --ema out", "--ema")


def test_an_inpainting_file_keeps_its_first_four_input_channels(mini, weights, tmp_path, capsys):
    """And says so. Their order is noisy latents, mask, masked picture."""
    wide = torch.cat([weights[CONV_IN], torch.ones(32, 5, 3, 3)], dim=1)
    assert_same(run(tmp_path, {**mini, CONV_IN: wide}), weights)
    printed = capsys.readouterr().out
    assert "SD1.x inpainting" in printed and "kept the first 4 of 9 input channels" in printed
    (tmp_path / "out" / "sd15.safetensors").unlink()
    eight = {**mini, CONV_IN: wide[:, :8].contiguous()}
    assert_refused(tmp_path, eight, r"in another shape 1 .* \[32, 8, 3, 3\] instead of")


@pytest.mark.parametrize("layout", ("whole checkpoint", "SD", "diffusers", "folder"))
def test_the_vae_may_come_from_another_file(mini, weights, tmp_path, layout):
    """In any layout; what is not its weights is left."""
    vae = {key: tensor for key, tensor in weights.items() if key.startswith(VAE)}
    source = tmp_path / "vae.safetensors"
    if layout == "whole checkpoint":
        save_file({**mini, CONV_IN: torch.zeros(1)}, source)
    elif layout == "SD":
        bare = {key.removeprefix(VAE): tensor for key, tensor in vae.items()}
        save_file({**bare, "loss.logvar": torch.zeros(1)}, source)
    else:
        write_folder(tmp_path / "folder", weights)
        source = tmp_path / "folder" / "vae"
        source = source / "diffusion_pytorch_model.safetensors" if layout == "diffusers" else source
    without = {key: tensor for key, tensor in mini.items() if key not in vae}
    assert_refused(tmp_path, without, "has no VAE .*add --vae FILE")
    assert_same(run(tmp_path, without, "--vae", str(source)), weights)
    other = {**mini, **{key: tensor * 2 for key, tensor in vae.items()}}
    assert_same(run(tmp_path, other, "--vae", str(source)), weights)


def test_text_names_without_text_model_are_understood(mini, weights, tmp_path):
    """Some merged files lack that level."""
    short = {key.replace(".text_model.", "."): tensor for key, tensor in mini.items()}
    assert_same(run(tmp_path, short), weights)


def test_list_prints_every_pair_and_writes_nothing(mini, weights, tmp_path, capsys):
    """Also without a tokenizer."""
    write_folder(tmp_path / "folder", weights)
    main([str(tmp_path / "folder"), "--out", str(tmp_path / "x.safetensors"), "--list"])
    lines = [line.split(" -> ") for line in capsys.readouterr().out.splitlines() if " -> " in line]
    assert sorted(name for _, name in lines) == sorted(weights) and not (tmp_path / "x.safetensors").exists()
    assert ["unet/mid_block.attentions.0.norm.weight", UNET + "middle_block.1.norm.weight"] in lines


@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16, torch.float32))
def test_dtype_is_what_the_numbers_are_stored_in(mini, weights, tmp_path, dtype):
    """Weights of this test are exact in all three."""
    got = run(tmp_path, mini, "--dtype", str(dtype).removeprefix("torch."))
    assert {tensor.dtype for tensor in got.values()} == {dtype}
    assert_same(got, weights)


# ------------------------------------------------------------------------------------------------------------
# What is refused
# ------------------------------------------------------------------------------------------------------------

def test_tensors_that_are_missing_left_over_or_of_another_shape_are_named(mini, tmp_path):
    """All of them, in one message."""
    mini["model.diffusion_model.typo"] = mini.pop(UNET + "out.2.bias")
    mini[VAE + "quant_conv.bias"] = torch.zeros(7)
    assert_refused(tmp_path, mini, "lacks 1 tensors: model.diffusion_model.out.2.bias; "
                   "has left over 1 tensors: model.diffusion_model.typo; "
                   r"has in another shape 1 tensors: first_stage_model.quant_conv.bias \[7\] instead of")


def test_two_tensors_for_one_place_are_refused(mini, tmp_path):
    """Old and new name of the same weight, say."""
    key = "cond_stage_model.transformer.text_model.final_layer_norm.bias"
    mini[key.replace("text_model.", "")] = mini[key].clone()
    assert_refused(tmp_path, mini, f"has twice 1 tensors: {key}")


def sd2(mini):
    key = UNET + "input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight"
    return {**mini, key: torch.zeros(32, 1024)}


@pytest.mark.parametrize("make, message", (
    (sd2, "is SD2, its text 1024 wide"),
    (lambda mini: {**mini, "cond_stage_model.model.ln_final.bias": torch.zeros(1)}, "is SD2, not"),
    (lambda mini: {**mini, "conditioner.embedders.0.x": torch.zeros(1)}, "is SDXL, not"),
    (lambda mini: {"lora_unet_mid_block_proj_in.lora_up.weight": torch.zeros(1)}, "is a LoRA, not"),
    (lambda mini: {"unet.mid_block.attn1.to_q.lora_A.weight": torch.zeros(1)}, "is a LoRA, not"),
    (lambda mini: {key: t for key, t in mini.items() if key.startswith(VAE)}, "is a VAE alone.* as --vae"),
    (lambda mini: {key[len(VAE):]: t for key, t in mini.items() if key.startswith(VAE)}, "is a VAE alone"),
    (lambda mini: {"some.weight": torch.zeros(1)}, "has no UNet .* but some.weight"),
    (lambda mini: {key: t for key, t in mini.items() if "cond_stage" not in key}, "has no text encoder"),
), ids=("SD2 sizes", "SD2 names", "SDXL", "LoRA", "PEFT LoRA", "VAE", "VAE bare", "other", "no text"))
def test_other_kinds_of_models_are_refused_by_name(mini, tmp_path, make, message):
    """Found by their names and sizes."""
    assert_refused(tmp_path, make(mini), message)


class Code:
    """What a hostile checkpoint may hold: something to run on loading."""

    def __reduce__(self):
        return print, ("this must not be printed",)


def cut(path, save, keep):
    save(path)
    path.write_bytes(path.read_bytes()[:keep])


TENSORS = {"a": torch.zeros(1000)}
BAD_FILES = {
    "no file": (lambda path: None, "no file at"),
    "empty": (lambda path: path.write_bytes(b""), "neither safetensors nor ckpt"),
    "LFS": (lambda path: path.write_bytes(b"version https://git-lfs.github.com/spec/v1\n"), "LFS pointer"),
    "HTML page": (lambda path: path.write_bytes(b"\n<!DOCTYPE html><html>sign in</html>"), "web page"),
    "text": (lambda path: path.write_bytes(b"Not found, sorry."), "neither safetensors nor ckpt"),
    "cut safetensors": (lambda path: cut(path, lambda p: save_file(TENSORS, p), -1), "truncated or damaged"),
    "cut header": (lambda path: cut(path, lambda p: save_file(TENSORS, p), 40), "truncated or damaged"),
    "cut ckpt": (lambda path: cut(path, lambda p: torch.save(TENSORS, p), -1), "truncated or damaged"),
    "half a ckpt": (lambda path: cut(path, lambda p: torch.save(TENSORS, p), 2000), "truncated or damaged"),
    "code": (lambda path: torch.save({"state_dict": {"a": Code()}}, path), r"code in it \(.*print\)"),
    "bare code": (lambda path: path.write_bytes(pickle.dumps(Code(), 2)), r"code in it \(.*print\)"),
    "damaged pickle": (lambda path: path.write_bytes(b"\x80\x02\xff\xff"), "damaged"),
    "a list": (lambda path: torch.save([1, 2], path), "holds a list"),
}


@pytest.mark.parametrize("make, message", BAD_FILES.values(), ids=BAD_FILES)
def test_bad_files_are_refused_in_one_sentence(mini, tmp_path, capsys, make, message):
    """By what they are, whatever they are called; code in a pickle is named and never run."""
    path = tmp_path / "model.safetensors"
    make(path)
    assert_refused(tmp_path, path, f"model.safetensors.*{message}|{message}.*model.safetensors")
    assert "must not" not in capsys.readouterr().out


def test_a_folder_without_weights_is_refused(mini, weights, tmp_path):
    """With the folder that lacks them."""
    write_folder(tmp_path / "folder", weights)
    (tmp_path / "folder" / "vae" / "diffusion_pytorch_model.safetensors").unlink()
    assert_refused(tmp_path, tmp_path / "folder", "no diffusion_pytorch_model .* in .*folder.vae")


@pytest.mark.parametrize("content, message", (
    (None, "no tokenizer at"), ("a b\nc d\n", "is not CLIP's list of 86 merges"), ("", "is not CLIP's list"),
    ("\n".join([*MERGES[1:], "x y"]), "is not CLIP's list"), ("\n".join(MERGES[:-1]), "is not CLIP's list")))
def test_a_wrong_tokenizer_is_refused(mini, tmp_path, content, message):
    """Missing, another model's, shifted by a line, or too short."""
    (tmp_path / "merges.txt").unlink()
    if content is not None:
        (tmp_path / "merges.txt").write_text(content)
    assert_refused(tmp_path, mini, message)


def test_a_single_file_needs_a_tokenizer(mini, tmp_path):
    """Which is asked for by its name."""
    save_file(mini, tmp_path / "sd.safetensors")
    with pytest.raises(ValueError, match="no tokenizer in a single file: give --merges bpe_simple"):
        main([str(tmp_path / "sd.safetensors"), "--out", str(tmp_path / "out.safetensors")])


def test_merges_are_read_from_clips_own_file_too(tmp_path):
    """Zipped, with its header, and with far more pairs than CLIP uses."""
    path = tmp_path / "bpe.txt.gz"
    lines = ['"bpe_simple_vocab_16e6.txt#version: 0.2', *MERGES, "far more", ""]
    path.write_bytes(gzip.compress("\n".join(lines).encode()))
    assert C.read_merges(str(path), MINI) == MERGES


def test_numbers_that_are_not_finite_are_refused(mini, weights, tmp_path):
    """Those of the file, and those too large for float16, which bfloat16 can hold."""
    key = UNET + "out.2.bias"
    assert_refused(tmp_path, {**mini, key: torch.full((4,), float("nan"))}, f"1 tensors .* not finite: {key}")
    large = {key: torch.full((4,), 2.0 ** 17)}
    assert_refused(tmp_path, {**mini, **large}, f"not finite: {key}; try --dtype bfloat16")
    assert_same(run(tmp_path, {**mini, **large}, "--dtype", "bfloat16"), {**weights, **large})


def test_another_noise_schedule_is_mentioned(mini, weights, tmp_path):
    """The tables in the file are not used, but those of SD1.x must be meant."""
    save_file({**mini, "alphas_cumprod": mini["alphas_cumprod"] * 0.5}, tmp_path / "sd.safetensors")
    placed, found = convert(str(tmp_path / "sd.safetensors"), MINI)
    assert "WARNING: was made for another noise schedule, with alpha_bar[999]=0.00233" in found
    assert len(placed) == len(weights)


def test_wrong_parameter_counts_are_refused(mini, tmp_path, monkeypatch):
    """The last check before a file gets its name."""
    monkeypatch.setitem(C.PARAMETERS, "vae", 83_653_863)
    assert_refused(tmp_path, mini, "vae has 1,067,079 parameters, not 83,653,863")


def test_the_script_ends_with_one_sentence(tmp_path):
    """Not with a traceback."""
    command = [sys.executable, C.__file__, str(tmp_path / "none.ckpt")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.count("\n") == 1
    assert done.stderr.startswith("convert_sd_weights.py: no file at")


# ------------------------------------------------------------------------------------------------------------
# What is damaged
# ------------------------------------------------------------------------------------------------------------

def damage(rng, tensors, whole, path, save):
    """Write `tensors`, whose file is the bytes `whole`, with one thing wrong: the file is cut or has a bit
    flipped, or a tensor is missing, has another name or shape, or is there under two names."""
    kind, key = rng.choice(("cut", "flip", "drop", "rename", "reshape", "twice")), rng.choice(sorted(tensors))
    tensors = dict(tensors)
    if kind == "drop":
        del tensors[key]
    if kind == "rename":
        tensors[key[:-1] + rng.choice("abcxyz_")] = tensors.pop(key)
    if kind == "reshape":
        shape = tensors[key].shape
        tensors[key] = tensors[key].reshape(1, *shape) if rng.random() < 0.5 else tensors[key].flatten()[:-1]
    if kind == "twice":
        other = key.replace(".text_model.", ".") if ".text_model." in key else key + "2"
        tensors[other] = tensors[key].clone()
    if kind in ("drop", "rename", "reshape", "twice"):
        save(tensors, path)
        return kind
    data = bytearray(whole)
    if kind == "cut":
        del data[rng.randrange(len(data)):]
    if kind == "flip":
        where = rng.randrange(min(len(data), rng.choice((200, 20_000, len(data)))))   # headers, often
        data[where] ^= 1 << rng.randrange(8)
    path.write_bytes(data)
    return kind


@pytest.mark.parametrize("ending", ("ckpt", "safetensors"))
def test_a_damaged_checkpoint_is_refused_or_harmless(mini, weights, tmp_path, ending):
    """70 times each: an error in one sentence, or bit for bit the weights that were meant.

    A bit flipped in a tensor of a safetensors file is what only --sha256 can see; the test asks for it."""
    rng, path, refused = random.Random(0), tmp_path / f"sd.{ending}", 0
    save = torch.save if ending == "ckpt" else save_file
    save(mini, path)
    whole = path.read_bytes()
    digest = hashlib.sha256(whole).hexdigest()
    for _ in range(70):
        kind = damage(rng, mini, whole, path, save)
        try:
            placed, _ = convert(str(path), MINI)
            if kind == "flip" and ending == "safetensors":
                C.check_sha256(path, digest)
        except ValueError as error:
            refused += 1
            assert "\n" not in str(error) and str(path) in str(error)
        else:
            assert_same({name: tensor for _, name, tensor in placed}, weights)
    assert refused >= 50             # and what does not matter, a bit in the position ids, say, is let pass


def test_a_damaged_file_of_ours_is_refused_or_harmless(tmp_path, small_weights):
    """Cut, or with a bit flipped anywhere: its checksum is of the numbers, their names, and the config."""
    rng, whole = random.Random(0), Path(small_weights).read_bytes()
    path, expected = tmp_path / "damaged.safetensors", load_file(small_weights)
    for _ in range(60):
        data = bytearray(whole)
        if rng.random() < 0.3:
            del data[rng.randrange(len(data)):]
        else:
            where = rng.randrange(min(len(data), rng.choice((3000, 60_000, len(data)))))
            data[where] ^= 1 << rng.randrange(8)
        path.write_bytes(data)
        try:
            model = load_weights(str(path))
        except ValueError as error:
            assert "\n" not in str(error) and str(path) in str(error)
        else:
            got = {PREFIXES[part] + name: tensor for part, network in model.networks().items()
                   for name, tensor in network.state_dict().items()}
            assert_same(got, expected)


def test_the_sha256_is_printed_and_insisted_on(mini, weights, tmp_path, capsys):
    """As the hub shows it."""
    path = tmp_path / "sd.safetensors"
    save_file(mini, path)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    assert_same(run(tmp_path, path, "--sha256", digest.upper()), weights)
    assert f"SHA-256 {digest}" in capsys.readouterr().out
    (tmp_path / "out" / "sd15.safetensors").unlink()
    assert_refused(tmp_path, path, "has SHA-256 .*, not 123: download", "--sha256", "123")


# ------------------------------------------------------------------------------------------------------------
# LoRA
# ------------------------------------------------------------------------------------------------------------

def every_lora_layer(rank=2):
    """A LoRA on every linear layer and conv that SD1.5's diffusers names know, of mini's sizes."""
    with torch.device("meta"):
        networks = Model.build(MINI).networks()
    lora, changed = {}, {}
    for part, prefix in (("unet", "lora_unet_"), ("text", "lora_te_")):
        shapes = {PREFIXES[part] + name: tensor.shape for name, tensor in networks[part].state_dict().items()}
        for key, ldm in SD15["diffusers"][part].items():
            if not key.endswith(".weight") or len(shapes.get(ldm, ())) < 2 or "embedding." in key:
                continue
            stem, shape = prefix + key.removesuffix(".weight").replace(".", "_"), shapes[ldm]
            lora[f"{stem}.lora_down.weight"] = torch.randn(rank, *shape[1:])
            lora[f"{stem}.lora_up.weight"] = torch.randn(shape[0], rank, *(1 for _ in shape[2:]))
            lora[f"{stem}.alpha"] = torch.tensor(1.0)
            up, down = lora[f"{stem}.lora_up.weight"], lora[f"{stem}.lora_down.weight"]
            change = torch.einsum("or,ri->oi", up.flatten(1), down.flatten(1)).view(shape)
            changed[ldm] = change / rank
    return lora, changed


def weights_of(model):
    return {PREFIXES[part] + name: tensor.clone() for part, network in model.networks().items()
            for name, tensor in network.state_dict().items()}


def test_a_lora_changes_exactly_its_layers(mini, tmp_path):
    """W + scale x alpha / rank x up down, on all attention, feed-forward and conv layers by kohya's names."""
    torch.manual_seed(0)
    lora, changed = every_lora_layer()
    path, model = str(tmp_path / "lora.safetensors"), Model.build(MINI)
    save_file({**lora, "lora_unet_of_the_future.lora_up.weight": torch.zeros(1)}, path)
    before = weights_of(model)
    layers, unknown = C.merge_lora(model, path, 0.5)
    assert layers == len(changed) > 250 and unknown == ["lora_unet_of_the_future.lora_up.weight"]
    for key, weight in weights_of(model).items():
        wanted = before[key] + 0.5 * changed[key] if key in changed else before[key]
        assert torch.allclose(weight, wanted, atol=1e-5), key
    C.merge_lora(model, path, -0.5)                       # and back
    assert all(torch.allclose(weight, before[key], atol=1e-5) for key, weight in weights_of(model).items())


def test_a_lora_of_another_model_is_refused(tmp_path):
    """By its names, or by its sizes."""
    path, model = tmp_path / "lora.safetensors", Model.build(MINI)
    save_file({"unet.mid_block.attn1.to_q.lora_A.weight": torch.zeros(1)}, path)
    with pytest.raises(ValueError, match="is no LoRA that fits: .* but unet.mid_block"):
        C.merge_lora(model, str(path))
    stem = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn2_to_k"
    pair = {f"{stem}.lora_down.weight": torch.zeros(4, 1024), f"{stem}.lora_up.weight": torch.zeros(64, 4)}
    save_file(pair, path)
    with pytest.raises(ValueError, match="is a LoRA of another model: .*attn2_to_k"):
        C.merge_lora(model, str(path))
