"""Convert Stable Diffusion 1.x into one file of ours: UNet, VAE, text encoder and tokenizer.

    python convert_sd_weights.py v1-5-pruned-emaonly.safetensors --merges bpe_simple_vocab_16e6.txt.gz
    python convert_sd_weights.py stable-diffusion-v1-5/          a diffusers folder brings its own merges

Checkpoints are on the Hugging Face hub (stable-diffusion-v1-5/stable-diffusion-v1-5), under their own licence
(CreativeML Open RAIL-M); the merges are in the repository openai/CLIP, folder clip. The result takes 2.1 GB
in float16 and has no temporal layers: train.py trains them. Every tensor must find its place, and every
place its tensor. A pickle never runs code. Compare the file's `sha256sum` with the one that the hub shows.
"""
import argparse
import gzip
import os
import re
from dataclasses import replace
from pathlib import Path

import torch
from safetensors import safe_open

from data import check_writable, read_json
from model import PREFIXES, PRESETS, Model, Tokenizer, fill, is_temporal, plain_errors, save_weights

UNET, VAE, TEXT = PREFIXES["unet"], PREFIXES["vae"], PREFIXES["text"]
# files hold more than weights: noise schedule, positions, training state, parts of CLIP that SD never uses
IGNORED = re.compile(r"betas|\w*alphas_cumprod\w*|posterior_\w+|logvar|.*\.position_ids|"
                     r"model_ema\.(decay|num_updates)|first_stage_model\.(loss|model_ema)\..*|"
                     r"cond_stage_model\.(.*text_projection.*|logit_scale)")
# names and shapes that give away another kind of model
FOREIGN = {"a LoRA": r"(?i)lora",
           "SD2": r"^cond_stage_model\.model\.|attn2\.to_k\.weight \[\d+, 1024\]",
           "SDXL": r"^conditioner\.|add_embedding\.|label_emb\.|attn2\.to_k\.weight \[\d+, 2048\]"}


def rename(key, part, config):
    """SD's name of a tensor, from that of a diffusers folder's "unet", "vae" or "text", or a "single" file.
    The dots in these patterns also match the underscores in the names of LoRA layers."""
    n, levels, last = config.res_blocks + 1, len(config.widths), len(config.vae_widths) - 1
    after = lambda i: 2 if levels - 1 - i in config.attention_levels else 1   # an upsampler follows attention
    rules = {"unet": [                  # SD numbers the blocks of all levels in one row, n per level
        (r"(resnets.\d+).norm1", r"\1.in_layers.0"),
        (r"(resnets.\d+).conv1", r"\1.in_layers.2"),
        (r"(resnets.\d+).time_emb_proj", r"\1.emb_layers.1"),
        (r"(resnets.\d+).norm2", r"\1.out_layers.0"),
        (r"(resnets.\d+).conv2", r"\1.out_layers.3"),
        (r"(resnets.\d+).conv_shortcut", r"\1.skip_connection"),
        (r"^time_embedding.linear_1", "time_embed.0"),
        (r"^time_embedding.linear_2", "time_embed.2"),
        (r"^conv_in", "input_blocks.0.0"),
        (r"^down_blocks.(\d+).resnets.(\d+)", lambda i, j: f"input_blocks.{1 + i * n + j}.0"),
        (r"^down_blocks.(\d+).attentions.(\d+)", lambda i, j: f"input_blocks.{1 + i * n + j}.1"),
        (r"^down_blocks.(\d+).downsamplers.0.conv", lambda i: f"input_blocks.{(i + 1) * n}.0.op"),
        (r"^mid_block.resnets.(\d)", lambda i: f"middle_block.{2 * i}"),
        (r"^mid_block.attentions.0", "middle_block.1"),
        (r"^up_blocks.(\d+).resnets.(\d+)", lambda i, j: f"output_blocks.{i * n + j}.0"),
        (r"^up_blocks.(\d+).attentions.(\d+)", lambda i, j: f"output_blocks.{i * n + j}.1"),
        (r"^up_blocks.(\d+).upsamplers.0", lambda i: f"output_blocks.{i * n + n - 1}.{after(i)}"),
        (r"^conv_norm_out", "out.0"),
        (r"^conv_out", "out.2"),
    ], "vae": [                     # SD numbers the decoder's levels by resolution, diffusers in order of use
        (r"conv_shortcut", "nin_shortcut"),
        (r"conv_norm_out", "norm_out"),
        (r"mid_block.resnets.(\d)", lambda i: f"mid.block_{i + 1}"),
        (r"mid_block.attentions.0", "mid.attn_1"),
        (r"attn_1.group_norm", "attn_1.norm"),
        (r"attn_1.(?:to_)?(q|k|v)(?:uery|ey|alue)?\.", r"attn_1.\1."),    # query, key, value: before mid-2023
        (r"attn_1.(?:to_out.0|proj_attn)", "attn_1.proj_out"),
        (r"down_blocks.(\d+).resnets.(\d+)", lambda i, j: f"down.{i}.block.{j}"),
        (r"down_blocks.(\d+).downsamplers.0", lambda i: f"down.{i}.downsample"),
        (r"up_blocks.(\d+).resnets.(\d+)", lambda i, j: f"up.{last - i}.block.{j}"),
        (r"up_blocks.(\d+).upsamplers.0", lambda i: f"up.{last - i}.upsample"),
    ], "text": [(r"^text_model.", "")],
        "single": [(r"^cond_stage_model.transformer.(?=embed|encoder|final)", TEXT)]}    # some merged files
    for pattern, to in rules[part]:
        key = re.sub(pattern, to if isinstance(to, str) else lambda m: to(*map(int, m.groups())), key)
    return PREFIXES.get(part, "") + key


