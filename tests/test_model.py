"""Run: python -m pytest -q tests/test_model.py

Parity with SD's own code is checked on reduced widths, see oracle_weights.py. fixtures/sd15_keys.json.gz has
the names and shapes of the real checkpoint, fixtures/tokenizer.json.gz those merges of CLIP's 48,894 that its
texts could need, each under its real number, with the ids that CLIP's own tokenizer gives.
"""

import gzip
import json
from dataclasses import replace
from pathlib import Path

import oracle_weights as oracle
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch._subclasses.fake_tensor import FakeTensorMode

import model as M
from model import (PREFIXES, PRESETS, VAE, Around, Gate, Model, PseudoConv3d, SharedWindow, TextEncoder,
                   Tokenizer, UNet, attention, blend_weights, is_temporal, load_weights, nearest_given,
                   save_weights)

FIXTURES = Path(__file__).parent / "fixtures"
SD15 = json.loads(gzip.decompress((FIXTURES / "sd15_keys.json.gz").read_bytes()))
CLIP = json.loads(gzip.decompress((FIXTURES / "tokenizer.json.gz").read_bytes()))
SMALL = replace(PRESETS["tiny"], widths=(32, 64), attention_levels=(1,), heads=2, emb_dim=32,
                temporal_emb_dim=32, vae_widths=(16, 32), text_width=32, text_layers=1, text_heads=2)
F = 5              # frames in the windows of this file
ROUNDING = 5e-6    # float32, values around 1: kernels add up in another order when the batch has another size


def small_unet(temporal_noise=0.0):
    """A small UNet; noise on all its temporal parameters stands for training."""
    torch.manual_seed(0)
    unet = UNet(SMALL).eval()
    with torch.no_grad():
        for name, parameter in unet.named_parameters():
            if is_temporal(name):
                parameter.add_(temporal_noise * torch.randn_like(parameter))
    return unet


def window_inputs(b=2, seed=1):
    """Latents, noise levels and text for b windows of F frames."""
    g = torch.Generator().manual_seed(seed)
    return (torch.randn(b, 4, F, 8, 8, generator=g), torch.randint(0, 1000, (b, F), generator=g),
            torch.randn(b, 77, 32, generator=g))


def image_model(unet, x, t, context):
    """What the UNet says of every frame as a picture of its own."""
    return torch.stack([unet(x[:, :, i], t[:, i], context) for i in range(x.shape[2])], dim=2)


def largest(a, b):
    assert a.shape == b.shape
    return (a - b).abs().max().item()


# ------------------------------------------------------------------------------------------------------------
# Time in the UNet
# ------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("frames", (None, [0, 1, 2, 3, 4], [0, 1, 2, 6, 10], [3, 19, 35, 36, 99]), ids=str)
@pytest.mark.parametrize("given", (None, [1, 0, 0, 0, 1], [1, 1, 1, 1, 1]), ids=str)
@torch.no_grad()
def test_a_fresh_video_model_is_its_image_model_on_every_frame(frames, given):
    """Temporal layers start as the identity, to the last bit, whatever they are told of distances, levels and
    given frames."""
    unet, (x, t, context) = small_unet(), window_inputs()
    frames = None if frames is None else torch.tensor([frames, frames[:1] + [f + 7 for f in frames[1:]]])
    given = None if given is None else torch.tensor([given, given[::-1]]).bool()
    video = unet(x, t, context, frames, given)
    assert torch.equal(video, unet(x, t, context, temporal=False))
    assert largest(video, image_model(unet, x, t, context)) <= ROUNDING


@torch.no_grad()
def test_a_trained_model_still_is_the_image_model_on_one_frame_and_without_temporal():
    """f = 1 and temporal=False are plain SD, with any temporal weights."""
    unet, (x, t, context) = small_unet(temporal_noise=0.1), window_inputs()
    images = image_model(unet, x, t, context)
    assert largest(unet(x[:, :, :1], t[:, :1], context), images[:, :, :1]) <= ROUNDING
    assert largest(unet(x, t, context, temporal=False), images) <= ROUNDING
    assert largest(unet(x, t, context), images) > 1e-2


