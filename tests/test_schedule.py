"""Run: python -m pytest -q tests/test_schedule.py"""

import time
from dataclasses import replace

import pytest

import schedule
from schedule import (PLANNERS, cut, extension, ladder, main, makespan, seed, show, stats, training_windows,
                      verify)

LENGTHS = [*range(1, 201), 500, 2300, 10000]


@pytest.mark.parametrize("options", ({}, {"red_black": False}, {"max_stride": 1}), ids=str)
def test_ladder_makes_every_frame_once_from_any_user_frames(options):
    """verify() agrees, windows have at most 7 frames, and none lies outside the video."""
    for n in LENGTHS:
        for given in {(0,), (0, n - 1), (0, n // 3, n // 2), (*range(min(n, 5)),), (n - 1,), (n // 3, n - 1)}:
            plan = ladder(n, given, **options)
            verify(plan, n, given)
            assert sorted([f for w in plan for f in w.new] + list(set(given))) == list(range(n))
            assert all(len(w.frames) <= 7 and 0 <= w.frames[0] and w.frames[-1] < n for w in plan)


def test_seed_makes_every_frame_once_and_pads_less_than_a_loop():
    """verify() agrees, windows have at most 8 frames, and the plan ends after 7 + 12 loops frames."""
    for n in LENGTHS:
        plan = seed(n)
        verify(plan, n)
        end = n if n <= 7 else 7 + 12 * -((7 - n) // 12)
        assert sorted(f for w in plan for f in w.new) == list(range(1, end)) and end - n < 12
        assert all(len(w.frames) <= 8 for w in plan)


@pytest.mark.parametrize("plan", (seed(61), ladder(61), ladder(61, (0, 60)), ladder(61, red_black=False)))
def test_given_frames_come_from_a_smaller_level(plan):
    """A window reads the windows in deps, which are earlier in the list, and is one level above the last."""
    for i, w in enumerate(plan):
        reads = {j for j, other in enumerate(plan) if set(w.given) & set(other.new)}
        assert set(w.deps) == reads and all(j < i for j in reads)
        assert w.level == 1 + max((plan[j].level for j in reads), default=-1)


def test_keys_in_place_of_the_frame_before_free_the_fills_of_each_other():
    """Same windows in the same order, but a fill reads anchors and keys only, one of them behind it."""
    for n in (19, 121, 500):
        plan = seed(n, "key")
        verify(plan, n)
        assert [(w.new, w.stage) for w in plan] == [(w.new, w.stage) for w in seed(n)]
        keys = {0, 1, 6} | {f for w in plan if w.stage == "extrap" for f in w.new}
        fills = [w for w in plan if w.stage == "interp"]
        assert all(set(w.given) <= keys for w in fills)
        assert all({w.new[0] - 5, w.new[0] - 1, w.new[-1] + 1} <= set(w.given) for w in fills[1:])


def test_seed_is_the_published_list():
    """Counted from 1: 1, 2!..7! / 1,2,3,7,11!,15!,19! / 1,2,6,7,8!,9!,10!,11, each loop 12 frames further."""
    plan = [([f + 1 for f in w.given], [f + 1 for f in w.new], w.stage) for w in seed(121)]
    assert plan[:7] == [
        ([1], [2, 3, 4, 5, 6, 7], "starter"), ([1, 2, 3, 7], [11, 15, 19], "extrap"),
        ([1, 2, 6, 7, 11], [8, 9, 10], "interp"), ([1, 2, 10, 11, 15], [12, 13, 14], "interp"),
        ([1, 2, 14, 15, 19], [16, 17, 18], "interp"), ([1, 2, 15, 19], [23, 27, 31], "extrap"),
        ([1, 2, 18, 19, 23], [20, 21, 22], "interp")]
    assert [(w.given, w.new) for w in seed(5)] == [((0,), (1, 2, 3, 4))] and seed(1) == []


@pytest.mark.parametrize("planner, options, figures, deep", [
    (seed, {}, [(41, 317, 32, 32), (169, 1309, 128, 128), (769, 5959, 578, 578)], 2501),
    (seed, {"context": "key"}, [(41, 316, 12, 12), (169, 1308, 44, 44), (769, 5958, 194, 194)], 835),
    (ladder, {"red_black": False}, [(40, 272, 4, 7), (164, 1142, 10, 22), (755, 5277, 38, 96)], 158),
    (ladder, {}, [(40, 272, 6, 7), (164, 1142, 12, 22), (755, 5277, 40, 96)], 160),
    (ladder, {"max_stride": 64}, [(41, 275, 7, 8), (166, 1154, 8, 23), (764, 5338, 15, 97)], 45),
    (ladder, {"max_stride": 9999}, [(41, 275, 7, 8), (167, 1157, 9, 24), (767, 5355, 11, 99)], 13),
    (ladder, {"max_stride": 36, "width": 9, "ratio": 6},
     [(25, 213, 5, 5), (99, 888, 6, 14), (458, 4115, 15, 59)], 50)])
def test_figures_of_the_plans(planner, options, figures, deep):
    """Windows, evaluations, levels, makespan on 8 devices at 121, 500 and 2300 frames; levels at 10,000."""
    for n, expected in zip((121, 500, 2300), figures):
        plan = planner(n, **options)
        assert (*list(stats(plan).values())[:3], makespan(plan, 8)) == expected
        assert makespan(plan, 1) == len(plan) and makespan(plan, len(plan)) == stats(plan)["levels"]
    assert stats(planner(10000, **options))["levels"] == deep


def test_costs_of_small_plans():
    """Padding is what lies beyond the video; a window that waits for a device holds up those that read it."""
    assert stats(seed(121), 121)["padding"] == 6 and stats(ladder(121), 121)["padding"] == 0
    late = schedule.build([((0,), (1,)), ((0,), (2,)), ((0,), (3,)), ((3,), (4,))])
    assert [makespan(late, devices) for devices in (1, 2, 3)] == [4, 3, 2]


def test_keys_are_as_far_apart_as_the_video_and_max_stride_allow():
    """The stride is the smallest power of the ratio with which 7 frames span the video, up to max_stride."""
    assert [ladder(n)[0].frames[1] for n in (7, 8, 25, 26, 97, 98)] == [1, 4, 4, 16, 16, 16]
    assert [ladder(385, max_stride=stride)[0].frames[1] for stride in (3, 63, 64, 300)] == [1, 16, 64, 64]


def test_stage_says_what_a_window_does():
    """starter has one given frame, extrap makes frames outside the given ones, interp between them."""
    assert [w.stage for w in ladder(121)] == ["starter", "extrap"] + 38 * ["interp"]
    assert {w.stage for w in ladder(121, (0, 120))} == {"interp"}
    assert [w.stage for w in ladder(121, (60,))[:2]] == ["starter", "starter"]
    assert [w.stage for w in ladder(121, (60, 61))[:2]] == ["extrap", "extrap"]


@pytest.mark.parametrize("i, changes, sentence", [
    (1, {"frames": (0, 1, 6, 2, 10, 14, 18)}, "window 1 has frames .* increase strictly"),
    (1, {"frames": (-1, 1, 2, 6, 10, 14, 18)}, "window 1 has frames .* from 0 on"),
    (1, {"new": ()}, "window 1 makes .* it must make some of"),
    (1, {"new": (10, 14, 17)}, "window 1 makes .* it must make some of"),
    (2, {"new": (6, 7, 8, 9)}, "window 2 makes frame 6, which exists already"),
    (0, {"new": (0, 1, 2, 3, 4, 5, 6)}, "window 0 makes frame 0, which exists already"),
    (1, {"frames": (0, 1, 2, 7, 10, 14, 18)}, "window 1 reads frame 7, which does not exist yet"),
    (2, {"level": 1}, r"window 2 says its .* \('interp', 1, .* make them \('interp', 2, \(0, 1\)\)"),
    (2, {"deps": (0,)}, r"window 2 says its .* \('interp', 2, \(0,\)\)"),
    (1, {"stage": "interp"}, r"window 1 says its .* make them \('extrap'"),
    (4, {"frames": (0, 1, 13, 14, 16, 17, 18), "new": (16, 17)}, r"makes frame 15 \(1 of 19 are missing\)")])
def test_verify_names_what_is_wrong(i, changes, sentence):
    """One broken plan per kind of break."""
    plan = seed(19)
    plan[i] = replace(plan[i], **changes)
    with pytest.raises(ValueError, match=sentence):
        verify(plan, 19)


def test_picture_shows_every_window_and_fits_the_terminal():
    """A row per window, marked as its frames are; the picture in the module's docstring is the real one."""
    for plan, n in ((ladder(121), 121), (seed(122), 122), (ladder(2300), 2300), (seed(9000), 9000), ([], 1)):
        lines = show(plan, n).splitlines()
        assert sum(stage in line for line in lines for stage in schedule.STAGES) == len(plan)
        assert max(map(len, lines)) <= 140
    rows = sorted("".join("#" if f in w.new else "c" if f in w.frames else "." for f in range(61))
                  for w in ladder(61))
    assert sorted(line[10:] for line in show(ladder(61), 61).splitlines()[1:]) == rows
    assert all(f"    {row}\n" in schedule.__doc__ for row in show(ladder(17), 17).splitlines()[1:])


@pytest.mark.parametrize("n", (19, 61, 121, 127))
def test_training_windows_are_the_ones_sampling_asks_for(n):
    """Every window that fits in the clip is there once up to a shift, and frame 0 stays frame 0."""
    def shape(w):
        return w.stage, w.frames[0] == 0, *([f - w.frames[0] for f in part] for part in (w.frames, w.new))
    windows = training_windows("video", n)
    shapes = [shape(w) for w in windows]
    plans = ladder(n) + seed(n) + ladder(n, (0, n - 1))
    asked = [shape(w) for w in plans if w.frames[-1] < n]
    assert all(shapes.count(s) == 1 for s in asked) and all(s in asked for s in shapes)
    assert all(w.frames[-1] < n and w.deps == () for w in windows)
    for stage in schedule.STAGES:
        assert training_windows(stage, n) == [w for w in windows if w.stage == stage]


@pytest.mark.parametrize("call, sentence", [
    (lambda: seed(0), "at least 1 frame, found 0"), (lambda: ladder(-3), "at least 1 frame, found -3"),
    (lambda: ladder(5, (0, 5)), r"0..4, found \(0, 5\)"), (lambda: ladder(5, ()), "one or more of 0..4"),
    (lambda: ladder(9, (-1,)), "count them from 0"), (lambda: ladder(9, width=6), "try 4, 7 and 16"),
    (lambda: ladder(9, ratio=1), "ratio >= 2"), (lambda: ladder(9, max_stride=0), "max_stride >= 1"),
    (lambda: training_windows("extra", 121), "'extra': choose starter, extrap, interp or video"),
    (lambda: training_windows("extrap", 97, ("ladder",)), "no extrap .* the ladder 98"),
    (lambda: training_windows("extrap", 18, ("seed",)), "no extrap .* the seed needs 19 frames"),
    (lambda: makespan(seed(9), 0), "at least 1 device, found 0"), (lambda: verify([], 0), "frame, found 0")])
def test_impossible_requests_say_what_to_do(call, sentence):
    """What was found, what was expected, what to do."""
    with pytest.raises(ValueError, match=sentence):
        call()


def test_the_command_prints_the_plan_and_refuses_in_one_sentence(capsys):
    """The picture, then the costs; without a plan one sentence instead of an exit code, which means 1."""
    main(["121"])
    printed = capsys.readouterr().out
    assert show(ladder(121), 121) in printed and "40, 21, 11, 7 windows" in printed
    main(["121", "--schedule", "seed"])
    assert "41 windows, 32 dependency levels, 317 frame evaluations" in capsys.readouterr().out
    main(["500", "--max_stride", "64"])
    assert "8 dependency levels" in capsys.readouterr().out and list(PLANNERS) == ["ladder", "seed", "joint"]
    for argv in (["0"], ["121", "--max_stride", "0"], ["121", "--schedule", "seed", "--max_stride", "16"]):
        with pytest.raises(SystemExit) as stop:
            main(argv)
        assert "found" in stop.value.code and "\n" not in stop.value.code


@pytest.mark.parametrize("max_stride", (16, 64))
def test_an_extension_makes_the_rest_once_and_joins_like_the_ladder(max_stride):
    """Every frame from the old end on is made once, from frames that exist.

    No fill is of a kind that a plain ladder does not have: only the place differs."""
    fills = {tuple(f - w.frames[0] for f in w.frames) for n in (385, 386, 390, 401, 449)
             for w in ladder(n, max_stride=max_stride) if w.stage == "interp"}
    for known, n in ((1, 2), (5, 60), (121, 122), (121, 181), (97, 400), (121, 2300), (500, 10000)):
        plan = extension(n, known, max_stride)
        verify(plan, n, range(known))
        assert sorted(f for w in plan for f in w.new) == list(range(known, n))
        assert all(len(w.frames) <= 7 and w.frames[-1] < n for w in plan)
        if known > max_stride and (n - known) % max_stride == 0:
            assert all(tuple(f - w.frames[0] for f in w.frames) in fills for w in plan if w.stage == "interp")
    assert extension(400, 121, max_stride)[0].given == (0, 120 - max_stride, 120)   # two keys, and the anchor
    with pytest.raises(ValueError, match="121 frames cannot be lengthened to 121"):
        extension(121, 121)


@pytest.mark.parametrize("borders", ((0,), (0, 60), (0, 1, 2, 3), (0, 33, 34, 100)))
def test_a_cut_plan_makes_no_window_across_a_border(borders):
    """Each window makes frames of one segment; all are still made once, in windows of no more frames."""
    ends = (0, 120)
    for plan, n, given in ((ladder(121), 121, (0,)), (ladder(121, ends), 121, ends), (seed(43), 43, (0,))):
        parts = cut(plan, borders)
        verify(parts, n, given)
        assert all(len({sum(f >= border for border in borders) for f in w.new}) == 1 for w in parts)
        assert max(len(w.frames) for w in parts) <= max(len(w.frames) for w in plan)
    assert cut(ladder(121), (0,)) == ladder(121)


def test_plans_of_long_videos_are_quick_and_shallow():
    """2300 and 10,000 frames are planned and verified in under a second; stride 64 keeps them shallow."""
    for n, stride, levels in ((121, 16, 6), (500, 16, 12), (2300, 64, 15), (10000, 64, 45)):
        begun = time.perf_counter()
        plan = ladder(n, max_stride=stride)
        verify(plan, n)
        assert time.perf_counter() - begun < 1 and stats(plan)["levels"] <= levels


@pytest.mark.parametrize("devices", (1, 2, 4, 8))
def test_batches_are_assigned_to_devices_that_are_free_after_what_they_read(devices):
    """No device runs two batches at once, none starts before its given frames, and one device never waits."""
    batches = [[w for w in ladder(500) if w.level == level][i:i + 3] for level in range(12)
               for i in range(0, 40, 3)]
    batches = [batch for batch in batches if batch]
    costs = [len(batch) for batch in batches]
    places, (faster, reads) = schedule.assign(batches, costs, devices), schedule.gain(batches, costs, devices)
    ends, busy = {0: 0}, {device: 0 for device in range(devices)}
    for batch, cost, (device, end) in zip(batches, costs, places):
        assert end - cost >= max([busy[device], *(ends[f] for w in batch for f in w.given)])
        busy[device] = end
        ends.update((f, end) for w in batch for f in w.new)
    assert devices > 1 or max(ends.values()) == sum(costs)
    assert sum(costs) / devices <= max(ends.values()) <= sum(costs)
    assert faster == sum(costs) / max(ends.values())
    assert reads == 0 if devices == 1 else 0 < reads < sum(len(w.given) for w in ladder(500))
    single = schedule.assign([[w] for w in ladder(121)], [1] * 40, devices)
    assert max(end for _, end in single) == makespan(ladder(121), devices)
