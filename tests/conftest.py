"""What several test files need: the project on the path, and a model small enough to train in a test."""

import multiprocessing
import os
import sys
from dataclasses import replace

import pytest
import torch

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import train  # noqa: E402
from model import PRESETS, Model, is_temporal, load_weights, save_weights  # noqa: E402

# tests that start several processes fork them from one that has imported all this once, and done nothing else
multiprocessing.set_forkserver_preload(["train", "sample", "torch._dynamo", "torch.distributed.fsdp",
                                        "torch.distributed.pipelining"])


@pytest.fixture(scope="session")
def small_config():
    """The tiny preset, narrower and shallower: same classes, same code path."""
    return replace(PRESETS["tiny"], widths=(32, 32), attention_levels=(1,), heads=2, emb_dim=32,
                   temporal_emb_dim=32, vae_widths=(16, 16), text_width=32, text_layers=1, text_heads=2)


@pytest.fixture(scope="session")
def small_weights(small_config, tmp_path_factory):
    """A weights file with random numbers in it, temporal layers at the identity."""
    torch.manual_seed(0)
    path = str(tmp_path_factory.mktemp("weights") / "small.safetensors")
    save_weights(path, Model.build(small_config), torch.float32, stage="image")
    return path


@pytest.fixture(scope="session")
def restless_weights(small_weights, tmp_path_factory):
    """Weights whose temporal layers do something, so that windows really depend on their given frames."""
    model = load_weights(small_weights)
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.unet.named_parameters():
        if is_temporal(name):
            parameter.data += 0.05 * torch.randn(parameter.shape, generator=generator)
    path = str(tmp_path_factory.mktemp("weights") / "restless.safetensors")
    save_weights(path, model, torch.float32)
    return path


def validate_briefly(change=setattr):
    """One example at every second level: validation is half of a short run, and few tests are about it."""
    validation_loss = train.validation_loss

    def short(model, schedule, batches, args, device):
        """The validation loss of very little."""
        first = {key: values[:1] for key, values in batches[0].items()}
        return validation_loss(model, schedule, [first], args, device, train.LEVELS[1::2])

    change(train, "validation_loss", short)


@pytest.fixture
def quick_validation(monkeypatch):
    """That, for one test."""
    validate_briefly(monkeypatch.setattr)


@pytest.fixture
def no_sheet(monkeypatch):
    """No contact sheet at the end of a run: a third of a run of few steps."""
    monkeypatch.setattr(train, "sample_sheet", lambda *_: None)