@torch.no_grad()
def test_in_a_trained_model_every_frame_depends_on_every_other():
    """And in a fresh one on none."""
    x, t, context = window_inputs()
    for noise, mixes in ((0.0, False), (0.1, True)):
        unet = small_unet(noise)
        before = unet(x, t, context)
        for i in range(F):
            changed = x.clone()
            changed[:, :, i] += 1
            difference = (unet(changed, t, context) - before).abs().amax((0, 1, 3, 4))
            others = torch.arange(F) != i
            assert (difference[others] > 1e-4).all() if mixes else (difference[others] <= ROUNDING).all()


@torch.no_grad()
def test_temporal_layers_see_distances_levels_and_given_frames():
    """A frame's result depends on how far the others are, on their levels and on which are given; where the
    window stands in the video does not matter."""
    unet, (x, t, context) = small_unet(temporal_noise=0.1), window_inputs()
    frames, given = torch.arange(F).expand(2, F), torch.tensor([1, 0, 0, 0, 0]).bool().expand(2, F)
    last = lambda t=t, frames=frames, given=given: unet(x, t, context, frames, given)[:, :, -1]
    other_level = t.clone()
    other_level[:, 0] = 999 - other_level[:, 0]
    assert largest(last(frames=frames * 4), last()) > 1e-3
    assert largest(last(t=other_level), last()) > 1e-3
    assert largest(last(given=~given), last()) > 1e-3
    assert largest(last(frames=frames + 1000), last()) <= 1e-5


@torch.no_grad()
def test_a_window_does_not_see_the_others_of_its_batch():
    """Two windows together give what each gives alone, with spacings and given frames of their own."""
    unet, (x, t, context) = small_unet(temporal_noise=0.1), window_inputs()
    frames = torch.tensor([[0, 1, 2, 6, 10], [0, 4, 8, 12, 16]])
    given = torch.tensor([[1, 1, 0, 0, 0], [1, 0, 0, 0, 1]]).bool()
    together = unet(x, t, context, frames, given)
    for i in range(2):
        alone = unet(x[i:i + 1], t[i:i + 1], context[i:i + 1], frames[i:i + 1], given[i:i + 1])
        assert largest(alone, together[i:i + 1]) <= 1e-5 * together.abs().max()


@torch.no_grad()
def test_group_norm_does_not_see_how_long_the_window_is():
    """Statistics are per frame: loud frames that join a window change nothing in the others."""
    unet, (x, t, context) = small_unet(), window_inputs()
    x[:, :, 3:] *= 100
    assert largest(unet(x, t, context)[:, :, :3], unet(x[:, :, :3], t[:, :3], context)) <= ROUNDING


@torch.no_grad()
def test_side_taps_fade_with_the_gap():
    """The frame before comes in times gap^-0.5, and the frame after, at the initial falloff."""
    conv = PseudoConv3d(2, 2)
    torch.nn.init.dirac_(conv.weight)
    torch.nn.init.zeros_(conv.bias)
    x = torch.randn(3, 2, 4, 4)
    window = Around(1, 3, SharedWindow([3]), torch.tensor([[1.0, 4.0]]), *[None] * 6)
    conv.temporal.weight[:2, :, 0, 0] = torch.eye(2)
    assert largest(conv(x, window), torch.stack([x[0], x[1] + x[0], x[2] + x[1] / 2])) <= 1e-6
    conv.temporal.weight[:2] = 0
    conv.temporal.weight[4:, :, 0, 0] = torch.eye(2)
    assert largest(conv(x, window), torch.stack([x[0] + x[1], x[1] + x[2] / 2, x[2]])) <= 1e-6


def test_nearest_given_frames_by_hand():
    """At or before, at or after, -1 where there is none."""
    given = torch.tensor([[0, 1, 0, 0, 1, 0], [0, 0, 0, 0, 0, 0], [1, 1, 1, 1, 1, 1]]).bool()
    before, after, earlier, later = nearest_given(given).unbind(-1)
    assert before.tolist() == [[-1, 1, 1, 1, 4, 4], [-1] * 6, [0, 1, 2, 3, 4, 5]]
    assert after.tolist() == [[1, 1, 4, 4, 4, -1], [-1] * 6, [0, 1, 2, 3, 4, 5]]
    assert earlier.tolist() == [[-1, -1, -1, -1, 1, 1], [-1] * 6, [-1, 0, 1, 2, 3, 4]]
    assert later.tolist() == [[4, 4, -1, -1, -1, -1], [-1] * 6, [1, 2, 3, 4, 5, -1]]


