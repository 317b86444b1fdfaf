"""Random weights and inputs, the same on every machine, and the outputs of SD's own code for them.

fixtures/oracle.safetensors holds the outputs of reference implementations of SD1.x (float64, stored as
float32) on reduced widths; its metadata lists the cases and checksums of the weights. Configurations: `mini`;
`small`; `faint`, with features so small that a norm's eps of 1e-5 in place of 1e-6 shows; `in9`, with 9 input
channels. A weight is a byte of numpy's frozen legacy generator times a power of two, exact in float16.
"""

import json
import math
import re
import zlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open

from model import PREFIXES, PRESETS, is_temporal

FIXTURE = Path(__file__).parent / "fixtures" / "oracle.safetensors"
with safe_open(FIXTURE, framework="pt") as file:
    CASES = {case["id"]: case for case in json.loads(file.metadata()["cases"])}
    MANIFEST = json.loads(file.metadata()["configs"])
    EXPECTED = {key: file.get_tensor(key) for key in file.keys()}

# layers whose output enters a residual stream or a norm: `faint` makes them 64 times smaller
FAINT = re.compile(
    r"(input_blocks\.0\.0|in_layers\.2|emb_layers\.1|out_layers\.3|skip_connection|\.op|upsample\.conv|"
    r"output_blocks\.\d+\.\d+\.conv|proj_in|proj_out|to_out\.0|ff\.net\.2|encoder\.conv_in|decoder\.conv_in|"
    r"\.conv1|\.conv2|nin_shortcut|downsample\.conv|token_embedding|position_embedding|self_attn\.out_proj|"
    r"mlp\.fc2)\.(weight|bias)$")
SHARP = re.compile(r"(to_q|q_proj|mid\.attn_1\.q|ff\.net\.0\.proj)\.weight$")   # attention far from uniform


def random_bytes(label, n):
    return np.random.RandomState(zlib.crc32(label.encode())).bytes(n)


def weight(key, shape, seed, profile):
    """One tensor of weights, a function of its arguments alone."""
    n = int(np.prod(shape))
    q = np.frombuffer(random_bytes(f"{seed}:{key}", n), dtype=np.int8).reshape(shape)
    gain = len(shape) == 1 and key.endswith("weight")
    if gain:                                               # of a norm, around 1
        v = 1.0 + (q >> 2).astype(np.float32) / 64
    elif len(shape) == 1:
        v = q.astype(np.float32) * 2.0 ** -9
    else:                                                  # variance about 1 / fan_in
        exponent = round(math.log2(math.sqrt(3.0 * shape[0] / n))) - 7 + bool(SHARP.search(key))
        v = q.astype(np.float32) * 2.0 ** exponent
    if profile == "faint" and FAINT.search(key) and not gain:
        v = v * 2.0 ** -6
    return torch.from_numpy(np.ascontiguousarray(v, dtype=np.float32))


def weights(name, part, network):
    """{SD's name: tensor} for all tensors of a network except temporal ones, checked against the manifest."""
    about = MANIFEST[name][part]
    shapes = {PREFIXES[part] + key: tuple(tensor.shape) for key, tensor in network.state_dict().items()
              if not is_temporal(key)}
    tensors = {key: weight(key, shape, about["seed"], about["profile"]) for key, shape in shapes.items()}
    total = 0
    for key in sorted(tensors):
        total = zlib.crc32(tensors[key].numpy().tobytes(), zlib.crc32(key.encode(), total))
    assert total == about["checksum"], f"names or shapes of {name}.{part} are not those of the reference"
    return tensors


def config(name):
    """Our Config for one of the reference's configurations."""
    c = MANIFEST[name]
    unet, vae = c["unet"]["config"], c.get("vae", MANIFEST["small"]["vae"])["config"]
    text = c.get("text", MANIFEST["small"]["text"])["config"]
    return replace(
        PRESETS["sd15"], name=name, widths=tuple(unet["model_channels"] * m for m in unet["channel_mult"]),
        res_blocks=unet["num_res_blocks"], heads=unet["num_heads"], emb_dim=4 * unet["model_channels"],
        temporal_emb_dim=32, in_channels=unet["in_channels"],
        vae_widths=tuple(vae["ch"] * m for m in vae["ch_mult"]), vae_res_blocks=vae["num_res_blocks"],
        text_width=unet["context_dim"], text_layers=text["layers"],
        text_heads=text["heads"], vocabulary=text["vocab"])


def noise(label, shape):
    """Almost normally distributed numbers: sums of 12 bytes."""
    n = int(np.prod(shape))
    u = np.frombuffer(random_bytes(f"in:0:{label}", 12 * n), dtype=np.uint8).reshape(12, n)
    return torch.from_numpy(((u.astype(np.float32).sum(0) - 1530.0) / 256.0).reshape(shape))
