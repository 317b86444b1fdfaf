"""The frame schedule, not the noise schedule: which frames go through the UNet together, and in what order.

A long video does not fit through the UNet at once, so it is made window by window. A plan is a list of
windows; each reads a few frames that exist (given) and makes a few that do not (new). Three planners:

    seed    12 more frames at a time, each fill reading a frame that the fill before it has just made:
            121 frames are 32 windows deep, and errors add up along that chain
    ladder  frames far apart over the whole video first, then every gap filled 4 times finer, and again:
            6 deep, and the windows of one level can run as one batch or on many devices
    joint   the ladder with all its keys in one window, which many devices share frame by frame; as one rung,
            max_stride 1, the whole video at once

Seventeen frames by the ladder (`python schedule.py 17`): the first column is the level, c given, # new.

    0 starter c...#...#...#...#
    1 interp  c###c...c........
      interp  ....c...c###c...c
    2 interp  ...cc###cc.......
      interp  ...........cc###c

Sources: the seed is the schedule of lxj616's blog (2023-07-09), its frames counted from 0 instead of 1.
Filling between frames that stand far apart: FDM (arXiv 2205.11495), NUWA-XL (arXiv 2303.12346).
"""

import argparse
import math
import re
from bisect import bisect_left, bisect_right
from collections import Counter
from dataclasses import dataclass, replace
from functools import partial
from itertools import groupby

STAGES = ("starter", "extrap", "interp")
LONGEST = 8             # frames of a window that one device makes
PICTURE_COLUMNS = 127   # with its labels a picture stays within 140 columns


@dataclass(frozen=True)
class Window:
    """One pass of a few frames through the UNet, from noise to latents. Frames are absolute, from 0."""
    frames: tuple[int, ...]   # strictly increasing: what goes through the UNet together
    new: tuple[int, ...]      # the ones this window makes
    stage: str                # starter: from one frame | extrap: beyond the known | interp: between the known
    level: int                # dependency depth; 0 reads only the user's frames; equal levels are independent
    deps: tuple[int, ...]     # indices into the plan: the windows that made the given frames

    @property
    def given(self) -> tuple[int, ...]:
        """The frames that exist before this window runs."""
        return tuple(frame for frame in self.frames if frame not in self.new)

    @property
    def gap(self) -> float:
        """How far apart the given frames around the new ones are; infinite where the known ends."""
        left = [frame for frame in self.given if frame < self.new[0]]
        right = [frame for frame in self.given if frame > self.new[-1]]
        return right[0] - left[-1] if left and right else math.inf

    def part(self, places: slice) -> "Window":
        """The window with only its frames at `places`: what one of several devices has of it."""
        frames = self.frames[places]
        return replace(self, frames=frames, new=tuple(frame for frame in self.new if frame in frames))

    @property
    def joint(self) -> bool:
        """Whether it is longer than seed and ladder have any, and devices share its frames."""
        return len(self.frames) > LONGEST


def stage_of(given, new) -> str:
    """Name a window by what it does, since that is what a model has to be trained for."""
    if len(given) <= 1:
        return "starter"
    return "interp" if min(given) < min(new) and max(new) < max(given) else "extrap"


def build(steps) -> list[Window]:
    """Turn (given, new) pairs, listed in an order in which they can run, into windows with level and deps."""
    plan, maker = [], {}   # maker: frame -> index of the window that makes it
    for given, new in steps:
        deps = tuple(sorted({maker[frame] for frame in given if frame in maker}))
        level = 1 + max((plan[dep].level for dep in deps), default=-1)
        maker.update((frame, len(plan)) for frame in new)
        frames = tuple(sorted([*given, *new]))
        plan.append(Window(frames, tuple(sorted(new)), stage_of(given, new), level, deps))
    return plan


def user_frames(n_frames, given) -> list[int]:
    """The user's frames, sorted. ValueError if the video is empty or a given frame is not in it."""
    if n_frames < 1:
        raise ValueError(f"a video has at least 1 frame, found {n_frames}: ask for 1 or more")
    if not given or min(given) < 0 or max(given) >= n_frames:
        raise ValueError(f"given frames must be one or more of 0..{n_frames - 1}, found {tuple(given)}: "
                         "count them from 0, and without any picture make frame 0 from the prompt first")
    return sorted(set(given))