# --- reading ----------------------------------------------------------------------------------------------
class Skipped:
    """Takes the place of an object in a pickle that we do not need: accepts anything, does nothing."""
    __init__ = __setstate__ = lambda self, *args: None


# SD's own .ckpt files hold objects of these classes beside the tensors; the real classes are never loaded
STAND_INS = [type(name, (Skipped,), {"__module__": module}) for module, name in (
    ("pytorch_lightning.callbacks.model_checkpoint", "ModelCheckpoint"),
    ("numpy.core.multiarray", "scalar"), ("numpy._core.multiarray", "scalar"), ("numpy", "dtype"))]


def read_tensors(path):
    """{name: tensor} of a .safetensors, .ckpt or .bin file, by its first bytes, or of the one in a folder."""
    if os.path.isdir(path):                                 # a part of a diffusers model, and not its .fp16
        files = [str(file) for file in Path(path).iterdir() if file.suffix in (".safetensors", ".bin")]
        path = min(files, key=lambda name: (name.endswith(".bin"), len(name)), default=path)
    if re.search(r"-\d{5}-of-\d{5}\.\w+$", path):
        raise ValueError(f"{path} is one shard of several: save the model again, in one file")
    if not os.path.isfile(path):
        raise ValueError(f"no weights at {path}: give a .safetensors or .ckpt file, or a diffusers folder")
    with open(path, "rb") as file:
        head = file.read(64)
    if head.startswith(b"version https://git-lfs"):
        raise ValueError(f"{path} is a git-LFS pointer, not the weights: run git lfs pull in its folder")
    if head.lstrip().startswith(b"<"):
        raise ValueError(f"{path} is a web page (HTML), not a checkpoint: download the file itself")
    if head[8:9] != b"{" and not head.startswith((b"PK\x03\x04", b"\x80")):
        raise ValueError(f"{path} is neither safetensors nor ckpt, beginning {head[:8]!r}: download it again")
    try:
        if head[8:9] == b"{":
            with safe_open(path, framework="pt") as file:
                return {key: file.get_tensor(key) for key in file.keys()}
        with open(path, "rb") as file, torch.serialization.safe_globals(STAND_INS):
            tensors = torch.load(file, map_location="cpu", weights_only=True)   # plain data, never a program
        for _ in range(2):                                  # LDM nests them, some programs twice
            tensors = tensors.get("state_dict", tensors)
        return {str(key): tensor for key, tensor in tensors.items() if isinstance(tensor, torch.Tensor)}
    except Exception as error:                              # a damaged file can raise almost anything
        if code := re.search(r"GLOBAL (\S+)", str(error)):
            raise ValueError(f"{path} wants to run {code[1]}: refused, give a .safetensors file") from None
        reason = str(error).split("\n")[0][:60] or type(error).__name__
        raise ValueError(f"{path} is truncated or damaged ({reason}): download it again") from None


