"""Positions of coloured objects, triangulated from two cameras whose positions are known to a centimetre.

Each camera's coloured pixels give a ray; two rays intersect at the object. The exterior cameras of the bundled world
differ a little between episodes: the start, where the objects' positions are known, gives the offset. A view that shows
too little of an object (hidden, or lost in an imagined image) is left out; with one view left, the object is assumed
to be on the table unless last seen above it.

Shape legend: F frames, H, W pixels. Image points are fractions of the image's width and height, from its upper left.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage
from scipy.spatial import ConvexHull
from scipy.spatial.transform import Rotation

from persistworld_cli.metrics.masks import object_mask
from persistworld_cli.policies.bundled_world.rules import (
    EXTERIOR_VIEWS,
    FIELD_OF_VIEW,
    IMAGE_HEIGHT,
    IMAGE_WIDTH,
    LOOK_AT,
    ROUND_SHAPES,
    Float,
)
from persistworld_cli.policies.judge import SceneObject

VISIBLE = 0.55  # share of an object's silhouette: less gives no ray
SPECK = 0.15  # share of a colour's largest region: smaller regions are not the object
RAY_GAP = 0.03  # m, largest distance between two rays that meet
ON_TABLE = 0.02  # m above its resting height: if last seen higher, one view does not give its position
RAISED = 0.05  # m above its resting height: a free object this high lies on the large one (at least 0.1 m high)
IN_HAND = 0.09  # m from the pads: nearer than this, with a closed gripper, it may be carried
CLOSED = 0.15  # the gripper has begun to close
_CORNERS = np.array([[x, y, z] for x in (-1, 1) for y in (-1, 1) for z in (-1, 1)], dtype=np.float64)
_ROUND = np.array([[np.cos(a), np.sin(a), z] for a in np.linspace(0, 2 * np.pi, 16, endpoint=False) for z in (-1, 1)])
_HEIGHT = 2 * np.tan(np.radians(FIELD_OF_VIEW) / 2)  # of the image plane at distance 1
_ASPECT = IMAGE_WIDTH / IMAGE_HEIGHT  # of the recorded images; extraction may have stretched them


@dataclass(frozen=True)
class Camera:
    """Position (3,) m; axes as rows (3, 3) right, up, back; offset (2,) of what it shows from what is expected."""

    position: Float
    axes: Float
    offset: Float

    def project(self, points: Float) -> Float:
        """(n, 3) m -> (n, 2) image points."""
        right, up, back = ((points - self.position) @ self.axes.T).T
        plane = [0.5 + right / (-back * _HEIGHT * _ASPECT), 0.5 - up / (-back * _HEIGHT)]
        return np.stack(plane, axis=1) + self.offset

    def ray(self, point: Float) -> Float:
        """(2,) image point -> (3,) unit vector towards it."""
        u, v = point - self.offset - 0.5
        ray = self.axes.T @ np.array([u * _HEIGHT * _ASPECT, -v * _HEIGHT, -1.0])
        direction: Float = ray / np.linalg.norm(ray)
        return direction


@dataclass(frozen=True)
class Detection:
    """An object's pixels in one image: their centroid (2,), and the fraction of the image that they fill."""

    centroid: Float
    area: float


def nominal_camera(name: str) -> Camera:
    """An exterior camera at the recorder's nominal position."""
    azimuth, elevation = np.radians(EXTERIOR_VIEWS[name][:2])
    back = np.array([np.cos(azimuth) * np.cos(elevation), np.sin(azimuth) * np.cos(elevation), np.sin(elevation)])
    right = np.cross([0.0, 0.0, 1.0], back)
    right /= np.linalg.norm(right)
    position = np.array(LOOK_AT) + EXTERIOR_VIEWS[name][2] * back
    return Camera(position, np.stack([right, np.cross(back, right), back]), np.zeros(2))


def detect(frames: NDArray[np.uint8], item: SceneObject) -> list[Detection | None]:
    """The pixels of an object's colour in each image (F, H, W, 3); None if there are none."""
    return [_detect(mask) for mask in object_mask(frames, [item.rgb])]


def _detect(mask: NDArray[np.bool_]) -> Detection | None:
    labels, count = ndimage.label(mask)
    if not count:
        return None
    sizes = ndimage.sum_labels(mask, labels, np.arange(1, count + 1))
    rows, columns = np.nonzero(np.isin(labels, 1 + np.flatnonzero(sizes >= SPECK * sizes.max())))
    h, w = mask.shape
    return Detection(np.array([(columns.mean() + 0.5) / w, (rows.mean() + 0.5) / h]), len(rows) / mask.size)


