"""pytest tests/test_processes.py: a run shared by several processes is that of one, and resumes exactly."""

import csv
import json
import multiprocessing
import os
import shutil
import socket
from functools import cache

import pytest
import torch

import train
from conftest import assert_same_run


def work(rank, world, port, machines, argv, crash):
    """One process of a run, set up as torchrun does it; `crash`: the step it dies at, if any."""
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world), LOCAL_RANK=str(rank % (world // machines)),
                      LOCAL_WORLD_SIZE=str(world // machines), GROUP_RANK=str(rank * machines // world),
                      MASTER_PORT=str(port), MASTER_ADDR="127.0.0.1")
    torch.set_num_threads(1)
    rate = train.get_learning_rate
    train.get_learning_rate = lambda step, args: os._exit(7) if step == crash else rate(step, args)
    train.main(argv)


def start(argvs, machines=1, crash=None):
    """Run a process for each command line."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context, n = multiprocessing.get_context("forkserver"), len(argvs)
    children = [context.Process(target=work, args=(rank, n, port, machines, argv, crash))
                for rank, argv in enumerate(argvs)]
    for child in children:
        child.start()
    for child in children:
        child.join()
    assert [child.exitcode for child in children] == [7 if crash else 0] * n


SHORT = dict(batch_size=4, gradient_accumulation_steps=2, save_every=2)     # 3 steps of 2 x 4 examples


@pytest.fixture(scope="module")
def whole(tmp_path_factory, train_argv):
    """A function (number of processes, **flags) -> the folder of their run. No run is made twice."""
    @cache
    def folder(n, stage="interp", **flags):
        place = tmp_path_factory.mktemp("whole")
        start([train_argv(place, stage=stage, **SHORT, **flags)] * n)
        return place / stage

    return folder


def rows(folder):
    """The log of a run: losses, validation losses and lengths of gradients."""
    with open(folder / "log.csv", newline="") as file:
        return [[float(row[key] or 0) for key in ("loss", "val_loss", "grad_norm")]
                for row in csv.DictReader(file)]


@pytest.mark.parametrize("n, flags", [(2, {}), (2, {"pipeline": True}), (4, {"pipeline": True}),
                                      (2, {"stage": "image"})], ids=str)
def test_curves_are_those_of_one_process(whole, n, flags):
    """Losses and lengths of gradients within 1e-5, their means to 1e-4, and no file more or less.

    Weights within a tenth of a step, unless their gradient is only rounding: Adam goes as far on that as on
    any other. A bias that the next norm takes off again has such a gradient."""
    shared, alone = whole(n, **flags), whole(1, flags.get("stage", "interp"))
    assert sorted(os.listdir(shared)) == sorted(os.listdir(alone))
    for one, other in zip(rows(shared), rows(alone), strict=True):
        assert one == pytest.approx(other, rel=1e-5)
    one, other = (torch.load(folder / "ckpt.pt", weights_only=True) for folder in (shared, alone))
    slopes = [[state["exp_avg"] for state in run["optimizer"]["state"].values()] for run in (one, other)]
    steepest = max(slope.abs().max() for slope in slopes[1])
    for name, slope, same in zip(one["ema"], *slopes, strict=True):
        assert (slope - same).abs().max() < 1e-4 * steepest
        if same.abs().max() > 1e-6 * steepest:
            assert (one["ema"][name] - other["ema"][name]).abs().max() < 2e-4   # the learning rate is 2e-3


def test_two_machines_share_messages_only_and_resume_exactly(tmp_path, little_weights, train_argv, whole):
    """Each has its own folder, cache and weights, and dies after step 2; only rank 0's folder holds the run.

    Resumed by both it is bit for bit the run that went through, resumed by one process it has its curve."""
    argvs = []
    for machine in ("first", "second"):
        os.mkdir(tmp_path / machine)
        own = shutil.copy(little_weights, tmp_path / machine / "own.safetensors")
        argvs.append(train_argv(tmp_path / machine, weights=own, **SHORT))
    start(argvs, machines=2, crash=2)
    shutil.copytree(tmp_path / "first" / "interp", tmp_path / "alone")
    start([[*argv, "--resume", "auto"] for argv in argvs], machines=2)
    assert sorted(os.listdir(tmp_path / "second")) == ["cache", "own.safetensors"]
    assert_same_run(tmp_path / "first" / "interp", whole(2))
    start([[*argvs[0], "--out", str(tmp_path / "alone"), "--resume", "auto"]])
    for row, same in zip(rows(tmp_path / "alone"), rows(whole(1)), strict=True):
        assert row == pytest.approx(same, rel=1e-5)


@pytest.mark.parametrize("n, argv, words", [
    (3, ["--pipeline"], "pairs of processes, found 3"), (4, [], "6 cannot be shared by 4"),
    (4, ["--pipeline", "--batch_size", "3"], "3 cannot be shared by 2")])
def test_runs_that_cannot_be_shared_say_why(tmp_path, n, argv, words):
    """In one sentence, before anything is made."""
    with pytest.raises(ValueError, match=words):
        train.batch_part(train.parse(["--stage=interp", f"--out={tmp_path / 'run'}", *argv]), 0, n)


def test_profile_shows_where_the_time_of_a_step_goes(tmp_path, train_argv, capsys):
    """Forward, backward and optimizer are in the table, and in a trace that can be opened."""
    train.main(train_argv(tmp_path, max_steps=6, batch_size=1, profile=True))
    printed = capsys.readouterr().out
    names = {event["name"] for event in json.load(open(tmp_path / "interp" / "trace.json"))["traceEvents"]}
    assert {"aten::conv2d", "Optimizer.step#AdamW.step"} <= names and "Self CPU time total" in printed
    assert all(part in printed for part in ("aten::conv2d", "ConvolutionBackward", "Optimizer.step"))
