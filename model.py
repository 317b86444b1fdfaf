"""The networks: Stable Diffusion 1.5's UNet with temporal layers added, its VAE, text encoder and tokenizer.

Read PseudoConv3d, TemporalAttention, Block and UNet first: they turn an image model into a video model. A
`WindowInfo`, below them, is what they are told about their window. Skip the rest at first.

The image part keeps the module names of SD's checkpoint, so its weights load as they are. Everything new has
"temporal" in its name and starts as the identity: a fresh video model *is* SD, frame by frame.

Shapes: b batch, c channels, f frames of a window, h w of the latents, H W of the picture, d text width.
`t` is the noise level of a frame, 0 (almost clean) to 999 (pure noise). `frames` says where frames are in the
video. `given` frames exist already and are shown to the network; the others are new, and it makes them.
"""
import html
import json
import math
import os
import re
import sys
import unicodedata
import zlib
from collections import Counter, OrderedDict
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from itertools import accumulate, pairwise

import torch
import torch.distributed as dist
import torch.nn.functional as F
from einops import rearrange, repeat
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn
from torch.nn.utils import parametrize
from torch.utils.checkpoint import checkpoint

from diffusion import NoiseSchedule, precondition

TINY_WEIGHTS = os.path.join(os.path.dirname(os.path.abspath(__file__)), "assets", "tiny.safetensors")
TEXT_TOKENS = 77         # length of every prompt, start and end tokens and padding included


@dataclass(frozen=True)
class Config:
    """What defines a set of weights, and is saved with them. The defaults are Stable Diffusion 1.5."""
    name: str = "sd15"
    size: int = 512                          # of a picture, in pixels
    prediction: str = "eps"                  # what the UNet predicts: "eps" or "v"
    zero_terminal_snr: bool = False          # is the last noise level pure noise
    widths: tuple = (320, 640, 1280, 1280)   # UNet channels per resolution level
    res_blocks: int = 2                      # per level
    attention_levels: tuple = (0, 1, 2)      # levels that have spatial attention
    heads: int = 8
    emb_dim: int = 1280                      # width of the noise level embedding
    temporal_emb_dim: int = 512              # width of what the temporal layers are told about a frame
    vae_widths: tuple = (128, 256, 512, 512)
    vae_res_blocks: int = 2
    vae_patch: int = 1                       # pixels folded into channels before the first VAE conv, per axis
    vae_groups: int = 32                     # of the VAE's GroupNorms
    text_width: int = 768                    # also the width of the UNet's cross-attention context
    text_layers: int = 12
    text_heads: int = 12
    vocabulary: int = 49408                  # 256 bytes, 256 that end a word, merges, start and end of text
    in_channels: int = 4
    latent_mean: tuple = (0.0, 0.0, 0.0, 0.0)
    latent_std: tuple = (1 / 0.18215,) * 4   # SD1.x: latents times 0.18215 have a standard deviation near 1

    @property
    def vae_factor(self):
        """How many times smaller than the picture the latents are, along each axis."""
        return self.vae_patch * 2 ** (len(self.vae_widths) - 1)


PRESETS = {
    "sd15": Config(),
    "tiny": Config(
        name="tiny", size=64, prediction="v", zero_terminal_snr=True, widths=(64, 96, 96), res_blocks=1,
        attention_levels=(1, 2), heads=4, emb_dim=128, temporal_emb_dim=128, vae_widths=(48, 64), vae_patch=2,
        vae_res_blocks=1, vae_groups=16, text_width=64, text_layers=2, text_heads=4, vocabulary=514)}


# --- the lesson: time, added to an image model --------------------------------------------------------------
conv3x3 = partial(nn.Conv2d, kernel_size=3, padding=1)


def named(**layers):
    """Layers that run one after the other, under SD's names for them."""
    return nn.Sequential(OrderedDict(layers))


def zero(module):
    """The module with all parameters zero: a path that is closed until training opens it."""
    for parameter in module.parameters():
        nn.init.zeros_(parameter)
    return module


def attention(q, k, v, bias=None):
    """softmax(q kᵀ/√d + bias) v for q, k, v (rows, heads, tokens, d) and bias (rows, heads, q, k) or None."""
    # temporal attention has a row per pixel; a CUDA launch takes at most 65,535 rows x heads
    rows = 65_535 // q.shape[1]
    chunks = zip(*(x.split(rows) for x in (q, k, v, bias) if x is not None))
    return torch.cat([F.scaled_dot_product_attention(*chunk) for chunk in chunks])


