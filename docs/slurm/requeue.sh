# For the scripts beside this one: run a command in a job, and requeue the job if the command should continue.

# In "$OUTPUT/slurm-$SLURM_JOB_ID.failures": one line per failure of a machine. After this many the job ends.
RESTARTS="${RESTARTS:-3}"

# run_and_requeue COMMAND...: exits with the command's code, or requeues the job. It is requeued
# - after USR1, which SLURM sends before the time limit and which the command gets: it has saved its state;
# - after a machine's failure, up to RESTARTS times: 75, or above 128 (a signal), except for 130 (interrupted).
# A user's or the program's error (1, 2, ...) would come again: the job ends with it.
run_and_requeue() {
  "$@" &
  local command=$! code=0 stopping="" count failures="$OUTPUT/slurm-$SLURM_JOB_ID.failures"
  trap 'stopping=1; kill -USR1 "$command"' USR1
  wait "$command" || code=$?
  while kill -0 "$command" 2>/dev/null; do   # a trapped signal ends `wait` early
    code=0
    wait "$command" || code=$?
  done
  if [ -n "$stopping" ] && [ "$code" -ne 0 ]; then
    echo "job $SLURM_JOB_ID is requeued: the time limit is near"
  elif [ "$code" -eq 75 ] || { [ "$code" -gt 128 ] && [ "$code" -ne 130 ]; }; then
    mkdir -p "$OUTPUT"
    echo "$(date '+%F %T') exit code $code" >> "$failures"
    count=$(($(wc -l < "$failures")))
    [ "$count" -gt "$RESTARTS" ] && exit "$code"
    echo "job $SLURM_JOB_ID is requeued after exit code $code: restart $count of $RESTARTS"
  else
    exit "$code"
  fi
  scontrol requeue "$SLURM_JOB_ID"            # the same command resumes from the saved state
  exit 0
}
