#!/usr/bin/env bash
# The whole story on two CPU cores, from a fresh clone, in about a quarter of an hour:  bash launch/quickstart.sh [flags]
# Installs what is locked, then runs launch/quickstart.py, which says what it does. Works from any directory; run it again at will.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)
bash "$root/launch/bootstrap.sh"
export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}" PYTHONSAFEPATH=1      # the caller's folder stays the current one, and unread
exec "$root/.venv/bin/python" -m launch.quickstart "$@"