def read_model(path, config, parts=("unet", "vae", "text")):
    """{SD's name: tensor} of a single file, of parts of a diffusers folder, or of a VAE's file or folder."""
    sources = {"single": path}
    if os.path.isdir(os.path.join(path, "vae")):
        sources = {part: os.path.join(path, "text_encoder" if part == "text" else part) for part in parts}
    found = {}
    for part, source in sources.items():
        tensors = read_tensors(source)
        if "decoder.conv_in.weight" in tensors:             # a VAE; the rules leave SD's names as they are
            part = "vae"
        for key, tensor in tensors.items():
            name = rename(key, part, config)
            found[f"{name} (again)" if name in found else name] = tensor
    return found


def read_merges(path, config):
    """The tokenizer's pairs, best first, from CLIP's bpe_simple_vocab_16e6.txt.gz, a merges.txt, or a
    tokenizer.json, which newer folders have in its place."""
    advice = "give --merges bpe_simple_vocab_16e6.txt.gz of openai/CLIP, or merges.txt of a diffusers folder"
    if not os.path.isfile(path):
        raise ValueError(f"no tokenizer at {path}: {advice}")
    if path.endswith(".json"):
        pairs = read_json(path).get("model", {}).get("merges", [])
        lines = [pair if isinstance(pair, str) else " ".join(pair) for pair in pairs]
    else:
        data = Path(path).read_bytes()
        text = (gzip.decompress(data) if data.startswith(b"\x1f\x8b") else data).decode(errors="replace")
        lines = re.sub(r"^.*#version.*\n", "", text).split("\n")
    count = config.vocabulary - 514                         # the other ids are 2 x 256 bytes, start and end
    merges = [line.strip() for line in lines[:count]]
    if len(merges) < count or merges[:2] != ["i n", "t h"] or any(pair.count(" ") != 1 for pair in merges):
        raise ValueError(f"{path} is not CLIP's list of {count} merges, beginning with i n, t h: {advice}")
    return merges


# --- placing ----------------------------------------------------------------------------------------------
def read_scheduler(path, config):
    """The config, as the scheduler of a diffusers folder wants it: some fine-tunes predict v."""
    file = Path(path, "scheduler", "scheduler_config.json")
    told = read_json(file) if file.exists() else {}
    kind, zero = told.get("prediction_type", "epsilon"), bool(told.get("rescale_betas_zero_snr"))
    if kind not in ("epsilon", "v_prediction") or zero and kind == "epsilon":     # eps is all of pure noise
        raise ValueError(f"{file} says that the UNet predicts {kind}: expected epsilon or v_prediction")
    return replace(config, prediction="eps" if kind == "epsilon" else "v", zero_terminal_snr=zero)


