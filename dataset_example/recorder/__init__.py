"""Records the bundled example world: a simulated Franka Panda at a table, in DROID's format (LeRobot v2.1)."""
