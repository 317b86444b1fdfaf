"""The frame schedule (not the noise schedule): which frames are generated together, and in what order.

A long video does not fit through the UNet at once, so it is made window by window. A window is a few frames
that go through the UNet together: the given ones exist already and condition the others; the new ones start
as noise. A plan is a list of windows that makes the whole video. The plan below makes 17 frames from the
first (`python schedule.py 17`; a row per window, c given, # new):

       0 starter c...#...#...#...#
       1 interp  c###c...c........
       1 interp  ....c...c###c...c
       2 interp  ...cc###cc.......
       2 interp  ...........cc###c

The first column is the depth of a window: how many windows must run before it, one after another. Windows of
equal depth are independent, so they run as one batch or on several devices. There are three planners:

    hierarchical    keyframes far apart, then every gap filled 4 times finer, and again: 121 frames are 6 deep
    autoregressive  12 more frames at a time, each window given frames of the last: 32 deep, errors compound
    joint           hierarchical with all keyframes in one window, whose frames several devices share

Read `Window` and `hierarchical` first. The windows to train on, and devices, come last and can wait.
"""
import argparse
import math
from bisect import bisect_left, bisect_right
from dataclasses import dataclass
from functools import partial
from itertools import chain, groupby

STAGES = ("starter", "extrap", "interp")
WIDTH = 7     # the most frames of a hierarchical window: 4 given, 3 new
RATIO = 4     # an infill window makes its gap 4 times finer: 3 new frames
# how often training draws a window of each kind, mostly keyframes; infill is fine in gaps of RATIO at most
SHARES = {"starter": 3, "extrap": 4, "coarse": 2, "fine": 1}
LONGEST = 8   # autoregressive's widest window; devices share longer ones


@dataclass(frozen=True)
class Window:
    """A few frames that go through the UNet together. Frames are absolute, counted from 0."""
    frames: tuple[int, ...]   # given and new, strictly increasing
    new: tuple[int, ...]      # the ones this window makes
    stage: str                # starter: from one frame | extrap: beyond the given ones | interp: between them
    depth: int                # 0 reads only the user's frames; windows of equal depth are independent

    @property
    def given(self) -> tuple[int, ...]:
        """The frames that exist before this window runs."""
        return tuple(frame for frame in self.frames if frame not in self.new)

    @property
    def gap(self) -> float:
        """The distance between the given frames around the new ones, infinite if one side has none."""
        left = [frame for frame in self.given if frame < self.new[0]]
        right = [frame for frame in self.given if frame > self.new[-1]]
        return right[0] - left[-1] if left and right else math.inf

    @property
    def joint(self) -> bool:
        """Whether it is so long that all devices share its frames."""
        return len(self.frames) > LONGEST


def build(steps) -> list[Window]:
    """Turn (given, new) pairs, in an order in which they can run, into windows with stage and depth."""
    plan, depths = [], {}   # depths: frame -> depth of the window that makes it
    for given, new in steps:
        between = min(given) < min(new) and max(new) < max(given)
        stage = "starter" if len(given) == 1 else "interp" if between else "extrap"
        depth = 1 + max(depths.get(frame, -1) for frame in given)
        depths.update((frame, depth) for frame in new)
        plan.append(Window(tuple(sorted({*given, *new})), tuple(sorted(new)), stage, depth))
    return plan


