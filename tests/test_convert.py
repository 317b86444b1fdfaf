"""pytest tests/test_convert.py: SD1.5's names, from fixtures/, on oracle_weights.py's narrow networks."""

import gzip
import json
import pickle
import random
import runpy
import sys
import types
from pathlib import Path

import numpy as np
import oracle_weights as oracle
import pytest
import torch
from safetensors.torch import load_file, save_file

import convert_sd_weights as C
from convert_sd_weights import TEXT, UNET, VAE, main, rename
from model import PRESETS, Model, load_weights

FIXTURES = Path(__file__).parent / "fixtures"
SD15 = json.loads(gzip.decompress((FIXTURES / "sd15_keys.json.gz").read_bytes()))
CLIP = json.loads(gzip.decompress((FIXTURES / "tokenizer.json.gz").read_bytes()))
MINI = oracle.config("mini")
DIFFUSERS = {part: dict(names) for part, names in SD15["diffusers"].items()}
for part, key, ldm in (    # mini grows at other levels than SD1.5, so it has three shortcuts more
        ("unet", "down_blocks.3.resnets.0.conv_shortcut", UNET + "input_blocks.10.0.skip_connection"),
        ("vae", "encoder.down_blocks.3.resnets.0.conv_shortcut", VAE + "encoder.down.3.block.0.nin_shortcut"),
        ("vae", "decoder.up_blocks.1.resnets.0.conv_shortcut", VAE + "decoder.up.2.block.0.nin_shortcut")):
    DIFFUSERS[part] |= {f"{key}.{leaf}": f"{ldm}.{leaf}" for leaf in ("weight", "bias")}
OLD_NAMES = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
MERGES = [CLIP["merges"][str(i)] for i in range(MINI.vocabulary - 514)]   # CLIP's first 86
CONV_IN, BIAS = UNET + "input_blocks.0.0.weight", UNET + "out.2.bias"
MASK = torch.ones(32, 5, 3, 3)    # inpainting: a mask and a masked picture follow the noisy latents
TO_K = UNET + "input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight"


@pytest.fixture(scope="module")
def model():
    """A mini SD1.5, at first without numbers."""
    with torch.device("meta"):
        return Model.build(MINI)


@pytest.fixture(scope="module")
def weights(model):
    """The 964 weights of a mini SD1.5, by SD's names."""
    return {name: tensor for part, network in model.networks().items()
            for name, tensor in oracle.weights("mini", part, network).items()}


@pytest.fixture
def mini(weights):
    """A checkpoint like v1-5-pruned-emaonly.safetensors, which holds more than weights."""
    return {**weights, "betas": torch.zeros(1000), "alphas_cumprod": torch.zeros(1000),
            TEXT + "embeddings.position_ids": torch.arange(77)[None], "model_ema.decay": torch.tensor(0.9999),
            "model_ema.num_updates": torch.tensor(840000)}


@pytest.fixture
def command(monkeypatch, tmp_path):
    """The command line for a mini SD1.5, with merges as in CLIP's own file: tensors -> path of the result."""
    monkeypatch.setitem(PRESETS, "sd15", MINI)
    lines = ['"bpe_simple_vocab_16e6.txt#version: 0.2', *MERGES, "far more", ""]
    (tmp_path / "bpe.txt.gz").write_bytes(gzip.compress("\n".join(lines).encode()))

    def run(tensors):
        source, out = written(tmp_path / "sd.safetensors", tensors), tmp_path / "out" / "sd15.safetensors"
        main([str(source), "--merges", str(tmp_path / "bpe.txt.gz"), "--out", str(out)])
        return out

    return run


def write_folder(folder, weights, old=False):
    """Write a diffusers folder by the fixture's names, not our rules; old: as before mid-2023, in pickles."""
    save, ending = (torch.save, "bin") if old else (save_file, "safetensors")
    for part, name in (("unet", "unet"), ("vae", "vae"), ("text", "text_encoder")):
        tensors = {}
        for key, ldm in DIFFUSERS[part].items():
            for new, name_then in OLD_NAMES.items() if old else ():
                key = key.replace(f"attentions.0.{new}", f"attentions.0.{name_then}")    # only in the VAE
            if ldm in weights:    # a linear layer where SD has a 1x1 conv
                tensors[key] = weights[ldm].squeeze() if ".mid.attn_1." in ldm else weights[ldm]
        (folder / name).mkdir(parents=True)
        save(tensors, folder / name / f"diffusion_pytorch_model.{ending}")
    (folder / "tokenizer").mkdir()
    (folder / "tokenizer" / "merges.txt").write_text("\n".join(["#version: 0.2", *MERGES, ""]))
    return folder