def by_frame(items, flag) -> dict:
    """FRAME:VALUE, one or many, also many in one string with commas between: {frame: value} by frame.

    So `--prompts` and `--keyframes` say what holds where. ValueError, naming the flag, for anything else."""
    found = {}
    for item in re.split(r",\s*(?=\d+:)", ",".join(items)) if items else []:
        frame, _, value = (part.strip() for part in item.partition(":"))
        if not frame.isdigit() or not value or int(frame) in found:
            raise ValueError(f"--{flag} has {item!r}: expected FRAME:VALUE, each frame once, counted from 0, "
                             "like 0:a.png 120:b.png for pictures, 0:dawn 60:night for prompts")
        found[int(frame)] = value
    return dict(sorted(found.items()))


# --- the planners -----------------------------------------------------------------------------------------

def seed(n_frames: int, context: str = "dense") -> list[Window]:
    """The blog's plan from frame 0: a start of 7 frames, then loops of one stride 4 extrap and three fills.

    Each loop adds 12 frames, so up to 11 frames at the end of the plan are padding (n_frames and beyond):
    make them like the others, then trim. context: what a fill sees before its gap, the frame just before
    (dense, as published) or the key before (key), so that fills wait for keys only. ValueError if
    n_frames < 1."""
    user_frames(n_frames, (0,))   # for its check
    steps = [((0,), range(1, min(n_frames, 7)))] if n_frames > 1 else []
    for last in range(6, n_frames - 1, 12):
        # Frames 0 and 1 are in every window: an anchor that never drifts, and how fast it moved.
        steps.append(((0, 1, last - 4, last), (last + 4, last + 8, last + 12)))
        for a in (last, last + 4, last + 8):
            # a - 1 was written by the previous fill: this one detail chains all fills of the video.
            before = (a - 1,) if context == "dense" else (a - 4,) if a > 6 else ()
            steps.append(((0, 1, *before, a, a + 4), (a + 1, a + 2, a + 3)))
    return build(steps)


def ladder(n_frames: int, given=(0,), max_stride: int = 16, width: int = 7, ratio: int = 4,
           red_black: bool = True, one_window: bool = False) -> list[Window]:
    """Keys up to `max_stride` frames apart, then every gap filled `ratio` times finer until none is left.

    given       the user's frames, any: the first, first and last, several keyframes. What comes before the
                first one is climbed backwards, which no training window shows: better give frame 0 as well
    max_stride  rounded down to a power of ratio; training clips must hold (width - 1) * max_stride + 1 frames
    width       the most frames in a window; all of them lie in range(n_frames), so nothing is padding
    red_black   fill every second gap first, so that the others see fresh frames close by on both sides and
                move at their speed; without it the plan is less deep and its joins show more
    one_window  all keys in one window, instead of a few in each
    ValueError if n_frames < 1, a given frame is not in the video, or the other numbers do not fit."""
    user = user_frames(n_frames, given)
    if ratio < 2 or width < ratio + 3 or max_stride < 1:
        raise ValueError("a fill has 4 given and ratio - 1 new frames, so expected ratio >= 2, "
                         "width >= ratio + 3 and max_stride >= 1 (try 4, 7 and 16), found "
                         f"{ratio}, {width} and {max_stride}")
    stride = key_stride(n_frames, max_stride, width, ratio)
    keys = skeleton(user, n_frames, stride, width)
    new_keys = sorted(frame for _, new in keys for frame in new)
    if one_window and new_keys:
        keys = [(user, new_keys)]
    known = sorted([*user, *new_keys])
    return build([*keys, *fills(known, stride, ratio, red_black)])


def joint(n_frames: int, given=(0,), max_stride: int = 16) -> list[Window]:
    """The ladder with all keys in one window, however many; max_stride 1: all frames of the video."""
    return ladder(n_frames, given, max_stride, one_window=True)


def key_stride(n_frames, max_stride=16, width=7, ratio=4) -> int:
    """How far apart the ladder lays its keys: the power of ratio with which one window spans the video."""
    stride = 1
    while stride * (width - 1) < n_frames - 1 and stride * ratio <= max_stride:
        stride *= ratio
    return stride


