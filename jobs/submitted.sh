#!/bin/sh
# Runs a submitted job with the Python that Ray itself runs on: sh jobs/submitted.sh STORAGE VERB ARGUMENTS
#
# Where Ray makes no environment for a job, that Python need not be the one on the PATH of Ray's processes, if there is one
# at all. The node's raylet has it in its command line, because it starts the workers with it. The parent of this process,
# the job's supervisor, is such a worker, and has the raylet's process id in its environment.
raylet=$(tr '\0' '\n' <"/proc/$PPID/environ" | sed -n 's/^RAY_RAYLET_PID=//p')
python=$(tr '\0' '\n' <"/proc/$raylet/cmdline" | sed -n 's/^--python_worker_command=\([^ ]*\) .*/\1/p')
exec "${python:-python}" -m jobs.submitted "$@"
