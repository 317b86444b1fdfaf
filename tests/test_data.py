"""pytest tests/test_data.py: the sky world is a pure function of (seed, frame), batches of (seed, step)."""

import numpy as np
import pytest
import torch
from PIL import Image

import data
import schedule
from data import DAY, SPLITS, SkyWorld, sky_clips


def clips(tmp_path, worlds=3, frames=range(121), key="vae"):
    """Clips whose "latents" are 8x8 thumbnails, so that no VAE is needed."""
    encode = lambda video: torch.nn.functional.avg_pool3d(video, (1, 8, 8))[:, [0, 1, 2, 0]]
    return sky_clips(str(tmp_path / "clips.safetensors"), encode, range(worlds), frames, 64, key)


def test_a_frame_does_not_depend_on_which_others_are_asked_for():
    """video(frames)[i] == video([frames[i]]), in any order: any stride and any length show the same film."""
    frames = [0, 7, 400, 3]
    whole = SkyWorld(5).video(frames)
    for i, frame in enumerate(frames):
        assert torch.equal(whole[:, i], SkyWorld(5).video([frame])[:, 0])


def test_frames_are_pictures_in_range():
    """(3, f, H, W), float32, in [-1, 1], and using a good part of that range."""
    video = SkyWorld(1, 96).video(np.arange(4))
    assert video.shape == (3, 4, 96, 96) and video.dtype == torch.float32
    assert -1 <= video.min() < -0.5 and 0.5 < video.max() <= 1


def test_a_world_looks_the_same_at_every_size():
    """Twice the size, averaged down, is nearly the small picture: lengths are in widths, not in pixels."""
    small, large = SkyWorld(2, 64).video([30]), SkyWorld(2, 128).video([30])
    assert (torch.nn.functional.avg_pool3d(large[None], (1, 2, 2))[0] - small).abs().mean() < 0.02


def test_splits_never_share_a_world():
    """Training draws seeds below 900,000 above its first: the ranges of the splits do not meet."""
    starts = sorted(SPLITS.values())
    assert all(b - a > 900_000 for a, b in zip(starts, starts[1:]))
    assert not torch.equal(SkyWorld(SPLITS["train"]).video([0]), SkyWorld(SPLITS["test"]).video([0]))


def test_clouds_drift_as_the_caption_says():
    """The cloud layer at frame f is the one at frame 0, moved by wind x f, to the pixel."""
    world = next(w for w in map(SkyWorld, range(99)) if w.pace == "slow")
    frames = np.array([0, 25])                                            # 25 frames x 0.12 pixels = 3 pixels
    light = np.ones((3, 2, 1, 1), np.float32)
    image = np.zeros((3, 2, 64, 64), np.float32)
    world._paint_clouds(image, frames, (np.float32(np.arange(64)) / 64)[:, None], light, light)
    assert np.allclose(np.roll(image[:, 0], round(world.wind * 25 * 64), axis=2), image[:, 1], atol=1e-5)
    assert (world.wind > 0) == ("wind right" in world.caption())


def test_balloons_follow_the_wind_and_keep_apart():
    """Around the cylinder with the wind, up and down between bounds, and never one behind another."""
    world = next(w for w in map(SkyWorld, range(99)) if len(w.colours) == 3)
    tracks = world.balloons(np.arange(2000))
    assert np.allclose(data.sideways(tracks[:, 1:, 0], tracks[:, :-1, 0]), world.wind)
    assert tracks[..., 1].min() >= 0.12 and tracks[..., 1].max() <= 0.55
    steps = np.abs(np.diff(tracks[..., 1], axis=1))
    assert np.allclose(np.median(steps, axis=1), np.abs(world.sinking))
    for i, j in ((0, 1), (0, 2), (1, 2)):
        assert np.abs(data.sideways(tracks[i, :, 0], tracks[j, :, 0])).min() > 2 * data.BALLOON_RADIUS


def test_the_world_is_a_cylinder():
    """The step from the last column back to the first is an ordinary step: no seam."""
    video = SkyWorld(3).video(np.arange(0, 400, 10))
    across = (video[..., 0] - video[..., -1]).abs().mean()
    inside = video.diff(dim=3).abs().mean(dim=(0, 1, 2))
    assert across < 2 * inside.max()