def is_visible(camera: Camera, item: SceneObject, position: Float, seen: Detection) -> bool:
    """Whether a view shows enough of an object at a position for the centroid of its pixels to be valid."""
    return seen.area >= VISIBLE * silhouette_area(camera, item, position)


def silhouette_area(camera: Camera, item: SceneObject, position: Float) -> float:
    """The fraction of the image that an unhidden object fills, with its orientation at the start."""
    shape = _ROUND if item.shape in ROUND_SHAPES else _CORNERS
    turn = Rotation.from_quat(item.quaternion[[1, 2, 3, 0]])
    corners = camera.project(position + turn.apply(shape * item.half))
    return float(ConvexHull(corners).volume)  # of a plane figure: its area


def calibrate(camera: Camera, starts: Sequence[tuple[SceneObject, Detection | None]]) -> Camera:
    """The camera with the mean offset of the objects in its start image from their known positions."""
    gaps = [
        seen.centroid - camera.project(item.position[None])[0]
        for item, seen in starts
        if seen and is_visible(camera, item, item.position, seen)
    ]
    return replace(camera, offset=np.mean(gaps, axis=0)) if gaps else camera


class ObjectTracker:
    """Positions of one object over a rollout, frame by frame.

    An object that the gripper does not hold rests on the table or on the large object. A half hidden object appears too
    high or too low, so an object near the table is placed where its rays meet its resting height.
    """

    def __init__(self, cameras: Mapping[str, Camera], item: SceneObject) -> None:
        self._cameras, self._item = cameras, item
        self._rest = float(item.half[2])
        self._height = float(item.position[2])  # its last position seen by both cameras

    def locate(self, seen: Mapping[str, Detection | None], pads: Float, gripper: float) -> Float:
        """(3,) the object's position; NaN where it is unknown.

        Args:
            seen: camera -> the object's pixels in its image.
            pads: (3,) the point between the finger pads.
            gripper: 0 open .. 1 closed.
        """
        views = [(camera, one) for name, camera in self._cameras.items() if (one := seen[name]) is not None]
        found = self._triangulate(views, pads, gripper)
        if found is not None:
            visible = [(camera, one) for camera, one in views if is_visible(camera, self._item, found, one)]
            if len(visible) < len(views):
                views, found = visible, self._triangulate(visible, pads, gripper)
        if found is None:
            return np.full(3, np.nan)
        if len(views) == 2:
            self._height = float(found[2])
        return found

    def _triangulate(self, views: Sequence[tuple[Camera, Detection]], pads: Float, gripper: float) -> Float | None:
        """Where two rays intersect; or where the rays, or a single ray, meet the resting height."""
        if not views:
            return None
        crossed = _intersect(*views) if len(views) == 2 else None
        if len(views) == 2 and crossed is None:
            return None
        resting = np.mean([self._at_resting_height(*view) for view in views], axis=0)
        if not self._item.graspable:
            return resting
        carried = gripper > CLOSED and np.linalg.norm((resting if crossed is None else crossed) - pads) < IN_HAND
        if crossed is None:
            return None if carried or self._height > self._rest + ON_TABLE else resting
        return crossed if carried or crossed[2] > self._rest + RAISED else resting

    def _at_resting_height(self, camera: Camera, seen: Detection) -> Float:
        """Where the ray meets the height of the object's centre on the table."""
        ray = camera.ray(seen.centroid)
        point: Float = camera.position + ray * (self._rest - camera.position[2]) / ray[2]
        return point


def _intersect(one: tuple[Camera, Detection], two: tuple[Camera, Detection]) -> Float | None:
    """The point nearest to two rays; None if they are far apart, since they then show different things."""
    origins = np.stack([camera.position for camera, _ in (one, two)])
    rays = np.stack([camera.ray(seen.centroid) for camera, seen in (one, two)])
    along = rays[0] @ rays[1]
    gap = origins[1] - origins[0]
    lengths = np.linalg.solve(np.array([[1, -along], [along, -1]]), np.array([gap @ rays[0], gap @ rays[1]]))
    points = origins + lengths[:, None] * rays
    if np.linalg.norm(points[0] - points[1]) > RAY_GAP:
        return None
    middle: Float = points.mean(axis=0)
    return middle