def test_a_blend_of_k_frames_is_exact_for_polynomials_of_degree_k_minus_1():
    """Straight lines through two given frames, cubics through four, less where fewer are known."""
    generator = torch.Generator().manual_seed(0)
    frames, nodes = torch.tensor([[13, 21, 4]]), torch.tensor([[[12, 16, 8, 20]] * 3])
    for known in ([1, 1, 0, 0], [1, 1, 1, 0], [1, 1, 1, 1], [0, 1, 0, 0]):
        known = torch.tensor(known).bool().expand(1, 3, 4)
        weights = blend_weights(frames, nodes, known)
        coefficients = torch.randn(known[0, 0].sum(), generator=generator)
        value = lambda at: sum(c * (at / 10) ** power for power, c in enumerate(coefficients))
        assert not weights[~known].any()
        assert torch.allclose((weights * value(nodes)).sum(-1), value(frames), rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_every_frame_is_shown_its_nearest_given_frames():
    """As 9 channels: latents before, latents after, given or not; with their distances, shares and blend."""
    unet, (x, t, context) = small_unet(), window_inputs(b=1)
    given = torch.tensor([[0, 1, 0, 1, 0]]).bool()
    window = unet.look_around(x, t, context, torch.tensor([[0, 2, 3, 6, 7]]), given, SharedWindow([F]))
    for i, (before, after) in enumerate(((None, 1), (1, 1), (1, 3), (3, 3), (3, None))):
        shown = [torch.zeros(4, 8, 8) if j is None else x[0, :, j] for j in (before, after)]
        assert torch.equal(window.hint[i], torch.cat([*shown, given[0, i].expand(1, 8, 8).float()]))
    assert window.since.tolist() == [[0, -2], [0, 0], [1, -3], [0, 0], [1, 0]]
    assert torch.allclose(window.share, torch.tensor([[0, 1], [1, 0], [3 / 4, 1 / 4], [1, 0], [1, 0]]))
    blends = [x[0, :, 1], x[0, :, 1], 3 / 4 * x[0, :, 1] + 1 / 4 * x[0, :, 3], x[0, :, 3], x[0, :, 3]]
    assert largest(window.blend, torch.stack(blends)) <= 1e-6
    window = unet.look_around(x, t, context, torch.tensor([[0, 4, 5, 8, 12]]),
                              torch.tensor([[1, 1, 0, 1, 1]]).bool(), SharedWindow([F]))
    four = x[0, :, [0, 1, 3, 4]]
    assert torch.equal(window.blend[[0, 1, 3, 4]], four.transpose(0, 1))
    cubic = torch.einsum("ckhw, k -> chw", four, torch.tensor([-7, 105, 35, -5]) / 128)     # by hand
    assert largest(window.blend[2], cubic) <= 1e-6


@torch.no_grad()
def test_the_guess_is_the_given_frames_moved_by_speed_times_distance():
    """Sideways around the edge, down from the edge; a blend of both sides where there are two; and the
    answer of the whole network where it has learned to go by the guess."""
    unet, (x, t, context) = small_unet(), window_inputs(b=1)
    unet.temporal_guess.sharpness.fill_(99)                   # only the place that the speed points at,
    unet.temporal_guess.to_rest.bias[4:8] = 99                # and nothing of the blend
    unet.temporal_guess.to_speed.bias[:] = torch.tensor([0.5, -1.0]) / 0.05   # latents per frame: down, left
    given = torch.tensor([[0, 1, 0, 1, 0]]).bool()
    window = unet.look_around(x, t, context, torch.tensor([[0, 2, 4, 6, 8]]), given, SharedWindow([F]))
    guess, moving, _ = unet.temporal_guess(window)
    rows = lambda down: (torch.arange(8) - down).clamp(0, 7)
    moved = lambda frame, down, across: x[0, :, frame, rows(down)].roll(across, dims=2)
    two = (moved(1, 1, -2) + moved(3, -1, 2)) / 2
    wanted = torch.stack([moved(1, -1, 2), x[0, :, 1], two, x[0, :, 3], moved(3, 1, -2)])
    assert largest(guess, wanted) <= 1e-5 and largest(moving, wanted) <= 1e-5
    unet.temporal_trust.bias[:4] = 9                          # go by the guess,
    unet.temporal_trust.bias[4:] = -9                         # with hardly a doubt
    answer = unet(x, torch.full((1, F), 999), context, torch.tensor([[0, 2, 4, 6, 8]]), given)
    assert largest(-answer[0].transpose(0, 1), wanted) <= 0.05             # v at pure noise is -x0


def temporal_gradients(checkpoint_every):
    unet, (x, t, context) = small_unet(temporal_noise=0.1).train(), window_inputs()
    unet.checkpoint_every = checkpoint_every
    for name, parameter in unet.named_parameters():
        parameter.requires_grad_(is_temporal(name))
    given = torch.tensor([1, 0, 0, 0, 1]).bool().expand(2, F)
    unet(x, t, context, given=given).square().mean().backward()
    return unet, {name: parameter.grad for name, parameter in unet.named_parameters()}


def test_gradient_checkpointing_gives_the_same_gradients(monkeypatch):
    """To every temporal parameter, though neither the input nor the first layers need any. The re-entrant
    kind of checkpointing gives none, in silence."""
    calls, real = [], M.checkpoint
    monkeypatch.setattr(M, "checkpoint", lambda *args, **kinds: calls.append(args) or real(*args, **kinds))
    unet, stored = temporal_gradients(0)
    assert not calls
    half = lambda blocks: -(-len(blocks) // 2)
    for every, times in ((1, len(unet.input_blocks) + 1 + len(unet.output_blocks)),
                         (2, half(unet.input_blocks) + 1 + half(unet.output_blocks))):
        calls.clear()
        _, recomputed = temporal_gradients(every)
        assert len(calls) == times
        for name, gradient in stored.items():
            if is_temporal(name):
                assert gradient is not None and recomputed[name] is not None, name
                assert largest(gradient, recomputed[name]) <= 1e-6 * gradient.abs().max() + 1e-9, name


def test_a_training_step_moves_temporal_parameters_only():
    """The image model is frozen: no gradient, not a bit changed."""
    unet, gradients = temporal_gradients(1)
    before = {name: parameter.detach().clone() for name, parameter in unet.named_parameters()}
    torch.optim.AdamW([p for p in unet.parameters() if p.requires_grad], lr=1e-2).step()
    for name, parameter in unet.named_parameters():
        assert (gradients[name] is not None) == is_temporal(name), name
        assert torch.equal(parameter, before[name]) != is_temporal(name), name


def test_the_gradient_of_a_gate_is_that_of_its_formula():
    """Against finite differences, and nothing is kept beside the input."""
    torch.manual_seed(0)
    both, kept = torch.randn(2, 3, 8, dtype=torch.float64, requires_grad=True), []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: (kept.append(x), x)[1], lambda x: x):
        out = Gate.apply(both)
    assert torch.equal(out, both[..., :4] * torch.nn.functional.gelu(both[..., 4:]))
    assert len(kept) == 1 and torch.equal(kept[0], both)
    assert torch.autograd.gradcheck(Gate.apply, both)


def test_a_feed_forward_in_pieces_is_the_whole(monkeypatch):
    """Nothing between the layers is larger than asked for, and a dry run, about a GPU, has one piece."""
    layer, x, sizes = M.FeedForward(8), torch.randn(5, 6, 8), []
    whole = layer(x)
    layer.net[0].register_forward_pre_hook(lambda module, inputs: sizes.append(len(inputs[0])))
    monkeypatch.setattr(M, "LARGEST_REUSED", 2 * 6 * 64 * 4)
    assert largest(layer(x), whole) <= 1e-6 and sizes == [2, 2, 1]
    with FakeTensorMode(allow_non_fake_inputs=True):
        layer(torch.empty(5, 6, 8))
    assert sizes[3:] == [5]


@pytest.mark.parametrize("as_conv", [True, False], ids=["as a conv", "as a product"])
@pytest.mark.parametrize("frozen", [True, False], ids=["frozen", "trained"])
def test_a_linear_layer_is_its_formula_whichever_kernel_computes_it(monkeypatch, frozen, as_conv):
    """Output and gradients against float64, lean or not, in an odd layout; frozen, no input is kept."""
    monkeypatch.setattr(M, "conv_is_quicker", lambda x, weight: as_conv)
    torch.manual_seed(0)
    layer, kept = M.Linear(24, 40), []
    layer.weight.requires_grad_(not frozen)
    x = torch.randn(2, 24, 5, 7).permute(0, 3, 2, 1).requires_grad_()
    exact = x.double() @ layer.weight.double().T + layer.bias.double()
    wanted = [x] if frozen else [x, layer.weight, layer.bias]
    slope = torch.randn(exact.shape)
    exact_gradients = torch.autograd.grad(exact, wanted, slope.double())
    for layer.lean in [False] + [True] * frozen:
        with torch.autograd.graph.saved_tensors_hooks(lambda x: (kept.append(x), x)[1], lambda x: x):
            out = layer(x)
        assert torch.allclose(out.double(), exact, atol=1e-5)
        for found, right in zip(torch.autograd.grad(out, wanted, slope), exact_gradients):
            assert torch.allclose(found, right, atol=1e-5)
        if frozen:
            home = lambda tensor: tensor.untyped_storage().data_ptr()
            assert all(home(tensor) == home(layer.weight) for tensor in kept)


@pytest.fixture
def products(monkeypatch):
    """A list that grows with every conv that is computed as a product of patches."""
    called, real = [], M.patches
    monkeypatch.setattr(M, "patches", lambda x, stride: (called.append(x), real(x, stride))[1])
    return called


@pytest.mark.parametrize("lean", [False, True])
def test_a_conv_as_a_product_of_patches_is_the_conv(monkeypatch, products, lean):
    """Output and gradient against float64, at every edge of an oblong picture; other convs stay convs."""
    monkeypatch.setattr(M, "mostly_sorting", lambda x, pixels, weight: True)
    torch.manual_seed(0)
    for options in (dict(padding=1), dict(padding=1, stride=2), dict(padding=0)):
        layer = M.Conv2d(6, 10, 3, **options).requires_grad_(False)
        layer.lean = lean
        x = torch.randn(2, 6, 4, 7).to(memory_format=torch.channels_last).requires_grad_()
        exact = torch.nn.functional.conv2d(x.double(), layer.weight.double(), layer.bias.double(), **options)
        slope = torch.randn(exact.shape)
        out = layer(x)
        assert torch.allclose(out.double(), exact, atol=1e-5)
        gradients = torch.autograd.grad(out, x, slope) + torch.autograd.grad(exact, x, slope.double())
        assert torch.allclose(*gradients, atol=1e-5)
    assert len(products) == 2


def test_attention_in_cache_is_attention_and_keeps_no_scores(monkeypatch):
    """Output and gradients of torch's own, when the last rows are fewer too; to a text without gradients."""
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 3, 2, 12, 8)
    q, kept = q.requires_grad_(), []
    monkeypatch.setattr(M, "CACHED_SCORES", 4 * 12 * 12)
    for trained in (True, False):
        wanted = [q, k.requires_grad_(trained), v.requires_grad_(trained)][:3 if trained else 1]
        with torch.autograd.graph.saved_tensors_hooks(lambda x: (kept.append(x), x)[1], lambda x: x):
            out = M.attention_in_cache(q, k, v)
        assert {x.shape for x in kept} == {(6, 12, 8)}
        slope, exact = torch.randn(out.shape), torch.nn.functional.scaled_dot_product_attention(q, k, v)
        assert largest(out, exact) <= 1e-6
        for found, right in zip(*(torch.autograd.grad(x, wanted, slope) for x in (out, exact)), strict=True):
            assert largest(found, right) <= 1e-5


