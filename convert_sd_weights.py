"""Stable Diffusion 1.x weights in, one file of ours out: image model, VAE, text encoder and tokenizer.

    python convert_sd_weights.py v1-5-pruned-emaonly.safetensors --merges bpe_simple_vocab_16e6.txt.gz
    python convert_sd_weights.py stable-diffusion-v1-5/         a diffusers folder: brings its tokenizer along

Checkpoints are on the Hugging Face hub, stable-diffusion-v1-5/stable-diffusion-v1-5 for one, under a licence
of their own (CreativeML Open RAIL-M); the tokenizer's merges are in the repository openai/CLIP, folder clip.
The result has 2.1 GB and no temporal layers: those start as the identity and are trained.

Nothing runs that a pickle asks for, and a .ckpt is held against its own checksums. safetensors has none: the
SHA-256 that is printed is the one the hub shows beside the file, and --sha256 insists on it.

model.py keeps the names of SD's own single file, so there is nothing to rename in one; a diffusers folder
goes through the tables below. Every tensor must find its place, once, and every place its tensor; if not, all
names that do not fit are printed and nothing is written.
"""

import argparse
import gzip
import hashlib
import os
import pickle
import re
import zipfile
from collections import Counter
from functools import cache

import torch
from safetensors import SafetensorError, safe_open

from model import PREFIXES, PRESETS, Model, is_temporal, save_weights

UNET, VAE, TEXT = PREFIXES["unet"], PREFIXES["vae"], PREFIXES["text"]
CONV_IN = UNET + "input_blocks.0.0.weight"
PARAMETERS = {"unet": 859_520_964, "vae": 83_653_863, "text": 123_060_480}   # of SD1.x, 4 input channels
ALPHA_BAR = 0.99915, 0.00466                                                 # first and last of its schedule
# in files beside weights: noise schedule, positions 0..76, training state, parts of CLIP that SD does not use
IGNORED = re.compile(r"betas|\w*alphas_cumprod\w*|posterior_\w+|logvar|.*\.position_ids|"
                     r"model_ema\.(decay|num_updates)|first_stage_model\.(loss|model_ema)\..*|"
                     r"cond_stage_model\.(.*text_projection.*|logit_scale)")
# what training programs leave in their pickles beside the tensors; nothing of it is needed
HARMLESS = ("pytorch_lightning.", "lightning.", "numpy.")
# names by which other kinds of files give themselves away
FOREIGN = {
    "a LoRA": "(?i)lora",
    "SD2": r"^cond_stage_model\.model\.",
    "SDXL": r"^conditioner\.|add_embedding\.|label_emb\.",
}


def unet_rules(config):
    """Diffusers' names in the UNet -> SD's. SD counts its stages through, diffusers counts per resolution."""
    n, levels = config.res_blocks + 1, len(config.widths)   # n: stages per level
    after = lambda i: 2 if levels - 1 - i in config.attention_levels else 1   # the attention, if there is one
    return [
        (r"(resnets\.\d+)\.norm1", r"\1.in_layers.0"),
        (r"(resnets\.\d+)\.conv1", r"\1.in_layers.2"),
        (r"(resnets\.\d+)\.time_emb_proj", r"\1.emb_layers.1"),
        (r"(resnets\.\d+)\.norm2", r"\1.out_layers.0"),
        (r"(resnets\.\d+)\.conv2", r"\1.out_layers.3"),
        (r"(resnets\.\d+)\.conv_shortcut", r"\1.skip_connection"),
        (r"^time_embedding\.linear_1", "time_embed.0"),
        (r"^time_embedding\.linear_2", "time_embed.2"),
        (r"^conv_in", "input_blocks.0.0"),
        (r"^down_blocks\.(\d+)\.resnets\.(\d+)", lambda i, j: f"input_blocks.{1 + i * n + j}.0"),
        (r"^down_blocks\.(\d+)\.attentions\.(\d+)", lambda i, j: f"input_blocks.{1 + i * n + j}.1"),
        (r"^down_blocks\.(\d+)\.downsamplers\.0\.conv", lambda i: f"input_blocks.{(i + 1) * n}.0.op"),
        (r"^mid_block\.resnets\.(\d)", lambda i: f"middle_block.{2 * i}"),
        (r"^mid_block\.attentions\.0", "middle_block.1"),
        (r"^up_blocks\.(\d+)\.resnets\.(\d+)", lambda i, j: f"output_blocks.{i * n + j}.0"),
        (r"^up_blocks\.(\d+)\.attentions\.(\d+)", lambda i, j: f"output_blocks.{i * n + j}.1"),
        (r"^up_blocks\.(\d+)\.upsamplers\.0", lambda i: f"output_blocks.{i * n + n - 1}.{after(i)}"),
        (r"^conv_norm_out", "out.0"),
        (r"^conv_out", "out.2"),
    ]


