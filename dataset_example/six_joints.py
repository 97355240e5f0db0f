"""Draws recordings of a planar arm with six joints and one camera: `python -m dataset_example.six_joints OUT`.

The example of docs/own-robot.md: LeRobot v3.0, 10 frames per second, states and actions of six angles in degrees, no
gripper. A state is where the joints are; the action of a frame is where they are at the next one.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from persistworld_cli.data.raw.lerobot_writer import NewEpisode, write_lerobot

JOINTS = ("base", "shoulder", "elbow", "forearm", "wrist", "tool")
FPS, HEIGHT, WIDTH = 10, 96, 160
TASK = "wave the arm"
_REACH = np.array([35.0, 40.0, 45.0, 45.0, 50.0, 60.0])  # degrees each way from upright
_LINKS = (20, 18, 14, 12, 9, 7)  # pixels
_COLOURS = ("firebrick", "darkorange", "gold", "forestgreen", "royalblue", "purple")


def joint_angles(episode: int, length: int) -> NDArray[np.float64]:
    """(length, 6) degrees: each joint swings at a pace of its own."""
    rng = np.random.default_rng(episode)
    pace, phase = rng.uniform(0.1, 0.5, 6), rng.uniform(0, 2 * np.pi, 6)
    return _REACH * np.sin(2 * np.pi * pace * np.arange(length)[:, None] / FPS + phase)


def draw(angles: NDArray[np.float64]) -> NDArray[np.uint8]:
    """(96, 160, 3): the arm at (6,) angles, from a camera in front of it."""
    image = Image.new("RGB", (WIDTH, HEIGHT), "lightgray")
    pencil = ImageDraw.Draw(image)
    pencil.rectangle((0, HEIGHT - 10, WIDTH, HEIGHT), fill="saddlebrown")
    at, heading = np.array([WIDTH / 2, HEIGHT - 10.0]), 0.0
    for angle, length, colour in zip(angles, _LINKS, _COLOURS, strict=True):
        heading += np.radians(angle)
        end = at + length * np.array([np.sin(heading), -np.cos(heading)])
        pencil.line((*at, *end), fill=colour, width=7)
        pencil.ellipse((*(end - 3), *(end + 3)), fill="black")
        at = end
    return np.asarray(image)


def make_episode(number: int, length: int) -> NewEpisode:
    """One recording."""
    angles = joint_angles(number, length + 1)
    columns = {"observation.state": angles[:-1], "action": angles[1:]}
    return NewEpisode(task=TASK, columns=columns, images={"front": np.stack([draw(row) for row in angles[:-1]])})


def main(arguments: Sequence[str] | None = None) -> None:
    """Write the dataset."""
    parser = argparse.ArgumentParser(prog="dataset_example.six_joints", description=__doc__)
    parser.add_argument("out", type=Path, metavar="OUT", help="new folder of the LeRobot dataset")
    parser.add_argument("--episodes", type=int, default=20, help="how many (default: %(default)s)")
    parser.add_argument("--frames", type=int, default=60, help="length of an episode (default: %(default)s)")
    options = parser.parse_args(arguments)
    write_lerobot(options.out, [make_episode(i, options.frames) for i in range(options.episodes)], FPS, "six_joints")


if __name__ == "__main__":
    main()
