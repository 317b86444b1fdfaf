"""Run: python -m pytest -q tests/test_schedule.py"""

import math
from dataclasses import replace

import pytest

import schedule
from schedule import (assign, autoregressive, build, costs, cut, extension, hierarchical, joint, main,
                      makespan, reach, share, shortest_clip, show, verify, window_shapes)

LENGTHS = [*range(1, 201), 500, 2300, 10000]


@pytest.mark.parametrize("options", ({}, {"max_stride": 1}, {"max_stride": 64}), ids=str)
def test_a_hierarchical_plan_makes_every_frame_once_from_any_user_frames(options):
    """Windows have at most 7 frames, all of the video: nothing is padding."""
    for n in LENGTHS:
        for given in {(0,), (0, n - 1), (0, n // 3, n // 2), (*range(min(n, 5)),), (n - 1,), (n // 3, n - 1)}:
            plan = hierarchical(n, given, **options)
            verify(plan, n, given)
            assert max([n, *(w.frames[-1] + 1 for w in plan)]) == n and all(len(w.frames) <= 7 for w in plan)


def test_an_autoregressive_plan_makes_every_frame_once_and_pads_less_than_a_loop():
    """Windows have at most 8 frames, and the plan ends after 7 frames and whole loops of 12."""
    for n in LENGTHS:
        plan = autoregressive(n)
        verify(plan, n)
        length = max([n, *(w.frames[-1] + 1 for w in plan)])
        assert length == (n if n <= 7 else 7 + 12 * math.ceil((n - 7) / 12))
        assert all(len(w.frames) <= 8 for w in plan)


def test_the_autoregressive_plan_is_the_published_list():
    """Counted from 1, as in the blog; each loop is 12 frames further."""
    plan = [([f + 1 for f in w.given], [f + 1 for f in w.new], w.stage) for w in autoregressive(121)]
    assert plan[:7] == [
        ([1], [2, 3, 4, 5, 6, 7], "starter"), ([1, 2, 3, 7], [11, 15, 19], "extrap"),
        ([1, 2, 6, 7, 11], [8, 9, 10], "interp"), ([1, 2, 10, 11, 15], [12, 13, 14], "interp"),
        ([1, 2, 14, 15, 19], [16, 17, 18], "interp"), ([1, 2, 15, 19], [23, 27, 31], "extrap"),
        ([1, 2, 18, 19, 23], [20, 21, 22], "interp")]
    assert [(w.given, w.new) for w in autoregressive(5)] == [((0,), (1, 2, 3, 4))] and autoregressive(1) == []


@pytest.mark.parametrize("n, given, stride", [
    (1, (0,), 16), (2, (0,), 1), (121, (0,), 16), (121, (0,), 4), (300, (0,), 1), (100, (0, 40, 99), 4)])
def test_a_joint_plan_makes_all_keyframes_in_one_window_and_fills_the_same_gaps(n, given, stride):
    """It is the only window of depth 0; with stride 1 it is the whole plan."""
    plan, split = joint(n, given, stride), hierarchical(n, given, stride)
    verify(plan, n, given)
    infill = lambda plan: [(w.frames, w.new) for w in plan if w.gap <= stride and len(w.new) <= 3]
    assert sum(w.depth == 0 for w in plan) <= 1 and infill(plan) == infill(split)
    assert plan == [] or set(plan[0].frames) == {*given, *range(n)[::stride], n - 1}


@pytest.mark.parametrize("plan", (autoregressive(61), hierarchical(61, (0, 60)), joint(300)))
def test_a_window_depends_on_the_windows_that_make_its_given_frames(plan):
    """They come earlier in the list, and the window is one deeper than the deepest of them."""
    for i, w in enumerate(plan):
        reads = {j for j, other in enumerate(plan) if set(w.given) & set(other.new)}
        assert all(j < i for j in reads)
        assert w.depth == 1 + max((plan[j].depth for j in reads), default=-1)


def test_the_stage_says_what_a_window_does_and_the_stride_follows_from_the_length():
    """starter: one given frame, extrap: new ones outside, interp: between. 7 frames span a short video."""
    assert [w.stage for w in hierarchical(121)] == ["starter", "extrap"] + 38 * ["interp"]
    assert {w.stage for w in hierarchical(121, (0, 120))} == {"interp"}
    assert [w.stage for w in hierarchical(121, (60, 61))[:2]] == ["extrap", "extrap"]
    assert [hierarchical(n)[0].frames[1] for n in (7, 8, 25, 26, 97, 98)] == [1, 4, 4, 16, 16, 16]
    assert [hierarchical(385, max_stride=stride)[0].frames[1] for stride in (3, 63, 64)] == [1, 16, 64]


@pytest.mark.parametrize("planner, options, figures", [
    (autoregressive, {}, [(41, 32, 317, 32), (169, 128, 1309, 128), (769, 578, 5959, 578)]),
    (hierarchical, {}, [(40, 6, 272, 7), (164, 12, 1142, 22), (755, 40, 5277, 96)]),
    (hierarchical, {"max_stride": 64}, [(41, 7, 275, 8), (166, 8, 1154, 23), (764, 15, 5338, 97)])])
def test_what_the_plans_cost(planner, options, figures):
    """Windows, depth, evaluations, and makespan on 8 devices at 121, 500 and 2300 frames."""
    for n, (windows, depth, evaluations, time) in zip((121, 500, 2300), figures):
        plan = planner(n, **options)
        assert costs(plan).startswith(f"{windows} windows, depth {depth}, {evaluations} frame evaluations")
        assert [makespan(plan, devices) for devices in (1, 8, windows)] == [windows, time, depth]


@pytest.mark.parametrize("max_stride", (16, 64))
def test_an_extension_makes_the_rest_once_and_its_boundary_is_like_any_other(max_stride):
    """No infill window is of a kind that a plain hierarchical plan does not have: only the place differs."""
    shape = lambda w: tuple(f - w.frames[0] for f in w.frames)
    infill = {shape(w) for n in (385, 386, 390, 401, 449) for w in hierarchical(n, max_stride=max_stride)
              if w.stage == "interp"}
    for known, n in ((1, 2), (5, 60), (121, 122), (121, 181), (97, 400), (121, 2300), (500, 10000)):
        plan = extension(n, known, max_stride)
        verify(plan, n, range(known))
        assert max(w.frames[-1] for w in plan) < n and all(len(w.frames) <= 7 for w in plan)
        if known > max_stride and (n - known) % max_stride == 0:
            assert all(shape(w) in infill for w in plan if w.stage == "interp")
    assert extension(400, 121, max_stride)[0].given == (0, 120 - max_stride, 120)   # and the anchor


@pytest.mark.parametrize("borders", ((0,), (0, 60), (0, 1, 2, 3), (0, 33, 34, 100)))
@pytest.mark.parametrize("plan", (hierarchical(121), joint(121), autoregressive(121)), ids=len)
def test_a_cut_plan_has_no_window_that_makes_frames_on_both_sides_of_a_border(plan, borders):
    """All frames are still made once, in windows of no more frames."""
    parts = cut(plan, borders)
    verify(parts, 121)
    assert all(len({sum(f >= border for border in borders) for f in w.new}) == 1 for w in parts)
    assert max(len(w.frames) for w in parts) <= max(len(w.frames) for w in plan)
    assert borders != (0,) or parts == plan


@pytest.mark.parametrize("i, changes, sentence", [
    (1, {"frames": (-1, 1, 2, 7, 10, 14, 18)}, r"window 1 must .*\[-1, 7\] do not exist yet"),
    (1, {"new": ()}, "window 1 must make new"), (2, {"new": (6, 7, 8, 9)}, r"window 2 .*\[6\] exist already"),
    (0, {"new": (0, 1, 2, 3, 4, 5, 6)}, r"window 0 must .*\[0\] exist already"),
    (4, {"frames": (0, 1, 13, 14, 16, 17, 18), "new": (16, 17)}, "1 of 19 frames are missing, like 15")])
def test_verify_says_what_is_wrong(i, changes, sentence):
    """One broken plan per kind of break."""
    plan = autoregressive(19)
    plan[i] = replace(plan[i], **changes)
    with pytest.raises(ValueError, match=sentence):
        verify(plan, 19)


def test_a_picture_shows_every_window_and_fits_the_terminal():
    """A row per window, marked as its frames are; the picture in the module's docstring is the real one."""
    for planner, n in (autoregressive, 122), (hierarchical, 2300), (autoregressive, 9000), (joint, 1):
        plan = planner(n)
        lines = show(plan, n).splitlines()
        assert sum(stage in line for line in lines for stage in schedule.STAGES) == len(plan)
        assert max(map(len, lines)) <= 140
    assert "frames 122..126 are padding" in show(autoregressive(122), 122)
    rows = show(hierarchical(17), 17).splitlines()[1:-2]
    assert "".join(f"    {row}\n" for row in rows) in schedule.__doc__


@pytest.mark.parametrize("n", (19, 61, 121, 127))
def test_training_shows_the_windows_that_sampling_asks_for_and_no_others(n):
    """Every one that fits in the clip, once per source up to a shift, and frame 0 stays frame 0."""
    shape = lambda w: (w.stage, w.frames[0] == 0, tuple((f - w.frames[0], f in w.new) for f in w.frames))
    plans = [hierarchical(k, given) for k in (n, (n + 1) // 2, (n + 3) // 4) for given in ((0,), (0, k - 1))]
    asked = {shape(w) for plan in (*plans, autoregressive(n)) for w in plan if w.frames[-1] < n}
    shapes = window_shapes("video", n)
    assert {shape(w) for _, windows in shapes for w in windows} == asked
    for _, windows in shapes:
        assert all(reach(w) < n for w in windows)
        assert len({shape(w) for w in windows}) == len(windows)
    for stage in schedule.STAGES:
        assert window_shapes(stage, n) == [pair for pair in shapes if pair[1][0].stage == stage]


def test_keyframes_are_drawn_often_and_small_gaps_seldom():
    """(share, stage, windows, largest gap) of the lists at 121 frames."""
    assert [(share, windows[0].stage, len(windows), max(w.gap for w in windows))
            for share, windows in window_shapes("video", 121)] == [
        (6, "starter", 1, math.inf), (8, "extrap", 1, math.inf), (4, "interp", 7, 120), (2, "interp", 4, 4),
        (3, "starter", 1, math.inf), (4, "extrap", 9, math.inf), (1, "interp", 28, 4),
        (3, "starter", 2, math.inf), (2, "interp", 8, 60), (1, "interp", 6, 4)]


@pytest.mark.parametrize("stage", (*schedule.STAGES, "video"))
def test_the_shortest_clip_of_a_stage_is_the_shortest(stage):
    """From there on every plan has a window of the stage; below, none has."""
    windows = lambda n: hierarchical(n) + hierarchical(n, (0, n - 1)) + autoregressive(n)
    fits = [any(stage in (w.stage, "video") and w.frames[-1] < n for w in windows(n)) for n in range(1, 200)]
    assert fits.index(True) + 1 == shortest_clip(stage) and all(fits[fits.index(True):])
    assert window_shapes(stage, shortest_clip(stage))
    with pytest.raises(ValueError, match=f"no {stage} window fits in {shortest_clip(stage) - 1} frames"):
        window_shapes(stage, shortest_clip(stage) - 1)


@pytest.mark.parametrize("devices", (1, 2, 4, 8))
def test_batches_run_on_devices_that_are_free_once_what_they_read_exists(devices):
    """No device runs two batches at once, and none starts before its given frames are made."""
    depths = [[w for w in hierarchical(500) if w.depth == depth] for depth in range(12)]
    batches = [windows[i:i + 3] for windows in depths for i in range(0, len(windows), 3)]
    work = [len(batch) for batch in batches]
    ends, busy = {0: 0}, [0] * devices
    for batch, time, (device, end) in zip(batches, work, assign(batches, work, devices)):
        assert end - time >= max([busy[device], *(ends[f] for w in batch for f in w.given)])
        busy[device] = end
        ends.update((f, end) for w in batch for f in w.new)
    late = build([((0,), (1,)), ((0,), (2,)), ((0,), (3,)), ((3,), (4,))])
    assert makespan(late, devices) == {1: 4, 2: 3}.get(devices, 2)


@pytest.mark.parametrize("devices", (1, 2, 3))
def test_devices_share_the_frames_of_a_joint_window_and_the_rest_is_shared_out(devices):
    """It starts when all are free and ends for all at once; every frame of it is somewhere."""
    plan = joint(121, max_stride=4)
    places = assign([[w] for w in plan], [len(w.frames) for w in plan], devices)
    assert places[0] == (None, 31 / devices) and {device for device, _ in places[1:]} == set(range(devices))
    assert sum(share(31, devices)) == 31 and max(share(31, devices)) - min(share(31, devices)) <= 1
    assert plan[0].joint and not plan[1].joint
    with pytest.raises(ValueError, match="4 processes cannot share a window of 3 frames"):
        share(3, 4)


@pytest.mark.parametrize("call, sentence", [
    (lambda: autoregressive(0), "a video of 0 frames"), (lambda: hierarchical(-3), "a video of -3 frames"),
    (lambda: hierarchical(5, (0, 5)), r"5 frames has no frames \(0, 5\)"), (lambda: joint(5, ()), "give"),
    (lambda: hierarchical(9, (-1,)), "from 0 on"), (lambda: verify([], 0), "0 frames")])
def test_an_impossible_request_is_refused_in_a_sentence(call, sentence):
    with pytest.raises(ValueError, match=sentence):
        call()


def test_the_command_prints_the_plan_and_refuses_in_one_sentence(capsys):
    """The picture, then the costs. SystemExit with a sentence prints it, and the exit code is 1."""
    for planner, flags in (hierarchical, []), (autoregressive, ["--schedule", "autoregressive"]):
        main(["121", *flags])
        printed, plan = capsys.readouterr().out, planner(121)
        assert show(plan, 121) in printed and costs(plan) in printed
        assert f"{makespan(plan, 1)}, {makespan(plan, 2)}, " in printed
    with pytest.raises(SystemExit, match="^a video of 0 frames.*$"):
        main(["0"])
