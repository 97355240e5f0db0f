"""An observation as a policy gets it, for tests of policies and their servers."""

from __future__ import annotations

from typing import Any

import numpy as np

from persistworld_cli.policies.action_spaces import JointVelocity, at_joints
from persistworld_cli.policies.observation import PolicyView, build_observation
from persistworld_cli.robot.adapter import GainAdapter

REST = np.array([0.0, 0.05, 0.3, -2.25, 0.0, 2.5, -np.pi / 2, 0.0])
IMAGES = np.zeros((3, 6, 8, 3), np.uint8)
IMAGES_SHOWN = {"observation/exterior_image_1_left": 1, "observation/wrist_image_left": 2}
VIEW = PolicyView(space=JointVelocity(GainAdapter()), image_size=16, images=IMAGES_SHOWN)


def observation(joints: np.ndarray = REST, prompt: str = "lift the cube") -> dict[str, Any]:
    return build_observation(VIEW, IMAGES, at_joints(joints), prompt)