def vae_rules(config):
    """The same for the VAE. SD numbers the decoder's levels by resolution, diffusers in the order of use."""
    last = len(config.vae_widths) - 1
    return [
        (r"conv_shortcut", "nin_shortcut"),
        (r"conv_norm_out", "norm_out"),
        (r"mid_block\.resnets\.(\d)", lambda i: f"mid.block_{i + 1}"),
        (r"mid_block\.attentions\.0", "mid.attn_1"),
        (r"attn_1\.group_norm", "attn_1.norm"),
        (r"attn_1\.(?:to_)?(q|k|v)(uery|ey|alue)?\.", r"attn_1.\1."),   # query, key, value: until mid-2023
        (r"attn_1\.(to_out\.0|proj_attn)", "attn_1.proj_out"),
        (r"down_blocks\.(\d+)\.resnets\.(\d+)", lambda i, j: f"down.{i}.block.{j}"),
        (r"down_blocks\.(\d+)\.downsamplers\.0", lambda i: f"down.{i}.downsample"),
        (r"up_blocks\.(\d+)\.resnets\.(\d+)", lambda i, j: f"up.{last - i}.block.{j}"),
        (r"up_blocks\.(\d+)\.upsamplers\.0", lambda i: f"up.{last - i}.upsample"),
    ]


def rename(key, part, config):
    """The name in SD's single file of a tensor of a diffusers folder; part: "unet", "vae" or "text"."""
    rules = {"unet": unet_rules, "vae": vae_rules, "text": lambda config: [(r"^text_model\.", "")]}[part]
    for pattern, to in rules(config):
        key = re.sub(pattern, to if isinstance(to, str) else lambda m: to(*map(int, m.groups())), key)
    return PREFIXES[part] + key


# ------------------------------------------------------------------------------------------------------------
# Reading. A checkpoint becomes a list of rows (name in the file, name in SD's single file, tensor)
# ------------------------------------------------------------------------------------------------------------

def read_tensors(path):
    """All tensors of a .safetensors, .ckpt or .bin file. Its first bytes say what it is, not its ending."""
    if not os.path.isfile(path):
        raise ValueError(f"no file at {path}: give a Stable Diffusion 1.x checkpoint or a diffusers folder")
    with open(path, "rb") as file:
        head = file.read(64)
    if head.startswith(b"version https://git-lfs"):
        raise ValueError(f"{path} is a git-LFS pointer, not the weights: run git lfs pull in its folder")
    if head.lstrip().startswith(b"<"):
        raise ValueError(f"{path} is a web page (HTML), not a checkpoint: download the file itself")
    try:
        if head[8:9] == b"{":
            with safe_open(path, framework="pt") as file:
                return {key: file.get_tensor(key) for key in file.keys()}
        if head.startswith((b"PK\x03\x04", b"\x80")):
            return read_pickle(path)
    except (SafetensorError, zipfile.BadZipFile, RuntimeError, EOFError, OSError, KeyError) as error:
        raise ValueError(f"{path} is truncated or damaged ({str(error)[:60]}): download it again") from None
    raise ValueError(f"{path} is neither safetensors nor ckpt, starting with {head[:8]!r}: download it again")


