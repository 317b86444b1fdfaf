"""What several test files need: the project on the path, and models small enough to train in a test."""

import csv
import multiprocessing
import os
import sys
from dataclasses import replace

import pytest
import torch

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import train  # noqa: E402
from model import PRESETS, Model, is_temporal, load_weights, save_weights  # noqa: E402

# validation takes most of the time of a run of few steps: one noise level per quarter of the range will do
train.LEVELS = train.LEVELS[1::2]

# tests that start several processes fork them from one that has imported all this once, and done nothing else
multiprocessing.set_forkserver_preload(["train", "sample", "torch._dynamo"])


def assert_same_run(folder, other):
    """Two runs ended alike, bit for bit: weights, average, optimizer and log, but for the time it took."""
    one, two = (torch.load(path / "ckpt.pt", weights_only=True) for path in (folder, other))
    assert one["step"] == two["step"]
    for part in ("model", "ema"):
        assert all(torch.equal(one[part][name], two[part][name]) for name in one[part])
    states, others = (run["optimizer"]["state"].values() for run in (one, two))
    for state, same in zip(states, others, strict=True):
        assert all(torch.equal(state[key], same[key]) for key in ("step", "exp_avg", "exp_avg_sq"))
    log, same = ([row | {"seconds": 0} for row in csv.DictReader(open(path / "log.csv"))]
                 for path in (folder, other))
    assert log == same and len(log) == one["step"] + 1


@pytest.fixture(scope="session")
def small_config():
    """The tiny preset, narrower and shallower: same classes, same code path."""
    return replace(PRESETS["tiny"], widths=(32, 32), attention_levels=(1,), heads=2, emb_dim=32,
                   temporal_emb_dim=32, vae_widths=(16, 16), text_width=32, text_layers=1, text_heads=2)


def random_weights(config, folder):
    """A weights file with random numbers in it, temporal layers at the identity."""
    torch.manual_seed(0)
    save_weights(str(folder / "image.safetensors"), Model.build(config), torch.float32, stage="image")
    return str(folder / "image.safetensors")


@pytest.fixture(scope="session")
def small_weights(small_config, tmp_path_factory):
    """Those of the small model."""
    return random_weights(small_config, tmp_path_factory.mktemp("small"))


@pytest.fixture(scope="session")
def restless_weights(small_weights, tmp_path_factory):
    """Weights whose temporal layers do something, so that windows really depend on their given frames."""
    model = load_weights(small_weights)
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.unet.named_parameters():
        if is_temporal(name):
            parameter.data += 0.03 * torch.randn(parameter.shape, generator=generator)
    path = str(tmp_path_factory.mktemp("weights") / "restless.safetensors")
    save_weights(path, model, torch.float32)
    return path


@pytest.fixture(scope="session")
def little_config(small_config):
    """The same for pictures of 32 x 32 pixels: to train for a few steps, and to validate, in a second."""
    return replace(small_config, size=32)


@pytest.fixture(scope="session")
def little_weights(little_config, tmp_path_factory):
    """Those of the little model."""
    return random_weights(little_config, tmp_path_factory.mktemp("little"))


@pytest.fixture(scope="session")
def train_argv(little_weights):
    """A function (folder, **flags) -> the command line of a run of a few short steps into folder/STAGE.

    True stands for a flag without a value."""
    def argv(folder, **flags):
        flags = dict(stage="interp", weights=little_weights, max_steps=3, batch_size=2, worlds=2, frames=31,
                     save_every=100, device="cpu") | flags
        flags = {"out": folder / flags["stage"]} | flags
        return [word for name, value in flags.items()
                for word in ([f"--{name}"] if value is True else [f"--{name}", str(value)])]

    return argv