def test_kernels_for_the_cpu_are_chosen_in_bfloat16_and_not_in_a_dry_run(monkeypatch, products):
    """A dry run is about a GPU, though its tensors, which have no content, say that they are on the CPU."""
    half, attended = torch.bfloat16, []
    monkeypatch.setattr(M, "attention_in_cache", lambda q, k, v: attended.append(q.dtype))
    q = torch.randn(1, 2, 4, 8)
    attention(q, q, q)
    attention(*3 * [q.half()])
    attention(*3 * [q.to(half)])
    assert attended == [half]

    def conv_is_a_product(n, stride, dtype):
        products.clear()
        layer = M.Conv2d(256, 256, 3, padding=1, stride=stride, dtype=dtype).requires_grad_(False)
        layer(torch.zeros(n, 256, 16, 16, dtype=dtype))
        return bool(products)

    assert conv_is_a_product(2, 1, half) and not conv_is_a_product(3, 1, half)
    assert conv_is_a_product(8, 2, half) and not conv_is_a_product(9, 2, half)
    assert not conv_is_a_product(2, 1, torch.float32)
    tokens, weight = torch.zeros(4, 256), torch.zeros(256, 256)
    assert M.conv_is_quicker(tokens, weight) and not M.conv_is_quicker(tokens.to(half), weight)
    with FakeTensorMode():
        q = torch.empty(1, 2, 4, 8, dtype=half)
        attention(q, q, q)
        assert attended == [half] and not conv_is_a_product(2, 1, half)