class Skipped:
    """Stands for an object in a pickle that is not needed: takes what it is given, keeps and does nothing."""

    def __init__(self, *args, **kwargs):
        pass

    def __setstate__(self, state):
        pass


def stand_in(name):
    """A class that does nothing under the name that a pickle asks for."""
    module, _, short = name.rpartition(".")
    return type(short, (Skipped,), {"__module__": module})


def read_pickle(path):
    """The tensors of a .ckpt or .bin file. A pickle may hold any program, so only plain data is loaded.

    What training programs leave in it is skipped, one name at a time, as loading comes across it."""
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            if broken := archive.testzip():                 # torch does not look at the checksums
                raise ValueError(f"{path} is damaged, in {broken}: download it again")
    skip = []
    while True:
        allowed = torch.serialization.safe_globals([stand_in(name) for name in skip])
        try:
            with open(path, "rb") as file, allowed:
                tensors = torch.load(file, map_location="cpu", weights_only=True)   # a path: by its ending
            break
        except (pickle.UnpicklingError, TypeError) as error:
            found = re.search(r"GLOBAL (\S+)", str(error))
            code = found[1] if found else skip[-1] if skip else None
            if found and code.startswith(HARMLESS) and code not in skip:
                skip.append(code)
                continue
            raise ValueError(f"{path} is a pickle with code in it ({code}), which is not run: give the "
                             f".safetensors file of this model" if code else
                             f"{path} is damaged: download it again") from None
    while isinstance(tensors, dict) and "state_dict" in tensors:
        tensors = tensors["state_dict"]
    if not isinstance(tensors, dict):
        raise ValueError(f"{path} holds a {type(tensors).__name__}, not named tensors: give a checkpoint")
    return {key: tensor for key, tensor in tensors.items() if isinstance(tensor, torch.Tensor)}


def part_file(folder):
    """The weights in one folder of a diffusers model: safetensors before pickles, all bits before fp16."""
    names = os.listdir(folder) if os.path.isdir(folder) else []
    for name in (f"{base}{half}.{ending}" for ending in ("safetensors", "bin") for half in ("", ".fp16")
                 for base in ("diffusion_pytorch_model", "model", "pytorch_model")):
        if name in names:
            return os.path.join(folder, name)
    raise ValueError(f"no diffusion_pytorch_model or model .safetensors or .bin in {folder}: give a single "
                     "file, or a whole diffusers folder with unet, vae, text_encoder and tokenizer in it")


def read_source(path, config):
    """The rows of a single file or a diffusers folder."""
    if os.path.isdir(path):
        return [(f"{folder}/{key}", rename(key, part, config), tensor)
                for part, folder in (("unet", "unet"), ("vae", "vae"), ("text", "text_encoder"))
                for key, tensor in read_tensors(part_file(os.path.join(path, folder))).items()]
    short = r"^cond_stage_model\.transformer\.(?=embeddings|encoder|final_layer_norm)"   # some merges
    return [(key, re.sub(short, TEXT, key), tensor) for key, tensor in read_tensors(path).items()]


def read_vae(path, config):
    """The rows of a VAE: a file or folder of its own, or the VAE in a whole checkpoint."""
    if os.path.isdir(path):
        inner = os.path.join(path, "vae")
        path = part_file(inner if os.path.isdir(inner) else path)
    tensors = read_tensors(path)
    if any(key.startswith(VAE) for key in tensors):
        tensors = {key.removeprefix(VAE): tensor for key, tensor in tensors.items() if key.startswith(VAE)}
    diffusers = any("_blocks." in key for key in tensors)
    return [(f"{path}: {key}", rename(key, "vae", config) if diffusers else VAE + key, tensor)
            for key, tensor in tensors.items()]


