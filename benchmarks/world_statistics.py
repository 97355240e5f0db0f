"""Statistics of events in a design of the bundled world and of the difficulty of its images, compared with another.

`python -m benchmarks.world_statistics --design steady --against varied [--episodes 24] [--seed 900] [--sheet DIR]`

Episodes are simulated and drawn here (nothing is read from disk, no codec); no model is trained. Images are taken at
5 Hz and brought to the model's 48x80 as extraction does. Every number is a mean over episodes with a 95% bootstrap
interval over episodes; the ratio's interval resamples the episodes of each design separately. `--sheet` also writes two
contact sheets of each design, at the recorded size and at the model's. Needs MuJoCo (`pip install -e '.[sim]'`).

A clip is a current frame t and the four that follow; clips do not overlap. A spell is an unbroken contact, gaps of up
to 0.2 s closed, at 15 Hz.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from benchmarks.gates import to_unit
from dataset_example.recorder.design import DESIGNS, Design
from dataset_example.recorder.episode import Actor, Cameras, World, build_world, mujoco
from dataset_example.recorder.robot import FRAME_HZ
from dataset_example.recorder.scene import CAMERAS, WRIST_CAMERA
from persistworld_cli.data.raw.resize import resize
from persistworld_cli.metrics.masks import MOTION, masked_psnr, moving_mask
from persistworld_cli.metrics.psnr import psnr
from persistworld_cli.policies.bundled_world.rules import EXTERIOR_VIEWS
from persistworld_cli.statistics.paired import cluster_bootstrap

HEIGHT, WIDTH, RATE_HZ, AHEAD = 48, 80, 5, 4
STRIDE = FRAME_HZ // RATE_HZ
SILHOUETTE = (90, 160)  # objects are counted at this size, in pixels of the model's
GAP = 3  # ticks without contact that do not end a spell: 0.2 s
PUSHED = 0.03  # m over the table
LIFTED = 0.03  # m up
FLAT = 0.01  # m up: an object that was pushed stays lower
HIDDEN = 0.5  # of an object's silhouette
GLIMPSE = 0.1  # of its silhouette: less does not count as visible
EDGE = 0.08  # of the full range, between neighbouring pixels: as much as counts as motion
SMALLEST = 5.0  # pixels: the gate
GRIPPER = ("flange", "finger1", "finger2")
_ALONE = 4  # geom group of an object that is drawn alone

# What must not become rarer (the gate: 0.8 of the other design's), by the name of its measurement.
EVENTS = (
    *(f"moving pixels, {camera}" for camera in CAMERAS),
    "moving pixels, all views",
    "contacts",
    "pushes",
    "occlusions",
)
KEPT = 0.8


@dataclass(frozen=True)
class Recorded:
    """One episode as it is measured.

    T ticks at 15 Hz, F frames at 5 Hz, V cameras, N objects.
    """

    frames: NDArray[np.uint8]  # (F, V, 180, 320, 3)
    touched: NDArray[np.bool_]  # (T, N) the gripper touches the object
    together: NDArray[np.bool_]  # (T, N * (N - 1) / 2) two objects touch
    positions: NDArray[np.float64]  # (T, N, 3) m
    shares: NDArray[np.float64]  # (F, V, N) visible part of an object's silhouette; NaN where it is not in the image
    sizes: NDArray[np.float64]  # (F, V, N) shorter side of a whole silhouette, pixels of the model's; NaN where cut
    seen: NDArray[np.float64]  # (F, V, N) visible pixels of the model's
    wrist: list[tuple[NDArray[np.float64], NDArray[np.float64]]]  # place (3,) and axes (3, 3) of the wrist camera
    wrist_fovy: float
    success: bool


def record(design: Design, seed: int, episode: int, seconds: float) -> Recorded:
    """Simulates, draws and observes one episode."""
    world, director = build_world(seed, episode, design)
    actor, ticks = Actor(world, director), round(seconds * FRAME_HZ)
    cameras, silhouettes = Cameras(world, len(range(0, ticks, STRIDE))), Silhouettes(world)
    touched, together, positions, told, wrist = [], [], [], [], []
    eye = world.data.camera(WRIST_CAMERA)
    for tick in range(ticks):
        positions.append(world.observe()["sim.object_pose"].reshape(-1, 7)[:, :3])
        if tick % STRIDE == 0:
            cameras.shoot()
            told.append(silhouettes.measure())
            wrist.append((eye.xpos.copy(), eye.xmat.reshape(3, 3).copy()))
        actor.tick()
        one, two = contacts(world)
        touched.append(one)
        together.append(two)
    director.judge(world.snapshot())
    cameras.close()
    silhouettes.close()
    shares, sizes, seen = (np.array(part) for part in zip(*told, strict=True))
    return Recorded(
        frames=np.stack([cameras.frames[name] for name in CAMERAS], axis=1),
        touched=np.array(touched),
        together=np.array(together),
        positions=np.array(positions),
        shares=shares,
        sizes=sizes,
        seen=seen,
        wrist=wrist,
        wrist_fovy=design.views.wrist_fovy,
        success=director.success,
    )


def contacts(world: World) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """(3,) which objects the gripper touches now; (3,) which pairs of objects (0-1, 0-2, 1-2) touch."""
    model, pairs = world.model, world.data.contact.geom
    names = [model.body(int(model.geom_bodyid[geom])).name for geom in pairs.ravel()]
    touched, together = np.zeros(3, bool), np.zeros(3, bool)
    for one, two in zip(names[::2], names[1::2], strict=True):
        ids = sorted(int(name[-1]) for name in (one, two) if name.startswith("object"))
        if len(ids) == 2 and ids[0] != ids[1]:
            together[sum(ids) - 1] = True
        elif len(ids) == 1 and (one in GRIPPER or two in GRIPPER):
            touched[ids[0]] = True
    return touched, together


class Silhouettes:
    """Counts each object's pixels in each view: as it is seen, and as it would be with nothing in front of it."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._renderer = mujoco.Renderer(world.model, *SILHOUETTE)
        self._renderer.enable_segmentation_rendering()
        self._geoms = [int(world.model.body(f"object{i}").geomadr[0]) for i in range(3)]
        self._alone = mujoco.MjvOption()
        self._alone.geomgroup[:] = 0
        self._alone.geomgroup[_ALONE] = 1

    def measure(self) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
        """(V, N) each: visible share, shorter side, visible pixels (`Recorded`)."""
        shares, sizes, seen = (np.full((len(CAMERAS), 3), np.nan) for _ in range(3))
        scale = np.array([HEIGHT / SILHOUETTE[0], WIDTH / SILHOUETTE[1]])
        for view, camera in enumerate(CAMERAS):
            together = self._draw(camera)
            for index, geom in enumerate(self._geoms):
                self._world.model.geom_group[geom] = _ALONE
                alone = self._draw(camera, self._alone) == geom
                self._world.model.geom_group[geom] = 0
                count, visible = alone.sum(), (together == geom).sum()
                seen[view, index] = visible * scale.prod()
                if not count:
                    continue
                shares[view, index] = visible / count
                rows, columns = np.flatnonzero(alone.any(axis=1)), np.flatnonzero(alone.any(axis=0))
                inside = rows[0] > 0 and columns[0] > 0
                if inside and rows[-1] < SILHOUETTE[0] - 1 and columns[-1] < SILHOUETTE[1] - 1:
                    sizes[view, index] = (scale * [rows[-1] - rows[0] + 1, columns[-1] - columns[0] + 1]).min()
        return shares, sizes, seen

    def _draw(self, camera: str, option: mujoco.MjvOption | None = None) -> NDArray[np.int32]:
        """(H, W) number of the geom at each pixel, -1 for none."""
        self._renderer.update_scene(self._world.data, camera=camera, scene_option=option)
        self._renderer.scene.flags[mujoco.mjtRndFlag.mjRND_SHADOW] = 0
        ids: NDArray[np.int32] = self._renderer.render()[..., 0]
        return ids

    def close(self) -> None:
        self._renderer.close()


