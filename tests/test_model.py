"""pytest tests/test_model.py: time in the UNet, parity with Stable Diffusion, the tokenizer, weights files.

Parity with SD's own code is checked on reduced widths, see oracle_weights.py. fixtures/sd15_keys.json.gz has
the names and shapes of the real checkpoint; fixtures/tokenizer.json.gz has those of CLIP's 48,894 merges that
its texts could need, each under its real number, and the ids that CLIP's own tokenizer gives.
"""

import gzip
import json
import math
from dataclasses import replace
from pathlib import Path

import oracle_weights as oracle
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import model as M
from model import (PREFIXES, PRESETS, VAE, ClipParallel, Model, PseudoConv3d, TextEncoder, Tokenizer, UNet,
                   WindowInfo, attention, blend_weights, is_temporal, load_weights, look_around,
                   nearest_given, save_weights)

FIXTURES = Path(__file__).parent / "fixtures"
SD15 = json.loads(gzip.decompress((FIXTURES / "sd15_keys.json.gz").read_bytes()))
CLIP = json.loads(gzip.decompress((FIXTURES / "tokenizer.json.gz").read_bytes()))
SMALL = replace(PRESETS["tiny"], widths=(32, 64), attention_levels=(1,), heads=2, emb_dim=32,
                temporal_emb_dim=32, vae_widths=(16, 32), text_width=32, text_layers=1, text_heads=2)
F = 5              # frames in the windows of this file
ROUNDING = 5e-6    # float32, values around 1: kernels add up in another order when the batch has another size
BIAS = PREFIXES["unet"] + "out.2.bias"


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
    """The UNet's output for every frame as a picture of its own."""
    return torch.cat([unet(x[:, :, i:i + 1], t[:, i:i + 1], context) for i in range(x.shape[2])], dim=2)


def largest(a, b):
    """The largest difference between two tensors of the same shape."""
    assert a.shape == b.shape
    return (a - b).abs().max().item()


# --- time in the UNet -------------------------------------------------------------------------------------

@pytest.mark.parametrize("frames", (None, [0, 1, 2, 6, 10], [3, 19, 35, 36, 99]), ids=str)
@pytest.mark.parametrize("given", (None, [1, 0, 0, 0, 1], [1, 1, 1, 1, 1]), ids=str)
@torch.no_grad()
def test_a_fresh_video_model_is_its_image_model_on_every_frame(frames, given):
    """To the last bit, whatever the temporal layers are told of distances, levels and given frames."""
    unet, (x, t, context) = small_unet(), window_inputs()
    frames = None if frames is None else torch.tensor([frames, frames[:1] + [f + 7 for f in frames[1:]]])
    given = None if given is None else torch.tensor([given, given[::-1]]).bool()
    video = unet(x, t, context, frames, given)
    assert torch.equal(video, unet(x, t, context, temporal=False))
    assert largest(video, image_model(unet, x, t, context)) <= ROUNDING


@torch.no_grad()
def test_a_trained_model_is_still_the_image_model_on_one_frame_and_without_temporal():
    unet, (x, t, context) = small_unet(temporal_noise=0.1), window_inputs()
    without = unet(x, t, context, temporal=False)
    assert largest(image_model(unet, x, t, context), without) <= ROUNDING
    assert largest(unet(x, t, context), without) > 1e-2


@pytest.mark.parametrize("noise, mixes", ((0.0, False), (0.1, True)), ids=("fresh", "trained"))
@torch.no_grad()
def test_every_frame_depends_on_every_other_after_training_and_on_none_before(noise, mixes):
    unet, (x, t, context) = small_unet(noise), window_inputs()
    before = unet(x, t, context)
    for i in range(F):
        changed = x.clone()
        changed[:, :, i] += 1
        difference = (unet(changed, t, context) - before).abs().amax((0, 1, 3, 4))
        others = difference[torch.arange(F) != i]
        assert (others > 1e-4).all() if mixes else (others <= ROUNDING).all()