def sinusoids(values, dim):
    """Sinusoidal embedding of numbers of any shape: (..., dim). Cosines first, then sines, as in SD."""
    freqs = torch.exp(-math.log(10_000) * torch.arange(dim // 2, device=values.device) / (dim // 2))
    angles = values.float()[..., None] * freqs
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


def distance_embedding(distance):
    """Sinusoids of signed distances in frames, of any shape: (..., 32)."""
    # on a log scale: near frames one by one, far ones roughly; times 10, as the fastest has a period of 2π
    return sinusoids(10 * distance.sign() * distance.abs().log1p(), 32)


class PseudoConv3d(nn.Conv2d):
    """A 3x3 conv in space, then a conv of kernel 3 across frames: (b f) c h w -> (b f) c h w.

    From Make-A-Video (Singer et al. 2209.14792). The second starts as the identity, and is 1x1 in space."""
    def __init__(self, c_in, c_out):
        super().__init__(c_in, c_out, 3, padding=1)
        self.temporal = zero(nn.Conv2d(c_out, 3 * c_out, 1, bias=False))   # taps: frame before, this, after
        self.temporal_falloff = nn.Parameter(torch.full((c_out,), 0.5))

    def forward(self, x, window=None):
        x = super().forward(x)
        if window is None:                                       # a picture: plain Stable Diffusion
            return x
        clips = window.clips                                     # in one process it holds all frames
        wide = clips.fetch(rearrange(x, "(b f) c h w -> b f c h w", b=window.b), clips.halo_places)
        taps = self.temporal(wide.flatten(0, 1))
        before, here, after = rearrange(taps, "(b f) (k c) h w -> k b f c h w", b=window.b, k=3)
        # neighbours in a window may be far apart in the video: g frames away counts g^-falloff
        fade = (window.gap[..., None] ** -self.temporal_falloff)[..., None, None].to(x.dtype)
        from_before = F.pad(before[:, :-1] * fade, (0,) * 6 + (1, 0))
        from_after = F.pad(after[:, 1:] * fade, (0,) * 6 + (0, 1))
        return x + (here + from_before + from_after)[:, clips.in_halo].flatten(0, 1)


class TemporalAttention(nn.Module):
    """Each pixel attends to itself in the other frames of the window: (b f) c h w -> (b f) c h w.

    Identity at the start. An embedding, and a bias by signed distance in frames, tell the frames apart."""
    def __init__(self, channels, heads, emb_dim):
        super().__init__()
        self.heads = heads
        self.norm = nn.LayerNorm(channels)
        self.emb = zero(nn.Linear(emb_dim, channels))
        self.bias = nn.Sequential(nn.Linear(32, 32), nn.SiLU(), zero(nn.Linear(32, heads, bias=False)))
        self.to_qkv = nn.Linear(channels, 3 * channels, bias=False)
        self.to_out = zero(nn.Linear(channels, channels))

    def forward(self, x, window):
        h, clips = x.shape[-2], window.clips
        tokens = rearrange(x, "(b f) c h w -> b f (h w) c", b=window.b)
        tokens = self.norm(tokens) + self.emb(window.emb)[:, :, None]
        qkv = self.to_qkv(clips.fetch(tokens, clips.seen_places))    # half as much to send as keys and values
        q, k, v = rearrange(qkv, "b f n (k heads d) -> k (b n) heads f d", k=3, heads=self.heads)
        q = q[:, :, clips.in_seen]
        bias = self.bias(distance_embedding(window.distance).to(x.dtype))             # (b, f, f, heads)
        if clips.mask is not None:
            bias = bias + clips.mask[..., None].to(bias)
        bias = repeat(bias, "b i j heads -> (b n) heads i j", n=tokens.shape[2]).to(q.dtype)
        out = rearrange(attention(q, k, v, bias), "(b n) heads f d -> b f n (heads d)", b=window.b)
        return x + rearrange(self.to_out(out), "b f (h w) c -> (b f) c h w", h=h)


class Block(nn.Sequential):
    """One numbered entry of SD's input_blocks or output_blocks: SD's layers, and our temporal attention."""
    def forward(self, x, emb, context, window=None, skip=None):
        if skip is not None:
            x = torch.cat([x, skip], dim=1)          # in here, so that checkpointing does not keep it twice
        for layer in self:
            if isinstance(layer, ResBlock):
                x = layer(x, emb, window)
            elif isinstance(layer, SpatialTransformer):
                x = layer(x, context)
            elif isinstance(layer, TemporalAttention):
                x = x if window is None else layer(x, window)
            else:
                x = layer(x)
        return x


class UNet(nn.Module):
    """SD1.5's UNet (2112.10752) with temporal layers: predicts eps or v of every frame of a window.

    Every frame has its own noise level (Diffusion Forcing, 2407.01392). `temporal_hint` shows each frame the
    given frames nearest to it, and what `temporal_prior` guesses from them. The output is preconditioned on
    this guess, so the network only has to learn what is left. Both start closed; the prior has a loss too."""
    def __init__(self, config):
        super().__init__()
        c, widths, emb = config, config.widths, config.emb_dim
        self.checkpoint_every = 0     # recompute every K-th block in the backward pass; 0: none
        self.factor = 2 ** (len(widths) - 1)      # latents are halved this often, and must come out even
        self.time_embed = nn.Sequential(nn.Linear(widths[0], emb), nn.SiLU(), nn.Linear(emb, emb))

        def block(c_in, c_out, attend, up=None):
            layers = Block(ResBlock(c_in, c_out, emb))
            if attend:
                layers.append(SpatialTransformer(c_out, c.heads, c.text_width))
            layers.temporal = TemporalAttention(c_out, c.heads, c.temporal_emb_dim)
            if up is not None:
                layers.add_module(str(len(layers) - 1), up)     # SD's number: it does not count ours
            return layers

        self.input_blocks = nn.ModuleList([Block(conv3x3(c.in_channels, widths[0]))])
        ch, skips = widths[0], [widths[0]]
        for level, width in enumerate(widths):
            for _ in range(c.res_blocks):
                self.input_blocks.append(block(ch, width, level in c.attention_levels))
                ch = width
                skips.append(ch)
            if level < len(widths) - 1:
                self.input_blocks.append(Block(named(op=conv3x3(ch, ch, stride=2))))      # half the size
                skips.append(ch)

        self.middle_block = Block(
            ResBlock(ch, ch, emb), SpatialTransformer(ch, c.heads, c.text_width), ResBlock(ch, ch, emb))
        self.middle_block.temporal = TemporalAttention(ch, c.heads, c.temporal_emb_dim)

        self.output_blocks = nn.ModuleList()
        for level, width in reversed(list(enumerate(widths))):
            for i in range(c.res_blocks + 1):
                up = upsample(width) if level > 0 and i == c.res_blocks else None
                self.output_blocks.append(block(ch + skips.pop(), width, level in c.attention_levels, up))
                ch = width
        self.out = nn.Sequential(nn.GroupNorm(32, ch), nn.SiLU(), conv3x3(ch, 4))

        self.temporal_embed = FrameEmbedding(c.temporal_emb_dim, c.text_width)
        self.temporal_hint = zero(conv3x3(3 * 4 + 1, widths[0]))
        self.temporal_prior = FlowPrior(c.temporal_emb_dim)
        self.temporal_gate = zero(nn.Linear(c.temporal_emb_dim, 2 * 4))
        self.schedule = NoiseSchedule(c.prediction, c.zero_terminal_snr)

    def forward(self, x, t, context, frames=None, given=None, prompt_start=None, temporal=True,
                with_prior=False, clips=None):
        """Returns eps or v, in the shape of x with 4 channels. One frame, or temporal=False, is plain SD.

        x        latents (b, c, f, h, w)
        t        noise levels (b, f)
        context  text embeddings (b, 77, d)
        frames   frame numbers (b, f), of which only differences matter; default 0, 1, 2 ...
        given    (b, f) bool: which frames are given, default none
        prompt_start  (b,) the frame at which this prompt took over from another, default -inf: none did
        with_prior  return the prior too, in the same shape (None for one frame): it has a loss of its own
        clips    a `ClipParallel`, if processes share a window; x, t, frames and given are this process's"""
        b, _, f, h, w = x.shape
        if t.shape != (b, f) or h % self.factor or w % self.factor:
            raise ValueError(f"the UNet got x of {tuple(x.shape)} and t of {tuple(t.shape)}: h and w must be "
                             f"multiples of {self.factor}, and t one level per frame, {(b, f)}")
        window = None
        if temporal and (clips.total if clips else f) > 1:
            window = look_around(self.temporal_embed, x, t, context, frames, given, prompt_start, clips)
        output, prior = self.second_half(x, t, context, window, *self.first_half(x, t, context, window))
        return (output, prior) if with_prior else output

    def first_half(self, x, t, context, window):
        """Down to the middle. Returns all that the second half needs: it may run on another device."""
        prior, log_std = (None, None) if window is None else self.temporal_prior(window)
        emb = self.time_embed(sinusoids(t.flatten(), self.time_embed[0].in_features).to(x.dtype))
        skips, hidden = [], rearrange(x, "b c f h w -> (b f) c h w")
        for i, block in enumerate(self.input_blocks):
            hidden = self.run(i, block, hidden, emb, context, window)
            if i == 0 and window is not None:
                hidden = hidden + self.temporal_hint(torch.cat([window.hint, prior], dim=1))
            skips.append(hidden)
        hidden = self.run(0, self.middle_block, hidden, emb, context, window)
        return hidden, emb, prior, log_std, *skips

    def second_half(self, x, t, context, window, hidden, emb, prior, log_std, *skips):
        """Back up: the output, and the prior (None without a window), like x."""
        for i, (block, skip) in enumerate(zip(self.output_blocks, reversed(skips))):
            hidden = self.run(i, block, hidden, emb, context, window, skip)
        video = lambda images: rearrange(images, "(b f) c h w -> b c f h w", b=len(x))
        output = video(self.out(hidden))
        if window is None:
            return output, None
        gate, frame_log_std = self.temporal_gate(window.emb.flatten(0, 1))[..., None, None].chunk(2, dim=1)
        gate = gate.tanh()                # saturates near 1: a gate that wavers makes the video flicker
        # fresh, the gate is 0 and std 1: then precondition returns the output as it is
        mean, std = video(gate * prior), video((log_std + frame_log_std).clamp(-6, 1).exp())
        return precondition(self.schedule, output, x[:, :4], t, mean, std), video(prior)

    def run(self, i, block, *inputs):
        """Run a block; if it is every K-th, the backward pass recomputes it instead of keeping it."""
        if not self.training or not self.checkpoint_every or i % self.checkpoint_every:
            return block(*inputs)
        # re-entrant checkpointing would train nothing, silently, when its input needs no gradient
        return checkpoint(block, *inputs, use_reentrant=False)


def is_temporal(name):
    """Does a parameter of the UNet belong to what the video stages train? All others are the image model."""
    return "temporal" in name


# --- what the temporal layers are told about their window, and the prior ------------------------------------
@dataclass
class WindowInfo:
    """What temporal layers know about their window. Gaps and distances are in frames of the video."""
    b: int
    clips: object            # a `ClipParallel`: which frames this process has. Fetching: those of others
    gap: torch.Tensor        # (b, f-1) from each frame to the next
    distance: torch.Tensor   # (b, f, f) signed distance of every frame from every other
    emb: torch.Tensor        # (b, f, e) what each frame is told about itself
    hint: torch.Tensor       # (b f, 9, h, w) nearest given latents before and after; is it given itself
    since: torch.Tensor      # (b f, 2) frames since the given one before (>= 0) and the one after (<= 0)
    share: torch.Tensor      # (b f, 2) weight of each of the two in a linear blend; 0 where there is none
    blend: torch.Tensor      # (b f, 4, h, w) polynomial through up to two given frames on either side


class FrameEmbedding(nn.Module):
    """What temporal layers are told about each frame, (b, f, e): its noise level; how far and how noisy the
    nearest given frames are; how far the first new frame is; how long its prompt has held; and a few numbers
    per token of the text, as a mean over all tokens would drown the one word that matters."""
    def __init__(self, dim, context_dim):
        super().__init__()
        self.token = nn.Linear(context_dim, 8)
        self.text = nn.Linear(8 * TEXT_TOKENS, dim)
        # own level, four distances and two levels of given frames, three flags
        self.mlp = nn.Sequential(nn.Linear(64 + 6 * 32 + 3, dim), nn.SiLU(), nn.Linear(dim, dim))

    def forward(self, t, frames, given, before, after, context, prompt_start):
        known = torch.stack([given, before >= 0, after >= 0], dim=-1).float()             # (b, f, 3)
        at = lambda values, index: values.gather(1, index.clamp(min=0))   # -1 reads frame 0: `known` tells
        first_new = at(frames, (~given).int().argmax(1, keepdim=True))                    # (b, 1)
        # "night" beside bright frames: a new prompt, or one that has held since the night before?
        held = (frames - prompt_start[:, None]).clamp(-64, 64)     # by then the video has had time to follow
        places = [frames - at(frames, before), at(frames, after) - frames, frames - first_new, held]
        parts = [sinusoids(t, 64), *map(distance_embedding, places)]
        parts += [sinusoids(at(t, before), 32), sinusoids(at(t, after), 32), known]
        text = self.text(self.token(context).flatten(1))                                  # (b, e)
        features = torch.cat(parts, dim=-1).to(text.dtype)
        return F.silu(self.mlp(features) + text[:, None])


def nearest_given(given):
    """For every frame of a window, the places (b, f, 4) of the given frames (b, f) bool around it: nearest at
    or before it, nearest at or after it, the next beyond each; -1 where there is none."""
    f = given.shape[1]
    index = torch.arange(f, device=given.device).expand_as(given)
    before = torch.where(given, index, -1).cummax(1).values
    after = torch.where(given, index, f).flip(1).cummin(1).values.flip(1)
    earlier = F.pad(before, (1, 0), value=-1).gather(1, before.clamp(min=0))
    later = F.pad(after, (0, 1), value=f).gather(1, (after + 1).clamp(max=f))
    nearest = torch.stack([before, after, earlier, later], dim=-1)
    return torch.where(nearest == f, -1, nearest)


def blend_weights(frames, nodes, known):
    """Lagrange weights (b, f, k), at `frames` (b, f), of the polynomial through the known `nodes` (b, f, k).
    Two nodes make a linear blend, four a cubic. Unknown nodes have weight 0."""
    itself = torch.eye(nodes.shape[-1], dtype=torch.bool, device=nodes.device)
    others = known[..., :, None] & known[..., None, :] & ~itself                         # (b, f, k, k)
    above = (frames[..., None] - nodes)[..., None, :]                                    # (b, f, 1, k)
    below = nodes[..., :, None] - nodes[..., None, :]                                    # (b, f, k, k)
    return torch.where(others, above / torch.where(others, below, 1), 1).prod(-1) * known


def look_around(embed, x, t, context, frames=None, given=None, prompt_start=None, clips=None):
    """The `WindowInfo` of a window; embed: a `FrameEmbedding`, the others as for `UNet.forward`."""
    b, _, f, h, w = x.shape
    clips = clips or ClipParallel([f])      # one process has them all; `fetch` then does nothing
    frames = torch.arange(f, device=x.device).expand(b, f) if frames is None else frames
    given = torch.zeros(b, f, dtype=torch.bool, device=x.device) if given is None else given
    prompt_start = torch.full((b,), -math.inf, device=x.device) if prompt_start is None else prompt_start
    mine = rearrange(x[:, :4], "b c f h w -> b f c h w"), t, frames, given
    all_latents, all_t, all_frames, all_given = (clips.fetch(values, clips.all_places) for values in mine)
    nearest = nearest_given(all_given)
    emb = embed(all_t, all_frames, all_given, *nearest[..., :2].unbind(-1), context, prompt_start)
    nearest, emb = nearest[:, clips.here], emb[:, clips.here]

    # the four given frames nearest to each frame: their latents and where they are; zeros where there is none
    known, row, place = nearest >= 0, torch.arange(b, device=x.device)[:, None, None], nearest.clamp(min=0)
    spread = lambda values: values[..., None, None, None].to(x.dtype)
    near = all_latents[row, place] * spread(known)                                        # (b, f, 4, c, h, w)
    nodes = all_frames[row, place]                                                        # (b, f, 4)
    hint = torch.cat([near[:, :, 0], near[:, :, 1], spread(given).expand(b, f, 1, h, w)], dim=2)

    since = torch.where(known[..., :2], frames[..., None] - nodes[..., :2], 0)
    known[..., 1] &= ~given                                 # a given frame is one node, not two
    known[..., 2:] &= known[..., :2].all(-1, keepdim=True)  # outer nodes only between given frames
    share = blend_weights(frames, nodes[..., :2], known[..., :2])
    blend = (near * spread(blend_weights(frames, nodes, known))).sum(2)
    rows = lambda values: values.flatten(0, 1).to(x.dtype)                                # (b f, ...)
    gap = clips.fetch(frames, clips.halo_places).diff(dim=1).to(x.dtype)
    distance = frames[:, :, None] - clips.fetch(frames, clips.seen_places)[:, None, :]
    return WindowInfo(b, clips, gap, distance, emb, rows(hint), rows(since), rows(share), rows(blend))


class FlowPrior(nn.Module):
    """A guess at each frame: the given ones around it, moved along a flow and relit, mixed with their cubic.

    Little else moves things: the image model is frozen, temporal layers look at one pixel at a time. Convs
    say how fast every latent moves; times the distance in frames, that is where it was in a given frame."""
    def __init__(self, emb_dim, width=64):
        super().__init__()
        self.conv_in = conv3x3(9 + 4 + 2, width)                     # hint, blend, place in the picture
        self.convs = nn.ModuleList([nn.Conv2d(width, width, 3, padding=d, dilation=d) for d in (2, 4)])
        self.emb = nn.Linear(emb_dim, 3 * 2 * width)                 # scale and shift for each of the convs
        self.out = zero(conv3x3(width, 2 + 2 + 3 * 4))
        self.light = zero(nn.Linear(width + emb_dim, 4 * 4 + 4))     # an affine map of all latents of a frame

    def forward(self, window):
        """-> the prior, and the logarithm of how wrong it may be; (b f, 4, h, w) each."""
        n, _, h, w = window.hint.shape
        scales, shifts = rearrange(self.emb(window.emb), "b f (two k c) -> two k (b f) c 1 1", two=2, k=3)
        centres = [(torch.arange(size, device=scales.device) + 0.5) * 2 / size - 1 for size in (h, w)]
        y, x = torch.meshgrid(*centres, indexing="ij")               # from -1 to 1, as grid_sample counts
        places = torch.stack([y, x]).to(scales.dtype).expand(n, 2, h, w)
        hidden = self.conv_in(torch.cat([window.hint, window.blend, places], dim=1))
        hidden = F.silu(hidden * (1 + scales[0]) + shifts[0])
        for conv, scale, shift in zip(self.convs, scales[1:], shifts[1:]):
            hidden = hidden + F.silu(conv(hidden) * (1 + scale) + shift)
        velocity, sides, correction, gate, log_std = self.out(hidden).split((2, 2, 4, 4, 4), dim=1)
        sides = (sides + window.share.clamp(min=1e-30).log()[..., None, None]).softmax(dim=1)   # nearer: more
        moved = 0
        for side, latents in enumerate(window.hint[:, :8].chunk(2, dim=1)):
            # velocity is in latents per 16 frames, the stride of keyframes, so that its numbers are near 1
            by = velocity / 16 * window.since[:, side, None, None, None]
            grid = torch.stack([x - by[:, 1] * 2 / w, y - by[:, 0] * 2 / h], dim=-1).to(latents.dtype)
            source = F.grid_sample(latents, grid, padding_mode="border", align_corners=False)
            moved = moved + sides[:, side:side + 1] * source
        whole = torch.cat([hidden.mean((2, 3)), window.emb.flatten(0, 1)], dim=1)
        gain, offset = self.light(whole)[..., None, None].split((16, 4), dim=1)
        warped = moved + (gain.view(n, 4, 4, 1, 1) * moved[:, None]).sum(2) + offset + correction
        return window.blend + gate.sigmoid() * (warped - window.blend), log_std


# --- Stable Diffusion's own blocks --------------------------------------------------------------------------
class ResBlock(nn.Module):
    """Two convs with the noise level added between them. GroupNorm pools within a frame, not over the window.

    SD's GroupNorms have an eps of 1e-5 here and in the UNet's `out`, 1e-6 everywhere else."""
    def __init__(self, c_in, c_out, emb_dim):
        super().__init__()
        self.in_layers = nn.Sequential(nn.GroupNorm(32, c_in), nn.SiLU(), conv3x3(c_in, c_out))
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(emb_dim, c_out))
        self.out_layers = nn.Sequential(
            nn.GroupNorm(32, c_out), nn.SiLU(), nn.Dropout(0), PseudoConv3d(c_out, c_out))
        self.skip_connection = nn.Conv2d(c_in, c_out, 1) if c_in != c_out else nn.Identity()

    def forward(self, x, emb, window=None):
        hidden = self.in_layers(x) + self.emb_layers(emb)[:, :, None, None]
        return self.skip_connection(x) + self.out_layers[3](self.out_layers[:3](hidden), window)


class CrossAttention(nn.Module):
    """Multi-head attention of tokens (rows, n, c) to themselves, or to a text (b, 77, d) per video."""
    def __init__(self, channels, heads, context_dim=None):
        super().__init__()
        self.heads = heads
        self.to_q = nn.Linear(channels, channels, bias=False)
        self.to_k = nn.Linear(context_dim or channels, channels, bias=False)
        self.to_v = nn.Linear(context_dim or channels, channels, bias=False)
        self.to_out = nn.Sequential(nn.Linear(channels, channels), nn.Dropout(0))

    def forward(self, x, context=None):
        context = x if context is None else context
        q, k, v = (rearrange(tokens, "(b f) n (heads d) -> b heads (f n) d", b=len(context), heads=self.heads)
                   for tokens in (self.to_q(x), self.to_k(context), self.to_v(context)))
        out = rearrange(attention(q, k, v), "b heads (f n) d -> (b f) n (heads d)", n=x.shape[1])
        return self.to_out(out)


class SpatialTransformer(nn.Module):
    """Pixels of a frame attend to each other, then to the text: (b f) c h w -> (b f) c h w."""
    def __init__(self, channels, heads, context_dim):
        super().__init__()
        self.norm = nn.GroupNorm(32, channels, eps=1e-6)
        self.proj_in = nn.Conv2d(channels, channels, 1)
        block = {"attn1": CrossAttention(channels, heads)}
        block["ff"] = named(net=nn.Sequential(
            named(proj=nn.Linear(channels, 8 * channels)), nn.Dropout(0), nn.Linear(4 * channels, channels)))
        block["attn2"] = CrossAttention(channels, heads, context_dim)
        block |= {name: nn.LayerNorm(channels) for name in ("norm1", "norm2", "norm3")}
        self.transformer_blocks = nn.ModuleList([nn.ModuleDict(block)])
        self.proj_out = nn.Conv2d(channels, channels, 1)

    def forward(self, x, context):
        block = self.transformer_blocks[0]
        tokens = rearrange(self.proj_in(self.norm(x)), "b c h w -> b (h w) c")
        tokens = tokens + block["attn1"](block["norm1"](tokens))
        tokens = tokens + block["attn2"](block["norm2"](tokens), context)
        project, _, back = block["ff"].net
        hidden, gate = project(block["norm3"](tokens)).chunk(2, dim=-1)
        tokens = tokens + back(hidden * F.gelu(gate))                # GEGLU (Shazeer 2002.05202)
        return x + self.proj_out(rearrange(tokens, "b (h w) c -> b c h w", h=x.shape[-2]))


def upsample(channels):
    """Twice the size: nearest neighbour, then a conv. The VAE uses it too."""
    return named(larger=nn.Upsample(scale_factor=2), conv=conv3x3(channels, channels))


# --- training in less memory --------------------------------------------------------------------------------
def to_8bit(x, dims):
    """x as integers from -127 to 127, and the scale to multiply them by, one for all numbers along `dims`."""
    # divide in float32: in bfloat16 the largest number often comes out as 128, which int8 reads as -128
    scale = (x.abs().amax(dims, keepdim=True).float() / 127).clamp(min=1e-7).to(x.dtype)
    return (x / scale.float()).round_().clamp_(-127, 127).to(torch.int8), scale


class EightBit(nn.Module):
    """A weight as 8-bit integers with a scale per output channel, unpacked whenever a layer asks for it."""
    def right_inverse(self, weight):              # what torch stores in place of the weight
        return to_8bit(weight, tuple(range(1, weight.dim())))

    def forward(self, integers, scale):
        return integers * scale


def store_in_8bit(unet):
    """Store the frozen weights of a UNet in 8 bits. Checkpoint every block, or all are unpacked at once."""
    for module in list(unet.modules()):
        if isinstance(module, (nn.Conv2d, nn.Linear)) and not module.weight.requires_grad:
            parametrize.register_parametrization(module, "weight", EightBit())


def add_lora(unet, rank):
    """Add a low-rank bypass, trainable and zero at the start, to every projection of the spatial attentions:
    W x + up(down(x)) (Hu et al. 2106.09685, 4.1)."""
    for name, layer in list(unet.named_modules()):
        if isinstance(layer, nn.Linear) and ".attn" in name:
            linear = partial(nn.Linear, bias=False, device=layer.weight.device)
            down, up = linear(layer.in_features, rank), zero(linear(rank, layer.out_features))
            layer.lora = nn.Sequential(down, up)
            layer.register_forward_hook(lambda layer, inputs, out: out + layer.lora(*inputs))


def keep_activations(eight_bit, home, dtype):
    """A context: the forward pass keeps what the backward pass needs in 8 bits, or on another device.

    eight_bit: tensors of type `dtype` as integers with a scale per row; a float32 tensor in a half precision
    run has a reason, and stays. home: the device to keep them on, or None. Small tensors stay."""
    def pack(x):
        device, scale = x.device, None
        if isinstance(x, nn.Parameter) or x.numel() < 2 ** 12:
            return x, None, device
        if eight_bit and x.dtype == dtype and x.dim() > 2 and x.shape[-1] > 3:   # not a conv kernel, 3 wide
            x, scale = to_8bit(x, -1)
        return x.to(home or device), scale, device

    def unpack(kept):
        x, scale, device = kept
        return x.to(device) if scale is None else x.to(device) * scale

    return torch.autograd.graph.saved_tensors_hooks(pack, unpack)


# --- several devices, one window: clip parallelism, dual-scope attention (Tan et al. 2406.16260) ------------
class ClipParallel:
    """Processes share a window: each has a part of its frames, a clip, and fetches what it lacks from others.

    lens: how many frames each process has. rank: which process this is. The scope of temporal attention: each
    frame sees the frames up to `radius` places away, and `n_global` spread evenly over the window."""
    def __init__(self, lens, rank=0, radius=math.inf, n_global=0):
        self.rank, self.total = rank, sum(lens)
        self.clips = [range(end - n, end) for n, end in zip(lens, accumulate(lens))]
        self.clip = self.clips[rank]
        everywhere = [round(i * (self.total - 1) / max(1, n_global - 1)) for i in range(n_global)]
        # what each process fetches, as lists of places in the window
        near = lambda radius: [range(max(0, clip.start - radius), min(self.total, clip.stop + radius))
                               for clip in self.clips]
        self.all_places, self.halo_places = near(self.total), near(1)
        self.seen_places = [sorted({*places, *everywhere}) for places in near(min(radius, self.total))]
        own = lambda places: slice(places[rank].index(self.clip[0]), places[rank].index(self.clip[-1]) + 1)
        self.here, self.in_halo = own(self.all_places), own(self.halo_places)
        self.in_seen = own(self.seen_places)
        self.mask = None     # added to the logits of temporal attention
        if radius < self.total - 1:
            queries, keys = torch.tensor(self.clip)[:, None], torch.tensor(self.seen_places[rank])
            in_scope = ((queries - keys).abs() <= radius) | torch.isin(keys, torch.tensor(everywhere))
            self.mask = torch.where(in_scope, 0.0, -math.inf)                             # (f, seen)

    def fetch(self, x, places):
        """The frames x (b, f, ...) of this process -> the frames at those places of the window."""
        if len(self.clips) == 1:
            return x
        # every process knows what all want, and must call this when they do; gloo sends from the CPU
        wanted = [[place - self.clip.start for place in theirs if place in self.clip] for theirs in places]
        sent = x.transpose(0, 1)[sum(wanted, [])].contiguous().cpu()
        counts = [sum(place in clip for place in places[self.rank]) for clip in self.clips]
        received = torch.empty(sum(counts), *sent.shape[1:], dtype=x.dtype)
        dist.all_to_all_single(received, sent, counts, [len(theirs) for theirs in wanted])
        return received.to(x.device).transpose(0, 1)


# --- the VAE ------------------------------------------------------------------------------------------------
class VAEResBlock(nn.Module):
    """The ResBlock of the VAE: no noise level, and names of its own."""
    def __init__(self, c_in, c_out, groups):
        super().__init__()
        self.norm1, self.conv1 = nn.GroupNorm(groups, c_in, eps=1e-6), conv3x3(c_in, c_out)
        self.norm2, self.conv2 = nn.GroupNorm(groups, c_out, eps=1e-6), conv3x3(c_out, c_out)
        self.nin_shortcut = nn.Conv2d(c_in, c_out, 1) if c_in != c_out else nn.Identity()

    def forward(self, x):
        hidden = self.conv1(F.silu(self.norm1(x)))
        return self.nin_shortcut(x) + self.conv2(F.silu(self.norm2(hidden)))


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


class VAE(nn.Module):
    """SD's autoencoder (Rombach et al., section 3.1), frame by frame; `encode` and `decode` take videos."""
    def __init__(self, config):
        super().__init__()
        self.config = config
        widths, groups, n = config.vae_widths, config.vae_groups, config.vae_res_blocks
        first, last, top, pixels = widths[0], widths[-1], len(widths) - 1, 3 * config.vae_patch ** 2
        block = lambda c_in, c_out: VAEResBlock(c_in, c_out, groups)
        blocks = lambda *widths: nn.Sequential(*map(block, widths, widths[1:]))  # from each width to the next
        middle = lambda: named(block_1=block(last, last), attn_1=VAEAttention(last, groups),
                               block_2=block(last, last))
        half = lambda width: named(pad=nn.ZeroPad2d((0, 1, 0, 1)),               # on the right and below only
                                   conv=nn.Conv2d(width, width, 3, stride=2))
        down = lambda i: named(block=blocks(widths[max(i - 1, 0)], *[widths[i]] * n),
                               downsample=half(widths[i]) if i < top else nn.Identity())
        up = lambda i: named(block=blocks(widths[min(i + 1, top)], *[widths[i]] * (n + 1)),
                             upsample=upsample(widths[i]) if i > 0 else nn.Identity())
        self.encoder = named(
            conv_in=conv3x3(pixels, first), down=nn.Sequential(*map(down, range(top + 1))), mid=middle(),
            norm_out=nn.GroupNorm(groups, last, eps=1e-6), silu=nn.SiLU(), conv_out=conv3x3(last, 8))
        self.decoder = named(                                          # level 0, the largest, runs last
            conv_in=conv3x3(4, last), mid=middle(), up=named(**{str(i): up(i) for i in range(top, -1, -1)}),
            norm_out=nn.GroupNorm(groups, first, eps=1e-6), silu=nn.SiLU(), conv_out=conv3x3(first, pixels))
        self.quant_conv, self.post_quant_conv = nn.Conv2d(8, 8, 1), nn.Conv2d(4, 4, 1)

    def moments(self, images):
        """Pictures (n, 3, H, W) in [-1, 1] -> mean, log-variance of unscaled latents, (n, 4, h, w) each."""
        return self.quant_conv(self.encoder(F.pixel_unshuffle(images, self.config.vae_patch))).chunk(2, dim=1)

    def pictures(self, z):
        """Unscaled latents (n, 4, h, w) -> pictures (n, 3, H, W) in about [-1, 1]."""
        return F.pixel_shuffle(self.decoder(self.post_quant_conv(z)), self.config.vae_patch)

    def scaling(self, latents):
        """Mean and deviation of the unscaled latents per channel, shaped to match (b, 4, f, h, w)."""
        return (torch.tensor(values, device=latents.device, dtype=latents.dtype).view(1, 4, 1, 1, 1)
                for values in (self.config.latent_mean, self.config.latent_std))

    def encode(self, video, chunk=16):
        """Video (b, 3, f, H, W) in [-1, 1] -> latents (b, 4, f, h, w) of mean 0, deviation 1; not sampled."""
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


# --- text: CLIP's encoder (Radford et al. 2103.00020) and its byte-pair tokenizer ---------------------------
class TextLayer(nn.Module):
    """One transformer layer of CLIP: pre-norm, causal self-attention, quick GELU x·σ(1.702 x)."""
    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        names = "q_proj", "k_proj", "v_proj", "out_proj"
        self.self_attn = nn.ModuleDict({name: nn.Linear(width, width) for name in names})
        self.layer_norm1, self.layer_norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(width, 4 * width), "fc2": nn.Linear(4 * width, width)})

    def forward(self, x):
        hidden = self.layer_norm1(x)
        q, k, v = (rearrange(self.self_attn[f"{name}_proj"](hidden), "b n (heads d) -> b heads n d",
                             heads=self.heads) for name in "qkv")
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.self_attn["out_proj"](rearrange(out, "b heads n d -> b n (heads d)"))
        hidden = self.mlp["fc1"](self.layer_norm2(x))
        return x + self.mlp["fc2"](hidden * torch.sigmoid(1.702 * hidden))


