"""Where coloured objects are, from the images of two cameras whose places are known to a centimetre.

Each camera's coloured pixels give a ray; two rays cross at the object. The exterior cameras of the bundled world stand
a little differently in every episode: the start, where the objects' places are known, tells by how much. A view that
shows too little of an object (hidden, or gone from an imagined image) is left out; with one view left, an object is
taken to lie on the table, unless it is, or lately was, off it.

Shape legend: F frames, H, W pixels. Image places are shares of the image's width and height, from its upper left.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage
from scipy.spatial import ConvexHull
from scipy.spatial.transform import Rotation

from persistworld_cli.metrics.masks import object_mask
from persistworld_cli.policies.judge import Float, SceneObject

# Camera -> azimuth, elevation (degrees), distance (m) from the point looked at: the recorder's, before it varies them.
VIEWS = {"exterior_1_left": (-42.0, 30.0, 1.0), "exterior_2_left": (58.0, 33.0, 1.02)}
LOOK_AT = np.array([0.51, 0.0, 0.07])
FIELD = np.radians(23.5)  # vertical field of view
ASPECT = 16 / 9  # of the recorded images; extraction may have stretched them
SEEN = 0.55  # of an object's silhouette: less gives no ray
SPECK = 0.15  # of the largest patch of a colour: smaller ones are not the object
APART = 0.03  # m that two rays may miss each other by
ON_TABLE = 0.02  # m above where it rests: last seen higher, one view alone does not tell where it is
RAISED = 0.05  # m above where it rests: from here on a free object lies on the large one (0.1 m high or more)
IN_HAND = 0.09  # m from the pads: so near, with the gripper closed, it may be carried
CLOSED = 0.15  # the gripper has begun to close
_CORNERS = np.array([[x, y, z] for x in (-1, 1) for y in (-1, 1) for z in (-1, 1)], dtype=np.float64)
_ROUND = np.array([[np.cos(a), np.sin(a), z] for a in np.linspace(0, 2 * np.pi, 16, endpoint=False) for z in (-1, 1)])


@dataclass(frozen=True)
class Camera:
    """A camera: where it stands (3,), its axes as rows (3, 3) right, up, back, and by how much its image is off."""

    place: Float
    axes: Float
    shift: Float

    def project(self, points: Float) -> Float:
        """(n, 3) m -> (n, 2) shares of width and height."""
        right, up, back = ((points - self.place) @ self.axes.T).T
        high = 2 * np.tan(FIELD / 2)
        return np.stack([0.5 + right / (-back * high * ASPECT), 0.5 - up / (-back * high)], axis=1) + self.shift

    def ray(self, seen: Float) -> Float:
        """(2,) a place in the image -> (3,) the direction that it lies in."""
        u, v = seen - self.shift - 0.5
        high = 2 * np.tan(FIELD / 2)
        way = self.axes.T @ np.array([u * high * ASPECT, -v * high, -1.0])
        direction: Float = way / np.linalg.norm(way)
        return direction


@dataclass(frozen=True)
class Patch:
    """An object's pixels in one image: their centre, and their part of the image."""

    centre: Float
    area: float


def nominal_camera(name: str) -> Camera:
    """A camera as the world's recorder puts it before it varies the place."""
    azimuth, elevation = np.radians(VIEWS[name][:2])
    back = np.array([np.cos(azimuth) * np.cos(elevation), np.sin(azimuth) * np.cos(elevation), np.sin(elevation)])
    right = np.cross([0.0, 0.0, 1.0], back)
    right /= np.linalg.norm(right)
    return Camera(LOOK_AT + VIEWS[name][2] * back, np.stack([right, np.cross(back, right), back]), np.zeros(2))


def find_patches(frames: NDArray[np.uint8], item: SceneObject) -> list[Patch | None]:
    """Of each image (F, H, W, 3), the pixels of an object's colour; None where there are none."""
    return [_patch(mask) for mask in object_mask(frames, [item.rgb])]


def _patch(mask: NDArray[np.bool_]) -> Patch | None:
    labels, count = ndimage.label(mask)
    if not count:
        return None
    sizes = ndimage.sum_labels(mask, labels, np.arange(1, count + 1))
    kept = np.isin(labels, 1 + np.flatnonzero(sizes >= SPECK * sizes.max()))
    rows, columns = np.nonzero(kept)
    high, wide = mask.shape
    return Patch(np.array([(columns.mean() + 0.5) / wide, (rows.mean() + 0.5) / high]), len(rows) / mask.size)


