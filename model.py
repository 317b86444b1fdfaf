"""The networks: Stable Diffusion 1.5's UNet with time added to it, its VAE, text encoder and tokenizer.

The image part keeps the module names of the SD checkpoint, so real weights load as they are. All that is new
has "temporal" in its name and starts as the identity: a fresh video model equals its image model per frame.

Letters used in shapes, here and everywhere:
    b batch   c channels   f frames of a window   h, w of the latents   H, W of the picture   d text width
`t` is the noise level of a frame, an index from 0 (almost clean) to 999 (pure noise), never a moment of the
video; `frames` are moments of the video, absolute frame indices.

Papers: Rombach et al. 2112.10752 (latent diffusion), Radford et al. 2103.00020 (CLIP), Singer et al.
2209.14792 (Make-A-Video: pseudo-3D layers), Chen et al. 2407.01392 (Diffusion Forcing: a level per frame).
"""

import html
import json
import math
import os
import sys
import unicodedata
import zlib
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field, replace
from datetime import timedelta
from functools import lru_cache
from itertools import accumulate, groupby
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from einops import rearrange, repeat
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn.utils import parametrize
from torch.utils.checkpoint import checkpoint

from diffusion import NoiseSchedule, lean_on

LATENT_SCALE = 0.18215   # SD1.x: latents times this have a standard deviation near 1
LARGEST_REUSED = 2 ** 25  # bytes; glibc gives larger tensors back, and has the system clear new ones
CACHED_SCORES = 2 ** 21  # attention scores that a CPU's cache holds: 4 MB in bfloat16
GRID_LIMIT = 65_535      # most rows x heads of one attention call: CUDA kernels refuse a larger launch grid
TINY_WEIGHTS = os.path.join(os.path.dirname(os.path.abspath(__file__)), "assets", "tiny.safetensors")
TEXT_TOKENS = 77         # length of every prompt, start and end tokens and padding included
SPECIAL_TOKENS = ("<|startoftext|>", "<|endoftext|>")
ENDINGS = ("'s", "'t", "'re", "'ve", "'m", "'ll", "'d")   # that CLIP's tokenizer splits off


@dataclass(frozen=True)
class Config:
    """What defines a set of weights. Saved with them; `PRESETS` holds the two that ship."""

    name: str
    size: int                                # of a picture, in pixels
    prediction: str                          # what the UNet says: "eps" or "v"
    zero_terminal_snr: bool                  # is the last noise level pure noise
    widths: tuple                            # UNet channels per resolution level
    res_blocks: int                          # per level
    attention_levels: tuple                  # levels that have spatial attention
    heads: int
    emb_dim: int                             # width of the noise level embedding
    temporal_emb_dim: int                    # width of what the temporal layers are told about a frame
    vae_widths: tuple
    vae_res_blocks: int
    vae_patch: int                           # pixels folded into channels before the first VAE conv, per axis
    vae_groups: int                          # of the VAE's GroupNorms
    text_width: int                          # also the width of the UNet's cross-attention context
    text_layers: int
    text_heads: int
    vocabulary: int                          # 514 = 256 bytes, 256 bytes that end a word, start, end
    in_channels: int = 4
    latent_mean: tuple = (0.0, 0.0, 0.0, 0.0)
    latent_std: tuple = (1 / LATENT_SCALE,) * 4

    @property
    def vae_factor(self):
        """How many times smaller than the picture the latents are."""
        return self.vae_patch * 2 ** (len(self.vae_widths) - 1)


PRESETS = {
    "tiny": Config(
        name="tiny", size=64, prediction="v", zero_terminal_snr=True,
        widths=(64, 96, 96), res_blocks=1, attention_levels=(1, 2), heads=4, emb_dim=128,
        temporal_emb_dim=128, vae_widths=(48, 64), vae_res_blocks=1, vae_patch=2, vae_groups=16,
        text_width=64, text_layers=2, text_heads=4, vocabulary=514),
    "sd15": Config(
        name="sd15", size=512, prediction="eps", zero_terminal_snr=False,
        widths=(320, 640, 1280, 1280), res_blocks=2, attention_levels=(0, 1, 2), heads=8, emb_dim=1280,
        temporal_emb_dim=512, vae_widths=(128, 256, 512, 512), vae_res_blocks=2, vae_patch=1, vae_groups=32,
        text_width=768, text_layers=12, text_heads=12, vocabulary=49408),
}


# ----------------------------------------------------------------------------------------------- small layers

def zero(module):
    """The same module with all its parameters zero: a path that starts closed and that training opens."""
    for parameter in module.parameters():
        nn.init.zeros_(parameter)
    return module