class TextEncoder(nn.Module):
    """CLIP's text tower: token ids (b, 77) -> context (b, 77, d), after the final norm."""
    def __init__(self, config):
        super().__init__()
        width = config.text_width
        self.embeddings = nn.ModuleDict({"token_embedding": nn.Embedding(config.vocabulary, width),
                                         "position_embedding": nn.Embedding(TEXT_TOKENS, width)})
        layers = (TextLayer(width, config.text_heads) for _ in range(config.text_layers))
        self.encoder = named(layers=nn.Sequential(*layers))
        self.final_layer_norm = nn.LayerNorm(width)
        for embedding in self.embeddings.values():
            # narrow rows need larger numbers to be told apart; no stage trains them
            nn.init.normal_(embedding.weight, std=0.02 if width > 256 else 0.3)

    def forward(self, tokens):
        positions = self.embeddings["position_embedding"].weight[:tokens.shape[1]]
        return self.final_layer_norm(self.encoder(self.embeddings["token_embedding"](tokens) + positions))


class Tokenizer:
    """CLIP's byte-pair tokenizer. `merges`: its pairs, best first. Without any it reads plain bytes."""
    def __init__(self, merges=()):
        # CLIP writes a byte as a character: printable ones as themselves, the others from number 256 on
        printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
        others = [byte for byte in range(256) if byte not in printable]
        self.symbols = dict(zip(printable + others, map(chr, [*printable, *range(256, 512)])))
        symbols, pairs = list(self.symbols.values()), [tuple(merge.split()) for merge in merges]
        vocabulary = [*symbols, *(symbol + "</w>" for symbol in symbols), *map("".join, pairs)]
        self.merges, self.ranks = list(merges), {pair: i for i, pair in enumerate(pairs)}
        self.ids = {symbol: i for i, symbol in enumerate(vocabulary)}
        self.start, self.end = len(vocabulary), len(vocabulary) + 1

    @classmethod
    def learn(cls, texts, most=1000):
        """At most so many merges, to make every word of texts a token: the commonest pair of neighbours
        becomes a symbol, again and again (Sennrich et al. 1508.07909)."""
        tokenizer, words = cls(), {word for text in texts for word in cls.words(text)}
        while len(tokenizer.merges) < most and (
                pairs := Counter(pair for word in words for pair in pairwise(tokenizer.pieces(word)))):
            tokenizer = cls([*tokenizer.merges, " ".join(max(sorted(pairs), key=pairs.get))])
        return tokenizer.merges

    @staticmethod
    def words(text):
        """A text in lower case as a list of words. Digits and signs are words, too."""
        text = html.unescape(html.unescape(text)).lower()
        # numbers, of which \d knows only some, are split into digits; then endings, letters, other signs
        text = "".join(f" {ch} " if unicodedata.category(ch)[0] == "N" else ch for ch in text)
        return re.findall(r"'(?:s|t|re|ve|m|ll|d)|[^\W_]+|(?:[^\w\s]|_)+", text)

    def pieces(self, word):
        """The symbols of one word, after joining its best-ranked neighbours again and again."""
        parts = [self.symbols[byte] for byte in word.encode()]
        parts[-1] += "</w>"
        while known := [pair for pair in pairwise(parts) if pair in self.ranks]:
            i = list(pairwise(parts)).index(min(known, key=self.ranks.get))
            parts[i:i + 2] = [parts[i] + parts[i + 1]]
        return parts

    def __call__(self, texts):
        """Texts -> ids (n, 77): start token, text cut to fit, and the end token to the end, as in SD1.x."""
        rows = []
        for text in texts:
            ids = [self.ids[piece] for word in self.words(text) for piece in self.pieces(word)]
            row = [self.start, *ids[:TEXT_TOKENS - 2]]
            rows.append(row + [self.end] * (TEXT_TOKENS - len(row)))
        return torch.tensor(rows)