def test_attention_in_chunks_is_attention(monkeypatch):
    """With and without a mask, when the last chunk is a short one too."""
    torch.manual_seed(0)
    q, k, v, mask = *torch.randn(3, 7, 2, 5, 8), torch.randn(7, 2, 5, 5)
    by_hand = lambda mask: ((q @ k.transpose(2, 3)) / 8 ** 0.5 + mask).softmax(-1) @ v
    whole = attention(q, k, v), attention(q, k, v, mask)
    monkeypatch.setattr(M, "GRID_LIMIT", 4)
    chunks = attention(q, k, v), attention(q, k, v, mask)
    for i, m in enumerate((0, mask)):
        assert largest(whole[i], by_hand(m)) <= 1e-6 and largest(chunks[i], whole[i]) <= 1e-6


def test_the_unet_wants_one_level_per_frame():
    """A t of shape (b,) for a video is refused, with the shape that is needed."""
    unet, (x, t, context) = small_unet(), window_inputs()
    with pytest.raises(ValueError, match=r"shape \(2,\).*needs one level per frame, shape \(2, 5\)"):
        unet(x, t[:, 0], context)


# ------------------------------------------------------------------------------------------------------------
# VAE
# ------------------------------------------------------------------------------------------------------------

@torch.no_grad()
def test_the_vae_in_chunks_is_the_vae():
    """Frame by frame or all at once: the same latents, the same pictures."""
    torch.manual_seed(0)
    vae, video, latents = VAE(SMALL).eval(), torch.rand(2, 3, 3, 16, 24) * 2 - 1, torch.randn(2, 4, 3, 4, 6)
    for chunk in (1, 4):
        assert largest(vae.encode(video, chunk), vae.encode(video)) <= 1e-5
        assert largest(vae.decode(latents, chunk), vae.decode(latents)) <= 1e-5