def check(path, tensors):
    """Raise ValueError, naming what they are, if these tensors are not those of a whole SD1.x checkpoint."""
    whole = "give a whole Stable Diffusion 1.x checkpoint"
    for kind, pattern in FOREIGN.items():
        if any(re.search(pattern, f"{name} {list(tensor.shape)}") for name, tensor in tensors.items()):
            raise ValueError(f"{path} is {kind}, not Stable Diffusion 1.x: {whole}")
    if tensors and all(name.startswith(VAE) for name in tensors):
        raise ValueError(f"{path} is a VAE alone, which goes with a checkpoint as --vae: {whole}")
    for part, prefix in PREFIXES.items():
        if not any(name.startswith(prefix) for name in tensors):
            advice = "add --vae FILE, any SD1.x checkpoint has one" if part == "vae" else whole
            raise ValueError(f"{path} has no {part} ({prefix}*): {advice}")


def convert(path, model, vae=None, ema=False):
    """Put a checkpoint into a model (on the meta device, say). Returns a sentence on what was found."""
    tensors = read_model(path, model.config)
    if vae:
        other = read_model(vae, model.config, parts=("vae",))
        tensors = {name: tensor for name, tensor in tensors.items() if not name.startswith(VAE)}
        tensors |= {name: tensor for name, tensor in other.items() if name.startswith(VAE)}
    tensors = {name: tensor for name, tensor in tensors.items() if not IGNORED.fullmatch(name)}

    # Averages have the names of the weights without dots. In emaonly files most often they are the weights.
    average_of = {"model_ema." + name.removeprefix("model.").replace(".", ""): name for name in model.state()}
    averages = {name: tensors.pop(average) for average, name in average_of.items() if average in tensors}
    if ema and not averages:
        raise ValueError(f"{path} has no averaged weights (model_ema.*) beside its weights: leave --ema out")
    ema = ema or bool(averages) and not any(name.startswith(UNET) for name in tensors)
    if ema:
        tensors = {name: tensor for name, tensor in tensors.items() if not name.startswith(UNET)} | averages
    found = [f"{path}: SD1.x", "diffusers folder" if os.path.isdir(path) else "single file",
             "averages taken" if ema else "averages not used" if averages else "no averages",
             f"VAE of {vae}" if vae else "with VAE"]
    for name, tensor in tensors.items():
        if name == f"{UNET}input_blocks.0.0.weight" and tensor.shape[1:2] == (9,):
            found.append("inpainting: kept the first 4 of 9 input channels, not mask and masked picture")
            tensors[name] = tensor[:, :4]
        if ".mid.attn_1." in name and tensor.dim() == 2:    # diffusers has a linear layer, SD a 1x1 conv
            tensors[name] = tensor[:, :, None, None]
    check(path, tensors)
    fill(model, tensors, path, only=lambda name: not is_temporal(name))
    return ", ".join(found)


# --- LoRA: low-rank changes to many weights ---------------------------------------------------------------
@torch.no_grad()
def merge_lora(model, path, scale=1.0):
    """Add a LoRA file in kohya's layout: W + scale · alpha/rank · up·down (Hu et al. 2106.09685, 4.1).

    Returns how many layers it changed and which tensors found no place. ValueError if nothing fits."""
    tensors, used = read_tensors(path), set()
    weights = {(PREFIXES[part] + name).replace(".", "_"): weight for part, network in model.networks().items()
               for name, weight in network.named_parameters()}
    for stem in sorted({key.split(".")[0] for key in tensors}):
        part = "text" if stem.startswith("lora_te_") else "unet"
        name = rename(re.sub("^lora_(te|unet)_", "", stem) + "_weight", part, model.config).replace(".", "_")
        down, up = tensors.get(f"{stem}.lora_down.weight"), tensors.get(f"{stem}.lora_up.weight")
        if name not in weights or down is None or up is None:
            continue
        weight, rank, down, up = weights[name], len(down), down.float().flatten(1), up.float().flatten(1)
        expected = (len(weight), rank), (rank, weight[0].numel())
        if (up.shape, down.shape) != expected or f"{stem}.dora_scale" in tensors:
            raise ValueError(f"{path} is a LoRA of another kind or model, {stem} does not fit {name} "
                             f"{list(weight.shape)}: give one for Stable Diffusion 1.x in kohya's layout")
        alpha = tensors.get(f"{stem}.alpha", torch.tensor(rank)).item()
        change = scale * alpha / rank * (up @ down).view(weight.shape)
        if not change.isfinite().all():
            raise ValueError(f"{path} has numbers in {stem} that are not finite: give another LoRA")
        weight += change.to(weight.device)
        used |= {f"{stem}.lora_down.weight", f"{stem}.lora_up.weight", f"{stem}.alpha"}
    if not used:
        raise ValueError(f"{path} is no LoRA that fits: it lacks lora_unet_... .lora_down.weight and .lora_up"
                         f".weight, but has {', '.join(sorted(tensors)[:3])}: give one in kohya's names")
    return len(used) // 3, sorted(tensors.keys() - used)