# --- all of it together, and on disk ------------------------------------------------------------------------
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
    remembered: dict = field(default_factory=dict)      # {caption: text embedding}, by a frozen text encoder

    @classmethod
    def build(cls, config, merges=()):
        """A model with fresh random weights."""
        return cls(config, UNet(config), VAE(config), TextEncoder(config), Tokenizer(merges))

    def networks(self):
        """The three networks by name."""
        return {"unet": self.unet, "vae": self.vae, "text": self.text}

    def state(self):
        """All parameters {key of SD's single file: tensor}."""
        return {PREFIXES[part] + name: tensor for part, network in self.networks().items()
                for name, tensor in network.state_dict().items()}

    def to(self, device, parts=("unet", "vae", "text")):
        """Move networks. The UNet's convs are faster with the channels last in memory."""
        for part in parts:
            self.networks()[part].to(device)
        self.unet.to(memory_format=torch.channels_last)

    def context(self, prompts):
        """Text embeddings of a list of prompts: (n, 77, d)."""
        return self.text(self.tokenizer(prompts).to(next(self.text.parameters()).device))


@contextmanager
def plain_errors(script, advice):
    """Around a script: what its user can mend, and Ctrl-C, end it with a sentence, not with a traceback."""
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="backslashreplace")      # not every terminal can show every file name
    try:
        yield
    except (ValueError, OSError, EOFError, SafetensorError, MemoryError, torch.OutOfMemoryError) as error:
        raise SystemExit(f"{script}: {error}") from None
    except KeyboardInterrupt:
        raise SystemExit(f"{script}: stopped; {advice}") from None