def read_merges(path, config):
    """The tokenizer's pairs, best first, from CLIP's bpe_simple_vocab_16e6.txt.gz or from a merges.txt."""
    if not os.path.isfile(path or ""):
        where = f"at {path}" if path else "in a single file"
        raise ValueError(f"no tokenizer {where}: give --merges bpe_simple_vocab_16e6.txt.gz, from folder "
                         f"clip of the repository openai/CLIP, or the merges.txt of a diffusers folder")
    with open(path, "rb") as file:
        data = file.read()
    try:
        lines = (gzip.decompress(data) if data.startswith(b"\x1f\x8b") else data).decode().split("\n")
    except (OSError, EOFError, UnicodeDecodeError):
        lines = [""]
    count = config.vocabulary - 514                         # the other ids are 2 x 256 bytes, start and end
    merges = [line.strip() for line in lines["#version" in lines[0]:][:count]]
    if len(merges) < count or merges[:2] != ["i n", "t h"] or any(merge.count(" ") != 1 for merge in merges):
        raise ValueError(f"{path} is not CLIP's list of {count} merges, which begins with i n, t h: give "
                         f"bpe_simple_vocab_16e6.txt.gz or the merges.txt of a Stable Diffusion 1.x folder")
    return merges


# ------------------------------------------------------------------------------------------------------------
# Every tensor to its place
# ------------------------------------------------------------------------------------------------------------

def refuse_foreign(path, rows, config):
    """Raise ValueError when names or sizes are those of another kind of model, or a whole part is missing."""
    hint = "download a whole Stable Diffusion 1.x checkpoint instead"
    names = {name: tensor for _, name, tensor in rows}
    for kind, pattern in FOREIGN.items():
        if any(re.search(pattern, key) for key, _, _ in rows):
            raise ValueError(f"{path} is {kind}, not Stable Diffusion 1.x: {hint}")
    for width in (tensor.shape[-1] for name, tensor in names.items() if name.endswith("attn2.to_k.weight")):
        if width != config.text_width:
            kind = {1024: "SD2", 2048: "SDXL"}.get(width, "another model")
            raise ValueError(f"{path} is {kind}, its text {width} wide and not {config.text_width}: {hint}")
    has = {prefix: any(name.startswith(prefix) for name in names) for prefix in (UNET, VAE, TEXT)}
    if not has[UNET]:
        vae = any(re.match(r"(first_stage_model\.)?(encoder|decoder)\.conv_in", name) for name in names)
        raise ValueError(f"{path} is a VAE alone, which goes with a checkpoint as --vae: {hint}" if vae else
                         f"{path} has no UNet ({UNET}*) but {', '.join(sorted(names)[:3])} ...: {hint}")
    if not has[VAE]:
        raise ValueError(f"{path} has no VAE ({VAE}*): add --vae FILE, any SD1.x checkpoint has one")
    if not has[TEXT]:
        raise ValueError(f"{path} has no text encoder ({TEXT}*): {hint}")


def choose_average(path, rows, ema):
    """Rows with one set of UNet weights, the averaged ones if `ema`, and a word on which.

    The averages have the same names without dots. emaonly files have two counters left of them: there the
    averages stand where the weights belong."""
    averages = {name for _, name, _ in rows if name.startswith("model_ema.") and not IGNORED.fullmatch(name)}
    if ema and not averages:
        raise ValueError(f"{path} has no averaged weights (model_ema.*) beside its weights: leave --ema out")
    if not ema:
        rows = [row for row in rows if row[1] not in averages]
        return rows, "averages not used" if averages else "no averages"
    twin = {"model_ema." + name.removeprefix("model.").replace(".", ""): name
            for _, name, _ in rows if name.startswith(UNET)}
    rows = [(key, twin.get(name, name), tensor) for key, name, tensor in rows if not name.startswith(UNET)]
    return rows, "averages taken"


def fit(name, tensor, shape):
    """A tensor in the shape our model has for it, as far as SD1.x files are known to differ."""
    if name == CONV_IN and tensor.shape[1:2] == (9,) and shape[1] == 4:
        return tensor[:, :4]                # what follows is for the mask and the masked picture
    if ".mid.attn_1." in name and tensor.dim() == 2:
        return tensor[:, :, None, None]     # diffusers has a linear layer where SD has a 1x1 conv
    return tensor


