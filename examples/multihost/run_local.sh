#!/bin/sh
# Two processes with two CPU devices each on this machine: run_local.sh [arguments of train.py]
set -eu
here=$(dirname "$0")
export JAX_PLATFORMS=cpu
export XLA_FLAGS="--xla_force_host_platform_device_count=2"
# Forced devices need two threads each of XLA's pool, or their collectives wait for one another for ever.
export NPROC=4
port=${PORT:-29400}
${PYTHON:-python3} "$here/train.py" --coordinator "localhost:$port" --num-processes 2 --process-id 1 "$@" &
other=$!
status=0
${PYTHON:-python3} "$here/train.py" --coordinator "localhost:$port" --num-processes 2 --process-id 0 "$@" || status=$?
wait "$other" || status=$?
exit "$status"