@contextmanager
def complete(path):
    """A name to write to. The file gets its own name when it is complete, and not if anything fails."""
    os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
    root, ending = os.path.splitext(path)
    unfinished = f"{root}.{os.getpid()}.tmp{ending}"       # two processes may write the same file
    try:
        yield unfinished
        os.replace(unfinished, path)
    finally:
        if os.path.exists(unfinished):
            os.remove(unfinished)


def checksum(tensors, *texts):
    """CRC-32 of tensors, their names and texts: safetensors notices a file cut short, but no flipped bit."""
    total = zlib.crc32("".join(texts).encode())
    for key, tensor in sorted(tensors.items()):
        total = zlib.crc32(f"{key} {tensor.dtype} {tuple(tensor.shape)}".encode(), total)
        total = zlib.crc32(tensor.reshape(-1).view(torch.uint8).cpu().numpy(), total)
    return f"{total:08x}"


def save_weights(path, model, dtype=torch.float16, only=lambda key: True, **about):
    """Write a model as one safetensors file with SD's keys, or those of them that `only` accepts."""
    tensors = {key: tensor.detach().to("cpu", dtype).contiguous()
               for key, tensor in model.state().items() if only(key)}
    texts = {"config": json.dumps(asdict(model.config)), "merges": "\n".join(model.tokenizer.merges),
             "about": json.dumps({**model.about, **about})}
    with complete(path) as unfinished:
        save_file(tensors, unfinished, metadata=texts | {"checksum": checksum(tensors, *texts.values())})
        os.chmod(unfinished, 0o644)    # safetensors makes files that only their owner can read


