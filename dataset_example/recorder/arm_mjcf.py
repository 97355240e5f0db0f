"""The arm and the gripper as MJCF: Franka Panda's kinematics, our own primitive shapes.

Joint frames follow Franka's modified DH table (persistworld_cli/robot/kinematics.py); the flange is 0.107 m beyond
joint 7. The gripper has two parallel fingers that open along the flange's x axis; the wrist camera is on its -y side.
"""

from __future__ import annotations

SHELL, JOINT, HAND, PAD = "0.86 0.86 0.88 1", "0.42 0.44 0.49 1", "0.20 0.21 0.24 1", "0.08 0.08 0.09 1"
_GHOST = 'contype="0" conaffinity="0"'
_FINGER = (
    '<geom type="box" size=".007 .0125 .021" pos=".007 0 .146" rgba="{pad}" contype="2" conaffinity="0" condim="6"'
    ' friction="1.8 .05 .01" solref="0.008 1"/>'
    '<geom type="box" size=".006 .011 .026" pos=".013 0 .106" rgba="{hand}" contype="0" conaffinity="0"/>'
)


def _capsule(start: str, end: str, radius: float, rgba: str) -> str:
    return f'<geom type="capsule" fromto="{start} {end}" size="{radius}" rgba="{rgba}" {_GHOST}/>'


def _inertia(position: str, mass: float, moment: float) -> str:
    return f'<inertial pos="{position}" mass="{mass}" diaginertia="{moment} {moment} {moment}"/>'


def _joint(index: int, low: float, high: float, damping: float) -> str:
    return f'<joint name="joint{index}" axis="0 0 1" range="{low} {high}" damping="{damping}"/>'


def _gripper(wrist_camera: str, case: str, stroke: float) -> str:
    """Palm, two fingers that mirror each other, the camera and its case; the frame is the flange's."""
    finger = _FINGER.format(pad=PAD, hand=HAND)
    slide = f'type="slide" axis="1 0 0" range="0 {stroke}" damping="4"'
    return f"""<body name="flange" pos="0 0 .107" gravcomp="1">{_inertia("0 0 .05", 0.8, 0.002)}
  <site name="flange"/>{wrist_camera}
  <geom type="cylinder" size=".038 .018" pos="0 0 .016" rgba="{JOINT}" {_GHOST}/>
  <geom type="box" size=".050 .026 .026" pos="0 0 .056" rgba="{HAND}" contype="2" conaffinity="0"/>
  <geom type="box" size=".022 .009 .012" pos="{case}" rgba="{PAD}" {_GHOST}/>
  <body name="finger1" gravcomp="1">{_inertia("0 0 .13", 0.05, 1e-4)}<joint name="finger1" {slide}/>{finger}</body>
  <body name="finger2" quat="0 0 0 1" gravcomp="1">{_inertia("0 0 .13", 0.05, 1e-4)}
    <joint name="finger2" {slide}/>{finger}</body>
</body>"""


def arm_body(wrist_camera: str, case: str, stroke: float) -> str:
    """MJCF of base, seven links and gripper.

    Args:
        wrist_camera: a camera element in the flange frame.
        case: where that camera's case is, in the same frame.
        stroke: m that each finger moves; the gripper opens to twice that.
    """
    links = [
        (
            'pos="0 0 .333"', 3, "0 0 -.1", 0.05, _joint(1, -2.8973, 2.8973, 2),
            _capsule("0 0 -.16", "0 0 0", 0.075, SHELL),
        ),
        (
            'quat="1 -1 0 0"', 3, "0 -.1 0", 0.05, _joint(2, -1.7628, 1.7628, 2),
            _capsule("0 0 -.06", "0 0 .06", 0.075, JOINT) + _capsule("0 0 0", "0 -.2 0", 0.07, SHELL),
        ),
        (
            'pos="0 -.316 0" quat="1 1 0 0"', 2.5, "0 0 0", 0.03, _joint(3, -2.8973, 2.8973, 2),
            _capsule("0 0 -.1", "0 0 0", 0.068, SHELL) + _capsule("0 0 0", ".0825 0 0", 0.06, SHELL),
        ),
        (
            'pos=".0825 0 0" quat="1 1 0 0"', 2.5, "0 0 0", 0.03, _joint(4, -3.0718, -0.0698, 2),
            _capsule("0 0 -.05", "0 0 .05", 0.066, JOINT) + _capsule("0 0 0", "-.0825 .12 0", 0.058, SHELL),
        ),
        (
            'pos="-.0825 .384 0" quat="1 -1 0 0"', 2, "0 0 -.1", 0.02, _joint(5, -2.8973, 2.8973, 1),
            _capsule("0 0 -.25", "0 0 -.05", 0.055, SHELL),
        ),
        (
            'quat="1 1 0 0"', 1.5, "0 0 0", 0.01, _joint(6, -0.0175, 3.7525, 1),
            _capsule("0 0 -.05", "0 0 .05", 0.052, JOINT) + _capsule("0 0 0", ".088 0 0", 0.048, SHELL),
        ),
        (
            'pos=".088 0 0" quat="1 1 0 0"', 0.7, "0 0 .05", 0.005, _joint(7, -2.8973, 2.8973, 1),
            _capsule("0 0 0", "0 0 .07", 0.044, SHELL),
        ),
    ]  # fmt: skip
    body = _gripper(wrist_camera, case, stroke)
    for number, (place, mass, centre, moment, joint, shapes) in reversed(list(enumerate(links, start=1))):
        inertia = _inertia(centre, mass, moment)
        body = f'<body name="link{number}" {place} gravcomp="1">{inertia}{joint}{shapes}\n{body}</body>'
    base = f'<geom type="cylinder" size=".09 .09" pos="0 0 .09" rgba="{SHELL}" {_GHOST}/>'
    return f'<body name="link0">{base}\n{body}</body>'


def _servo(index: int, stiffness: int, damping: int) -> str:
    return f'<position name="servo{index}" joint="joint{index}" kp="{stiffness}" kv="{damping}"/>'


_GAINS = ((2500, 200), (2500, 200), (2000, 160), (2000, 160), (1000, 60), (1000, 60), (1000, 60))
ARM_ACTUATORS = f"""<equality><joint joint1="finger1" joint2="finger2" solref="0.005 1"/></equality>
<actuator>{"".join(_servo(index, *gains) for index, gains in enumerate(_GAINS, start=1))}
  <position name="gripper" joint="finger1" kp="900" kv="30" forcerange="-28 28"/></actuator>"""