@cache
def shapes(config):
    """What our model needs of an image model: shapes by name."""
    with torch.device("meta"):
        networks = Model.build(config).networks()
    return {PREFIXES[part] + name: tensor.shape for part, network in networks.items()
            for name, tensor in network.state_dict().items() if not is_temporal(name)}


def place(path, rows, config):
    """Rows -> rows with our names and shapes: all that our model needs, nothing twice, nothing left over."""
    wanted = shapes(config)
    placed = [(key, name, fit(name, tensor, wanted[name]) if name in wanted else tensor)
              for key, name, tensor in rows if not IGNORED.fullmatch(name)]
    count = Counter(name for _, name, _ in placed)
    problems = {
        "lacks": sorted(wanted.keys() - count.keys()),
        "has left over": [key for key, name, _ in placed if name not in wanted],
        "has twice": [name for name in count if count[name] > 1],
        "has in another shape": [f"{key} {list(tensor.shape)} instead of {list(wanted[name])}"
                                 for key, name, tensor in placed
                                 if name in wanted and tensor.shape != wanted[name]]}
    found = [f"{what} {len(keys)} tensors: {', '.join(keys)}" for what, keys in problems.items() if keys]
    if found:
        raise ValueError(f"{path} {'; '.join(found)}; nothing was written, give a plain SD1.x checkpoint")
    return placed


def convert(path, config, vae=None, ema=False):
    """A checkpoint -> rows of everything that our file holds, and a sentence on what was found."""
    rows = read_source(path, config)
    if vae:
        rows = [row for row in rows if not row[1].startswith(VAE)] + read_vae(vae, config)
    refuse_foreign(path, rows, config)
    rows, averages = choose_average(path, rows, ema)
    placed = place(path, rows, config)
    tensors = {name: tensor for _, name, tensor in rows}
    dtype, channels = str(tensors[CONV_IN].dtype).removeprefix("torch."), tensors[CONV_IN].shape[1]
    inpainting = channels != config.in_channels
    found = [f"{path}: SD1.x{' inpainting' if inpainting else ''}",
             "diffusers folder" if os.path.isdir(path) else "single file", dtype, averages,
             f"VAE of {vae}" if vae else "with VAE", "with text encoder"]
    if inpainting:
        found.append(f"kept the first 4 of {channels} input channels, not those of mask and masked picture")
    if "alphas_cumprod" in tensors:
        ends = tensors["alphas_cumprod"][[0, -1]].tolist()
        if max(abs(end - expected) for end, expected in zip(ends, ALPHA_BAR)) > 1e-3:
            found.append(f"WARNING: was made for another noise schedule, with alpha_bar[999]={ends[1]:.5f}")
    return placed, ", ".join(found)


# ------------------------------------------------------------------------------------------------------------
# Writing
# ------------------------------------------------------------------------------------------------------------

def write(path, placed, config, merges, dtype, **about):
    """Write our file, read it back and check it. Only then does it get its name."""
    with torch.device("meta"):
        model = Model.build(config, merges)     # temporal layers are not written and take no memory
    for part, network in model.networks().items():
        mine = {name.removeprefix(PREFIXES[part]): tensor for _, name, tensor in placed
                if name.startswith(PREFIXES[part])}
        network.load_state_dict(mine, strict=False, assign=True)   # place() has compared all names and shapes
    unchecked = f"{path}.unchecked"
    try:
        os.makedirs(os.path.dirname(os.path.abspath(path)), exist_ok=True)
        save_weights(unchecked, model, dtype, only=lambda name: not is_temporal(name), **about)
        self_check(unchecked)
        os.replace(unchecked, path)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{path} could not be written ({error}): make room, or give another --out") from None
    finally:
        for leftover in (unchecked, f"{unchecked}.tmp"):
            if os.path.exists(leftover):
                os.remove(leftover)


