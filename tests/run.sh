#!/usr/bin/env bash
# The tests:  bash tests/run.sh [oracle | faults] [pytest's arguments]
#
#   (nothing)  everything but the two below and what is marked `slow`; needs no torch; at most 8 minutes on two cores
#   oracle     installs the extra `oracle` and holds our numerics against the real diffusers and transformers
#   faults     kills, full disks, broken files
# Installs what is locked first. Works from any directory; paths among the arguments are relative to the repository.
# Exit 0 only if a test ran and none failed.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)

which=default
case "${1:-}" in oracle | faults) which=$1; shift ;; esac
if [ "$which" = oracle ]; then bash "$root/launch/bootstrap.sh" oracle; else bash "$root/launch/bootstrap.sh"; fi

cd "$root"
unset SORA_JAX_ORACLE
export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}" PYTHONSAFEPATH=1
export PYTEST_DISABLE_PLUGIN_AUTOLOAD=1 PYTEST_PLUGINS=_hypothesis_pytestplugin,xdist.plugin      # the caller's plugins stay out
case $which in
  default)      # compiling, most of the time, keeps one core busy: two files at a time, unless you look for something
    [ $# -gt 0 ] || set -- -n 2 --dist loadfile
    set -- -m "not faults and not slow" "$@" ;;
  faults) set -- -m faults "$@" ;;
  oracle) export SORA_JAX_ORACLE=1
    case " $*" in *" tests/oracle"*) ;; *) set -- tests/oracle "$@" ;; esac ;;
esac
exec "$root/.venv/bin/python" -m pytest "$@"