def is_whole(camera: Camera, item: SceneObject, position: Float, patch: Patch) -> bool:
    """Whether enough is seen of an object at a place for its patch's centre to be its own."""
    return patch.area >= SEEN * silhouette(camera, item, position)


def silhouette(camera: Camera, item: SceneObject, position: Float) -> float:
    """The part of the image that an object would fill, seen whole, turned as at the start."""
    shape = _ROUND if item.shape in ("cylinder", "drum") else _CORNERS
    turn = Rotation.from_quat(item.quaternion[[1, 2, 3, 0]])
    corners = camera.project(position + turn.apply(shape * item.half))
    return float(ConvexHull(corners).volume)  # of a plane figure: its area


def calibrate(
    cameras: Mapping[str, Camera], starts: Mapping[str, Sequence[tuple[SceneObject, Patch | None]]]
) -> dict[str, Camera]:
    """Cameras with the shift at which objects (with what is seen of them at the start) lie where they are known to."""
    out = {}
    for name, camera in cameras.items():
        gaps = [
            patch.centre - camera.project(item.position[None])[0]
            for item, patch in starts[name]
            if patch and is_whole(camera, item, item.position, patch)
        ]
        out[name] = Camera(camera.place, camera.axes, np.mean(gaps, axis=0)) if gaps else camera
    return out


class Finder:
    """Places of one object over a rollout, frame by frame.

    What no gripper holds rests: on the table, or on the large object. Half hidden, an object seems to lie higher or
    lower than it does, so one that is seen near the table is put where its rays meet its resting height.
    """

    def __init__(self, cameras: Sequence[Camera], item: SceneObject) -> None:
        self._cameras, self._item = list(cameras), item
        self._rest = float(item.half[2])
        self._height = float(item.position[2])  # where it was last seen by both

    def place(self, patches: Sequence[Patch | None], pads: Float, gripper: float) -> Float:
        """(3,) where the object is, NaN if that cannot be told.

        Args:
            patches: of each camera.
            pads: (3,) the point between the finger pads.
            gripper: 0 open .. 1 closed.
        """
        views = [(c, p) for c, p in zip(self._cameras, patches, strict=True) if p is not None]
        found = self._from(views, pads, gripper)
        if found is not None:
            whole = [(c, p) for c, p in views if is_whole(c, self._item, found, p)]
            if len(whole) < len(views):
                views, found = whole, self._from(whole, pads, gripper)
        if found is None:
            return np.full(3, np.nan)
        if len(views) == 2:
            self._height = float(found[2])
        return found

    def _from(self, views: Sequence[tuple[Camera, Patch]], pads: Float, gripper: float) -> Float | None:
        """Where two rays cross, or where they, or one alone, meet the resting height."""
        if not views:
            return None
        crossed = _cross(*views) if len(views) == 2 else None
        if len(views) == 2 and crossed is None:
            return None
        resting = np.mean([self._at_rest(*view) for view in views], axis=0)
        if not self._item.graspable:
            return resting
        carried = gripper > CLOSED and np.linalg.norm((resting if crossed is None else crossed) - pads) < IN_HAND
        if crossed is None:
            return None if carried or self._height > self._rest + ON_TABLE else resting
        return crossed if carried or crossed[2] > self._rest + RAISED else resting

    def _at_rest(self, camera: Camera, patch: Patch) -> Float:
        """Where the ray meets the height of the object's centre when it stands on the table."""
        way = camera.ray(patch.centre)
        point: Float = camera.place + way * (self._rest - camera.place[2]) / way[2]
        return point


def _cross(one: tuple[Camera, Patch], two: tuple[Camera, Patch]) -> Float | None:
    """The point nearest to two rays; None where they miss each other: not the same thing was seen."""
    places = np.stack([camera.place for camera, _ in (one, two)])
    ways = np.stack([camera.ray(patch.centre) for camera, patch in (one, two)])
    along = ways[0] @ ways[1]
    gap = places[1] - places[0]
    reach = np.linalg.solve(np.array([[1, -along], [along, -1]]), np.array([gap @ ways[0], gap @ ways[1]]))
    points = places + reach[:, None] * ways
    if np.linalg.norm(points[0] - points[1]) > APART:
        return None
    middle: Float = points.mean(axis=0)
    return middle
