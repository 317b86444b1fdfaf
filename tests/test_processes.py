"""pytest tests/test_processes.py: a run shared by several processes is that of one, and resumes exactly."""

import csv
import json
import multiprocessing
import os
import shutil
import socket
from types import SimpleNamespace

import pytest
import torch

import train
from conftest import validate_briefly
from model import UNet


def work(rank, world, port, argv, crash):
    """One process of a run, set up as torchrun does it; `crash`: the step it dies at, if any."""
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world), LOCAL_RANK=str(rank), MASTER_PORT=str(port),
                      LOCAL_WORLD_SIZE=str(world), MASTER_ADDR="127.0.0.1")
    torch.set_num_threads(1)
    get_learning_rate = train.get_learning_rate

    def dying(step, args):
        """The learning rate, but not at that step."""
        if step == crash:
            os._exit(7)
        return get_learning_rate(step, args)

    validate_briefly()   # there are no fixtures in a child
    train.get_learning_rate, train.sample_sheet = dying, lambda *_: None
    train.main(argv)


def run(folder, weights, n, *more, stage="interp", crash=None, steps=3):
    """A short run of n processes into a folder. Returns the folder."""
    argv = ["--stage", stage, "--out", str(folder), "--max_steps", str(steps), "--batch_size", "4",
            "--gradient_accumulation_steps", "2", "--worlds", "2", "--frames", "31", "--warmup_steps", "2",
            "--val_every", "100", "--sample_every", "0", "--save_every", "2", "--device", "cpu", *more]
    argv += ["--weights", weights] if stage != "vae" else []
    context = multiprocessing.get_context("forkserver")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    children = [context.Process(target=work, args=(rank, n, port, argv, crash)) for rank in range(n)]
    for child in children:
        child.start()
    for child in children:
        child.join()
    assert [child.exitcode for child in children] == [7 if crash else 0] * n
    return folder


def rows(folder):
    """The log of a run: losses, validation losses and lengths of gradients."""
    with open(folder / "log.csv", newline="") as file:
        return [[float(row[key] or 0) for key in ("loss", "val_loss", "grad_norm")]
                for row in csv.DictReader(file)]


def checkpoint(folder):
    """The last checkpoint of a run."""
    return torch.load(folder / "ckpt.pt", weights_only=True)


@pytest.fixture(scope="module")
def whole(tmp_path_factory, small_weights):
    """A function (number of processes, *flags) -> the folder of their run of 3 steps of 2 x 4 examples."""
    done = {}

    def folder(n, *flags):
        """Made when it is first asked for."""
        if (n, flags) not in done:
            done[n, flags] = run(tmp_path_factory.mktemp("whole") / "interp", small_weights, n, *flags)
        return done[n, flags]

    return folder


@pytest.mark.parametrize("n, flags", [(2, []), (2, ["--shard"]), (2, ["--pipeline"]), (4, ["--pipeline"])])
def test_curves_are_those_of_one_process(whole, n, flags):
    """Losses and lengths of gradients within 1e-5, their means to 1e-4, and no file more or less.

    Weights within a tenth of a step, unless their gradient is only rounding: Adam goes as far on that as on
    any other. A bias that the next norm takes off again has such a gradient."""
    shared, alone = whole(n, *flags), whole(1)
    assert sorted(os.listdir(shared)) == sorted(os.listdir(alone))
    for one, other in zip(rows(shared), rows(alone), strict=True):
        assert one == pytest.approx(other, rel=1e-5)
    one, other = checkpoint(shared), checkpoint(alone)
    assert one["ema"].keys() == other["ema"].keys()
    slopes = [[state["exp_avg"] for state in run["optimizer"]["state"].values()] for run in (one, other)]
    steepest = max(slope.abs().max() for slope in slopes[1])
    for name, slope, same in zip(one["ema"], *slopes, strict=True):
        assert (slope - same).abs().max() < 1e-4 * steepest
        if same.abs().max() > 1e-6 * steepest:
            assert (one["ema"][name] - other["ema"][name]).abs().max() < 2e-4   # the learning rate is 2e-3


def test_the_image_stage_is_shared_too(tmp_path, small_weights):
    """A network that trains as a whole, with the text encoder, gives the same curve as well."""
    one, two = (run(tmp_path / str(n) / "image", small_weights, n, stage="image", steps=2) for n in (1, 2))
    for row, other in zip(rows(one), rows(two), strict=True):
        assert row == pytest.approx(other, rel=1e-5)