def written(path, tensors):
    save_file(tensors, path)
    return path


def only(mini, *prefixes):
    """The parts of a checkpoint whose names begin like this."""
    return {key: tensor for key, tensor in mini.items() if key.startswith(prefixes)}


def bare(mini, prefix):
    """One part, by the names it has in a file of its own."""
    return {key.removeprefix(prefix): tensor for key, tensor in only(mini, prefix).items()}


def assert_same(got, expected):
    """`got` is a dict of tensors or a model, whose temporal layers do not count."""
    got = got.state() if isinstance(got, Model) else got
    assert all(torch.equal(got[key].float(), expected[key]) for key in expected)


def assert_refused(path, model, message, **options):
    """In one sentence that names the file."""
    with pytest.raises(ValueError, match=message) as error:
        C.convert(str(path), model, **options)
    assert "\n" not in str(error.value) and str(path) in str(error.value)


def test_every_diffusers_name_of_sd15_becomes_sds_own():
    """Each becomes a name of its own, at full size; the rest of SD's file is ignored by name."""
    pairs = [(part, key, ldm) for part, keys in SD15["diffusers"].items() for key, ldm in keys.items()]
    assert all(rename(key, part, PRESETS["sd15"]) == ldm for part, key, ldm in pairs)
    names = {ldm for _, _, ldm in pairs}
    ignored = {key for key in SD15["shapes"] if C.IGNORED.fullmatch(key)}     # schedule, positions, counters
    assert names == SD15["shapes"].keys() - ignored and len(names) == 686 + 248 + 196
    assert list(only(dict.fromkeys(ignored), UNET, VAE, TEXT)) == [TEXT + "embeddings.position_ids"]


def test_a_single_file_becomes_one_file_of_ours(command, mini, weights, capsys):
    """It holds every tensor and the tokenizer, and what was found and checked is printed."""
    out = command(mini)
    assert [file.name for file in out.parent.iterdir()] == [out.name]
    assert "sd.safetensors: SD1.x, single file, no averages, with VAE" in capsys.readouterr().out
    stored, model = load_file(out), load_weights(out)
    assert stored.keys() == weights.keys() and {tensor.dtype for tensor in stored.values()} == {torch.float16}
    assert_same(model, weights)
    assert model.config == MINI and model.tokenizer.merges == MERGES


@pytest.mark.parametrize("make, found", (
    (lambda path, mini: torch.save({"epoch": 3, "state_dict": {"state_dict": mini}}, path), "single file"),
    (lambda path, mini: torch.save({"state_dict": mini}, path, _use_new_zipfile_serialization=False), ""),
    (lambda path, mini: save_file({k.replace(".text_model.", "."): t for k, t in mini.items()}, path), ""),
    (lambda path, mini: write_folder(path, mini, old=True), "diffusers folder"),
    (lambda path, mini: save_file({**mini, CONV_IN: torch.cat([mini[CONV_IN], MASK], 1)}, path),
     "inpainting: kept the first 4 of 9 input channels"),
), ids=("ckpt", "ckpt before 2020", "merged file", "folder before mid-2023", "inpainting"))
def test_every_layout_gives_the_same_weights(model, mini, weights, tmp_path, make, found):
    """Nested state dicts, text names without a level, linear layers for 1x1 convs, nine input channels."""
    make(tmp_path / "model", mini)
    assert found in C.convert(str(tmp_path / "model"), model)
    assert_same(model, weights)


@pytest.mark.parametrize("newer", (None, MERGES, [pair.split() for pair in MERGES]),
                         ids=("merges.txt", "tokenizer.json of strings", "tokenizer.json of pairs"))
def test_a_diffusers_folder_brings_its_tokenizer_and_may_predict_v(command, weights, tmp_path, newer):
    """Its weights come in full precision: beside them, the hub's folders hold .fp16 and .non_ema files."""
    folder, out = write_folder(tmp_path / "folder", weights), tmp_path / "new.safetensors"
    for other in ("fp16.safetensors", "non_ema.safetensors", "bin"):
        (folder / "unet" / f"diffusion_pytorch_model.{other}").write_bytes(b"not this one")
    told = folder / "scheduler" / "scheduler_config.json"
    if newer:
        (folder / "tokenizer" / "merges.txt").unlink()
        (folder / "tokenizer" / "tokenizer.json").write_text(json.dumps({"model": {"merges": newer}}))
        told.parent.mkdir()
        told.write_text('{"prediction_type": "v_prediction", "rescale_betas_zero_snr": true}')
    main([str(folder), "--out", str(out)])
    found = load_weights(out)
    assert_same(found, weights)
    assert found.tokenizer.merges == MERGES
    assert found.config.prediction == ("v" if newer else "eps")
    assert found.config.zero_terminal_snr == bool(newer)
    told.parent.mkdir(exist_ok=True)
    told.write_text('{"prediction_type": "sample"}')
    with pytest.raises(ValueError, match="predicts sample: expected epsilon or v_prediction"):
        main([str(folder), "--out", str(tmp_path / "other")])