@torch.no_grad()
def test_latents_are_scaled_on_the_way_out_and_unscaled_on_the_way_in():
    """By mean and deviation in the config, which are 0 and 1 / 0.18215 in SD1.x; pictures end at -1 and 1."""
    torch.manual_seed(0)
    vae = VAE(replace(SMALL, latent_mean=(1, 2, 3, 4), latent_std=(2, 2, 4, 4))).eval()
    video = torch.randn(2, 3, 3, 16, 16)
    raw = torch.stack([vae.moments(video[:, :, i])[0] for i in range(3)], dim=2)
    mean, std = torch.tensor([1.0, 2, 3, 4]).view(4, 1, 1, 1), torch.tensor([2.0, 2, 4, 4]).view(4, 1, 1, 1)
    latents = vae.encode(video)
    assert tuple(latents.shape) == (2, 4, 3, 4, 4) and largest(latents, (raw - mean) / std) <= 1e-5
    pictures = torch.stack([vae.pictures(raw[:, :, i]) for i in range(3)], dim=2)
    assert largest(vae.decode(latents), pictures.clamp(-1, 1)) <= 1e-5
    assert vae.decode(99 * latents).abs().max() == 1
    sd15 = PRESETS["sd15"]
    vae.config = replace(SMALL, latent_mean=sd15.latent_mean, latent_std=sd15.latent_std)
    assert largest(vae.encode(video), raw * 0.18215) <= 1e-5


@pytest.mark.parametrize("size", ((18, 16), (16, 18)))
def test_the_vae_refuses_sizes_that_it_cannot_halve(size):
    """With the size found and the number that it must be a multiple of."""
    with pytest.raises(ValueError, match=f"{size[0]}x{size[1]} pixels.*multiples of 4"):
        VAE(SMALL).encode(torch.zeros(1, 3, 1, *size))


# ------------------------------------------------------------------------------------------------------------
# Stable Diffusion 1.5
# ------------------------------------------------------------------------------------------------------------