def skeleton(user, n_frames, stride, width):
    """(given, new) of the key windows; afterwards known frames are nowhere more than stride apart."""
    first, last = user[0], user[-1]
    steps = []
    for i, (a, b) in enumerate(zip(user, user[1:])):
        steps += climb(user[:i + 1], range(a + stride, b, stride), {first, b}, width)
    if last < n_frames - 1:
        # The last key sits on the last frame, so the last gap is shorter and nothing is made to be trimmed.
        steps += climb(user, [*range(last + stride, n_frames - 1, stride), n_frames - 1], {first}, width)
    if first > 0:   # the same climb in a mirror: negate, go forward, negate back
        mirrored = climb([-f for f in reversed(user)], [*range(stride - first, 0, stride), 0], {-last}, width)
        steps += [([-f for f in given], [-f for f in new]) for given, new in mirrored]
    return steps


def climb(known, targets, anchors, width):
    """Yield (given, new), target after target, from the anchors, which never drift, and the last two keys."""
    trail = list(known)
    while targets:
        given = sorted({*anchors, *trail[-2:]})
        new = targets[:width - len(given)]
        yield given, new
        trail += new
        targets = targets[len(new):]


def fills(known, stride, ratio, red_black):
    """Yield (given, new) of the fills: two ends, their outer neighbours, ratio - 1 new frames between."""
    while stride > 1:
        stride //= ratio
        gaps = [(a, b) for a, b in zip(known, known[1:]) if b - a > stride]
        for turn in (gaps[0::2], gaps[1::2]) if red_black else (gaps,):
            fresh = []
            for a, b in turn:
                i = bisect_left(known, a)
                new = range(a + stride, b, stride)
                yield known[max(0, i - 1):i + 3], new
                fresh += new
            known = sorted(known + fresh)   # only after the turn: its windows must not wait for each other


def extension(n_frames: int, known: int, max_stride: int = 16) -> list[Window]:
    """The windows that lengthen a finished video of `known` frames to n_frames, by the ladder.

    They are those of a ladder that has come this far: the last frame is its last key, the one before lies
    a stride back. So what joins old and new is laid out like all the rest. ValueError if nothing is new."""
    if not 1 <= known < n_frames:
        raise ValueError(f"a video of {known} frames cannot be lengthened to {n_frames}: ask for more frames")
    last = known - 1
    given = {0, max(0, last - key_stride(n_frames, max_stride)), last}
    plan = ladder(n_frames, given, max_stride)   # no gap reaches over a given frame, so no window does both
    return build((window.given, window.new) for window in plan if window.new[0] > last)


def cut(plan, borders) -> list[Window]:
    """The plan with every window cut in two that makes frames on both sides of a border, the left ones first.

    borders: the first frames of segments, increasing; so each window can have the prompt of its segment."""
    steps = []
    for window in plan:
        given = window.given
        for _, new in groupby(window.new, key=lambda frame: bisect_right(borders, frame)):
            new = tuple(new)
            steps.append((given, new))
            given += new
    return build(steps)


PLANNERS = {"ladder": ladder, "seed": seed, "joint": joint}
# the same with one choice made otherwise, to compare; no training window is drawn from these
VARIANTS = {"ladder_plain": partial(ladder, red_black=False), "seed_key": partial(seed, context="key")}
SCHEDULES = PLANNERS | VARIANTS


def training_windows(stage, n_frames, planners=("ladder", "seed"), max_stride=16) -> list[Window]:
    """The distinct windows that sampling a video of n_frames asks for: what a model is to be trained on.

    n_frames may be several lengths; clips must be as long as the longest. stage is starter, extrap,
    interp, or video for all three. The ladder, whose keys are up to max_stride apart, is asked twice, for the
    first frame and for first and last.
    Windows that differ only by a shift of all their frames count once: inner fills are few, but each
    distance to a far anchor is there. Windows beyond range(n_frames) are left out, for a clip of n_frames
    cannot show the seed's padding; and deps are emptied, for the list is not a plan. ValueError for an
    unknown stage, and when no window of the stage fits."""
    if stage not in (*STAGES, "video"):
        raise ValueError(f"unknown stage {stage!r}: choose starter, extrap, interp or video")
    lengths = (n_frames,) if isinstance(n_frames, int) else tuple(n_frames)
    plans = {"ladder": partial(ladder, max_stride=max_stride), "seed": seed}
    windows = [window for n in lengths for name in planners for window in plans[name](n)]
    if "ladder" in planners:
        windows += [window for n in lengths for window in plans["ladder"](n, given=(0, n - 1))]
    distinct = {}
    for window in windows:
        if stage in (window.stage, "video") and window.frames[-1] < max(lengths):
            start = window.frames[0]
            shape = tuple(tuple(frame - start for frame in part) for part in (window.frames, window.new))
            distinct.setdefault(shape, replace(window, deps=()))
    if not distinct:
        raise ValueError(f"no {stage} window of {' or '.join(planners)} fits in {max(lengths)} frames: "
                         "train on longer clips (for every stage the seed needs 19 frames, the ladder 98)")
    return list(distinct.values())