def test_objects_of_training_programs_in_a_ckpt_are_skipped(mini, tmp_path, monkeypatch):
    """PyTorch Lightning's callback and NumPy's scalars, as in sd-v1-4-full-ema.ckpt."""
    name = "pytorch_lightning.callbacks.model_checkpoint"       # it is not installed here
    ModelCheckpoint = type("ModelCheckpoint", (), {"__module__": name})
    callback, path = ModelCheckpoint(), tmp_path / "model.ckpt"
    callback.best = np.float64(0.5)
    with monkeypatch.context() as patch:
        for module in (name.split(".")[0], name):
            patch.setitem(sys.modules, module, types.SimpleNamespace(ModelCheckpoint=ModelCheckpoint))
        torch.save({"state_dict": mini, "best": np.float32(1), ModelCheckpoint: callback}, path)
    assert_same(C.read_tensors(str(path)), mini)


def test_averages_are_taken_only_if_asked_for(model, mini, weights, tmp_path):
    averages = {"model_ema." + key.removeprefix("model.").replace(".", ""): tensor / 2
                for key, tensor in only(weights, UNET).items()}
    both = written(tmp_path / "both.safetensors", {**mini, **averages})
    assert "averages taken" in C.convert(str(both), model, ema=True)
    assert_same(model, weights | {key: tensor / 2 for key, tensor in only(weights, UNET).items()})
    assert "averages not used" in C.convert(str(both), model)
    assert_same(model, weights)
    assert_refused(written(both, mini), model, "has no averaged weights .*leave --ema out", ema=True)
    alone = {key: tensor for key, tensor in mini.items() if not key.startswith(UNET)} | averages
    assert "averages taken" in C.convert(str(written(both, alone)), model)    # then there is nothing to ask
    assert_same(model, weights | {key: tensor / 2 for key, tensor in only(weights, UNET).items()})
    averages.popitem()
    assert_refused(written(both, {**mini, **averages}), model, f"nothing at {UNET}", ema=True)


@pytest.mark.parametrize("make", (
    lambda path, mini: written(path / "sd.safetensors", {**mini, CONV_IN: torch.zeros(1)}),
    lambda path, mini: written(path / "vae.safetensors", {**bare(mini, VAE), "loss.logvar": torch.zeros(1)}),
    lambda path, mini: write_folder(path / "folder", mini),
    lambda path, mini: write_folder(path / "folder", mini) / "vae",
    lambda path, mini: write_folder(path / "folder", mini) / "vae" / "diffusion_pytorch_model.safetensors",
), ids=("a whole checkpoint", "a file like SD's", "a diffusers folder", "its vae", "the file in there"))
def test_the_vae_of_another_file_replaces_the_checkpoints_own(model, mini, weights, tmp_path, make):
    vae = str(make(tmp_path, mini))
    path = written(tmp_path / "zero.safetensors", mini | {key: 0 * mini[key] for key in only(mini, VAE)})
    assert f"VAE of {vae}" in C.convert(str(path), model, vae)
    assert_same(model, weights)


def test_tensors_that_do_not_fit_are_named(model, mini, tmp_path):
    """In one sentence: missing, left over, of another shape, there under two names."""
    vae, path = bare(mini, VAE), written(tmp_path / "sd.safetensors", mini)
    del vae["quant_conv.bias"]
    vae = written(tmp_path / "vae", vae)
    assert_refused(path, model, f"has nothing at {VAE}quant_conv.bias, ", vae=str(vae))
    mini["betas.typo"] = mini.pop(BIAS)
    mini[CONV_IN] = torch.zeros(32, 8, 3, 3)
    mini["cond_stage_model.transformer.final_layer_norm.bias"] = torch.zeros(32)
    for words in (rf"nothing at {BIAS}, expected \(4,\)", r"at betas.typo, expected nothing",
                  rf"at {TEXT}final_layer_norm.bias \(again\), expected nothing", "; 4 keys differ",
                  rf"\(32, 8, 3, 3\) at {CONV_IN}, expected \(32, 4, 3, 3\)"):
        assert_refused(written(path, mini), model, words)