def test_a_resumed_run_is_exact_and_fits_any_number_of_processes(tmp_path, small_weights, whole):
    """2 sharded processes, dead after step 2.

    Resumed by 2 it is bit for bit the run that went through, resumed by 1 it has its curve."""
    cut = run(tmp_path / "two" / "interp", small_weights, 2, "--shard", crash=2)
    assert checkpoint(cut)["step"] == 2
    assert all(type(tensor) is torch.Tensor for tensor in checkpoint(cut)["ema"].values())
    shutil.copytree(tmp_path / "two", tmp_path / "one")
    run(cut, small_weights, 2, "--shard", "--resume", "auto")
    assert rows(cut) == rows(whole(2, "--shard"))
    one, other = checkpoint(whole(2, "--shard")), checkpoint(cut)
    for part in ("model", "ema"):
        assert all(torch.equal(one[part][name], other[part][name]) for name in one[part])
    for moments, same in zip(one["optimizer"]["state"].values(), other["optimizer"]["state"].values()):
        assert all(torch.equal(moments[key], same[key]) for key in ("step", "exp_avg", "exp_avg_sq"))
    alone = run(tmp_path / "one" / "interp", small_weights, 1, "--resume", "auto")
    for one, other in zip(rows(alone), rows(whole(1)), strict=True):
        assert one == pytest.approx(other, rel=1e-5)


@pytest.mark.parametrize("n, argv, words", [
    (1, ["--shard"], "found one: start with torchrun"), (2, ["--shard", "--pipeline"], "leave one away"),
    (2, ["--stage", "image", "--shard"], "found image"), (3, ["--pipeline"], "pairs of processes, found 3"),
    (2, ["--pipeline", "--mixed_precision", "fp16"], "take bf16"), (4, [], "6 cannot be shared by 4"),
    (4, ["--pipeline", "--batch_size", "2"], "give 4 or more"),
    (2, ["--data", "x", "--score", "y"], "without torchrun"),
    (2, ["--error_bank", "0.5"], "one process, found 2")])
def test_runs_that_cannot_be_shared_say_why(n, argv, words):
    """In one sentence, before anything is made."""
    args = train.parse(["--stage", "interp", *argv])
    with pytest.raises(ValueError, match=words):
        train.batch_parts(args, n)


@pytest.mark.usefixtures("quick_validation", "no_sheet")
def test_profile_shows_where_the_time_of_a_step_goes(tmp_path, small_weights, capsys):
    """Four parts that make up nearly the whole step, and a trace that can be opened."""
    train.main(["--stage", "interp", "--out", str(tmp_path / "run"), "--max_steps", "6", "--batch_size", "1",
                "--worlds", "2", "--frames", "31", "--weights", small_weights, "--profile"])
    lines = [line.split() for line in capsys.readouterr().out.splitlines() if "ms a step" in line]
    shares = {line[0]: float(line[-1].rstrip("%")) for line in lines}
    assert list(shares) == ["data", "forward", "backward", "optimizer"]
    assert all(shares[name] for name in ("forward", "backward", "optimizer"))    # data may round to nothing
    assert 80 < sum(shares.values()) <= 100
    assert json.load(open(tmp_path / "run" / "trace.json"))["traceEvents"]


@pytest.mark.skipif(not shutil.which("c++"), reason="torch.compile needs a C++ compiler")
def test_compiled_stages_give_the_same_answers(small_config):
    """A stage that compile_stages has compiled keeps its names, its output and its gradient."""
    torch.manual_seed(0)
    stage, x, emb = UNet(small_config).stages()[1], torch.randn(3, 32, 8, 8), torch.randn(3, 32)
    weights, names = list(stage.get_submodule("0.in_layers").parameters()), list(stage.state_dict())
    eager = torch.autograd.grad(stage(x, emb, None).square().mean(), weights)
    train.compile_stages(SimpleNamespace(stages=lambda: [stage]), torch.device("cpu"))
    again = torch.autograd.grad(stage(x, emb, None).square().mean(), weights)
    assert stage._compiled_call_impl is not None and list(stage.state_dict()) == names
    for one, other in zip(eager, again, strict=True):
        assert torch.allclose(one, other, rtol=1e-4, atol=1e-6)


def test_where_nothing_can_be_compiled_compile_says_so(small_config, monkeypatch):
    """No compiler: one sentence, before a step is spent."""
    def fail(function):
        """What torch.compile does where there is no compiler."""
        raise RuntimeError("no working C++ compiler")

    monkeypatch.setattr(torch, "compile", fail)
    with pytest.raises(ValueError, match="no working C.. compiler.*leave --compile away"):
        train.compile_stages(UNet(small_config), torch.device("cpu"))