# --- looking at a plan ------------------------------------------------------------------------------------

def verify(plan, n_frames, given=(0,)) -> None:
    """Raise ValueError, with a sentence, unless the plan makes the whole video.

    Every frame is made once or given by the user, and a window reads only what windows before it in the list,
    which are also of a smaller level, have made. So the list can run in order, and a level at once."""
    exists = set(user_frames(n_frames, given))
    for i, window in enumerate(plan):
        if list(window.frames) != sorted(set(window.frames)) or min(window.frames, default=-1) < 0:
            raise ValueError(f"window {i} has frames {window.frames}: they must increase strictly, from 0 on")
        if not window.new or [frame for frame in window.frames if frame in window.new] != list(window.new):
            raise ValueError(f"window {i} makes {window.new}: it must make some of {window.frames}, in order")
    for i, (window, right) in enumerate(zip(plan, build((window.given, window.new) for window in plan))):
        for frame in window.frames:
            if frame in window.new and frame in exists:
                raise ValueError(f"window {i} makes frame {frame}, which exists already: make it once")
            if frame not in window.new and frame not in exists:
                raise ValueError(f"window {i} reads frame {frame}, which does not exist yet: make it earlier")
        if window != right:
            said, found = ((w.stage, w.level, w.deps) for w in (window, right))
            raise ValueError(f"window {i} says its (stage, level, deps) are {said}, but its frames make them "
                             f"{found}: let build() fill them in")
        exists.update(window.new)
    missing = sorted(set(range(n_frames)) - exists)
    if missing:
        raise ValueError(f"no window makes frame {missing[0]} ({len(missing)} of {n_frames} are missing): "
                         "add windows, or ask for a shorter video")


def stats(plan, n_frames=None) -> dict:
    """What a plan costs: windows; evals, the UNet frame evaluations per denoising step (sum of window sizes);
    levels, the length of the longest dependency chain; padding, frames from n_frames on, None if not told."""
    beyond = None if n_frames is None else sum(frame >= n_frames for window in plan for frame in window.new)
    return {"windows": len(plan), "evals": sum(len(window.frames) for window in plan),
            "levels": 1 + max((window.level for window in plan), default=-1), "padding": beyond}


def makespan(plan, devices) -> int:
    """How long a plan takes, in windows, when each goes to the first free device once its deps are there.

    Windows early in the list go first, and none waits for the rest of a level. ValueError if devices < 1."""
    if devices < 1:
        raise ValueError(f"a plan runs on at least 1 device, found {devices}: ask for 1 or more")
    busy, first_free, done = Counter(), 0, []   # busy: time -> windows running then; done: when each ends
    for window in plan:
        while busy[first_free] == devices:
            first_free += 1
        time = max([first_free, *(done[dep] for dep in window.deps)])
        while busy[time] == devices:
            time += 1
        busy[time] += 1
        done.append(time + 1)
    return max(done, default=0)


