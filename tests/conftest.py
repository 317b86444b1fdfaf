"""What several test files need: the project on the path, and a model small enough to train in a test."""

import os
import sys
from dataclasses import replace

import pytest
import torch

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from model import PRESETS, Model, save_weights  # noqa: E402


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
