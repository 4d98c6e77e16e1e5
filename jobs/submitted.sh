#!/bin/sh
# Runs a submitted job with the Python that Ray itself runs on: sh jobs/submitted.sh STORAGE VERB ARGUMENTS
#
# Where Ray makes no environment for a job, that Python need not be the one on the PATH of Ray's processes, if there is one
# at all. The node's raylet has it in its command line, because it starts the workers with it. The job's supervisor, which
# is the parent of this process or the parent of its shell, is such a worker: it has the raylet's process id in its
# environment.
process=$PPID
while [ -z "$raylet" ] && [ "${process:-1}" -gt 1 ]; do
    raylet=$(tr '\0' '\n' <"/proc/$process/environ" | sed -n 's/^RAY_RAYLET_PID=//p')
    process=$(sed -n 's/^PPid:[[:space:]]*//p' "/proc/$process/status")
done
python=$(tr '\0' '\n' <"/proc/$raylet/cmdline" | sed -n 's/^--python_worker_command=\([^ ]*\) .*/\1/p')
exec "${python:-python}" -m jobs.submitted "$@"