@pytest.mark.parametrize("make, message", (
    (lambda mini: {**mini, TO_K: torch.zeros(32, 1024)}, "is SD2, not"),
    (lambda mini: {**mini, TO_K: torch.zeros(32, 2048)}, "is SDXL, not"),
    (lambda mini: {**mini, "cond_stage_model.model.ln_final.bias": torch.zeros(1)}, "is SD2, not"),
    (lambda mini: {**mini, "conditioner.embedders.0.x": torch.zeros(1)}, "is SDXL, not"),
    (lambda mini: {"unet.mid_block.attn1.to_q.lora_A.weight": torch.zeros(1)}, "is a LoRA, not"),
    (lambda mini: bare(mini, VAE), "is a VAE alone.* as --vae"),
    (lambda mini: only(mini, UNET, TEXT), "has no vae.*add --vae"),
    (lambda mini: only(mini, UNET, VAE), "has no text"), (lambda mini: {}, "has no unet")))
def test_other_kinds_of_models_are_refused_by_name(model, mini, tmp_path, make, message):
    assert_refused(written(tmp_path / "sd.safetensors", make(mini)), model, message)


class Code(tuple):
    """A call (function, argument) that a hostile checkpoint makes when it is loaded."""
    __reduce__ = lambda self: (self[0], self[1:])


ENDLESS = {"a": torch.zeros(1)}
ENDLESS["state_dict"] = ENDLESS
BAD_FILES = {   # bytes, or an object to pickle
    "empty": (b"", "neither safetensors nor ckpt"),
    "LFS": (b"version https://git-lfs.github.com/spec/v1\n", "LFS pointer"),
    "HTML page": (b"\n<!DOCTYPE html><html>sign in</html>", "web page"),
    "damaged safetensors": (b"\x02" + bytes(7) + b"{", "truncated or damaged"),
    "damaged pickle": (b"\x80\x02\xff\xff", "truncated or damaged"),
    "code": ({"state_dict": {"a": Code((print, "ran"))}}, r"to run \S*print"),
    "bare code": (pickle.dumps(Code((print, "ran")), 2), r"to run \S*print"),
    "numpy": (Code((np.fromfile, "x")), r"to run numpy\.fromfile"),
    "a list": ([1, 2], "damaged .*'list'"),
    "endless": (ENDLESS, "has no unet"),
}


@pytest.mark.parametrize("content, message", BAD_FILES.values(), ids=BAD_FILES)
def test_bad_files_are_refused_and_their_code_never_runs(model, tmp_path, capfd, content, message):
    path = tmp_path / "model.safetensors"
    path.write_bytes(content) if isinstance(content, bytes) else torch.save(content, path)
    assert_refused(path, model, message)
    assert "ran" not in capfd.readouterr().out


def test_files_that_do_not_exist_are_refused(model, tmp_path, monkeypatch):
    """So is a folder that lacks a part, and a shard; the script ends with one sentence, not a traceback."""
    for part in ("vae", "unet"):
        (tmp_path / "folder" / part).mkdir(parents=True)
    assert_refused(tmp_path / "folder", model, "no weights at .*unet")
    (tmp_path / "folder" / "unet" / "model-00001-of-00002.safetensors").write_bytes(b"a part")
    assert_refused(tmp_path / "folder", model, "one shard of several: save the model again")
    monkeypatch.setattr(sys, "argv", ["convert_sd_weights.py", str(tmp_path / "none.ckpt")])
    with pytest.raises(SystemExit, match=r"^convert_sd_weights.py: no weights at [^\n]*$"):
        runpy.run_path(C.__file__, run_name="__main__")


def test_a_tokenizer_that_is_missing_or_not_clips_is_refused(tmp_path):
    path = tmp_path / "merges.txt"
    with pytest.raises(ValueError, match="no tokenizer at .*give --merges bpe_simple"):
        C.read_merges(str(path), MINI)
    for lines in (["a b", "c d"], [*MERGES[1:], "x y"], MERGES[:-1]):
        path.write_text("\n".join(lines))
        with pytest.raises(ValueError, match="is not CLIP's list of 86 merges"):
            C.read_merges(str(path), MINI)