def self_check(path):
    """Print parameter counts and noise schedule of our file. Raises ValueError when something is wrong."""
    with safe_open(path, framework="pt") as file:
        merges = file.metadata()["merges"].count("\n") + 1
        for part, expected in PARAMETERS.items():
            count, broken = 0, []
            for key in (key for key in file.keys() if key.startswith(PREFIXES[part])):
                tensor = file.get_tensor(key)               # one at a time: the file fills memory once
                count += tensor.numel()
                broken += [] if tensor.isfinite().all() else [key]
            if broken:
                raise ValueError(f"{len(broken)} tensors have numbers that are not finite: "
                                 f"{', '.join(broken)}; try --dtype bfloat16, and if that does not help "
                                 "another checkpoint")
            if count != expected:
                raise ValueError(f"{part} has {count:,} parameters, not {expected:,}: "
                                 "give an SD1.x checkpoint")
            print(f"{part:4} {count:>11,} parameters, all finite: OK")
    alpha_bar = (1 - torch.linspace(0.00085 ** 0.5, 0.012 ** 0.5, 1000, dtype=torch.float64) ** 2).cumprod(0)
    first, last = alpha_bar[0].item(), alpha_bar[-1].item()
    assert abs(first - ALPHA_BAR[0]) < 1e-5 > abs(last - ALPHA_BAR[1]), f"alpha_bar {first} ... {last}"
    print(f"noise schedule alpha_bar[0]={first:.5f} [999]={last:.5f}, {merges:,} merges: OK")


def check_sha256(path, expected):
    """Print the SHA-256 of a file, as the hub shows it. ValueError if another one is expected."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while part := file.read(1 << 20):
            digest.update(part)
    found = digest.hexdigest()
    if expected and found != expected.lower():
        raise ValueError(f"{path} has SHA-256 {found}, not {expected}: download it again")
    print(f"SHA-256 {found}")


# ------------------------------------------------------------------------------------------------------------
# LoRA files: small changes to many weights
# ------------------------------------------------------------------------------------------------------------

# kohya's names are those of diffusers with every dot an underscore; these words had underscores before
WORDS = ("down_blocks", "up_blocks", "mid_block", "transformer_blocks", "time_embedding", "time_emb_proj",
         "conv_shortcut", "conv_in", "conv_out", "proj_in", "proj_out", "linear_1", "linear_2", "to_q",
         "to_k", "to_v", "to_out", "text_model", "self_attn", "q_proj", "k_proj", "v_proj", "out_proj")


def lora_target(name, config):
    """Our name of the weight that a LoRA layer changes, say lora_unet_mid_block_attentions_0_proj_in."""
    part = {"lora_unet_": "unet", "lora_te_": "text"}
    prefix = next((prefix for prefix in part if name.startswith(prefix)), None)
    if prefix is None:
        return None
    dotted = name.removeprefix(prefix).replace("_", ".")
    for word in WORDS:
        dotted = dotted.replace(word.replace("_", "."), word)
    return rename(f"{dotted}.weight", part[prefix], config)


@torch.no_grad()
def merge_lora(model, path, scale=1.0):
    """Add a LoRA file in kohya's layout: W + scale · alpha/rank · up·down (Hu et al. 2106.09685, 4.1).

    Returns how many layers were changed and the names of all tensors that found no place. ValueError when
    none did, or when the sizes are those of another model."""
    tensors = read_tensors(path)
    weights = {PREFIXES[part] + name: weight for part, network in model.networks().items()
               for name, weight in network.named_parameters()}
    used = set()
    for key in [key for key in tensors if key.endswith(".lora_down.weight")]:
        stem = key.removesuffix(".lora_down.weight")
        weight = weights.get(lora_target(stem, model.config))
        up, down = f"{stem}.lora_up.weight", tensors[key]
        if weight is None or up not in tensors:
            continue
        if tensors[up].dim() < 2 or tensors[up].shape[1] != len(down) or f"{stem}.dora_scale" in tensors:
            raise ValueError(f"{path} is no plain LoRA at {stem}: give one in kohya's layout, not DoRA")
        alpha = tensors.get(f"{stem}.alpha", torch.tensor(float(len(down))))
        change = tensors[up].float().flatten(1) @ down.float().flatten(1)
        if change.numel() != weight.numel() or len(change) != len(weight):
            raise ValueError(f"{path} is a LoRA of another model: {stem} changes {tuple(change.shape)} "
                             f"numbers, here are {tuple(weight.shape)}; give one for Stable Diffusion 1.x")
        weight += scale * (alpha.item() / len(down)) * change.view(weight.shape).to(weight.device)
        used |= {key, up, f"{stem}.alpha"}
    if not used:
        raise ValueError(f"{path} is no LoRA that fits: no tensor is named like lora_unet_mid_block_..."
                         f".lora_down.weight but {', '.join(sorted(tensors)[:3])}; give one in kohya's names")
    return len(used) // 3, sorted(tensors.keys() - used)


def lora_tensors(model):
    """The LoRA that `add_lora` gave a UNet, in kohya's layout: for `merge_lora` and other programs."""
    layers = {f"{PREFIXES['unet']}{name}.weight": layer for name, layer in model.unet.named_modules()
              if hasattr(layer, "lora")}
    levels, each = range(len(model.config.widths)), range(model.config.res_blocks + 1)
    blocks = ["mid_block_attentions_0", *(f"{side}_blocks_{i}_attentions_{j}"
                                          for side in ("down", "up") for i in levels for j in each)]
    tensors = {}
    for block in blocks:
        for last in ("to_q", "to_k", "to_v", "to_out_0"):
            for stem in (f"lora_unet_{block}_transformer_blocks_0_attn{i}_{last}" for i in (1, 2)):
                layer = layers.pop(lora_target(stem, model.config), None)     # not all blocks have attention
                if layer is not None:
                    down, up = (part.weight.detach().cpu() for part in layer.lora)
                    tensors |= {f"{stem}.lora_down.weight": down, f"{stem}.lora_up.weight": up,
                                f"{stem}.alpha": torch.tensor(float(len(down)))}
    assert not layers, f"no name in kohya's layout for {', '.join(layers)}"
    return tensors