def hierarchical(n_frames: int, given=(0,), max_stride: int = 16, one_window=False) -> list[Window]:
    """Make keyframes at most max_stride apart, then fill every gap 4 times finer until none is left.

    given: the user's frames. What comes before the first is made backwards, which no model is trained for.
    max_stride is rounded down to a power of 4. one_window: all keyframes together. ValueError if n_frames is
    below 1, or a given frame is not in the video."""
    user, stride = user_frames(n_frames, given), keyframe_stride(n_frames, max_stride)
    steps = list(keyframe_steps(user, n_frames, stride))
    keyframes = sorted(frame for _, new in steps for frame in new)
    if one_window and keyframes:
        steps = [(user, keyframes)]
    known = sorted([*user, *keyframes])
    while stride > 1:   # coarse to fine, as in FDM (2205.11495) and NUWA-XL (2303.12346)
        stride //= RATIO
        gaps = [(a, b) for a, b in zip(known, known[1:]) if b - a > stride]
        # Fill every second gap first: the others then see on both sides how fast things move.
        for turn in (gaps[0::2], gaps[1::2]):
            fresh = []
            for a, b in turn:   # given: the ends of the gap and their outer neighbours
                i, new = bisect_left(known, a), range(a + stride, b, stride)
                steps.append((known[max(0, i - 1):i + 3], new))
                fresh += new
            known = sorted(known + fresh)   # only after the turn: its windows must not wait for each other
    return build(steps)


def autoregressive(n_frames: int) -> list[Window]:
    """Make 6 frames from frame 0, then 12 more at a time: three keyframes ahead, then the gaps between them
    (lxj616's blog, 2023-07-09). It makes up to 11 frames beyond the video."""
    user_frames(n_frames, (0,))   # for its check
    steps = [((0,), range(1, min(n_frames, 7)))] if n_frames > 1 else []
    for last in range(6, n_frames - 1, 12):
        # Frames 0 and 1 are in every window: an anchor that never drifts, and the speed of its motion.
        steps.append(((0, 1, last - 4, last), (last + 4, last + 8, last + 12)))
        for a in (last, last + 4, last + 8):
            # The window just before made frame a - 1: this one detail chains the whole video together.
            steps.append(((0, 1, a - 1, a, a + 4), (a + 1, a + 2, a + 3)))
    return build(steps)


joint = partial(hierarchical, one_window=True)   # with max_stride 1 the window is the whole video
PLANNERS = {"hierarchical": hierarchical, "autoregressive": autoregressive, "joint": joint}
FIRST_FRAME = Window((0,), (0,), "starter", 0)   # a picture from its prompt alone: no plan has this window


def user_frames(n_frames, given) -> list[int]:
    """The user's frames, sorted. ValueError if the video is empty or a given frame is not in it."""
    if not 1 <= n_frames <= 10 ** 6 or not given or min(given) < 0 or max(given) >= n_frames:
        raise ValueError(f"a video of {n_frames} frames has no frames {tuple(given)}: give frames from 0 on, "
                         "of a video of 1 to 1,000,000")
    return sorted(set(given))


def keyframe_stride(n_frames, max_stride) -> int:
    """Distance between keyframes: the least power of 4 whose window spans the video, at most max_stride."""
    stride = 1
    while stride * (WIDTH - 1) < n_frames - 1 and stride * RATIO <= max_stride:
        stride *= RATIO
    return stride


def keyframe_steps(user, n_frames, stride):
    """Yield (given, new) of the keyframe windows, after which no gap is wider than stride."""
    first, last = user[0], user[-1]
    # (existing frames, frames to make, anchors): between the user's frames, after them, before them
    walks = [(user[:i + 1], range(a + stride, b, stride), {first, b})
             for i, (a, b) in enumerate(zip(user, user[1:]))]
    if last < n_frames - 1:   # the last frame is a keyframe too: nothing needs to be dropped
        walks.append((user, [*range(last + stride, n_frames - 1, stride), n_frames - 1], {first}))
    if first > 0:
        walks.append((user[::-1], [*range(first - stride, 0, -stride), 0], {last}))
    for known, targets, anchors in walks:
        while targets:
            given = {*anchors, *known[-2:]}   # anchors never drift; the last two show how fast things move
            new, targets = targets[:WIDTH - len(given)], targets[WIDTH - len(given):]
            yield given, new
            known = [*known, *new]


def extension(n_frames: int, known: int, max_stride: int = 16) -> list[Window]:
    """The windows that lengthen a finished video of `known` frames to n_frames, as hierarchical would: its
    last frame and the one a stride before serve as its last keyframes."""
    given = {0, max(0, known - 1 - keyframe_stride(n_frames, max_stride)), known - 1}
    plan = hierarchical(n_frames, given, max_stride)   # no window makes frames on both sides of a given one
    return build((window.given, window.new) for window in plan if window.new[0] >= known)