@pytest.mark.parametrize("value", (float("nan"), 2.0 ** 17), ids=("NaN", "too large for float16"))
def test_a_file_that_fails_the_self_check_is_not_written_and_none_is_replaced(command, mini, value):
    with pytest.raises(ValueError, match=f"{BIAS} would not be finite in float16: give another"):
        command({**mini, BIAS: torch.full((4,), value)})
    out = command(mini)
    before = out.read_bytes()
    with pytest.raises(ValueError, match="exists: give another --out"):
        command(mini)
    assert out.read_bytes() == before and [file.name for file in out.parent.iterdir()] == [out.name]


@pytest.mark.parametrize("kind", ("ckpt", "safetensors", "ours"))
def test_a_damaged_file_is_refused_in_one_sentence_or_harmless(model, mini, small_weights, tmp_path, kind):
    """Cut short or with a flipped bit. Only our own files have a checksum of everything in them."""
    rng, refused, path = random.Random(0), 0, tmp_path / "damaged"
    torch.save(mini, path) if kind == "ckpt" else save_file(mini, path)
    whole, expected = Path(small_weights if kind == "ours" else path).read_bytes(), load_file(small_weights)
    for _ in range(60 if kind == "ours" else 30):
        data, where = bytearray(whole), rng.randrange(rng.choice((200, 3000, 60_000, len(whole))))
        data[where] ^= 1 << rng.randrange(8)
        path.write_bytes(data[:where] if rng.random() < 0.3 else data)
        try:
            assert_same(load_weights(path), expected) if kind == "ours" else C.convert(str(path), model)
        except ValueError as error:
            assert "\n" not in str(error) and str(path) in str(error)
            refused += 1
    assert refused >= 15


def test_a_lora_changes_exactly_its_layers(tmp_path):
    """By scale · alpha/rank · up·down: every linear layer and conv, by kohya's names."""
    torch.manual_seed(0)
    model, lora, change = Model.build(MINI), {}, {}
    before = {name: tensor.clone() for name, tensor in model.state().items()}
    for part, prefix in (("unet", "lora_unet_"), ("text", "lora_te_")):
        for key, ldm in DIFFUSERS[part].items():
            shape = before[ldm].shape if ldm in before else ()
            if len(shape) < 2 or "embedding." in key:
                continue
            stem = prefix + key.removesuffix(".weight").replace(".", "_")
            down, up = torch.randn(2, *shape[1:]), torch.randn(shape[0], 2, *[1] * len(shape[2:]))
            lora |= {f"{stem}.lora_down.weight": down, f"{stem}.lora_up.weight": up,
                     f"{stem}.alpha": torch.tensor(1.0)}
            change[ldm] = 0.5 / 2 * (up.flatten(1) @ down.flatten(1)).view(shape)
    path = written(tmp_path / "lora.safetensors", {**lora, "lora_unet_new.lora_up.weight": torch.zeros(1)})
    assert C.merge_lora(model, str(path), 0.5) == (len(change), ["lora_unet_new.lora_up.weight"])
    assert len(change) > 250
    for name, weight in model.state().items():
        assert torch.allclose(weight, before[name] + change.get(name, 0), atol=1e-5), name


STEM = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn2_to_k"
PAIR = {f"{STEM}.lora_down.weight": torch.zeros(4, 32), f"{STEM}.lora_up.weight": torch.zeros(64, 4)}
CONV = "lora_unet_down_blocks_0_resnets_0_conv1"
LOCON = {f"{CONV}.lora_{name}.weight": torch.zeros(shape) for name, shape in (
    ("down", (4, 32, 1, 1)), ("mid", (4, 4, 3, 3)), ("up", (32, 4, 1, 1)))}


@pytest.mark.parametrize("tensors, message", (
    ({"unet.mid_block.attn1.to_q.lora_A.weight": torch.zeros(1)}, "no LoRA that fits: .* but has unet.mid_b"),
    ({**PAIR, f"{STEM}.lora_down.weight": torch.zeros(4, 1024)}, "another kind or model, .*attn2_to_k"),
    ({**PAIR, f"{STEM}.dora_scale": torch.zeros(1)}, "another kind or model, .*attn2_to_k"),
    ({**PAIR, f"{STEM}.lora_up.weight": torch.full((64, 4), torch.nan)}, "attn2_to_k that are not finite"),
    (LOCON, "another kind or model, .*conv1"),
), ids=("PEFT", "SD2", "DoRA", "NaN", "LoCon with a middle"))
def test_a_lora_of_another_model_is_refused(tmp_path, tensors, message):
    with pytest.raises(ValueError, match=message):
        C.merge_lora(Model.build(MINI), str(written(tmp_path / "lora.safetensors", tensors)))
