#!/usr/bin/env bash
# One host of a queued resource, where launch.tpu.queued_resource runs this by ssh:
#
#   host.sh install [IMAGE]                  python, the versions of requirements.lock and libtpu; or a container image
#   host.sh mount BUCKET                     at /gcs/BUCKET
#   host.sh run NAME ATTEMPT COMMAND...      starts the command, follows its lines, and ends with its exit code
#   host.sh stop NAME                        asks it to save and end (SIGTERM)
#
# The command does not depend on the connection. Where one of this NAME is running, `run` follows it and starts nothing; where
# this ATTEMPT has ended, it gives its exit code. So gcloud may repeat what it lost, and a user may come back.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd -P)
state=$HOME/.sora_jax
venv=$state/venv-$(sha256sum "$root/requirements.lock" | cut -c 1-12)

die() { printf 'host.sh: %s\n' "$2" >&2; exit "$1"; }

find_python() {  # the runtime versions have python 3.10
  local name
  for name in python3.13 python3.12 python3.11 python3; do
    if "$name" -c 'import sys, ensurepip, venv; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
      command -v "$name"
      return
    fi
  done
  python3 -m pip install --quiet --user uv >&2 && python3 -m uv python install --quiet 3.12 >&2
  python3 -m uv python find 3.12
}

install() {
  mkdir -p "$state"
  exec 9>"$state/install.lock"
  flock 9
  if [ -n "${1:-}" ]; then
    sudo docker pull --quiet "$1" >/dev/null || die 1 "cannot pull $1; may this host's service account read it?"
    return
  fi
  if [ -e "$venv/done" ]; then return; fi
  "$(find_python)" -m venv --clear "$venv"
  "$venv/bin/python" -m pip install --quiet --no-deps -r "$root/requirements.lock"
  # what the extra `tpu` adds, the libtpu that this jax asks for; and what reads gs://
  "$venv/bin/python" -m pip install --quiet -c "$root/requirements.lock" 'jax[tpu]' gcsfs
  touch "$venv/done"
}

mount() {
  if mountpoint -q "/gcs/$1"; then return; fi
  command -v gcsfuse >/dev/null ||
    die 1 "no gcsfuse here; install it by a startup script: --create=--metadata-from-file=startup-script=FILE"
  sudo mkdir -p "/gcs/$1"
  sudo gcsfuse -o allow_other --uid "$(id -u)" --gid "$(id -g)" --implicit-dirs "$1" "/gcs/$1" >/dev/null
}

running() {  # its lock is held as long as the command runs, and not after a reboot
  [ -e "$job/current" ] && ! flock --shared --nonblock "$job/current/alive" true
}

start() {  # start ATTEMPT COMMAND...
  local run=$job/runs/$1
  shift
  mkdir -p "$run"
  printf '%q ' "$@" >"$run/command"
  : >"$run/log"
  ln -sfn "$run" "$job/current"
  exec 8>"$run/alive"
  flock 8
  # no signal but ours ends the command before its exit code is written
  # shellcheck disable=SC2016
  setsid bash -c 'trap : TERM HUP
    run=$1; shift
    "$@" >>"$run/log" 2>&1 </dev/null &
    child=$!; echo "$child" >"$run/pid"
    while kill -0 "$child" 2>/dev/null; do wait "$child"; done
    wait "$child"; echo $? >"$run/code.part"; mv "$run/code.part" "$run/code"' _ "$run" "$@" 9>&- >/dev/null 2>&1 </dev/null &
  exec 8>&-
}

follow() {  # follow RUN LINES: prints the log from this line on until the command ends -> its exit code
  tail -n "$2" -f "$1/log" &
  local reader=$!
  flock --shared "$1/alive" true
  sleep 0.5      # the last lines
  kill "$reader" 2>/dev/null || true
  [ -e "$1/code" ] || die 1 "the command ended without an exit code; was this host restarted?"
  exit "$(cat "$1/code")"
}

run() {  # run NAME ATTEMPT COMMAND...
  job=$state/$1
  local attempt=$2 lines=+1
  shift 2
  mkdir -p "$job/runs" "$job/attempts"
  exec 9>"$job/lock"
  flock 9
  if running; then
    [ "$(cat "$job/current/command")" = "$(printf '%q ' "$@")" ] ||
      die 2 "another command of this name is running: $(cat "$job/current/command"); stop it with Ctrl-C, or take another --name"
    lines=20
  elif [ ! -e "$job/attempts/$attempt" ]; then
    start "$attempt" "$@"
  fi
  [ -e "$job/attempts/$attempt" ] || ln -s "$(readlink "$job/current")" "$job/attempts/$attempt"
  flock -u 9
  exec 9>&-
  follow "$(readlink "$job/attempts/$attempt")" "$lines"
}

stop() {
  job=$state/$1
  if ! running; then return; fi
  local pid
  pid=$(cat "$job/current/pid")
  kill -TERM "$pid" 2>/dev/null || sudo kill -TERM "$pid"      # docker runs as root
}

cd "$root"
PATH=$venv/bin:$PATH
case ${1:-} in
  install | mount | run | stop) "$@" ;;
  *) die 2 "install, mount, run or stop" ;;
esac