def cut(plan, borders) -> list[Window]:
    """Split windows at borders, the first frames of segments in order: each window then has one prompt."""
    steps = []
    for window in plan:
        given = window.given
        for _, new in groupby(window.new, key=lambda frame: bisect_right(borders, frame)):
            new = tuple(new)
            steps.append((given, new))
            given += new
    return build(steps)


def plan_video(schedule, n_frames, given=(0,), borders=(0,), max_stride=16, known=0) -> list[Window]:
    """A planner's plan, cut at borders and verified; with `known`, to go on from so many finished frames."""
    if schedule == "autoregressive" and (list(given) != [0] or known or max_stride != 16):
        raise ValueError("--schedule autoregressive only goes on from frame 0: choose hierarchical")
    choices = () if schedule == "autoregressive" else (given, max_stride)
    plan = extension(n_frames, known, max_stride) if known else PLANNERS[schedule](n_frames, *choices)
    plan = cut(plan, borders)
    verify(plan, n_frames, range(known) if known else given)
    return plan


def verify(plan, n_frames, given=(0,)) -> None:
    """Raise ValueError, with a sentence, unless every frame is given by the user or made once, from frames
    that exist by then. So the list can run in order, and windows of equal depth at once."""
    exists = set(user_frames(n_frames, given))
    for i, window in enumerate(plan):
        again, early = sorted(exists.intersection(window.new)), sorted(set(window.given) - exists)
        if again or early or not window.new or not window.given:
            raise ValueError(f"window {i} must make new frames from existing ones, found {window.given} -> "
                             f"{window.new}: {again} exist already, {early} do not exist yet")
        exists.update(window.new)
    if missing := sorted(set(range(n_frames)) - exists):
        raise ValueError(f"{len(missing)} of {n_frames} frames are missing, like {missing[0]}: add windows")


def by_frame(items, flag):
    """["60:b.png", "0:a.png"] -> {0: "a.png", 60: "b.png"}. ValueError, naming the flag, for others."""
    found = {}
    for item in items:
        frame, _, value = (part.strip() for part in item.partition(":"))
        if not frame.isdecimal() or not value or int(frame) in found:
            raise ValueError(f"--{flag} has {item!r}: expected FRAME:VALUE, each frame once, like 0:dawn")
        found[int(frame)] = value
    return dict(sorted(found.items()))


def costs(plan) -> str:
    """What a plan costs, in words. Its depth is the length of the longest chain of windows."""
    depth = 1 + max((window.depth for window in plan), default=-1)
    evaluations = sum(len(window.frames) for window in plan)
    return f"{len(plan)} windows, depth {depth}, {evaluations} frame evaluations per denoising step"