@torch.no_grad()
def test_temporal_layers_see_distances_levels_text_and_given_frames_but_not_where_the_window_is():
    unet, (x, t, context) = small_unet(temporal_noise=0.1), window_inputs()
    frames, given = torch.arange(F).expand(2, F), torch.tensor([1, 0, 0, 0, 0]).bool().expand(2, F)
    last = lambda t=t, frames=frames, given=given: unet(x, t, context, frames, given)[:, :, -1]
    other_level = t.clone()
    other_level[:, 0] = 999 - other_level[:, 0]
    for change in ({"frames": frames * 4}, {"t": other_level}, {"given": ~given}):
        assert largest(last(**change), last()) > 1e-3, change
    assert largest(last(frames=frames + 1000), last()) <= 1e-5
    start = torch.tensor([-math.inf, 2.0])
    emb = lambda context, start: look_around(unet.temporal_embed, x, t, context, frames, given, start).emb
    assert largest(emb(context.flip(1), start), emb(context, start)) > 1e-3
    assert largest(emb(context, start - 1)[1], emb(context, start)[1]) > 1e-3
    assert torch.equal(emb(context, start), emb(context, start.clamp(-1000)))    # long ago is no news


@torch.no_grad()
def test_a_window_does_not_see_the_others_of_its_batch():
    unet, (x, t, context) = small_unet(temporal_noise=0.1), window_inputs()
    frames = torch.tensor([[0, 1, 2, 6, 10], [0, 4, 8, 12, 16]])
    given = torch.tensor([[1, 1, 0, 0, 0], [1, 0, 0, 0, 1]]).bool()
    together = unet(x, t, context, frames, given)
    for row in (slice(0, 1), slice(1, 2)):
        alone = unet(x[row], t[row], context[row], frames[row], given[row])
        assert largest(alone, together[row]) <= 1e-5 * together.abs().max()
    one_clip = unet(x, t, context, frames, given, clips=ClipParallel([F]))
    assert torch.equal(one_clip, together)


@torch.no_grad()
def test_group_norm_does_not_see_how_long_the_window_is():
    """Loud frames that join a window change nothing in the others."""
    unet, (x, t, context) = small_unet(), window_inputs()
    x[:, :, 3:] *= 100
    assert largest(unet(x, t, context)[:, :, :3], unet(x[:, :, :3], t[:, :3], context)) <= ROUNDING


@torch.no_grad()
def test_the_frames_before_and_after_fade_with_their_distance():
    """They count gap^-0.5 at the initial falloff."""
    conv = PseudoConv3d(2, 2)
    torch.nn.init.dirac_(conv.weight)
    torch.nn.init.zeros_(conv.bias)
    x = torch.randn(3, 2, 4, 4)
    window = WindowInfo(1, ClipParallel([3]), torch.tensor([[1.0, 4.0]]), *[None] * 6)
    conv.temporal.weight[:2, :, 0, 0] = torch.eye(2)
    assert largest(conv(x, window), torch.stack([x[0], x[1] + x[0], x[2] + x[1] / 2])) <= 1e-6
    conv.temporal.weight[:2] = 0
    conv.temporal.weight[4:, :, 0, 0] = torch.eye(2)
    assert largest(conv(x, window), torch.stack([x[0] + x[1], x[1] + x[2] / 2, x[2]])) <= 1e-6


@torch.no_grad()
def test_attention_in_chunks_is_attention(monkeypatch):
    """A CUDA launch takes 65,535 rows x heads."""
    torch.manual_seed(0)
    q, k, v, bias = *torch.randn(3, 35_000, 2, 3, 4), torch.randn(35_000, 2, 3, 3)
    launches, real = [], M.F.scaled_dot_product_attention
    monkeypatch.setattr(M.F, "scaled_dot_product_attention",
                        lambda q, *rest, **more: launches.append(q.shape[:2]) or real(q, *rest, **more))
    for bias in (torch.zeros(1), bias):
        by_hand = ((q @ k.transpose(2, 3)) / 4 ** 0.5 + bias).softmax(-1) @ v
        assert largest(attention(q, k, v, bias if bias.dim() > 1 else None), by_hand) <= 1e-5
    assert launches == 2 * [(32_767, 2), (2_233, 2)]


@pytest.mark.parametrize("h, frames, message", ((8, 1, r"t of \(2, 1\): .*one level per frame, \(2, 5\)"),
                                                (7, F, r"x of \(2, 4, 5, 7, 8\) .*multiples of 2")))