def share(n_frames, devices) -> list[int]:
    """How many of the frames of a window each device has, as evenly as can be. ValueError if one has none."""
    if devices > n_frames:
        raise ValueError(f"{devices} processes cannot share a window of {n_frames} frames: each needs one, "
                         "start fewer processes")
    return [n_frames // devices + (i < n_frames % devices) for i in range(devices)]


def assign(batches, work, devices, together=None) -> list[tuple[int | None, float]]:
    """Who runs which batch, and when it ends: (device, end) for each, in the unit of work.

    A batch is a list of windows that go through the UNet together. In the order of the list each goes to the
    device that can start it first, which is when the device is free and all given frames are made. A joint
    window goes to all, its device is None: they make it `together` times as fast as one, default in
    proportion. A function of the arguments alone: every process works it out for itself. ValueError if
    devices < 1."""
    if devices < 1:
        raise ValueError(f"a plan runs on at least 1 device, found {devices}: ask for 1 or more")
    free, ready, places = [0] * devices, {}, []   # ready: frame -> when it is made
    for batch, cost in zip(batches, work):
        given = max(ready.get(frame, 0) for window in batch for frame in window.given)
        if batch[0].joint:
            device, end = None, max(*free, given) + cost / (together or devices)
            free = [end] * devices
        else:   # of the devices that would wait, the one that waits least
            device = min(range(devices), key=lambda i: (max(free[i], given), -free[i]))
            free[device] = end = max(free[device], given) + cost
        ready.update((frame, end) for window in batch for frame in window.new)
        places.append((device, end))
    return places


def gain(batches, work, devices, together=None) -> tuple[float, int]:
    """How many times as fast as one device several are, if batches run as assign() says; and the traffic.

    That is how often a window reads a frame that another device has made, those of joint windows aside."""
    places = assign(batches, work, devices, together)
    home = {frame: device for batch, (device, _) in zip(batches, places)
            for window in batch for frame in window.new if device is not None}
    reads = sum(home.get(frame, device) != device for batch, (device, _) in zip(batches, places)
                for window in batch for frame in window.given)
    return sum(work) / max((end for _, end in places), default=1), reads


def costs(plan) -> str:
    """What a plan costs, in words."""
    numbers = stats(plan)
    return (f"{numbers['windows']} windows, {numbers['levels']} dependency levels, "
            f"{numbers['evals']} frame evaluations per denoising step")


def length(plan, n_frames) -> int:
    """How many frames must have room: the video, its padding, and the frame that closes a loop."""
    return max([n_frames, *(window.frames[-1] + 1 for window in plan)])


def show(plan, n_frames) -> str:
    """The plan as text, at most 140 columns: a row per window, level by level, c given, # new, . other."""
    total = length(plan, n_frames)
    scale = -(-total // PICTURE_COLUMNS)   # frames per column, so that long videos fit
    columns = -(-total // scale)
    digits = len(str(stats(plan)["levels"]))
    ruler = "".join(f"{column * scale:<10}" for column in range(0, columns, 10)).rstrip()
    lines = [" " * (digits + 9) + ruler]
    shown = None
    for window in sorted(plan, key=lambda window: window.level):
        cells = ["."] * columns
        for mark, frames in (("c", window.given), ("#", window.new)):
            for frame in frames:
                cells[frame // scale] = mark
        label = "" if window.level == shown else window.level
        lines.append(f"{label:>{digits}} {window.stage:<7} {''.join(cells)}")
        shown = window.level
    if scale > 1:
        lines.append(f"one column is {scale} frames, # if any of them is new")
    if total > n_frames:
        lines.append(f"frames {n_frames}..{total - 1} are padding: made, then trimmed")
    return "\n".join(lines)


def main(argv=None):
    """Print a plan and what it costs; exit with one sentence if there is no such plan."""
    parser = argparse.ArgumentParser(description="Draw which frames of a video are made together, and when.",
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("frames", type=int, help="length of the video; try 17, then 121")
    parser.add_argument("--schedule", choices=list(SCHEDULES), default="ladder", help="try seed, to compare")
    parser.add_argument("--max_stride", type=int, default=argparse.SUPPRESS,
                        help="most frames from key to key, not for the seed; 64 makes long videos less "
                             "deep, but needs training clips of 385 frames instead of 97 (default: 16)")
    args = parser.parse_args(argv)
    extra = {"max_stride": args.max_stride} if "max_stride" in args else {}
    if extra and args.schedule.startswith("seed"):
        raise SystemExit(f"--max_stride is for ladder and joint, found --schedule {args.schedule}: drop one")
    try:
        plan = SCHEDULES[args.schedule](args.frames, **extra)
    except ValueError as error:
        raise SystemExit(str(error))
    print(show(plan, args.frames))
    print(f"{args.schedule}: {costs(plan)}")
    times = ", ".join(str(makespan(plan, devices)) for devices in (1, 2, 4, 8))
    print(f"makespan on 1, 2, 4, 8 devices: {times} windows")


if __name__ == "__main__":
    main()