def show(plan, n_frames) -> str:
    """The plan as text, at most 140 columns: a row per window, c given, # new, . other; what it costs."""
    total = max([n_frames, *(window.frames[-1] + 1 for window in plan)])   # with the padding of the plan
    scale = -(-total // 127)   # frames per column, so that long videos fit
    columns = range(0, total, scale)
    lines = [" " * 13 + "".join(f"{frame:<10}" for frame in columns[::10]).rstrip()]
    for window in sorted(plan, key=lambda window: window.depth):
        cells = ["."] * len(columns)
        for frame in (*window.given, *window.new):   # new ones last: a column with any of them shows it
            cells[frame // scale] = "#" if frame in window.new else "c"
        lines.append(f"{window.depth:>4} {window.stage:<7} {''.join(cells)}")
    if scale > 1:
        lines.append(f"one column is {scale} frames, # if any of them is new")
    if total > n_frames:
        lines.append(f"frames {n_frames}..{total - 1} are padding: made, then dropped")
    times = ", ".join(f"{makespan(plan, devices):g}" for devices in (1, 2, 4, 8))
    return "\n".join([*lines, costs(plan), f"makespan on 1, 2, 4, 8 processes: {times} windows"])


# --- the windows to train on ------------------------------------------------------------------------------
def reach(window) -> int:
    """The distance from the first frame of a window to its last: a clip needs one frame more to hold it."""
    return window.frames[-1] - window.frames[0]


def shortest_clip(stage) -> int:
    """The fewest frames in which any window of a stage fits; extrap is frames 0 to 18 of autoregressive."""
    return {"vae": 1, "image": 1, "starter": 2, "extrap": 19, "interp": 3, "video": 2}[stage]


def window_shapes(stage, n_frames: int) -> list[tuple[int, list[Window]]]:
    """What a stage trains on: [(share, windows)], lists of windows and how often to draw from each.

    They are the windows of plans for n_frames, a half and a quarter of it; equal but for a shift, they count
    once. "video" is all stages; "vae" and "image" see single frames."""
    if stage in ("vae", "image"):
        return [(1, [FIRST_FRAME])]
    needed = shortest_clip(stage)
    if n_frames < needed:
        raise ValueError(f"no {stage} window fits in {n_frames} frames: train on clips of {needed} or more")
    half, quarter = (n_frames + 1) // 2, (n_frames + 3) // 4
    plans = lambda *lengths: [*map(hierarchical, lengths), *[hierarchical(n, (0, n - 1)) for n in lengths]]
    sources = [(2, plans(n_frames)), (1, [autoregressive(n_frames)]), (1, plans(half, quarter))]
    shapes = []
    for weight, source in sources:
        seen, kinds = set(), {kind: [] for kind in SHARES}
        for window in chain.from_iterable(source):
            shape = tuple((frame - window.frames[0], frame in window.new) for frame in window.frames)
            if stage in (window.stage, "video") and window.frames[-1] < n_frames and shape not in seen:
                seen.add(shape)
                infill = "fine" if window.gap <= RATIO else "coarse"
                kinds[infill if window.stage == "interp" else window.stage].append(window)
        shapes += [(weight * SHARES[kind], windows) for kind, windows in kinds.items() if windows]
    return shapes


def share(n_frames, devices) -> list[int]:
    """How many frames of a joint window each device gets, as even as can be. ValueError if one gets none."""
    if devices > n_frames:
        raise ValueError(f"{devices} processes cannot share a window of {n_frames} frames: start fewer")
    return [n_frames // devices + (i < n_frames % devices) for i in range(devices)]


def assign(batches, work, devices) -> list[tuple[int | None, float]]:
    """Which device runs which batch, and when it ends: (device, end) for each, in the unit of `work`.

    In list order each batch of windows goes to the device that can start it first, once its given frames
    exist. All devices share a joint window: its device is None."""
    free, ready, places = [0] * devices, {}, []   # ready: frame -> when it exists
    for batch, cost in zip(batches, work):
        given = max(ready.get(frame, 0) for window in batch for frame in window.given)
        if batch[0].joint:
            device, end = None, max(*free, given) + cost / devices
            free = [end] * devices
        else:   # of the devices that would wait, the one that waits least
            device = min(range(devices), key=lambda i: (max(free[i], given), -free[i]))
            free[device] = end = max(free[device], given) + cost
        ready.update((frame, end) for window in batch for frame in window.new)
        places.append((device, end))
    return places


def makespan(plan, devices) -> float:
    """How long a plan takes if each window takes one device a time of 1."""
    return max((end for _, end in assign([[window] for window in plan], [1] * len(plan), devices)), default=0)


def main(argv=None):
    """Print a plan and what it costs; exit with one sentence if there is no such plan."""
    parser = argparse.ArgumentParser(description="Draw which frames of a video are made together, and when.")
    parser.add_argument("frames", type=int, help="length of the video; try 17, then 121")
    parser.add_argument("--schedule", choices=list(PLANNERS), default="hierarchical",
                        help="which frames are made from which (default: hierarchical)")
    args = parser.parse_args(argv)
    try:
        print(show(PLANNERS[args.schedule](args.frames), args.frames))
    except ValueError as error:
        raise SystemExit(str(error))


if __name__ == "__main__":
    main()