def test_the_sd15_preset_has_exactly_the_tensors_of_the_real_checkpoint():
    """Names, shapes and parameter counts, temporal layers aside."""
    with torch.device("meta"):
        networks = Model.build(PRESETS["sd15"]).networks()
    ours = {PREFIXES[part] + name: list(tensor.shape) for part, network in networks.items()
            for name, tensor in network.state_dict().items() if not is_temporal(name)}
    real = {name: shape for name, shape in SD15["shapes"].items()
            if name.startswith(tuple(PREFIXES.values())) and not name.endswith("position_ids")}
    assert ours == real and len(real) == 686 + 248 + 196
    count = lambda network: sum(p.numel() for name, p in network.named_parameters() if not is_temporal(name))
    assert [count(network) for network in networks.values()] == [859_520_964, 83_653_863, 123_060_480]


@pytest.mark.parametrize("name, part", [(name, part) for name in ("small", "faint", "in9")
                                        for part in oracle.MANIFEST[name]])
@torch.no_grad()
def test_outputs_are_those_of_stable_diffusions_own_code(name, part):
    """With the same weights and inputs, to 3e-5 of the largest value. Rounding in float32 was below 1e-5
    where this was written; a wrong eps in the norms gives 2e-2."""
    network = {"unet": UNet, "vae": VAE, "text": TextEncoder}[part](oracle.config(name)).eval()
    weights = oracle.weights(name, part, network)
    weights = {key.removeprefix(PREFIXES[part]): tensor for key, tensor in weights.items()}
    network.load_state_dict(weights, strict=False)
    cases = [case for case in oracle.CASES.values() if (case["config"], case["part"]) == (name, part)]
    assert cases
    for case in cases:
        expected = oracle.EXPECTED[case["id"]]
        noise = lambda name: oracle.noise(f"{case['id']}.{name}", case[name])
        if part == "text":
            got = network(torch.tensor(case["tokens"]))
        elif part == "unet":
            got = network(noise("x"), torch.tensor(case["t"]), noise("ctx"))
        elif case["op"] == "encode":
            got = torch.cat(network.moments(noise("x") / 2), dim=1)
        else:
            got = network.pictures(noise("x"))
        assert largest(got, expected) <= 3e-5 * expected.abs().max(), case["id"]


# ------------------------------------------------------------------------------------------------------------
# Tokenizer
# ------------------------------------------------------------------------------------------------------------

def clip_tokenizer():
    """CLIP's tokenizer, merges at their real places; the other places hold pairs that no text can make."""
    return Tokenizer([CLIP["merges"].get(str(i), f"unused{i} unused{i}") for i in range(CLIP["total"])])


def test_ids_are_those_of_clip():
    """Accents, emoji, other scripts, HTML, contractions, numbers, long texts: start, ids, end, cut at 77."""
    tokenizer = clip_tokenizer()
    assert len(CLIP["cases"]) == 20 and (tokenizer.start, tokenizer.end) == (49406, 49407)
    for text, ids in CLIP["cases"]:
        assert tokenizer.encode(text) == ids, text
        assert tokenizer([text]).tolist() == [ids + [49407] * (77 - len(ids))], text


def test_without_merges_a_text_is_its_bytes():
    """The tiny preset's 514 ids: 256 bytes, 256 bytes that end a word, start, end."""
    tokenizer = Tokenizer()
    letter = {c: ord(c) - 33 for c in "abc"}              # bytes are numbered from "!" on
    assert tokenizer.encode("aB c") == [512, letter["a"], 256 + letter["b"], 256 + letter["c"], 513]
    assert tokenizer.encode("") == [512, 513] and len(tokenizer.ids) == 514 == PRESETS["tiny"].vocabulary
    long = tokenizer(["a" * 200, ""])
    assert tuple(long.shape) == (2, 77) and long[0].tolist() == [512] + [letter["a"]] * 75 + [513]


# ------------------------------------------------------------------------------------------------------------
# Weights files
# ------------------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def small_model():
    """A whole model with random weights and two merges."""
    torch.manual_seed(0)
    model = Model.build(replace(SMALL, vocabulary=516), ["c l", "cl o"])
    model.set_latent_scaling((0.1, 0.2, 0.3, 0.4), (1, 2, 3, 4))
    return model