def sinusoids(values, dim, max_period=10_000):
    """Sinusoidal embedding of numbers of any shape: (..., dim). Cosines first, then sines, as SD has them."""
    freqs = torch.exp(-math.log(max_period) * torch.arange(dim // 2, device=values.device) / (dim // 2))
    angles = values.float()[..., None] * freqs
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


def row_of_pixels(tokens):
    """(..., c) as one long row of pixels (1, c, 1, n), channels last: a view if the tokens are contiguous."""
    return tokens.reshape(1, 1, -1, tokens.shape[-1]).permute(0, 3, 1, 2)


def on_cpu(x):
    """Whether the CPU computes x. The tensors of a dry run, without content, stand for those of a GPU."""
    return x.device.type == "cpu" and not isinstance(x, FakeTensor)


def is_wide(weight):
    """Whether it matters which of the CPU's kernels multiplies with a weight (out, in, ...)."""
    return min(weight.shape[:2]) >= 256


def mostly_sorting(x, pixels, weight):
    """Whether a conv of x to so many pixels in all would mostly sort weights on a CPU, from torch's order to
    that of the kernel: wide ones in bfloat16, if the pixels are few."""
    return on_cpu(x) and x.dtype == torch.bfloat16 and pixels <= 512 and is_wide(weight)


def conv_is_quicker(x, weight):
    """Whether the product of tokens x (..., in) and a weight should be a 1x1 conv, see `product`."""
    usable = on_cpu(x) and torch.backends.mkldnn.is_available()
    return usable and x.dtype == torch.float32 and is_wide(weight)


def patches(x, stride=1):
    """The 3x3 pixels around every pixel, or every second of a row and column, zeros beyond the edge:
    (n, c, h, w) -> (pixels, 9c)."""
    around = F.pad(x, (1, 1, 1, 1)).unfold(2, 3, stride).unfold(3, 3, stride)
    return rearrange(around, "n c h w i j -> (n h w) (i j c)")


def sum_of_patches(parts, shape, stride=1):
    """The way back, for gradients: every pixel sums what the patches it lies in hold of it, to a `shape`."""
    n, c, h, w = shape
    parts = rearrange(parts, "(n h w) (i j c) -> i j n h w c", n=n, h=-(-h // stride), i=3, j=3)
    out = parts.new_zeros(n, h + 2, w + 2, c, dtype=torch.float32)
    for i in range(3):
        for j in range(3):
            out[:, i:i + h:stride, j:j + w:stride] += parts[i, j]
    return out[:, 1:-1, 1:-1].to(parts.dtype).permute(0, 3, 1, 2)


def product(x, weight, bias=None):
    """x Wᵀ + b for tokens (..., in) and a weight (out, in), as `F.linear` has it: (..., out).

    On a CPU a 1x1 conv over a row of pixels computes the same, in float32 at up to twice the speed, as other
    kernels work there: oneDNN's, not those of BLAS. In bfloat16 `F.linear` has oneDNN's too. But a conv keeps
    its input for the backward pass even if its weight is frozen; then it is `F.linear` after all."""
    frozen = torch.is_grad_enabled() and not weight.requires_grad
    if frozen or not conv_is_quicker(x, weight):
        return F.linear(x, weight, bias)
    out = F.conv2d(row_of_pixels(x), weight[:, :, None, None], bias)
    return tokens_of_row(out, (*x.shape[:-1], -1))


def tokens_of_row(row, shape):
    """The way back from `row_of_pixels`: (1, c, 1, n) as tokens of a shape (..., c)."""
    return row.permute(0, 2, 3, 1).reshape(shape)


def gradient_of_conv_input(gradient, weight, x, stride=(1, 1), padding=(0, 0)):
    """What torch does itself, to the bit. It wants the input x, but looks at shape and layout only."""
    options = stride, padding, (1, 1), False, (0, 0), 1                            # no dilation, one group
    return torch.ops.aten.convolution_backward(gradient, x, weight, None, *options, (True, False, False))[0]


class KeepNothing(torch.autograd.Function):
    """A frozen layer whose input is not kept: the gradient of its input needs the weight alone."""
    @staticmethod
    def forward(ctx, x, layer):
        ctx.layer, ctx.shape, ctx.stride = layer, x.shape, x.stride()
        return layer.plain(x)

    @staticmethod
    def backward(ctx, gradient):
        """The gradient of x; the layer is frozen, and has none."""
        weight = ctx.layer.weight.to(gradient.dtype)       # one that is stored in 8 bit is unpacked again
        return ctx.layer.gradient_of_input(gradient, weight, ctx.shape, ctx.stride), None


class Conv2d(nn.Conv2d):
    """A conv of the image model. `lean`, set by `save_memory` when it is frozen: see `KeepNothing`."""
    lean = False

    def plain(self, x):
        """What the layer computes."""
        weight, n = self.weight, x.shape[0]
        h, w = (-(-side // self.stride[0]) for side in x.shape[2:])                   # rounded up
        if not self.product_is_quicker(x, n * h * w, weight):
            return F.conv2d(x, weight, self.bias, self.stride, self.padding)
        out = F.linear(patches(x, self.stride[0]), rearrange(weight, "o c i j -> o (i j c)"), self.bias)
        return rearrange(out, "(n h w) c -> n c h w", n=n, h=h)

    def product_is_quicker(self, x, pixels, weight):
        """Whether a matrix product with `patches` should do what the layer does, on x or a gradient, where
        the output has so many pixels in all. A product would keep all patches to train a weight."""
        usual = (self.kernel_size, self.padding) == ((3, 3), (1, 1))
        trained = torch.is_grad_enabled() and weight.requires_grad
        return usual and mostly_sorting(x, pixels, weight) and not trained

    def gradient_of_input(self, gradient, weight, shape, stride):
        """The gradient of the input (b f, in, h, w) from that of the output (b f, out, h, w)."""
        if self.product_is_quicker(gradient, gradient.numel() // gradient.shape[1], weight):
            parts = rearrange(gradient, "n c h w -> (n h w) c") @ rearrange(weight, "o c i j -> o (i j c)")
            return sum_of_patches(parts, shape, self.stride[0])
        x = torch.empty_strided(shape, stride, dtype=gradient.dtype, device=gradient.device)
        return gradient_of_conv_input(gradient, weight, x, self.stride, self.padding)

    def forward(self, x):
        return KeepNothing.apply(x, self) if self.lean else self.plain(x)


class Linear(nn.Linear):
    """A linear layer of the image model. Frozen, it keeps no input anyway; `lean`, as for `Conv2d`: no copy
    of a weight in 8 bit either, and `product` is free to be a conv. `lora` is a trainable bypass, see
    `add_lora`."""
    lean = False

    def plain(self, x):
        """What the layer computes."""
        return product(x, self.weight, self.bias)

    def gradient_of_input(self, gradient, weight, shape, stride):
        """The gradient of the input (..., in) from that of the output (..., out)."""
        if not conv_is_quicker(gradient, weight):
            return gradient @ weight
        x = row_of_pixels(gradient.new_empty(shape))
        of_x = gradient_of_conv_input(row_of_pixels(gradient), weight[:, :, None, None], x)
        return tokens_of_row(of_x, shape)

    def forward(self, x):
        out = KeepNothing.apply(x, self) if self.lean else self.plain(x)
        return out + self.lora(x) if hasattr(self, "lora") else out


def no_autocast(x):
    """A context: autocast is off where x is. The meta device, of tensors without content, has none."""
    return nullcontext() if x.is_meta else torch.autocast(x.device.type, enabled=False)


class GroupNorm(nn.GroupNorm):
    """In the precision of its input. Autocast would make a float32 copy on a GPU, and keep that instead."""
    def forward(self, x):
        with no_autocast(x):
            return F.group_norm(x, self.num_groups, self.weight.to(x.dtype), self.bias.to(x.dtype), self.eps)


class LayerNorm(nn.LayerNorm):
    """In the precision of its input, as `GroupNorm`."""
    def forward(self, x):
        with no_autocast(x):
            weight, bias = self.weight.to(x.dtype), self.bias.to(x.dtype)
            return F.layer_norm(x, self.normalized_shape, weight, bias, self.eps)


def cheap(again, function, x):
    """function(x), which is quick: if `again`, only x is kept, and the backward pass computes the rest.

    Beside the matrix products, norms and activations take hardly any time, but as much memory."""
    if not again:
        return function(x)
    return checkpoint(function, x, use_reentrant=False, preserve_rng_state=False)


class AttentionInCache(torch.autograd.Function):
    """Attention of q, k, v (rows, tokens, d) written out, for so few rows at a time that their scores stay in
    a CPU's cache. The backward pass computes them again, as FlashAttention does (Dao et al. 2205.14135)."""
    @staticmethod
    def parts(*tensors):
        """The shares softmax(q kᵀ / √d) and the tensors, of which q and k come first, some rows at a time."""
        q, k = tensors[:2]
        rows = max(1, CACHED_SCORES // (q.shape[1] * k.shape[1]))
        for part in zip(*(x.split(rows) for x in tensors)):
            scores = (part[0] * q.shape[-1] ** -0.5) @ part[1].transpose(1, 2)
            yield scores.softmax(-1), *part

    @staticmethod
    def forward(ctx, q, k, v):
        ctx.save_for_backward(q, k, v)
        return torch.cat([shares @ v for shares, _, _, v in AttentionInCache.parts(q, k, v)])

    @staticmethod
    def backward(ctx, gradient):
        """The gradients of q, k and v; those of a text's k and v are hardly ever wanted."""
        gradients, wanted = ([], [], []), ctx.needs_input_grad
        for shares, q, k, v, slope in AttentionInCache.parts(*ctx.saved_tensors, gradient):
            of_shares = slope @ v.transpose(1, 2)
            # shares * (of_shares - their mean, weighed by the shares), in one pass
            of_scores = torch.ops.aten._softmax_backward_data(of_shares, shares, -1, shares.dtype)
            scale = q.shape[-1] ** -0.5
            gradients[0].append(of_scores @ (k * scale))
            if wanted[1]:
                gradients[1].append(of_scores.transpose(1, 2) @ (q * scale))
            if wanted[2]:
                gradients[2].append(shares.transpose(1, 2) @ slope)
        return tuple(torch.cat(parts) if parts else None for parts in gradients)


def attention_in_cache(q, k, v):
    """In bfloat16 quicker than torch's kernel for the CPU, in float32 slower."""
    return AttentionInCache.apply(*(x.flatten(0, 1) for x in (q, k, v))).unflatten(0, q.shape[:2])


def attention(q, k, v, mask=None):
    """softmax(q kᵀ / √d + mask) v for q, k, v (rows, heads, tokens, d), mask (rows, heads, q, k) or None.

    Temporal attention has a row for every pixel: many rows, each very short. They go through in chunks that
    the GPU kernels accept. To train the mask in half precision, torch's way would be to keep everything in
    float32; written out it is smaller and quicker, because the softmax is over a few frames only."""
    if mask is not None and mask.requires_grad and q.dtype != torch.float32:
        scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2) + mask
        return scores.softmax(-1).to(v.dtype) @ v
    fits = q.dtype == torch.bfloat16 and q.shape[-2] * k.shape[-2] <= CACHED_SCORES
    if mask is None and on_cpu(q) and fits:
        return attention_in_cache(q, k, v)
    rows = max(1, GRID_LIMIT // q.shape[1])
    if q.shape[0] <= rows:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    chunks = [F.scaled_dot_product_attention(*(x[i:i + rows] for x in (q, k, v)),
                                             attn_mask=None if mask is None else mask[i:i + rows])
              for i in range(0, q.shape[0], rows)]
    return torch.cat(chunks)


def scope_mask(queries, keys, radius, everywhere):
    """Which frames see which, to be added to attention logits: (q, k), 0 where they do, -inf where not.

    Frame i sees frame j if they are at most `radius` places apart, or if j is one of the frames `everywhere`.
    An infinite radius is full attention; a radius alone is local; with both it is dual-scope (Tan et al.
    2406.16260), and a frame that is near as well as everywhere counts once, as softmax wants it."""
    near = (queries[:, None] - keys).abs() <= radius
    return torch.where(near | torch.isin(keys, everywhere), 0.0, -math.inf)


class SharedWindow:
    """How processes share the frames of one window: each has a clip of it, and fetches what it lacks.

    lens: how many frames each process has, in order, any numbers from 1 on; rank: which of them this one is.
    radius, n_global: the scope of temporal attention, see `scope_mask`; the global frames are spread evenly
    from the first to the last. With one clip everything is at hand and nothing is sent: an ordinary window.

    Places are counted in the window, from 0. `halo` and `seen` list, for each process, the places that its
    temporal convs and attentions read: its clip and the frame on either side; its clip and all that is in
    scope."""
    def __init__(self, lens, rank=0, radius=math.inf, n_global=0):
        self.total, self.rank = sum(lens), rank
        self.clips = [range(end - n, end) for n, end in zip(lens, accumulate(lens))]
        everywhere = [round(i * (self.total - 1) / max(1, n_global - 1)) for i in range(n_global)]
        near = lambda clip, radius: range(max(0, clip.start - min(radius, self.total)),
                                          min(self.total, clip.stop + radius))
        self.halo = [near(clip, 1) for clip in self.clips]
        self.seen = [sorted({*near(clip, radius), *everywhere}) for clip in self.clips]
        clip = self.clips[rank]
        self.here = slice(clip.start, clip.stop)
        self.in_halo, self.in_seen = (slice(places.index(clip.start), places.index(clip.start) + len(clip))
                                      for places in (self.halo[rank], self.seen[rank]))
        self.mask = None                                # nothing is masked where everything is seen
        if radius < self.total - 1:
            queries, keys, everywhere = map(torch.tensor, (clip, self.seen[rank], everywhere))
            self.mask = scope_mask(queries, keys, radius, everywhere)

    def fetch(self, x, places, dim):
        """The frames of this clip, along `dim` of x -> those at places[rank], sorted, from wherever they are.

        `places` says so for every process, so each knows what the others want. All have to call this in the
        same order, with the same list. Through the memory of the CPU, which gloo needs."""
        if len(self.clips) == 1:
            return x
        parts, waiting = [], []
        for rank, clip in enumerate(self.clips):
            mine = [place - self.here.start for place in places[rank] if place in self.clips[self.rank]]
            theirs = [place for place in places[self.rank] if place in clip]
            sent = x.index_select(dim, torch.tensor(mine, dtype=torch.long, device=x.device))
            if rank == self.rank:
                parts.append(sent)
                continue
            if mine:
                waiting.append(dist.isend(sent.cpu().contiguous(), rank))
            if theirs:
                shape = (*x.shape[:dim], len(theirs), *x.shape[dim + 1:])
                parts.append(torch.empty(shape, dtype=x.dtype))
                waiting.append(dist.irecv(parts[-1], rank))
        for message in waiting:
            message.wait()
        return torch.cat([part.to(x.device) for part in parts], dim)


class Around(NamedTuple):
    """What temporal layers know about their window. Gaps and distances are in frames of the video.

    f counts the frames that this process has, all of them unless several share a window. The last four
    tensors are about the nearest given frames of each, at or before it and at or after it."""

    b: int
    f: int
    clips: SharedWindow      # who has which frames
    gap: torch.Tensor        # (b, halo-1) from each frame that a temporal conv reads to the next
    distance: torch.Tensor   # (b, f, seen) signed distance to every frame that temporal attention sees
    emb: torch.Tensor        # (b, f, e) what each frame is told about itself
    hint: torch.Tensor       # (b f, 9, h, w) latents before, latents after, and whether the frame is given
    since: torch.Tensor      # (b f, 2) frames since the one before (>= 0) and since the one after (<= 0)
    share: torch.Tensor      # (b f, 2) what each would have in a linear blend; 0 where there is none
    blend: torch.Tensor      # (b f, 4, h, w) cubic through two given frames on either side, else the nearest


def distance_embedding(distance):
    """Sinusoids of signed distances in frames, of any shape: (..., 32).

    On a logarithmic scale, so that neighbours are told apart frame by frame and far frames roughly; times 10,
    because the fastest sinusoid turns once in 6 units."""
    return sinusoids(10 * distance.sign() * distance.abs().log1p(), 32)


class PseudoConv3d(Conv2d):
    """A 3x3 conv inside each frame, then a conv of kernel 3 across frames: (b f) c h w -> (b f) c h w.

    The second starts as the identity. Its side taps fade with the gap g to the neighbour as g^-falloff, one
    learned falloff per channel: frames that are neighbours in the window may be far apart in the video. It is
    1x1 in space, so an ordinary matrix product, and no 3D conv is needed."""
    def __init__(self, c_in, c_out):
        super().__init__(c_in, c_out, 3, padding=1)
        self.temporal = zero(nn.Conv2d(c_out, 3 * c_out, 1, bias=False))
        self.temporal_falloff = nn.Parameter(torch.full((c_out,), 0.5))

    def forward(self, x, window=None):
        x = super().forward(x)
        if window is None:
            return x
        clips = window.clips
        pixels = rearrange(x, "(b f) c h w -> b f h w c", b=window.b)
        wide = clips.fetch(pixels, clips.halo, dim=1)
        before, here, after = product(wide, self.temporal.weight.flatten(1)).chunk(3, dim=-1)
        fade = window.gap[..., None, None, None] ** -self.temporal_falloff          # (b, halo-1, 1, 1, c)
        fade = fade.to(x.dtype)
        out = here.clone()
        out[:, 1:].add_(before[:, :-1] * fade)
        out[:, :-1].add_(after[:, 1:] * fade)
        return x + rearrange(out[:, clips.in_halo], "b f h w c -> (b f) c h w")


class TemporalAttention(nn.Module):
    """Each pixel attends to itself in the other frames of the window: (b f) c h w -> (b f) c h w.

    Identity at the start. Frames are told apart by a bias per head, a function of their signed distance, and
    by the embedding of each frame."""
    def __init__(self, channels, heads, emb_dim):
        super().__init__()
        self.heads = heads
        self.norm = LayerNorm(channels)
        self.emb = zero(nn.Linear(emb_dim, channels))
        self.bias = nn.Sequential(nn.Linear(32, 32), nn.SiLU(), zero(nn.Linear(32, heads, bias=False)))
        self.to_qkv = nn.Linear(channels, 3 * channels, bias=False)
        self.to_out = zero(nn.Linear(channels, channels))

    def forward(self, x, window):
        h, clips = x.shape[-2], window.clips
        tokens = rearrange(x, "(b f) c h w -> b f (h w) c", b=window.b)
        tokens = self.norm(tokens) + self.emb(window.emb)[:, :, None]
        tokens = clips.fetch(tokens, clips.seen, dim=1)      # half as much to send as keys and values
        qkv = product(tokens, self.to_qkv.weight)
        q, k, v = rearrange(qkv, "b f n (k heads d) -> k (b n) heads f d", k=3, heads=self.heads)
        q = q[:, :, clips.in_seen]
        bias = self.bias(distance_embedding(window.distance).to(q.dtype))     # (b, f, seen, heads)
        if clips.mask is not None:
            bias = bias + clips.mask[..., None].to(bias)
        bias = repeat(bias, "b i j heads -> (b n) heads i j", n=tokens.shape[2])
        out = rearrange(attention(q, k, v, bias), "(b n) heads f d -> b f n (heads d)", b=window.b)
        out = product(out, self.to_out.weight, self.to_out.bias)
        return x + rearrange(out, "b f (h w) c -> (b f) c h w", h=h)


class ResBlock(nn.Module):
    """Two convs with the noise level added between them.

    GroupNorm has SD's eps of 1e-5 here (and in the UNet's `out`), 1e-6 everywhere else. It pools within one
    frame, so nothing depends on how many frames a window has."""
    again = False    # see `cheap`

    def __init__(self, c_in, c_out, emb_dim):
        super().__init__()
        self.in_layers = nn.Sequential(
            GroupNorm(32, c_in), nn.SiLU(), Conv2d(c_in, c_out, 3, padding=1))
        self.emb_layers = nn.Sequential(nn.SiLU(), Linear(emb_dim, c_out))
        self.out_layers = nn.Sequential(
            GroupNorm(32, c_out), nn.SiLU(), nn.Dropout(0), PseudoConv3d(c_out, c_out))
        self.skip_connection = Conv2d(c_in, c_out, 1) if c_in != c_out else nn.Identity()

    def forward(self, x, emb, window=None):
        hidden = self.in_layers[2](cheap(self.again, self.in_layers[:2], x))
        hidden = hidden + self.emb_layers(emb)[:, :, None, None]
        hidden = cheap(self.again, self.out_layers[:2], hidden)
        return self.skip_connection(x) + self.out_layers[3](hidden, window)


class CrossAttention(nn.Module):
    """Multi-head attention of tokens (rows, n, c) to themselves, or to a text (b, 77, d) per video."""
    def __init__(self, channels, heads, context_dim=None):
        super().__init__()
        self.heads = heads
        self.to_q = Linear(channels, channels, bias=False)
        self.to_k = Linear(context_dim or channels, channels, bias=False)
        self.to_v = Linear(context_dim or channels, channels, bias=False)
        self.to_out = nn.Sequential(Linear(channels, channels), nn.Dropout(0))

    def forward(self, x, context=None):
        context = x if context is None else context
        rows, groups = x.shape[0], context.shape[0]
        q = rearrange(self.to_q(x), "(b f) n (heads d) -> b heads (f n) d", b=groups, heads=self.heads)
        k, v = (rearrange(to(context), "b n (heads d) -> b heads n d", heads=self.heads)
                for to in (self.to_k, self.to_v))
        out = rearrange(attention(q, k, v), "b heads (f n) d -> (b f) n (heads d)", f=rows // groups)
        return self.to_out(out)


class Gate(torch.autograd.Function):
    """Values and gates (..., 2c) -> values * GELU(gates) (..., c), keeping its input and nothing else.

    Left to autograd, GELU(gates) is kept too, and the gradients of the two halves are copied together."""
    @staticmethod
    def forward(ctx, both):
        ctx.save_for_backward(both)
        x, gate = both.chunk(2, dim=-1)
        return x * F.gelu(gate)

    @staticmethod
    def backward(ctx, gradient):
        """The gradient of values and gates (..., 2c), each half written to its place in one tensor."""
        both, = ctx.saved_tensors
        x, gate = both.chunk(2, dim=-1)
        out = torch.empty_like(both)
        of_x, of_gate = out.chunk(2, dim=-1)
        torch.mul(gradient, F.gelu(gate), out=of_x)
        torch.ops.aten.gelu_backward.grad_input(gradient * x, gate, grad_input=of_gate)
        return out


class GEGLU(nn.Module):
    """A linear layer whose second half gates the first (Shazeer 2002.05202)."""
    def __init__(self, c_in, c_out):
        super().__init__()
        self.proj = Linear(c_in, 2 * c_out)

    def forward(self, x):
        return Gate.apply(self.proj(x))


class FeedForward(nn.Module):
    """c -> 4c -> c on every token, on a CPU in pieces of some frames: see `LARGEST_REUSED`."""
    def __init__(self, channels):
        super().__init__()
        width = 4 * channels
        self.net = nn.Sequential(GEGLU(channels, width), nn.Dropout(0), Linear(width, channels))

    def forward(self, x):
        largest = 8 * x.numel() * x.element_size()                            # values and gates, 4c of each
        pieces = -(-largest // LARGEST_REUSED) if on_cpu(x) else 1
        return self.net(x) if pieces == 1 else torch.cat([self.net(part) for part in x.chunk(pieces)])


class TransformerBlock(nn.Module):
    """Self-attention, attention to the text, feed-forward; each normalised before and added to its input.

    They are made in the order of SD's keys, which is not the order they run in."""
    def __init__(self, channels, heads, context_dim):
        super().__init__()
        self.attn1 = CrossAttention(channels, heads)
        self.ff = FeedForward(channels)
        self.attn2 = CrossAttention(channels, heads, context_dim)
        self.norm1, self.norm2, self.norm3 = (LayerNorm(channels) for _ in range(3))

    def forward(self, x, context):
        x = x + self.attn1(self.norm1(x))
        x = x + self.attn2(self.norm2(x), context)
        return x + self.ff(self.norm3(x))


class SpatialTransformer(nn.Module):
    """Attention between the pixels of one frame, and from them to the text: (b f) c h w -> (b f) c h w."""
    def __init__(self, channels, heads, context_dim):
        super().__init__()
        self.norm = GroupNorm(32, channels, eps=1e-6)
        self.proj_in = Conv2d(channels, channels, 1)
        self.transformer_blocks = nn.ModuleList([TransformerBlock(channels, heads, context_dim)])
        self.proj_out = Conv2d(channels, channels, 1)

    def forward(self, x, context):
        h = x.shape[-2]
        tokens = rearrange(self.proj_in(self.norm(x)), "b c h w -> b (h w) c")
        for block in self.transformer_blocks:
            tokens = block(tokens, context)
        return x + self.proj_out(rearrange(tokens, "b (h w) c -> b c h w", h=h))


class Downsample(nn.Module):
    """Half the size, by a conv of stride 2."""
    def __init__(self, channels):
        super().__init__()
        self.op = Conv2d(channels, channels, 3, stride=2, padding=1)

    def forward(self, x):
        return self.op(x)


class Upsample(nn.Module):
    """Twice the size: nearest neighbour, then a conv. The VAE uses it too."""
    def __init__(self, channels):
        super().__init__()
        self.conv = Conv2d(channels, channels, 3, padding=1)

    def forward(self, x):
        return self.conv(F.interpolate(x, scale_factor=2, mode="nearest"))


# --------------------------------------------------------------------------------------------------- the UNet

class Stage(nn.Module):
    """One numbered entry of SD's input_blocks or output_blocks: its layers, then our temporal attention.

    That stands before an Upsample, so that it works at the resolution its features were made at."""
    def __init__(self, *layers, temporal=None):
        super().__init__()
        for i, layer in enumerate(layers):
            self.add_module(str(i), layer)                # SD numbers the layers of a stage
        self.temporal = temporal
        before_upsample = [layer for layer in layers if not isinstance(layer, Upsample)]
        self.order = (*before_upsample, temporal, *layers[len(before_upsample):])

    def forward(self, x, emb, context, window=None, skip=None):
        if skip is not None:
            x = torch.cat([x, skip], dim=1)      # in here: checkpointing does not keep it twice then
        for layer in self.order:
            if isinstance(layer, ResBlock):
                x = layer(x, emb, window)
            elif isinstance(layer, SpatialTransformer):
                x = layer(x, context)
            elif layer is not self.temporal:
                x = layer(x)
            elif layer is not None and window is not None:
                x = layer(x, window)
        return x


class FrameEmbedding(nn.Module):
    """What the temporal layers are told about each frame: (b, f, e).

    Its own noise level, how far the nearest given frames before and after it are and how noisy they are, its
    place after the first new frame, and the text: a picture does not say where the wind blows. All tokens of
    it, a few numbers each: a mean over 77 tokens would drown the one word that says "left"."""
    def __init__(self, dim, context_dim):
        super().__init__()
        self.token = nn.Linear(context_dim, 8)
        self.text = nn.Linear(8 * TEXT_TOKENS, dim)
        # own level, three distances and two levels of given frames, three flags
        self.mlp = nn.Sequential(nn.Linear(64 + 5 * 32 + 3, dim), nn.SiLU(), nn.Linear(dim, dim))

    def forward(self, t, frames, given, before, after, context):
        known = torch.stack([given, before >= 0, after >= 0], dim=-1).float()             # (b, f, 3)
        at = lambda values, index: values.gather(1, index.clamp(min=0))   # -1 reads frame 0: `known` tells
        first_new = at(frames, (~given).int().argmax(1, keepdim=True))                    # (b, 1)
        places = [frames - at(frames, before), at(frames, after) - frames, frames - first_new]
        parts = [sinusoids(t, 64), *(distance_embedding(place) for place in places)]
        parts += [sinusoids(at(t, index), 32) for index in (before, after)]
        text = self.text(self.token(context).flatten(1))                                  # (b, e)
        features = torch.cat([*parts, known], dim=-1).to(text.dtype)
        return F.silu(self.mlp(features) + text[:, None])


def nearest_given(given):
    """For every frame of a window the indices (b, f, 4) of the given frames that are nearest to it.

    given: (b, f) bool. They are the nearest at or before it, the nearest at or after it, and on either side
    the next one beyond; -1 where there is none. A given frame is its own nearest on both sides."""
    f = given.shape[1]
    index = torch.arange(f, device=given.device).expand_as(given)
    before = torch.where(given, index, -1).cummax(1).values
    after = torch.where(given, index, f).flip(1).cummin(1).values.flip(1)
    earlier = F.pad(before, (1, 0), value=-1).gather(1, before.clamp(min=0))
    later = F.pad(after, (0, 1), value=f).gather(1, (after + 1).clamp(max=f))
    nearest = torch.stack([before, after, earlier, later], dim=-1)
    return torch.where(nearest == f, -1, nearest)


def blend_weights(frames, nodes, known):
    """Weights (b, f, k) of the polynomial through k known frames `nodes` (b, f, k) at `frames` (b, f).

    They are Lagrange's: two nodes make a straight blend, four a cubic. Those not known have weight 0."""
    itself = torch.eye(nodes.shape[-1], dtype=torch.bool, device=nodes.device)
    others = known[..., :, None] & known[..., None, :] & ~itself                         # (b, f, k, k)
    above = (frames[..., None] - nodes)[..., None, :]                                    # (b, f, 1, k)
    below = nodes[..., :, None] - nodes[..., None, :]                                    # (b, f, k, k)
    return torch.where(others, above / torch.where(others, below, 1), 1).prod(-1) * known


class MotionGuess(nn.Module):
    """A guess at each frame: what its nearest given frames show, each moved to where it would be by now.

    For every latent a small network says how fast what is there moves. Times the frames since a given frame,
    that is how far away it was then: speed is learned from short gaps and holds for long ones. The guess is
    a mean over the places around there in both given frames, weighted by how near they lie, in space and in
    time, and as the network sees fit (adaptive convolution, Niklaus et al. 1703.07514), in another light,
    which is one affine map of the channels for the whole frame, plus a correction.

    Between close frames hardly anything moves by a whole latent, and nothing beats the cubic through two
    given frames on either side, which bends smoothly where straight blends meet in a kink. So the guess is a
    mixture of that and of what moved, as the network says per latent. What moved is trained by itself too:
    the mixture soon learns to leave it out, and nothing else would go on to teach it. With the guess comes a
    doubt, the logarithm of its expected error.

    Temporal layers see one pixel at a time and the image model's convolutions are frozen: without this
    nothing that is trained could move a thing farther than one 3x3 conv reaches.

    `reach`: rows and columns to each side that a latent may come from; on a landscape things move sideways.
    What was farther away is cut off there, and teaches no speed. Columns go around: what leaves on one side
    may come back on the other."""
    def __init__(self, emb_dim, width=64, reach=(2, 6)):
        super().__init__()
        self.reach, self.size = reach, tuple(2 * r + 1 for r in reach)
        self.conv_in = nn.Conv2d(9 + 4 + 2, width, 3, padding=1)         # hint, blend, where in the frame
        self.convs = nn.ModuleList([nn.Conv2d(width, width, 3, padding=d, dilation=d) for d in (2, 4)])
        self.emb = nn.Linear(emb_dim, 2 * 3 * width)      # a gain and a shift for each of the three convs
        self.to_speed = zero(nn.Conv2d(width, 2, 3, padding=1))
        self.to_taps = zero(nn.Conv2d(width, 2 * self.size[0] * self.size[1], 3, padding=1))
        self.to_light = zero(nn.Linear(width + emb_dim, 4 * 4 + 4 + 4))
        self.to_rest = zero(nn.Conv2d(width, 3 * 4, 3, padding=1))
        self.sharpness = nn.Parameter(torch.tensor(5.0))
        down, across = (torch.arange(-r, r + 1.0) for r in reach)
        self.register_buffer("offsets", torch.cartesian_prod(down, across), persistent=False)   # (taps, 2)

    def forward(self, window):
        """An `Around` -> guess, what moved, doubt: (b f, 4, h, w) each."""
        n, _, h, w = window.hint.shape
        gains, shifts = rearrange(self.emb(window.emb), "b f (two k c) -> two k (b f) c 1 1", two=2, k=3)
        axes = (torch.linspace(-1, 1, size, device=gains.device) for size in (h, w))
        places = torch.stack(torch.meshgrid(*axes, indexing="ij")).to(gains.dtype).expand(n, 2, h, w)
        seen = torch.cat([window.hint, window.blend, places], dim=1)
        x = F.silu(self.conv_in(seen) * (1 + gains[0]) + shifts[0])
        for conv, gain, shift in zip(self.convs, gains[1:], shifts[1:]):
            x = x + F.silu(conv(x) * (1 + gain) + shift)

        # latents per frame; an output near 1 is the fastest wind of the tiny preset
        speed = 0.05 * rearrange(self.to_speed(x), "n yx h w -> n 1 yx h w")
        limit = self.offsets.amax(0).view(2, 1, 1) + 0.5            # as far as the last place is the nearest
        origin = torch.clamp(-speed * window.since[..., None, None, None], -limit, limit)  # (n, 2, yx, h, w)
        squared = (origin[:, :, None] - self.offsets[..., None, None]).square().sum(3)     # of the distance
        logits = rearrange(self.to_taps(x), "n (side k) h w -> n side k h w", side=2)
        logits = logits - self.sharpness * squared
        logits = logits + window.share.clamp(min=1e-30).log()[..., None, None, None]
        weights = logits.flatten(1, 2).softmax(dim=1)                                      # (n, 2 taps, h, w)

        rows = torch.arange(-self.reach[0], h + self.reach[0], device=x.device).clamp(0, h - 1)
        columns = torch.arange(-self.reach[1], w + self.reach[1], device=x.device) % w
        sides = rearrange(window.hint[:, :8], "n (side c) h w -> (n side) c h w", c=4)
        around = F.unfold(sides[:, :, rows[:, None], columns], self.size)
        around = rearrange(around, "(n side) (c k) (h w) -> n c (side k) h w", n=n, c=4, h=h)
        moved = (around * weights[:, None]).sum(2)                                         # (n, 4, h, w)

        whole = torch.cat([x.mean((2, 3)), window.emb.flatten(0, 1)], dim=1)
        gain, shift, of_frame = self.to_light(whole).split((16, 4, 4), dim=1)
        correction, mixture, doubt = self.to_rest(x).chunk(3, dim=1)
        moved = moved + torch.einsum("nij,njhw->nihw", gain.view(n, 4, 4), moved) + shift[..., None, None]
        moved = moved + correction
        mixture = (mixture + of_frame[..., None, None]).sigmoid()
        return window.blend + mixture * (moved - window.blend), moved, doubt


class UNet(nn.Module):
    """SD1.5's UNet (Rombach et al.) with temporal layers: says the noise in the latents, or v, per frame.

    On top of the temporal layers come two paths for the given frames, both closed to begin with.
    `temporal_guess` moves and blends the nearest given frames before and after a frame. `temporal_hint`, at
    the entrance, shows every frame these two and the guess. `temporal_trust`, at the exit, says how far to go
    by the guess; `diffusion.lean_on` turns that into the answer, and the network only has to learn what is
    left."""
    def __init__(self, config):
        super().__init__()
        c, widths, emb = config, config.widths, config.emb_dim
        self.checkpoint_every = 0     # recompute every so-manieth stage in the backward pass; 0: none
        self.factor = 2 ** (len(widths) - 1)              # sizes are halved so often, and must come out even
        self.time_embed = nn.Sequential(Linear(widths[0], emb), nn.SiLU(), Linear(emb, emb))

        def stage(c_in, c_out, attend, *more):
            """ResBlock, spatial attention if this level has it, what else is given, temporal attention."""
            layers = [ResBlock(c_in, c_out, emb)]
            if attend:
                layers.append(SpatialTransformer(c_out, c.heads, c.text_width))
            return Stage(*layers, *more, temporal=TemporalAttention(c_out, c.heads, c.temporal_emb_dim))

        self.input_blocks = nn.ModuleList([Stage(Conv2d(c.in_channels, widths[0], 3, padding=1))])
        ch, skips = widths[0], [widths[0]]
        for level, width in enumerate(widths):
            for _ in range(c.res_blocks):
                self.input_blocks.append(stage(ch, width, level in c.attention_levels))
                ch = width
                skips.append(ch)
            if level < len(widths) - 1:
                self.input_blocks.append(Stage(Downsample(ch)))
                skips.append(ch)

        self.middle_block = Stage(
            ResBlock(ch, ch, emb), SpatialTransformer(ch, c.heads, c.text_width), ResBlock(ch, ch, emb),
            temporal=TemporalAttention(ch, c.heads, c.temporal_emb_dim))

        self.output_blocks = nn.ModuleList()
        for level, width in reversed(list(enumerate(widths))):
            for i in range(c.res_blocks + 1):
                up = [Upsample(width)] if level > 0 and i == c.res_blocks else []
                self.output_blocks.append(stage(ch + skips.pop(), width, level in c.attention_levels, *up))
                ch = width
        self.out = nn.Sequential(GroupNorm(32, ch), nn.SiLU(), Conv2d(ch, 4, 3, padding=1))

        self.temporal_embed = FrameEmbedding(c.temporal_emb_dim, c.text_width)
        self.temporal_hint = zero(nn.Conv2d(3 * 4 + 1, widths[0], 3, padding=1))
        self.temporal_guess = MotionGuess(c.temporal_emb_dim)
        self.temporal_trust = zero(nn.Linear(c.temporal_emb_dim, 2 * 4))
        self.schedule = NoiseSchedule(c.prediction, c.zero_terminal_snr)

    def forward(self, x, t, context, frames=None, given=None, temporal=True, with_guess=False,
                clips=None):
        """Returns eps or v, in the shape of x with 4 channels; temporal=False, or one frame, is plain SD.

        x: latents (b, c, f, h, w), or (b, c, h, w) for pictures. t: noise levels (b, f), or (b,).
        context: text (b, 77, d). frames: absolute frame indices (b, f), default 0, 1, 2 ...
        given: (b, f) bool, the frames that are known, default none.
        with_guess: return the guess and what moved, (b, 4, f, h, w) each, beside it, for training.
        clips: for a limited scope of attention, and where several processes share the window: then all the
        others are about the frames of this one, and frames and given must be there."""
        if with_guess and (x.dim() == 4 or x.shape[2] < 2 or not temporal):
            raise ValueError(f"latents {tuple(x.shape)} with temporal={temporal} have no neighbours to guess "
                             f"from: give 2 frames or more, or with_guess=False")
        if x.dim() == 4:
            return self(x[:, :, None], t[:, None], context)[:, :, 0]
        b, c, f, h, w = x.shape
        if t.shape != (b, f):
            raise ValueError(f"the UNet got noise levels t of shape {tuple(t.shape)} for latents "
                             f"{tuple(x.shape)}; it needs one level per frame, shape {(b, f)}")
        if h % self.factor or w % self.factor:
            raise ValueError(f"the UNet got latents of {h}x{w}; height and width must be multiples of "
                             f"{self.factor}: resize the pictures")
        window, clips = None, clips or SharedWindow([f])
        if temporal and clips.total > 1:
            window = self.look_around(x, t, context, frames, given, clips)
        out, *guesses = self.decode(x, t, context, window, *self.encode(x, t, context, window))
        return (out, *guesses) if with_guess else out

    def encode(self, x, t, context, window):
        """The first half, down to the middle: hidden, emb, what is guessed (None without a window), *skips.

        These tensors are all that the second half needs of it: the two may stand on different devices."""
        guess, moved, doubt = (None,) * 3 if window is None else self.temporal_guess(window)
        emb = sinusoids(t.flatten(), self.time_embed[0].in_features).to(x.dtype)
        emb = self.time_embed(emb)                                                        # (b f, emb)
        skips, hidden = [], rearrange(x, "b c f h w -> (b f) c h w")
        for i, stage in enumerate(self.input_blocks):
            hidden = self.run(i, stage, hidden, emb, context, window)
            if i == 0 and window is not None:
                hidden = hidden + self.temporal_hint(torch.cat([window.hint, guess], dim=1))
            skips.append(hidden)
        hidden = self.run(0, self.middle_block, hidden, emb, context, window)
        return hidden, emb, guess, moved, doubt, *skips

    def decode(self, x, t, context, window, hidden, emb, guess, moved, doubt, *skips):
        """The second half, back up: the answer, the guess and what moved (None without a window), like x."""
        skips = list(skips)
        for i, stage in enumerate(self.output_blocks):
            hidden = self.run(i, stage, hidden, emb, context, window, skips.pop())
        video = lambda images: rearrange(images, "(b f) c h w -> b c f h w", b=len(x))
        out = video(self.out(hidden))
        if window is None:
            return out, None, None
        of_frames = self.temporal_trust(window.emb.flatten(0, 1))[..., None, None]         # (b f, 8, 1, 1)
        trust, frame_doubt = of_frames.chunk(2, dim=1)
        trust = trust.tanh()    # full trust is easily said exactly: what differs per frame flickers
        e = (doubt + frame_doubt).clamp(-6, 1).exp()
        out = lean_on(self.schedule.to(x.device), out, x[:, :4], t, video(trust * guess), video(e))
        return out, video(guess), video(moved)

    def stages(self):
        """All stages, in the order they run."""
        return [*self.input_blocks, self.middle_block, *self.output_blocks]

    def look_around(self, x, t, context, frames, given, clips=None):
        """The `Around` of a window: what its temporal layers and the paths for given frames work with.

        Numbers of every frame are small: each process knows those of the whole window. Of the latents it
        gets those of the given frames that are nearest to its own."""
        b, c, f, h, w = x.shape
        clips = clips or SharedWindow([f])
        frames = torch.arange(f, device=x.device).expand(b, f) if frames is None else frames
        given = torch.zeros(b, f, dtype=torch.bool, device=x.device) if given is None else given
        everything = [range(clips.total)] * len(clips.clips)
        t, moment, given = (clips.fetch(numbers, everything, dim=1) for numbers in (t, frames, given))
        nearest = nearest_given(given)                                                    # (b, total, 4)
        emb = self.temporal_embed(t, moment, given, *nearest[..., :2].unbind(-1), context)

        latents, place = x[:, :4], nearest[:, clips.here].clamp(min=0)                    # where they are
        if len(clips.clips) > 1:
            wanted = [nearest[:, clip.start:clip.stop].clamp(min=0).unique() for clip in clips.clips]
            latents = clips.fetch(latents, [places.tolist() for places in wanted], dim=2)
            place = torch.searchsorted(wanted[clips.rank], place)

        halo, seen = (places[clips.rank] for places in (clips.halo, clips.seen))
        gap = moment[:, halo.start:halo.stop].diff(dim=1)
        distance = frames[:, :, None] - moment[:, None, :]
        if len(seen) < clips.total:
            distance = distance[..., seen]
        nearest, given, emb = (values[:, clips.here] for values in (nearest, given, emb))   # of these frames
        spread = lambda values: values[:, None, :, None, None].to(x.dtype)                # (b, 1, f, 1, 1)
        at = lambda index: index[:, None, :, None, None].expand(b, 4, f, h, w)
        near = [latents.gather(2, at(index)) * spread(exists)
                for index, exists in zip(place.unbind(-1), (nearest >= 0).unbind(-1))]
        hint = torch.cat([*near[:2], spread(given).expand(b, 1, f, h, w)], dim=1)

        moments, known = moment.gather(1, nearest.clamp(min=0).flatten(1)).view(b, f, 4), nearest >= 0
        since = torch.where(known[..., :2], frames[..., None] - moments[..., :2], 0)
        known[..., 1] &= ~given                                # a given frame is one node, not two
        known[..., 2:] &= known[..., :2].all(-1, keepdim=True)                # between frames, never beyond
        share = blend_weights(frames, moments[..., :2], known[..., :2])
        cubic = blend_weights(frames, moments, known)
        blend = sum(latents * spread(weight) for latents, weight in zip(near, cubic.unbind(-1)))

        images = lambda video: rearrange(video, "b c f h w -> (b f) c h w")
        rows = lambda pairs: pairs.flatten(0, 1).to(x.dtype)
        return Around(b, f, clips, gap.to(x.dtype), distance, emb, images(hint), rows(since), rows(share),
                      images(blend))

    def run(self, i, stage, *inputs):
        """One stage, recomputed in the backward pass instead of stored if it is the turn of stage i.

        The older, re-entrant checkpointing trains nothing, in silence, when the input needs no gradient."""
        if self.training and self.checkpoint_every and i % self.checkpoint_every == 0:
            return checkpoint(stage, *inputs, use_reentrant=False)
        return stage(*inputs)


def is_temporal(name):
    """Does a parameter of the UNet belong to what the video stages train? All others are the image model."""
    return "temporal" in name


# ------------------------------------------------------------------------------------ training in less memory

def to_8bit(x, dims):
    """x as integers from -127 to 127, and the scale to multiply them by, one for all numbers along `dims`.

    The scale has the type of x, but divides in float32: in bfloat16, with 8 bits for a number, the largest
    often came out as 128, which in eight bits with a sign is -128."""
    scale = (x.abs().amax(dims, keepdim=True).float() / 127).clamp(min=1e-7).to(x.dtype)
    return (x / scale.float()).round_().clamp_(-127, 127).to(torch.int8), scale


class EightBit(nn.Module):
    """A weight as 8-bit integers with a scale per output channel, unpacked whenever a layer asks for it."""
    def right_inverse(self, weight):
        """What torch stores in place of the weight."""
        return to_8bit(weight, tuple(range(1, weight.dim())))

    def forward(self, whole, scale):
        return whole * scale


def save_memory(unet, again=False, lean=False, eight_bit=False):
    """Let the UNet keep less for the backward pass, and its frozen layers be smaller; returns it.

    again: run norms and SiLU of the image model twice. lean: frozen layers keep nothing; costs no time.
    eight_bit: frozen weights take a byte per number; they are unpacked for every use, backward pass too."""
    for module in list(unet.modules()):
        if isinstance(module, ResBlock):
            module.again = again
        if isinstance(module, (Conv2d, Linear)) and not module.weight.requires_grad:
            module.lean = lean or eight_bit
            if eight_bit:
                parametrize.register_parametrization(module, "weight", EightBit())
    return unet


def add_lora(unet, rank):
    """Give every projection of the spatial attentions a trainable bypass of a low rank, zero at the start.

    W x + up(down(x)) (Hu et al. 2106.09685, 4.1). Returns the layers by the names of their weights."""
    layers = {f"{name}.weight": module for name, module in unet.named_modules()
              if isinstance(module, Linear) and name.split(".")[-1 - name.endswith(".0")].startswith("to_")}
    for layer in layers.values():
        there = layer.weight.device
        down = nn.Linear(layer.in_features, rank, bias=False, device=there)
        layer.lora = nn.Sequential(down, zero(nn.Linear(rank, layer.out_features, bias=False, device=there)))
    return layers


def keep_activations(eight_bit, home, dtype):
    """A context: what the forward pass keeps for the backward pass, it keeps smaller, or elsewhere.

    eight_bit: numbers of type `dtype` as 8-bit integers with a scale per row; what is float32 in a run in
    half precision has a reason, so it stays. home: the device to wait on, the CPU say, or None. Weights and
    small tensors stay as they are."""
    def pack(x):
        """A tensor for the backward pass -> what is kept of it, its scale and the device it came from."""
        if isinstance(x, nn.Parameter) or x.numel() < 2 ** 12:
            return x, None, None
        device, scale = x.device, None
        if eight_bit and x.dtype == dtype and x.dim() > 2 and x.shape[-1] > 3:        # 3: a kernel of a conv
            x, scale = to_8bit(x, -1)
        return (x if home is None else x.to(home)), scale, device

    def unpack(kept):
        """The tensor again, where it was."""
        x, scale, device = kept
        x = x if device is None else x.to(device)
        return x if scale is None else x * scale

    return torch.autograd.graph.saved_tensors_hooks(pack, unpack)


# ---------------------------------------------------------------------------------------------------- the VAE

class VAEResBlock(nn.Module):
    """The ResBlock of the VAE: no noise level, its own names, and GroupNorm with eps 1e-6."""
    def __init__(self, c_in, c_out, groups):
        super().__init__()
        self.norm1, self.conv1 = nn.GroupNorm(groups, c_in, eps=1e-6), nn.Conv2d(c_in, c_out, 3, padding=1)
        self.norm2, self.conv2 = nn.GroupNorm(groups, c_out, eps=1e-6), nn.Conv2d(c_out, c_out, 3, padding=1)
        if c_in != c_out:
            self.nin_shortcut = nn.Conv2d(c_in, c_out, 1)

    def forward(self, x):
        hidden = self.conv1(F.silu(self.norm1(x)))
        hidden = self.conv2(F.silu(self.norm2(hidden)))
        return hidden + (self.nin_shortcut(x) if hasattr(self, "nin_shortcut") else x)


class VAEAttention(nn.Module):
    """Attention with one head between all pixels of a frame, as 1x1 convs."""
    def __init__(self, channels, groups):
        super().__init__()
        self.norm = nn.GroupNorm(groups, channels, eps=1e-6)
        self.q, self.k, self.v, self.proj_out = (nn.Conv2d(channels, channels, 1) for _ in range(4))

    def forward(self, x):
        hidden = self.norm(x)
        q, k, v = (rearrange(to(hidden), "b c h w -> b 1 (h w) c") for to in (self.q, self.k, self.v))
        return x + self.proj_out(rearrange(attention(q, k, v), "b 1 (h w) c -> b c h w", h=x.shape[-2]))


class VAEDownsample(nn.Module):
    """Half the size. SD pads only on the right and at the bottom here."""
    def __init__(self, channels):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x):
        return self.conv(F.pad(x, (0, 1, 0, 1)))


def vae_middle(channels, groups):
    """Block, attention, block at the smallest size, under SD's names."""
    return nn.ModuleDict({"block_1": VAEResBlock(channels, channels, groups),
                          "attn_1": VAEAttention(channels, groups),
                          "block_2": VAEResBlock(channels, channels, groups)})


class Encoder(nn.Module):
    """Pictures (n, 3 patch², H/patch, W/patch) -> mean, log-variance (n, 8, h, w) before quant_conv."""
    def __init__(self, config):
        super().__init__()
        widths, groups = config.vae_widths, config.vae_groups
        ch, res_blocks = widths[0], config.vae_res_blocks
        self.conv_in = nn.Conv2d(3 * config.vae_patch ** 2, ch, 3, padding=1)
        self.down = nn.ModuleList()
        for level, width in enumerate(widths):
            blocks = [VAEResBlock(ch if i == 0 else width, width, groups) for i in range(res_blocks)]
            self.down.append(nn.ModuleDict({"block": nn.ModuleList(blocks)}))
            ch = width
            if level < len(widths) - 1:
                self.down[-1]["downsample"] = VAEDownsample(ch)
        self.mid = vae_middle(ch, groups)
        self.norm_out, self.conv_out = nn.GroupNorm(groups, ch, eps=1e-6), nn.Conv2d(ch, 8, 3, padding=1)

    def forward(self, x):
        x = self.conv_in(x)
        for level in self.down:
            for block in level["block"]:
                x = block(x)
            if "downsample" in level:
                x = level["downsample"](x)
        for layer in self.mid.values():
            x = layer(x)
        return self.conv_out(F.silu(self.norm_out(x)))


class Decoder(nn.Module):
    """Latents (n, 4, h, w) -> pictures (n, 3 patch², H/patch, W/patch)."""
    def __init__(self, config):
        super().__init__()
        widths, groups = config.vae_widths, config.vae_groups
        ch, res_blocks = widths[-1], config.vae_res_blocks + 1
        self.conv_in = nn.Conv2d(4, ch, 3, padding=1)
        self.mid = vae_middle(ch, groups)
        up = []
        for level, width in reversed(list(enumerate(widths))):
            blocks = [VAEResBlock(ch if i == 0 else width, width, groups) for i in range(res_blocks)]
            up.insert(0, nn.ModuleDict({"block": nn.ModuleList(blocks)}))
            ch = width
            if level > 0:
                up[0]["upsample"] = Upsample(ch)
        self.up = nn.ModuleList(up)   # numbered by resolution: the last entry runs first
        self.norm_out = nn.GroupNorm(groups, ch, eps=1e-6)
        self.conv_out = nn.Conv2d(ch, 3 * config.vae_patch ** 2, 3, padding=1)

    def forward(self, z):
        x = self.conv_in(z)
        for layer in self.mid.values():
            x = layer(x)
        for level in reversed(self.up):
            for block in level["block"]:
                x = block(x)
            if "upsample" in level:
                x = level["upsample"](x)
        return self.conv_out(F.silu(self.norm_out(x)))


class VAE(nn.Module):
    """SD's autoencoder (Rombach et al., section 3.1), frame by frame; `encode`, `decode` speak in videos."""
    def __init__(self, config):
        super().__init__()
        self.config = config
        self.encoder, self.decoder = Encoder(config), Decoder(config)
        self.quant_conv, self.post_quant_conv = nn.Conv2d(8, 8, 1), nn.Conv2d(4, 4, 1)

    def moments(self, images):
        """Pictures (n, 3, H, W) in [-1, 1] -> mean, log-variance of unscaled latents, (n, 4, h, w) each."""
        return self.quant_conv(self.encoder(F.pixel_unshuffle(images, self.config.vae_patch))).chunk(2, dim=1)

    def pictures(self, z):
        """Unscaled latents (n, 4, h, w) -> pictures (n, 3, H, W) in about [-1, 1]."""
        return F.pixel_shuffle(self.decoder(self.post_quant_conv(z)), self.config.vae_patch)

    def scaling(self, latents):
        """Mean and deviation of the unscaled latents per channel, shaped to match (b, 4, f, h, w)."""
        return (torch.tensor(v, device=latents.device, dtype=latents.dtype).view(1, 4, 1, 1, 1)
                for v in (self.config.latent_mean, self.config.latent_std))

    def encode(self, video, chunk=16):
        """Video (b, 3, f, H, W) in [-1, 1] -> latents (b, 4, f, h, w) of mean 0 and deviation 1.

        `chunk` frames at a time; the mean, not a sample: the same picture has the same latents every time."""
        factor, (H, W) = self.config.vae_factor, video.shape[-2:]
        if H % factor or W % factor:
            raise ValueError(f"a picture of {H}x{W} pixels cannot be encoded: height and width must be "
                             f"multiples of {factor}; resize it")
        frames = rearrange(video, "b c f H W -> (b f) c H W")
        z = torch.cat([self.moments(part)[0] for part in frames.split(chunk)])
        latents = rearrange(z, "(b f) c h w -> b c f h w", b=video.shape[0])
        mean, std = self.scaling(latents)
        return (latents - mean) / std

    def decode(self, latents, chunk=16):
        """Latents (b, 4, f, h, w) -> video (b, 3, f, H, W) in [-1, 1], `chunk` frames at a time."""
        mean, std = self.scaling(latents)
        z = rearrange(latents * std + mean, "b c f h w -> (b f) c h w")
        frames = torch.cat([self.pictures(part) for part in z.split(chunk)])
        return rearrange(frames, "(b f) c H W -> b c f H W", b=latents.shape[0]).clamp(-1, 1)


# ------------------------------------------------------------------------------------------------------- text

class TextAttention(nn.Module):
    """Causal self-attention with CLIP's names."""
    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (nn.Linear(width, width) for _ in range(4))

    def forward(self, x):
        q, k, v = (rearrange(to(x), "b n (heads d) -> b heads n d", heads=self.heads)
                   for to in (self.q_proj, self.k_proj, self.v_proj))
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out_proj(rearrange(out, "b heads n d -> b n (heads d)"))


class TextLayer(nn.Module):
    """One transformer layer of CLIP: pre-norm, quick GELU x·σ(1.702 x)."""
    def __init__(self, width, heads):
        super().__init__()
        self.self_attn = TextAttention(width, heads)
        self.layer_norm1, self.layer_norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(width, 4 * width), "fc2": nn.Linear(4 * width, width)})

    def forward(self, x):
        x = x + self.self_attn(self.layer_norm1(x))
        hidden = self.mlp["fc1"](self.layer_norm2(x))
        return x + self.mlp["fc2"](hidden * torch.sigmoid(1.702 * hidden))


class TextEncoder(nn.Module):
    """CLIP's text tower (Radford et al.): token ids (b, 77) -> context (b, 77, d), after the final norm."""
    def __init__(self, config):
        super().__init__()
        width = config.text_width
        self.embeddings = nn.ModuleDict({"token_embedding": nn.Embedding(config.vocabulary, width),
                                         "position_embedding": nn.Embedding(TEXT_TOKENS, width)})
        layers = nn.ModuleList([TextLayer(width, config.text_heads) for _ in range(config.text_layers)])
        self.encoder = nn.ModuleDict({"layers": layers})
        self.final_layer_norm = nn.LayerNorm(width)
        for embedding in self.embeddings.values():
            # narrow rows need larger numbers to be told apart from the first step on
            nn.init.normal_(embedding.weight, std=0.02 if width > 256 else 0.3)

    def forward(self, tokens):
        positions = self.embeddings["position_embedding"].weight[:tokens.shape[1]]
        x = self.embeddings["token_embedding"](tokens) + positions
        for layer in self.encoder["layers"]:
            x = layer(x)
        return self.final_layer_norm(x)


@lru_cache
def byte_symbols():
    """A printable character for each of the 256 bytes, in the order of CLIP's vocabulary.

    Printable ones stand for themselves and come first, the others take characters from 256 on."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    symbols = {byte: chr(byte) for byte in printable}
    for i, byte in enumerate(b for b in range(256) if b not in symbols):
        symbols[byte] = chr(256 + i)
    return symbols


def split_words(text):
    """A cleaned text as the list of pieces that byte pairs never cross.

    They are runs of letters, single digits, runs of other signs, and the English ENDINGS."""
    def kind(ch):
        category = unicodedata.category(ch)[0]            # L of letters, N of numbers
        return " " if ch.isspace() else category if category in "LN" else "*"

    words, i = [], 0
    while i < len(text):
        whole = next((s for s in (*SPECIAL_TOKENS, *ENDINGS) if text.startswith(s, i)), None)
        if whole:
            words.append(whole)
        elif kind(text[i]) == "N":
            words.append(text[i])
        else:
            words.append("".join(next(groupby(text[i:], kind))[1]))
        i += len(words[-1])
    return [word for word in words if not word.isspace()]


class Tokenizer:
    """CLIP's byte-pair tokenizer. `merges`: its pairs, best first; without, the plain bytes of tiny."""
    def __init__(self, merges=()):
        symbols = list(byte_symbols().values())
        pairs = [tuple(merge.split()) for merge in merges]
        vocabulary = [*symbols, *(s + "</w>" for s in symbols), *("".join(p) for p in pairs), *SPECIAL_TOKENS]
        self.merges = list(merges)
        self.ids = {symbol: i for i, symbol in enumerate(vocabulary)}
        self.ranks = {pair: i for i, pair in enumerate(pairs)}
        self.start, self.end = (self.ids[token] for token in SPECIAL_TOKENS)

    def pieces(self, word):
        """One word as the symbols left when the best-ranked neighbours have been joined again and again."""
        parts = [byte_symbols()[byte] for byte in word.encode()]
        parts[-1] += "</w>"
        while len(parts) > 1:
            best = min(zip(parts, parts[1:]), key=lambda pair: self.ranks.get(pair, math.inf))
            if best not in self.ranks:
                break
            joined, i = [], 0
            while i < len(parts):
                two = tuple(parts[i:i + 2]) == best
                joined.append("".join(parts[i:i + 1 + two]))
                i += 1 + two
            parts = joined
        return parts

    def encode(self, text):
        """The ids of a text, with start and end token, cut so that the end token still fits."""
        text = " ".join(html.unescape(html.unescape(text)).split()).lower()
        ids = [self.ids[piece] for word in split_words(text)
               for piece in ([word] if word in SPECIAL_TOKENS else self.pieces(word))]
        return [self.start, *ids[:TEXT_TOKENS - 2], self.end]

    def __call__(self, texts):
        """Texts -> ids (n, 77), padded with the end token as SD1.x has it."""
        rows = [self.encode(text) for text in texts]
        return torch.tensor([row + [self.end] * (TEXT_TOKENS - len(row)) for row in rows])


# ---------------------------------------------------------------------------- all of it together, and on disk

PREFIXES = {"unet": "model.diffusion_model.", "vae": "first_stage_model.",
            "text": "cond_stage_model.transformer.text_model."}   # as in SD's own single file


@dataclass
class Model:
    """The three networks of a preset and their tokenizer. `about`: what the weights file says of itself."""

    config: Config
    unet: UNet
    vae: VAE
    text: TextEncoder
    tokenizer: Tokenizer
    about: dict = field(default_factory=dict)

    @classmethod
    def build(cls, config, merges=()):
        """A model with fresh random weights."""
        return cls(config, UNet(config), VAE(config), TextEncoder(config), Tokenizer(merges))

    def networks(self):
        """The three networks by name."""
        return {"unet": self.unet, "vae": self.vae, "text": self.text}

    def to(self, device, parts=("unet", "vae", "text")):
        """Move networks; returns self. The UNet's convs are faster with the channels last in memory."""
        for part in parts:
            self.networks()[part].to(device)
        self.unet.to(memory_format=torch.channels_last)
        return self

    def context(self, prompts):
        """Text embeddings of a list of prompts: (n, 77, d)."""
        return self.text(self.tokenizer(prompts).to(next(self.text.parameters()).device))

    def set_latent_scaling(self, mean, std):
        """Take over the mean and deviation of the latents, measured when the VAE had been trained."""
        self.config = replace(self.config, latent_mean=tuple(mean), latent_std=tuple(std))
        self.vae.config = self.config


def choose_device(name=None):
    """The torch device to run on, and why."""
    if name:
        return torch.device(name), "as --device says"
    if torch.cuda.is_available():
        return torch.device("cuda"), torch.cuda.get_device_name()
    if torch.backends.mps.is_available():
        return torch.device("mps"), "Apple GPU"
    return torch.device("cpu"), f"no GPU found; {torch.get_num_threads()} threads"


def processes(backend="gloo"):
    """(rank, world): which process this is, of how many. torchrun starts them; without it (0, 1).

    backend: gloo carries tensors between CPUs, nccl between GPUs; there each process has a GPU of its own."""
    if "RANK" not in os.environ:
        return 0, 1
    rank, world, local = (int(os.environ[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
    if int(os.environ["LOCAL_WORLD_SIZE"]) != world:
        raise ValueError(f"{world} processes on several machines, which share no folder: start them on one, "
                         "with torchrun --standalone")
    if torch.cuda.is_available():
        torch.cuda.set_device(local % torch.cuda.device_count())
    dist.init_process_group(backend, timeout=timedelta(days=1))   # a video, or latents, may take so long
    if rank > 0:
        sys.stdout = open(os.devnull, "w")   # one process says what happens
    return rank, world


def checksum(tensors, *texts):
    """CRC-32 of tensors, their names and texts: safetensors notices a file cut short, but no flipped bit."""
    total = 0
    for text in texts:
        total = zlib.crc32(text.encode(), total)
    for key, tensor in sorted(tensors.items()):
        total = zlib.crc32(f"{key} {tensor.dtype} {tuple(tensor.shape)}".encode(), total)
        total = zlib.crc32(tensor.reshape(-1).view(torch.uint8).numpy(), total)
    return f"{total:08x}"


def save_weights(path, model, dtype=torch.float16, parts=("unet", "vae", "text"), only=None, **about):
    """Write a model as one safetensors file with SD's key names; `only` filters the UNet's parameter names.

    The file appears under its name when it is complete, never before."""
    tensors = {PREFIXES[part] + name: tensor.detach().to("cpu", dtype).contiguous()
               for part in parts for name, tensor in model.networks()[part].state_dict().items()
               if part != "unet" or only is None or only(name)}
    texts = {"config": json.dumps(asdict(model.config)), "merges": "\n".join(model.tokenizer.merges),
             "about": json.dumps({**model.about, **about})}
    metadata = {"format": "nanovideo", **texts, "checksum": checksum(tensors, *texts.values())}
    save_file(tensors, f"{path}.tmp", metadata=metadata)
    os.chmod(f"{path}.tmp", 0o644)    # safetensors makes files that only their owner can read
    os.replace(f"{path}.tmp", path)


def read_weights(path):
    """The config, merges, description, tensors of a file by `save_weights`. ValueError says what is wrong."""
    if not os.path.exists(path):
        raise ValueError(f"no weights file at {path}: the tiny preset's are assets/tiny.safetensors; for "
                         f"sd15 run convert_sd_weights.py on a Stable Diffusion 1.x checkpoint")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != "nanovideo":
                raise ValueError(f"{path} is a safetensors file, but not one of ours: run "
                                 f"convert_sd_weights.py on a Stable Diffusion 1.x checkpoint first")
            tensors = {key: file.get_tensor(key) for key in file.keys()}
            texts = [metadata[key] for key in ("config", "merges", "about")]
    except (SafetensorError, OSError, KeyError) as error:
        raise ValueError(f"{path} is not a complete safetensors file ({error}): give the weights file that "
                         f"train.py or convert_sd_weights.py wrote") from None
    if metadata.get("checksum", "") not in ("", checksum(tensors, *texts)):       # the first files had none
        raise ValueError(f"{path} is damaged, its checksum is not that of its numbers: copy or make it again")
    fields = {key: tuple(value) if isinstance(value, list) else value
              for key, value in json.loads(metadata["config"]).items()}
    merges = metadata["merges"].split("\n") if metadata["merges"] else []
    return Config(**fields), merges, json.loads(metadata["about"]), tensors


def fill(model, tensors, path, parts=("unet", "vae", "text"), temporal="optional"):
    """Copy tensors into the networks `parts` of a model: every tensor must fit and every parameter be there.

    Temporal layers may all be missing ("optional"), must be there ("required"), or alone count ("only")."""
    wanted = {PREFIXES[part] + name: tensor for part in parts
              for name, tensor in model.networks()[part].state_dict().items()}
    if temporal == "only":
        wanted = {key: tensor for key, tensor in wanted.items() if is_temporal(key)}
        tensors = {key: tensor for key, tensor in tensors.items() if is_temporal(key)}
    elif temporal == "optional" and not any(is_temporal(key) for key in tensors):
        wanted = {key: tensor for key, tensor in wanted.items() if not is_temporal(key)}
    missing, extra = sorted(wanted.keys() - tensors.keys()), sorted(tensors.keys() - wanted.keys())
    shapes = [key for key in wanted.keys() & tensors.keys() if wanted[key].shape != tensors[key].shape]
    for problem, keys in (("lacks", missing), ("has unknown", extra), ("has the wrong shape for", shapes)):
        if keys:
            raise ValueError(f"{path} {problem} {len(keys)} tensors for preset {model.config.name}: "
                             f"{', '.join(keys[:8])}{' ...' if len(keys) > 8 else ''}; "
                             f"give a file of this preset and stage")
    with torch.no_grad():
        for key, tensor in wanted.items():
            tensor.copy_(tensors[key])


def load_weights(path, preset=None):
    """The model in a weights file, float32, on the CPU, in eval mode. ValueError if of another preset."""
    config, merges, about, tensors = read_weights(path)
    if preset is not None and config.name != preset:
        raise ValueError(f"{path} holds weights of preset {config.name}, but --preset is {preset}: give the "
                         f"other file or the other preset")
    if not any(key.startswith(PREFIXES["vae"]) for key in tensors):
        raise ValueError(f"{path} holds only the temporal layers of stage {about.get('stage')}: give it as "
                         f"--stage_weights beside a full weights file")
    model = Model.build(config, merges)
    model.about = about
    fill(model, tensors, path)
    for network in model.networks().values():
        network.eval().requires_grad_(False)
    return model
