"""Names of the files in a run's folder that the launcher and its workers share."""

CONFIG = "config.json"  # settings and job, written by the launcher
RESULT = "result.json"  # what the task returned, written by rank 0
FAILURE = "failure.json"  # exit code and reason, written by the first rank that failed