def test_what_is_saved_is_what_is_loaded(small_model, tmp_path):
    """Config, merges, description and every bit; float16 unless asked otherwise; frozen, in eval mode."""
    path = tmp_path / "all.safetensors"
    save_weights(path, small_model, torch.float32, stage="video", steps=3)
    loaded = load_weights(path, "tiny")
    assert loaded.config == small_model.config and loaded.vae.config.latent_std == (1, 2, 3, 4)
    assert loaded.about == {"stage": "video", "steps": 3} and loaded.tokenizer.merges == ["c l", "cl o"]
    for part, network in small_model.networks().items():
        other = loaded.networks()[part]
        assert not other.training and not any(p.requires_grad for p in other.parameters())
        assert network.state_dict().keys() == other.state_dict().keys()
        assert all(torch.equal(t, other.state_dict()[name]) for name, t in network.state_dict().items())
    save_weights(path, small_model)
    assert {tensor.dtype for tensor in load_file(path).values()} == {torch.float16}
    assert load_weights(path).unet.state_dict()["out.2.bias"].dtype == torch.float32
    assert [file.name for file in tmp_path.iterdir()] == ["all.safetensors"]


@torch.no_grad()
def test_a_file_without_temporal_layers_loads_as_a_fresh_video_model(small_model, tmp_path):
    """As convert_sd_weights.py and the image stage write it."""
    path = tmp_path / "image.safetensors"
    save_weights(path, small_model, torch.float32, only=lambda name: not is_temporal(name))
    unet, (x, t, context) = load_weights(path).unet, window_inputs()
    assert largest(unet(x, t, context), image_model(unet, x, t, context)) <= ROUNDING


def change(path, changes):
    """Rewrite a weights file with some tensors replaced, or left out where the new value is None.

    With a checksum that is right: this is a file of another model, not a damaged one."""
    with M.safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    tensors = {**load_file(path), **{PREFIXES["unet"] + name: tensor for name, tensor in changes.items()}}
    tensors = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    right = M.checksum(tensors, *(metadata[key] for key in ("config", "merges", "about")))
    save_file(tensors, path, metadata=metadata | {"checksum": right})


@pytest.mark.parametrize("damage, message", (
    (lambda path: path.unlink(), "no weights file at .*convert_sd_weights.py"),
    (lambda path: path.write_bytes(path.read_bytes()[:-1]), "not a complete safetensors file"),
    (lambda path: path.write_bytes(path.read_bytes()[:100]), "not a complete safetensors file"),
    (lambda path: path.write_bytes(b""), "not a complete safetensors file"),
    (lambda path: save_file({"betas": torch.zeros(3)}, path), "not one of ours: run convert_sd_weights.py"),
    (lambda path: change(path, {"out.2.bias": None}), r"lacks 1 .*model\.diffusion_model\.out\.2\.bias;"),
    (lambda path: change(path, {"temporal_trust.bias": None}), r"lacks 1 tensors .*temporal_trust\.bias;"),
    (lambda path: change(path, {"typo": torch.zeros(1)}), r"unknown 1 .*model\.diffusion_model\.typo;"),
    (lambda path: change(path, {"out.2.bias": torch.zeros(5)}), r"wrong shape for 1 tensors .*out\.2\.bias;"),
), ids=("missing", "cut by a byte", "cut", "empty", "foreign", "lacks", "lacks temporal", "unknown", "shape"))
def test_a_bad_weights_file_is_refused_in_one_sentence(small_model, tmp_path, damage, message):
    """What was found and what to do next, with the file and every tensor by name."""
    path = tmp_path / "weights.safetensors"
    save_weights(path, small_model)
    damage(path)
    with pytest.raises(ValueError, match=message) as error:
        load_weights(path)
    assert str(path) in str(error.value) and "\n" not in str(error.value)


def test_weights_of_another_preset_or_stage_are_refused(small_model, tmp_path):
    """By the names of both."""
    path = tmp_path / "weights.safetensors"
    save_weights(path, small_model)
    with pytest.raises(ValueError, match="holds weights of preset tiny, but --preset is sd15"):
        load_weights(path, "sd15")
    save_weights(path, small_model, parts=("unet",), only=is_temporal, stage="interp")
    with pytest.raises(ValueError, match="only the temporal layers of stage interp"):
        load_weights(path)