def read_weights(path):
    """The config, merges, description and tensors of a file by `save_weights`; ValueError if damaged."""
    try:
        if not os.path.isfile(path):      # opening a named pipe would wait for ever
            raise OSError("no such file")
        with safe_open(path, framework="pt") as file:
            metadata, tensors = file.metadata(), {key: file.get_tensor(key) for key in file.keys()}
        config, merges, about, stated = (metadata[key] for key in ("config", "merges", "about", "checksum"))
    except (SafetensorError, OSError, KeyError, TypeError) as error:
        raise ValueError(f"no weights file of ours at {path} ({error}): give one by train.py, or let "
                         f"convert_sd_weights.py make one from a Stable Diffusion 1.x checkpoint") from None
    if stated != checksum(tensors, config, merges, about):
        raise ValueError(f"{path} is damaged, its checksum is wrong: copy or make it again")
    fields = {key: tuple(x) if isinstance(x, list) else x for key, x in json.loads(config).items()}
    return Config(**fields), merges.split("\n") if merges else [], json.loads(about), tensors


def fill(model, tensors, path, only=lambda key: True, dtype=torch.float32):
    """Make tensors a model's parameters, in this type (norms and biases in float32), without a copy if they
    have it already. `only` says which keys count: none of these may be missing or left over."""
    shapes = lambda state: {key: tuple(tensor.shape) for key, tensor in state.items() if only(key)}
    wanted, found = shapes(model.state()), shapes(tensors)
    wrong = [f"{found.get(key, 'nothing')} at {key}, expected {wanted.get(key, 'nothing')}"
             for key in sorted(wanted | found) if wanted.get(key) != found.get(key)]
    if wrong:
        raise ValueError(f"{path} has {'; '.join(wrong[:9])}; {len(wrong)} keys differ: "
                         f"give weights of preset {model.config.name} and of this stage")
    for part, prefix in PREFIXES.items():
        own = {key.removeprefix(prefix): tensors[key].to(dtype if tensors[key].dim() > 1 else torch.float32)
               for key in wanted if key.startswith(prefix)}
        model.networks()[part].load_state_dict(own, strict=False, assign=True)


def load_weights(path, preset=None, dtype=torch.float32):
    """The model in a weights file, on the CPU, frozen, as `fill` says. Temporal layers may be missing."""
    config, merges, about, tensors = read_weights(path)
    if preset not in (None, config.name):
        raise ValueError(f"{path} holds weights of preset {config.name}, found --preset {preset}: change one")
    if not any(key.startswith(PREFIXES["vae"]) for key in tensors):
        raise ValueError(f"{path} holds only the temporal layers: give it as --temporal beside full weights")
    with torch.device("meta"):
        model = Model.build(config, merges)
    model.about = about
    if not any(map(is_temporal, tensors)):     # all zero they are the identity
        tensors |= {key: torch.zeros(x.shape) for key, x in model.state().items() if is_temporal(key)}
    fill(model, tensors, path, dtype=dtype)
    for network in model.networks().values():
        network.eval().requires_grad_(False)
    return model
