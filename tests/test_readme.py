"""pytest tests/test_readme.py: every command of the README runs, in its order, in one folder, with a narrow
model, few steps and few frames. Its plan and its table of files are right."""
import gzip
import json
import re
import shlex
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import evaluate
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from test_data import encode, sky
from test_long import no_films   # noqa: F401

import convert_sd_weights
import data
import model
import sample
import schedule
import train

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text("utf-8")
SCRIPTS = {"sample.py": sample, "train.py": train, "data.py": data, "schedule.py": schedule,
           "convert_sd_weights.py": convert_sd_weights, "tests/evaluate.py": evaluate}
ELSEWHERE = {   # commands that this file does not run, and where they run
    "git clone": "CI", "python -m venv": "CI", "pip install": "CI", "pytest": "this is it",
    "python tests/benchmark.py": "takes minutes: the dry run by every flag",
    "python tests/gpu_check.py": "takes a GPU",
    "torchrun --nproc_per_node=2 train.py ...": "tests/test_processes.py"}
SHORT = {"--frames": "9", "--extend": "2", "--size": "64"}    # values in place of the README's
MORE = {"sample.py": "--steps 1", "tests/evaluate.py": "--worlds 1 --frames 9 --steps 1",
        "train.py": "--max_steps 2 --batch_size 2 --worlds 2"}


def commands():
    """All commands, in code blocks and in the text, in the order of the README, without comments."""
    parts = re.findall(r"^```(\w*)\n(.*?)^```|`([^`]+)`", README, re.DOTALL | re.MULTILINE)
    in_blocks = [line for _, block, _ in parts for line in block.split("\n")]
    for language, block, inline in parts:
        for line in [] if language else block.split("\n") if block else [inline.replace("\n", " ")]:
            command = re.sub(r"^\$ |\s+#.*", "", line)
            if re.match(r"(python|torchrun|pip|pytest|git)( |$)", command):
                if block or command not in in_blocks:
                    yield command


def shorten(words):
    """The same command for a shorter video, or with fewer steps."""
    words = [SHORT.get(before, word) for before, word in zip(["", *words], words)]
    words = [re.sub(r"^\d{2,}:", "8:", word) for word in words]                  # FRAME:FILE and FRAME:TEXT
    return [*words, *(MORE.get(words[0], "").split() if "--dry_run" not in words else [])]


@pytest.fixture
def folder(tmp_path, monkeypatch, small_weights, small_config):
    """An empty folder, but for the files that the README says are yours. Narrow models stand for the one that
    ships and for SD1.5."""
    monkeypatch.chdir(tmp_path)
    clip = json.loads(gzip.decompress((ROOT / "tests/fixtures/tokenizer.json.gz").read_bytes()))
    merges = [clip["merges"][str(i)] for i in range(86)]
    sd15 = replace(small_config, name="sd15", prediction="eps", zero_terminal_snr=False, vocabulary=600)
    for script in (sample, train):
        monkeypatch.setattr(script, "TINY_WEIGHTS", small_weights)
    monkeypatch.setattr(sample, "FIRST_FRAME_STEPS", 1)
    monkeypatch.setitem(model.PRESETS, "tiny", small_config)
    monkeypatch.setitem(model.PRESETS, "sd15", sd15)
    image_model = {key: x for key, x in model.Model.build(sd15).state().items() if not model.is_temporal(key)}
    save_file(image_model, "v1-5-pruned-emaonly.safetensors")
    Path("bpe_simple_vocab_16e6.txt.gz").write_bytes(gzip.compress("\n".join(merges).encode()))
    for name in ("a", "b", "first", "photo"):
        Image.fromarray(sky(0, 1)[0]).save(f"{name}.png")
    for seed in range(6):
        encode(tmp_path / "my_videos" / f"{seed}.mp4", pixels=sky(seed, 30), fps=8)
    return tmp_path


def test_every_command_runs_in_the_order_of_the_readme(folder, capsys):
    ran = []
    for command in commands():
        if any(command.startswith(known) for known in ELSEWHERE):
            continue
        words = shlex.split(command)
        if words[0] == "torchrun":
            script = next(i for i, word in enumerate(words) if word.endswith(".py"))
            rest = shorten(words[script:])
            run = [sys.executable, "-m", "torch.distributed.run", *words[1:script], ROOT / rest[0], *rest[1:]]
            subprocess.run(list(map(str, run)), cwd=folder, check=True, capture_output=True)
        else:
            script, *flags = shorten(words[1:])
            print(command)
            SCRIPTS[script].main(flags)
        ran.append(command)
    assert len(ran) > 25 and {"python sample.py --frames 121", "python train.py --stage interp"} <= set(ran)
    plan = subprocess.run([sys.executable, ROOT / "schedule.py", "17"], capture_output=True, text=True).stdout
    assert plan in README


def test_files_and_lines_are_those_of_the_table():
    rows = re.findall(r"^\| \[(\w+\.py)\]\(\1\) \| (\d+) \|", README, re.MULTILINE)
    lines = {path.name: str(len(path.read_text("utf-8").splitlines())) for path in ROOT.glob("*.py")}
    assert dict(rows) == lines
    assert all((ROOT / path).exists() for path in re.findall(r"\]\((?!http)([^)]+)\)", README))
