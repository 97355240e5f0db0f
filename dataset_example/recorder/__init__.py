"""Records the bundled example world: a simulated Franka Panda at a table, in DROID's format (LeRobot v2.1)."""

import ctypes.util
import os
import sys

# MuJoCo reads this once, when it is imported, and fails to import where the named library is missing. Without a screen
# only EGL and OSMesa can draw; where neither is installed, the physics still run.
if sys.platform.startswith("linux") and "MUJOCO_GL" not in os.environ:
    _found = [name for name, library in (("egl", "EGL"), ("osmesa", "OSMesa")) if ctypes.util.find_library(library)]
    if _found or "DISPLAY" not in os.environ:
        os.environ["MUJOCO_GL"] = _found[0] if _found else "disabled"
os.environ.setdefault("LP_NUM_THREADS", "0")  # Mesa's software renderer: one process, one core