def main(argv=None):
    """Convert one checkpoint: read it, say what it is, write it."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("model", help=".safetensors or .ckpt file of Stable Diffusion 1.x, or a diffusers folder")
    p.add_argument("--vae", metavar="FILE", help="take the VAE from here: a file or folder of any layout")
    p.add_argument("--merges", metavar="FILE", help="CLIP's bpe_simple_vocab_16e6.txt.gz, or a merges.txt; a "
                   "diffusers folder brings its own")
    p.add_argument("--out", metavar="FILE", default="out/sd15.safetensors", help="default %(default)s")
    p.add_argument("--ema", action="store_true", help="take the averaged weights of a file that holds both: "
                   "better pictures, while the others are meant to be trained on")
    p.add_argument("--dtype", default="float16", choices=("float16", "bfloat16", "float32"), help="of the "
                   "numbers in the file; float16, the default, is enough: what is trained is not in it")
    p.add_argument("--sha256", metavar="HEX", help="refuse MODEL if this is not its SHA-256, which the hub "
                   "shows beside each file: safetensors has no checksum of its own")
    p.add_argument("--list", action="store_true", help="only print which tensor becomes which, write nothing")
    args = p.parse_args(argv)
    config = PRESETS["sd15"]
    own = os.path.join(args.model, "tokenizer", "merges.txt") if os.path.isdir(args.model) else None
    if os.path.isfile(args.model):
        check_sha256(args.model, args.sha256)
    elif args.sha256:
        raise ValueError(f"--sha256 is of a single file and {args.model} is none: leave --sha256 out")
    placed, found = convert(args.model, config, args.vae, args.ema)
    print(found)
    if args.list:
        print("\n".join(f"{key} -> {name}" for key, name, _ in placed))
        return
    merges = read_merges(args.merges or own, config)
    write(args.out, placed, config, merges, getattr(torch, args.dtype), source=found)
    print(f"wrote {args.out}, {os.path.getsize(args.out) / 1e9:.1f} GB: go on with train.py or sample.py, "
          f"--preset sd15 --weights {args.out}")


if __name__ == "__main__":
    try:
        main()
    except ValueError as error:
        raise SystemExit(f"convert_sd_weights.py: {error}") from None