def spells(touching: NDArray[np.bool_]) -> list[tuple[int, int]]:
    """(T,) -> the first and the last tick of each spell."""
    ticks = np.flatnonzero(touching)
    if not len(ticks):
        return []
    breaks = np.flatnonzero(np.diff(ticks) > GAP + 1)
    firsts, lasts = np.append(ticks[0], ticks[breaks + 1]), np.append(ticks[breaks], ticks[-1])
    return list(zip(firsts.tolist(), lasts.tolist(), strict=True))


def events(episode: Recorded) -> dict[str, float]:
    """Counts per episode.

    contacts: spells of the gripper with an object. pushes: those in which the object moves at least 3 cm over the
    table and never rises by 1 cm. lifts: those in which it rises by at least 3 cm. object contacts: spells of two
    objects. occlusions: how often, in an exterior view at 5 Hz, the visible part of an object's silhouette falls from
    half or more to less (another object or the arm comes in front of it). still: the share of whole seconds in which no
    object moves faster than 2 cm/s. success: whether the instruction held.
    """
    found = {"contacts": 0, "pushes": 0, "lifts": 0}
    for index in range(episode.touched.shape[1]):
        for first, last in spells(episode.touched[:, index]):
            path = episode.positions[first : last + 2, index]
            rise = (path[:, 2] - path[0, 2]).max()
            found["contacts"] += 1
            found["pushes"] += bool(np.linalg.norm((path[-1] - path[0])[:2]) >= PUSHED and rise < FLAT)
            found["lifts"] += bool(rise >= LIFTED)
    hidden = episode.shares[:, : len(EXTERIOR_VIEWS)] < HIDDEN  # NaN, out of the image, is not hidden
    speed = np.linalg.norm(np.diff(episode.positions, axis=0), axis=2).max(axis=1) * FRAME_HZ
    seconds = speed[: len(speed) // FRAME_HZ * FRAME_HZ].reshape(-1, FRAME_HZ)
    return {
        **found,
        "object contacts": sum(len(spells(pair)) for pair in episode.together.T),
        "occlusions": float((hidden[1:] & ~hidden[:-1] & np.isfinite(episode.shares[:-1, :2])).sum()),
        "still": float((seconds < 0.02).all(axis=1).mean()),
        "success": float(episode.success),
    }


def object_sizes(episode: Recorded) -> dict[str, float]:
    """Pixels of the model's, by camera, over objects that are visible (a tenth of their silhouette or more).

    least side: the shortest side of any whole silhouette's bounding box (none that the image's edge cuts), as it would
    be with nothing in front. middle side: the median. seen: the median of an object's visible pixels.
    """
    told = {}
    for view, camera in enumerate(CAMERAS):
        visible = episode.shares[:, view] >= GLIMPSE
        sides = np.where(visible, episode.sizes[:, view], np.nan)
        any_whole = np.isfinite(sides).any()
        told[f"least side, {camera}"] = float(np.nanmin(sides)) if any_whole else np.nan
        told[f"middle side, {camera}"] = float(np.nanmedian(sides)) if any_whole else np.nan
        told[f"seen, {camera}"] = float(np.median(episode.seen[:, view][visible])) if visible.any() else np.nan
    return told


def images(frames: torch.Tensor) -> dict[str, float]:
    """What changes within clips, and how finely drawn images are; `frames` is (F, V, 3, 48, 80) in [0, 1].

    moving pixels: of a view (3840 pixels), those that differ from the current frame (`moving_mask`) in any of the four
    that follow. copy: PSNR in dB of the current frame as a prediction of the fourth that follows; copy where moving:
    over the pixels that moved by then. edges: share of neighbouring pixels that differ by more than 0.08. colours: how
    many colours of 4 bits a channel fill 90% of an image.
    """
    firsts = torch.arange(0, len(frames) - AHEAD, AHEAD)
    current, later = frames[firsts], torch.stack([frames[firsts + k] for k in range(1, AHEAD + 1)])
    moved = moving_mask(later, current)  # (AHEAD, clips, V, H, W)
    any_moved = moved.any(dim=0).sum(dim=(-1, -2)).double().mean(dim=0)
    copied, there = psnr(current, later[-1]).mean(dim=0), masked_psnr(current, later[-1], moved[-1]).nanmean(dim=0)
    steps = [frames.diff(dim=dim).abs().amax(dim=2) > EDGE for dim in (-1, -2)]
    edges = sum(step.double().mean(dim=(0, 2, 3)) for step in steps) / 2
    levels = (frames[::AHEAD] * 15.99).long()
    codes = (levels[:, :, 0] * 256 + levels[:, :, 1] * 16 + levels[:, :, 2]).flatten(2)
    told = {"moving pixels, all views": float(any_moved.sum())}
    for view, camera in enumerate(CAMERAS):
        told[f"moving pixels, {camera}"] = float(any_moved[view])
        told[f"copy, {camera}"] = float(copied[view])
        told[f"copy where moving, {camera}"] = float(there[view])
        told[f"edges, {camera}"] = float(edges[view])
        told[f"colours, {camera}"] = float(np.mean([_colours(row.numpy()) for row in codes[:, view]]))
    return told


def _colours(codes: NDArray[np.int64]) -> int:
    """How many of an image's colours, the most frequent first, fill 90% of it."""
    counts = np.sort(np.unique(codes, return_counts=True)[1])[::-1]
    return int(np.searchsorted(np.cumsum(counts), 0.9 * codes.size) + 1)


def overlap(episode: Recorded, frames: torch.Tensor) -> dict[str, float]:
    """How much of a wrist image an earlier one holds, 0.2 s and 0.8 s (a clip) before; `frames` is (F, 3, 48, 80).

    The homography between two images is the table plane's, from the simulator's camera poses: exact for the table,
    wrong for what stands on it and for the gripper, which moves along. wrist overlap: share of pixels whose point of
    the table lies within the earlier image. wrist shift: how far that point moved, pixels, median over pixels and mean
    over frames. wrist explained: share of pixels within 0.08 of the earlier image after the homography. wrist copied:
    the same without it.
    """
    return {
        f"{name}, {lag / RATE_HZ} s": value
        for lag in (1, AHEAD)
        for name, value in _overlap(episode, frames, lag).items()
    }


def _overlap(episode: Recorded, frames: torch.Tensor, lag: int) -> dict[str, float]:
    """`overlap` with the image of `lag` frames before."""
    rows = []
    for index in range(lag, len(frames)):
        before, u, v = episode.wrist[index - lag], *_pixels()
        table = _on_table(*episode.wrist[index], episode.wrist_fovy, u, v)
        old_u, old_v = _project(*before, episode.wrist_fovy, table)
        inside = np.isfinite(old_u) & (np.abs(old_u) <= WIDTH / 2) & (np.abs(old_v) <= HEIGHT / 2)
        grid = torch.from_numpy(np.stack([old_u / (WIDTH / 2), old_v / (HEIGHT / 2)], axis=-1)).float()
        grid = torch.nan_to_num(grid, nan=9.0)
        moved = torch.nn.functional.grid_sample(
            frames[index - lag][None], grid[None], padding_mode="border", align_corners=False
        )[0]
        close = ((moved - frames[index]).abs().amax(dim=0) <= MOTION).numpy()
        still = ((frames[index - lag] - frames[index]).abs().amax(dim=0) <= MOTION).double().mean()
        shift = np.nanmedian(np.hypot(old_u - u, old_v - v))
        rows.append((inside.mean(), shift, (close & inside).mean(), float(still)))
    names = ("wrist overlap", "wrist shift", "wrist explained", "wrist copied")
    return dict(zip(names, np.mean(rows, axis=0).tolist(), strict=True))


def _pixels() -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Pixel centres of the model's image, from its middle: right and down, each (48, 80)."""
    v, u = np.mgrid[0:HEIGHT, 0:WIDTH]
    return u + 0.5 - WIDTH / 2, v + 0.5 - HEIGHT / 2


def _slopes(fovy: float) -> tuple[float, float]:
    """Tangent per pixel of the model's image, across and down; recorded images are 16:9."""
    high = np.tan(np.radians(fovy) / 2)
    return high * (16 / 9) / (WIDTH / 2), high / (HEIGHT / 2)


def _on_table(place: Any, axes: Any, fovy: float, u: Any, v: Any) -> NDArray[np.float64]:
    """(48, 80, 3) the point of the table plane under each pixel; NaN where the ray does not meet it."""
    across, down = _slopes(fovy)
    rays = np.stack([u * across, -v * down, -np.ones_like(u)], axis=-1) @ axes.T
    with np.errstate(divide="ignore", invalid="ignore"):
        far = np.where(rays[..., 2] < -1e-6, -place[2] / rays[..., 2], np.nan)
    points: NDArray[np.float64] = place + far[..., None] * rays
    return points


def _project(place: Any, axes: Any, fovy: float, points: Any) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Where points lie in an image, from its middle, pixels; NaN behind the camera."""
    across, down = _slopes(fovy)
    right, up, back = np.moveaxis((points - place) @ axes, -1, 0)
    depth = np.where(back < -1e-6, -back, np.nan)
    return right / depth / across, -up / depth / down


def measure(design: Design, seed: int, episodes: int, seconds: float, sheet: Path | None) -> dict[str, list[float]]:
    """Every quantity of every episode."""
    told: dict[str, list[float]] = {}
    for number in range(episodes):
        episode = record(design, seed, number, seconds)
        small = np.stack([resize(episode.frames[:, view], HEIGHT, WIDTH) for view in range(len(CAMERAS))], axis=1)
        if sheet is not None and number < 3:
            write_sheets(sheet, f"{design.name}-{number}", episode.frames, small)
        frames = to_unit(small)
        parts = (events(episode), images(frames), object_sizes(episode), overlap(episode, frames[:, -1]))
        for name, value in (pair for part in parts for pair in part.items()):
            told.setdefault(name, []).append(value)
        print(f"\r{design.name}: {number + 1} of {episodes}", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    return told


def write_sheets(folder: Path, name: str, frames: NDArray[np.uint8], small: NDArray[np.uint8]) -> None:
    """Two PNGs of an episode: eight moments across, the views down; recorded, and the model's enlarged four times."""
    folder.mkdir(parents=True, exist_ok=True)
    moments = np.linspace(0, len(frames) - 1, 8).round().astype(int)
    enlarged = small[moments].repeat(4, axis=2).repeat(4, axis=3)
    for kind, images_ in (("recorded", frames[moments]), ("model", enlarged)):
        count, views, height, width, channels = images_.shape
        rows = images_.transpose(1, 2, 0, 3, 4).reshape(views * height, count * width, channels)
        Image.fromarray(rows).save(folder / f"{name}-{kind}.png")


def summary(values: list[float], seed: int = 0) -> tuple[float, float, float]:
    """Mean over episodes and its 95% bootstrap interval."""
    array = np.array(values, dtype=np.float64)
    low, high = cluster_bootstrap(array, [str(i) for i in range(len(array))], seed=seed)
    return float(np.nanmean(array)), float(low), float(high)


def ratio(new: list[float], old: list[float]) -> tuple[float, float, float]:
    """Ratio of two means, and its 95% interval when the episodes of each are drawn again."""
    rng, a, b = np.random.default_rng(0), np.array(new), np.array(old)
    with np.errstate(divide="ignore", invalid="ignore"):
        draws = [np.nanmean(rng.choice(a, len(a))) / np.nanmean(rng.choice(b, len(b))) for _ in range(2000)]
    known = np.array(draws)[np.isfinite(draws)]
    low, high = np.quantile(known, [0.025, 0.975]) if known.size else (np.nan, np.nan)
    return float(np.nanmean(a)) / (float(np.nanmean(b)) or np.nan), float(low), float(high)


def compare(new: dict[str, list[float]], old: dict[str, list[float]]) -> dict[str, Any]:
    """Rows of the table, and whether the gates hold: events at least 0.8 of the other's, no object under 5 pixels."""
    rows = {
        name: {"new": summary(new[name]), "old": summary(old[name]), "ratio": ratio(new[name], old[name])}
        for name in new
    }
    rarer = [name for name in EVENTS if rows[name]["ratio"][0] < KEPT]
    least = {camera: float(np.nanmin(new[f"least side, {camera}"])) for camera in CAMERAS}
    return {
        "rows": rows,
        "smallest_object": least,
        "too_rare": rarer,
        "too_small": [camera for camera, side in least.items() if side < SMALLEST],
    }


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.world_statistics",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--design", choices=list(DESIGNS), default="steady")
    parser.add_argument("--against", choices=list(DESIGNS), default="varied")
    parser.add_argument("--episodes", type=int, default=24, help="of each design")
    parser.add_argument("--seconds", type=float, default=14.0)
    parser.add_argument("--seed", type=int, default=900)
    parser.add_argument("--sheet", type=Path, metavar="DIR", help="also write contact sheets of three episodes")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    told = {
        name: measure(DESIGNS[name], options.seed, options.episodes, options.seconds, options.sheet)
        for name in (options.design, options.against)
    }
    result = compare(told[options.design], told[options.against])
    if options.json:
        print(json.dumps({"design": options.design, "against": options.against, **result}, indent=1))
        return
    print(f"{'per episode, mean [95%]':32}{options.design:>26}{options.against:>26}{'ratio':>24}")
    for name, row in result["rows"].items():
        cells = "".join(f"{'{:.3g} [{:.3g}, {:.3g}]'.format(*row[key]):>26}" for key in ("new", "old", "ratio"))
        print(f"{name:32}{cells}")
    sides = ", ".join(f"{camera} {side:.1f}" for camera, side in result["smallest_object"].items())
    print(f"smallest object of {options.design}, pixels: {sides}")
    print(f"rarer than {KEPT} of {options.against}: {', '.join(result['too_rare']) or 'nothing'}")
    print(f"views with objects under {SMALLEST:.0f} pixels: {', '.join(result['too_small']) or 'none'}")


if __name__ == "__main__":
    main()