def test_the_unet_refuses_shapes_that_do_not_fit(h, frames, message):
    unet, (x, t, context) = small_unet(), window_inputs()
    with pytest.raises(ValueError, match=message):
        unet(x[:, :, :, :h], t[:, :frames], context)


# --- given frames and the prior ---------------------------------------------------------------------------

def test_nearest_given_frames_by_hand():
    """At or before, at or after, the next on either side; -1 where there is none."""
    given = torch.tensor([[0, 1, 0, 0, 1, 0], [0, 0, 0, 0, 0, 0], [1, 1, 1, 1, 1, 1]]).bool()
    before, after, earlier, later = nearest_given(given).unbind(-1)
    assert before.tolist() == [[-1, 1, 1, 1, 4, 4], [-1] * 6, [0, 1, 2, 3, 4, 5]]
    assert after.tolist() == [[1, 1, 4, 4, 4, -1], [-1] * 6, [0, 1, 2, 3, 4, 5]]
    assert earlier.tolist() == [[-1, -1, -1, -1, 1, 1], [-1] * 6, [-1, 0, 1, 2, 3, 4]]
    assert later.tolist() == [[4, 4, -1, -1, -1, -1], [-1] * 6, [1, 2, 3, 4, 5, -1]]


@pytest.mark.parametrize("known", ([1, 1, 0, 0], [1, 1, 1, 0], [1, 1, 1, 1], [0, 1, 0, 0]), ids=str)
def test_a_blend_of_k_frames_is_exact_for_polynomials_of_degree_k_minus_1(known):
    """Straight lines through two given frames, cubics through four, less where fewer are known."""
    frames, nodes = torch.tensor([[13, 21, 4]]), torch.tensor([[[12, 16, 8, 20]] * 3])
    coefficients = torch.randn(sum(known), generator=torch.Generator().manual_seed(0))
    known = torch.tensor(known).bool().expand(1, 3, 4)
    weights = blend_weights(frames, nodes, known)
    value = lambda at: sum(c * (at / 10) ** power for power, c in enumerate(coefficients))
    assert not weights[~known].any()
    assert torch.allclose((weights * value(nodes)).sum(-1), value(frames), rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_every_frame_is_shown_its_nearest_given_frames():
    """As 9 channels: latents before, latents after, given or not; with their distances, shares and blend."""
    unet, (x, t, context) = small_unet(), window_inputs(b=1)
    look = lambda frames, given: look_around(unet.temporal_embed, x, t, context, torch.tensor([frames]),
                                             torch.tensor([given]).bool())
    window = look([0, 2, 3, 6, 7], [0, 1, 0, 1, 0])
    for i, (before, after) in enumerate(((None, 1), (1, 1), (1, 3), (3, 3), (3, None))):
        shown = [torch.zeros(4, 8, 8) if j is None else x[0, :, j] for j in (before, after)]
        assert torch.equal(window.hint[i], torch.cat([*shown, torch.full((1, 8, 8), float(i in (1, 3)))]))
    assert window.since.tolist() == [[0, -2], [0, 0], [1, -3], [0, 0], [1, 0]]
    assert torch.allclose(window.share, torch.tensor([[0, 1], [1, 0], [3 / 4, 1 / 4], [1, 0], [1, 0]]))
    blends = [x[0, :, 1], x[0, :, 1], 3 / 4 * x[0, :, 1] + 1 / 4 * x[0, :, 3], x[0, :, 3], x[0, :, 3]]
    assert largest(window.blend, torch.stack(blends)) <= 1e-6
    window, four = look([0, 4, 5, 8, 12], [1, 1, 0, 1, 1]), x[0, :, [0, 1, 3, 4]]
    assert torch.equal(window.blend[[0, 1, 3, 4]], four.transpose(0, 1))
    cubic = torch.einsum("ckhw, k -> chw", four, torch.tensor([-7, 105, 35, -5]) / 128)     # by hand
    assert largest(window.blend[2], cubic) <= 1e-6


@torch.no_grad()
def test_the_prior_is_the_given_frames_moved_by_speed_times_distance():
    """Whole latents, what comes in at an edge is the edge; a blend of both sides where there are two."""
    unet, (x, t, context) = small_unet(), window_inputs(b=1)
    flow = unet.temporal_prior.out.bias                       # velocity, sides, correction, gate, error
    flow[:2], flow[8:12] = torch.tensor([0.5, -1.0]) * 16, 99   # latents per 16 frames: down, left; all flow
    frames, given = torch.tensor([[0, 2, 4, 6, 8]]), torch.tensor([[0, 1, 0, 1, 0]]).bool()
    _, prior = unet(x, t, context, frames, given, with_prior=True)
    places = lambda by: (torch.arange(8) - by).clamp(0, 7)
    moved = lambda frame, down, right: x[0, :, frame, places(down)][:, :, places(right)]
    two = (moved(1, 1, -2) + moved(3, -1, 2)) / 2
    wanted = torch.stack([moved(1, -1, 2), x[0, :, 1], two, x[0, :, 3], moved(3, 1, -2)], dim=1)
    assert largest(prior[0], wanted) <= 1e-5


@torch.no_grad()
def test_the_output_is_the_prior_where_the_model_trusts_it():
    """A gate of 1 and a standard deviation near 0: then v at pure noise is minus the prior."""
    unet, (x, t, context) = small_unet(), window_inputs()
    unet.temporal_gate.bias[:4], unet.temporal_gate.bias[4:] = 9, -9
    output, prior = unet(x, torch.full_like(t, 999), context, with_prior=True,
                         given=torch.tensor([[0, 1, 0, 1, 0], [1, 0, 0, 0, 0]]).bool())
    assert prior.abs().amax((1, 3, 4)).min() > 0.1 and largest(-output, prior) <= 0.05


# --- the VAE ----------------------------------------------------------------------------------------------

@pytest.mark.parametrize("chunk", (1, 4, 16))
@torch.no_grad()
def test_latents_are_scaled_on_the_way_out_and_unscaled_on_the_way_in(chunk):
    """By the config's mean and deviation, 0 and 1 / 0.18215 in SD1.x; pictures are cut off at -1 and 1."""
    torch.manual_seed(0)
    vae = VAE(replace(SMALL, latent_mean=(1, 2, 3, 4), latent_std=(2, 2, 4, 4))).eval()
    video = torch.randn(2, 3, 3, 16, 24)
    raw = torch.stack([vae.moments(video[:, :, i])[0] for i in range(3)], dim=2)
    mean, std = torch.tensor([1.0, 2, 3, 4]).view(4, 1, 1, 1), torch.tensor([2.0, 2, 4, 4]).view(4, 1, 1, 1)
    latents = vae.encode(video, chunk)
    assert tuple(latents.shape) == (2, 4, 3, 4, 6) and largest(latents, (raw - mean) / std) <= 1e-5
    pictures = torch.stack([vae.pictures(raw[:, :, i]) for i in range(3)], dim=2)
    assert largest(vae.decode(latents, chunk), pictures.clamp(-1, 1)) <= 1e-5
    assert vae.decode(99 * latents).abs().max() == 1
    sd15 = PRESETS["sd15"]
    vae.config = replace(SMALL, latent_mean=sd15.latent_mean, latent_std=sd15.latent_std)
    assert largest(vae.encode(video), raw * 0.18215) <= 1e-5


# --- Stable Diffusion 1.5 ---------------------------------------------------------------------------------

def test_the_sd15_preset_has_exactly_the_tensors_of_the_real_checkpoint():
    """Names, shapes and parameter counts, temporal layers aside."""
    with torch.device("meta"):
        model = Model.build(PRESETS["sd15"])
    ours = {name: list(tensor.shape) for name, tensor in model.state().items() if not is_temporal(name)}
    real = {name: shape for name, shape in SD15["shapes"].items()
            if name.startswith(tuple(PREFIXES.values())) and not name.endswith("position_ids")}
    assert ours == real and len(real) == 686 + 248 + 196
    count = lambda network: sum(p.numel() for name, p in network.named_parameters() if not is_temporal(name))
    assert list(map(count, model.networks().values())) == [859_520_964, 83_653_863, 123_060_480]


PARTS = [(name, part) for name in ("small", "faint", "in9") for part in oracle.MANIFEST[name]]


@pytest.mark.parametrize("name, part, half", [(*part, False) for part in PARTS]
                         + [("small", part, True) for part in oracle.MANIFEST["small"]])
@torch.no_grad()
def test_outputs_are_those_of_stable_diffusions_own_code(name, part, half):
    """With the same weights and inputs, to 3e-5 of the largest value. Rounding is below 1e-5; a wrong eps in
    the norms gives 2e-2. In float16 to 2e-2 on average: rounding only inputs to bfloat16 takes 1.8e-2."""
    network = {"unet": UNet, "vae": VAE, "text": TextEncoder}[part](oracle.config(name)).eval()
    weights = oracle.weights(name, part, network)
    weights = {key.removeprefix(PREFIXES[part]): tensor for key, tensor in weights.items()}
    network.load_state_dict(weights, strict=False)
    for parameter in network.parameters():
        parameter.data = parameter.data.half() if half and parameter.dim() > 1 else parameter.data
    cases = [case for case in oracle.CASES.values() if (case["config"], case["part"]) == (name, part)]
    assert cases
    for case in cases:
        expected = oracle.EXPECTED[case["id"]]
        noise = lambda name: oracle.noise(f"{case['id']}.{name}", case[name])
        with torch.autocast("cpu", torch.float16, enabled=half):
            if part == "text":
                got = network(torch.tensor(case["tokens"]))
            elif part == "unet":
                got = network(noise("x")[:, :, None], torch.tensor(case["t"])[:, None], noise("ctx"))[:, :, 0]
            elif case["op"] == "encode":
                got = torch.cat(network.moments(noise("x") / 2), dim=1)
            else:
                got = network.pictures(noise("x"))
        if half:
            assert (got - expected).norm() <= 2e-2 * expected.norm(), case["id"]
        else:
            assert largest(got, expected) <= 3e-5 * expected.abs().max(), case["id"]


# --- the tokenizer ----------------------------------------------------------------------------------------

def test_ids_are_those_of_clip():
    """Accents, emoji, other scripts, HTML, contractions, numbers, long texts: start, ids, end, cut at 77."""
    # merges at their real places; the other places hold pairs that no text can make
    tokenizer = Tokenizer([CLIP["merges"].get(str(i), f"unused{i} unused{i}") for i in range(CLIP["total"])])
    assert len(CLIP["cases"]) == 20 and (tokenizer.start, tokenizer.end) == (49406, 49407)
    for text, ids in CLIP["cases"]:
        assert tokenizer([text]).tolist() == [ids + [49407] * (77 - len(ids))], text


def test_without_merges_a_text_is_its_bytes():
    """The tiny preset's 514 ids: 256 bytes, 256 bytes that end a word, start, end."""
    tokenizer = Tokenizer()
    a, b, c = (ord(letter) - 33 for letter in "abc")              # bytes are numbered from "!" on
    assert len(tokenizer.ids) == 512 and PRESETS["tiny"].vocabulary == 514
    ids = tokenizer(["aB c", "", "a" * 200]).tolist()
    assert ids == [[512, a, 256 + b, 256 + c] + [513] * 73, [512] + [513] * 76, [512] + [a] * 75 + [513]]


def test_learned_merges_give_every_word_a_token():
    """A token for each word of the texts, whatever stands beside it; unknown words fall into pieces."""
    texts = ["red balloon, dawn", "green balloons; RED Dawn", "day"]
    tokenizer = Tokenizer(Tokenizer.learn(texts))
    for word in ("red", "green", "balloon", "balloons", "dawn", "day", ",", ";"):
        assert len(tokenizer.pieces(word)) == 1, word
    assert len(tokenizer.pieces("reddish")) > 1 and len(tokenizer.ids) == 512 + len(tokenizer.merges)
    assert tokenizer.words("Red balloons; 12") == ["red", "balloons", ";", "1", "2"]
    assert Tokenizer.learn(texts, most=5) == tokenizer.merges[:5]


# --- weights files ----------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def small_model():
    """A whole model with random weights and two merges."""
    torch.manual_seed(0)
    model = Model.build(replace(SMALL, vocabulary=516), ["c l", "cl o"])
    model.config = replace(model.config, latent_mean=(0.1, 0.2, 0.3, 0.4), latent_std=(1, 2, 3, 4))
    return model


def test_what_is_saved_is_what_is_loaded(small_model, tmp_path):
    """Config, merges, description and every bit; float16 unless asked otherwise; frozen, in eval mode."""
    path = tmp_path / "all.safetensors"
    save_weights(path, small_model, torch.float32, stage="video", steps=3)
    loaded = load_weights(path, "tiny")
    assert loaded.config == small_model.config and loaded.vae.config.latent_std == (1, 2, 3, 4)
    assert loaded.about == {"stage": "video", "steps": 3} and loaded.tokenizer.merges == ["c l", "cl o"]
    for network in loaded.networks().values():
        assert not network.training and not any(p.requires_grad for p in network.parameters())
    assert loaded.state().keys() == small_model.state().keys()
    assert all(torch.equal(tensor, loaded.state()[key]) for key, tensor in small_model.state().items())
    save_weights(path, small_model)
    assert {tensor.dtype for tensor in load_file(path).values()} == {torch.float16}
    assert load_weights(path).state()[BIAS].dtype == torch.float32
    assert [file.name for file in tmp_path.iterdir()] == ["all.safetensors"]


@torch.no_grad()
def test_a_file_without_temporal_layers_loads_as_a_fresh_video_model(small_model, tmp_path):
    """As convert_sd_weights.py and the image stage write it."""
    path = tmp_path / "image.safetensors"
    save_weights(path, small_model, torch.float32, only=lambda name: not is_temporal(name))
    unet, (x, t, context) = load_weights(path).unet, window_inputs()
    assert torch.equal(unet(x, t, context), unet(x, t, context, temporal=False))


def change(path, key, tensor):
    """Rewrite a weights file with another tensor at a key, or none, and a checksum that is right for it."""
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    tensors = {**load_file(path), key: tensor}
    tensors = {key: tensor for key, tensor in tensors.items() if tensor is not None}
    right = M.checksum(tensors, *(metadata[key] for key in ("config", "merges", "about")))
    save_file(tensors, path, metadata=metadata | {"checksum": right})


def flip(path):
    """Change one bit in the middle of a file."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


GATE, TYPO = PREFIXES["unet"] + "temporal_gate.bias", PREFIXES["unet"] + "typo"


@pytest.mark.parametrize("damage, message", (
    (lambda path: path.unlink(), "no weights file of ours at .*convert_sd_weights.py"),
    (lambda path: path.write_bytes(path.read_bytes()[:-1]), "no weights file of ours"),
    (lambda path: path.write_bytes(b""), "no weights file of ours"),
    (lambda path: save_file({"betas": torch.zeros(3)}, path), "no weights file of ours"),
    (lambda path: save_file({"betas": torch.zeros(3)}, path, {"format": "pt"}), "no weights file of ours"),
    (flip, "is damaged, its checksum is wrong"),
    (lambda path: change(path, BIAS, None), rf"nothing at {BIAS}, expected \(4,\); 1 keys"),
    (lambda path: change(path, GATE, None), rf"nothing at {GATE}, expected \(8,\); 1 keys"),
    (lambda path: change(path, TYPO, torch.zeros(1)), rf"\(1,\) at {TYPO}, expected nothing; 1 keys"),
    (lambda path: change(path, BIAS, torch.zeros(5)), rf"\(5,\) at {BIAS}, expected \(4,\); 1 keys"),
), ids=("missing", "cut", "empty", "foreign", "foreign too", "flipped bit", "lacks", "lacks temporal",
        "unknown", "shape"))
def test_a_bad_weights_file_is_refused_in_one_sentence(small_model, tmp_path, damage, message):
    """It says what was found, what was expected and what to do next."""
    path = tmp_path / "weights.safetensors"
    save_weights(path, small_model)
    damage(path)
    with pytest.raises(ValueError, match=message) as error:
        load_weights(path)
    assert str(path) in str(error.value) and "\n" not in str(error.value)


def test_weights_of_another_preset_or_stage_are_refused(small_model, tmp_path):
    path = tmp_path / "weights.safetensors"
    save_weights(path, small_model)
    with pytest.raises(ValueError, match="holds weights of preset tiny, found --preset sd15"):
        load_weights(path, "sd15")
    save_weights(path, small_model, only=is_temporal, stage="interp")
    with pytest.raises(ValueError, match="only the temporal layers"):
        load_weights(path)
