"""Names of the files that the launcher and its workers share; the launcher leaves them in a run's folder for people."""

CONFIG = "config.json"  # settings and job, written by the launcher
RESULT = "result.json"  # what the task returned, written by rank 0
FAILURE = "failure.json"  # exit code and reason, written by the first rank that failed