def test_balloon_colours_are_where_the_tracks_say():
    """The pixel in the middle of the topmost balloon has the balloon's hue."""
    world = SkyWorld(6)
    frames = np.arange(0, 100, 20)
    video, centre = (world.video(frames) + 1) / 2, world.balloons(frames)[-1]
    colour = np.array(data.BALLOONS[world.colours[-1]]) / 255
    for i, (x, y) in enumerate(centre):
        pixel = video[:, i, int(y * 64), int(x * 64)].numpy()
        assert np.corrcoef(pixel, colour)[0, 1] > 0.9


def test_a_day_later_the_light_is_the_same():
    """The sun is a clock with a period of DAY frames, in every world."""
    world = SkyWorld(9)
    assert np.allclose(world.lamps([0]), world.lamps([DAY])) and world.caption(0) == world.caption(DAY)


def test_batches_are_pure_functions_of_seed_and_step(tmp_path, small_config):
    """Asked twice, in another order, a batch is the same; another step or seed gives another."""
    source, shapes = clips(tmp_path), [schedule.training_windows("interp", 121)]
    for draw in (lambda seed, step: data.picture_batch("train", seed, step, 6, 64),
                 lambda seed, step: source.images(seed, step, 6)[0],
                 lambda seed, step: source.windows(shapes, seed, step, 6)["latents"]):
        first = draw(0, 5)
        other = draw(0, 6)
        assert torch.equal(first, draw(0, 5)) and not torch.equal(first, draw(1, 5))
        assert first.shape != other.shape or not torch.equal(first, other)


def test_windows_are_cut_from_the_clip_at_the_distances_of_the_plan(tmp_path):
    """latents[i] of a window are those of frame frames[i], shifted by one number for all.

    given and user are as planned."""
    source = clips(tmp_path, worlds=1)
    shapes = [schedule.training_windows("video", 121, ("ladder",))]
    for step in range(40):
        batch = source.windows(shapes, 0, step, 2)
        columns = (batch[key] for key in ("latents", "frames", "given", "user"))
        for latents, frames, given, user in zip(*columns):
            all_latents = source.read(0, torch.arange(121), False)
            matches = [shift for shift in range(-int(frames[0]), 121 - int(frames[-1]))
                       if torch.equal(all_latents[:, frames + shift], latents)]
            assert len(matches) == 1
            assert any(set(frames.tolist()) == set(w.frames)
                       and given.tolist() == [f not in w.new for f in w.frames] for w in shapes[0])
            assert not (user & ~given).any() and (user | (frames != 0)).all()


def test_the_cache_is_made_once_and_again_when_the_vae_changes(tmp_path):
    """Same key: read from disk, bit for bit. Another key: made anew.

    Half a file never appears under the name."""
    first = clips(tmp_path, worlds=2, frames=range(3))
    again = sky_clips(str(tmp_path / "clips.safetensors"), None, range(2), range(3), 64, "vae")  # cannot encode
    assert all(torch.equal(first.read(i, torch.arange(3), False), again.read(i, torch.arange(3), False))
               for i in range(2))
    with pytest.raises(TypeError):
        sky_clips(str(tmp_path / "clips.safetensors"), None, range(2), range(3), 64, "another vae")
    assert [p.name for p in tmp_path.iterdir()] == ["clips.safetensors"]


def test_pixels_survive_the_way_to_a_tensor_and_back():
    """A given picture must come back bit for bit."""
    pixels = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    assert np.array_equal(data.to_pixels(data.from_pixels(Image.fromarray(pixels)))[0], pixels)


@pytest.mark.parametrize("name", ["sheet.png", "clip.gif"])
def test_preview_writes_a_picture(tmp_path, name, capsys):
    """`python data.py --preview FILE` leaves a file that Pillow can open."""
    data.main(["--preview", str(tmp_path / name), "--size", "16"])
    with Image.open(tmp_path / name) as image:
        assert getattr(image, "n_frames", 1) > 100 if name.endswith("gif") else image.width == 9 * 16 * 8


@pytest.mark.parametrize("argv, words", [
    (["--preview", "x.txt"], ".png"), (["--preview", "x.png", "--size", "20"], "multiples of 8")])
def test_bad_input_is_named(argv, words):
    """One sentence that says what was wrong and what would be right."""
    with pytest.raises(ValueError, match=words):
        data.main(argv)