def lora_file(item):
    """FILE or FILE:SCALE -> file, scale."""
    path, scale = re.fullmatch(r"(.+?)(?::(-?\d*\.?\d+))?", item, re.DOTALL).groups()
    return path, float(scale or 1)


def lora_tensors(model):
    """The LoRA that `add_lora` gave a UNet, in kohya's layout, for `merge_lora` and other programs."""
    blocks = ["mid_block_attentions_0", *(f"{side}_blocks_{i}_attentions_{j}" for side in ("down", "up")
              for i in range(len(model.config.widths)) for j in range(model.config.res_blocks + 1))]
    kohya = {rename(block, "unet", model.config): block for block in blocks}
    tensors = {}
    for name, layer in model.unet.named_modules():
        if hasattr(layer, "lora"):
            block, rest = f"{UNET}{name}".split(".transformer_blocks.")
            stem = f"lora_unet_{kohya[block]}_transformer_blocks_{rest.replace('.', '_')}"
            down, up = (linear.weight.detach().cpu() for linear in layer.lora)
            tensors |= {f"{stem}.lora_down.weight": down, f"{stem}.lora_up.weight": up,
                        f"{stem}.alpha": torch.tensor(float(len(down)))}
    return tensors


def main(argv=None):
    """Convert one checkpoint: read it, say what it is, write it."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("model", help=".safetensors or .ckpt file of Stable Diffusion 1.x, or a diffusers folder")
    p.add_argument("--vae", metavar="FILE", help="take the VAE from here: a file or folder of any layout")
    p.add_argument("--merges", metavar="FILE", help="CLIP's bpe_simple_vocab_16e6.txt.gz, or a merges.txt")
    p.add_argument("--out", metavar="FILE", default="out/sd15.safetensors", help="default %(default)s")
    p.add_argument("--ema", action="store_true", help="take the averaged weights, if there are both")
    args = p.parse_args(argv)
    if os.path.exists(args.out):
        raise ValueError(f"{args.out} exists: give another --out, or remove it")
    check_writable(args.out)
    with torch.device("meta"):                              # the numbers come from the checkpoint
        model = Model.build(read_scheduler(args.model, PRESETS["sd15"]))
    found = convert(args.model, model, args.vae, args.ema)
    print(found)
    beside = [os.path.join(args.model, "tokenizer", name) for name in ("merges.txt", "tokenizer.json")]
    merges = args.merges or next(filter(os.path.exists, beside), beside[0])
    model.tokenizer = Tokenizer(read_merges(merges, model.config))
    kept = lambda name: not is_temporal(name)
    if broken := [name for name, x in model.state().items() if kept(name) and not x.half().isfinite().all()]:
        raise ValueError(f"{', '.join(broken)} would not be finite in float16: give another checkpoint")
    save_weights(args.out, model, only=kept, source=found)
    print(f"wrote {args.out}, {os.path.getsize(args.out) / 1e9:.1f} GB: use it as --weights {args.out}")


if __name__ == "__main__":
    with plain_errors("convert_sd_weights.py", "nothing was written"):
        main()
