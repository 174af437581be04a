#!/usr/bin/env bash
# Makes .venv in the repository and installs the locked versions into it, once:  bash launch/bootstrap.sh [oracle]
#
# Run again, it looks at the stamps (a copy of each lock file that was wholly installed, in .venv) and is done in a moment.
# Stopped at any point, the next run goes on; two at once wait for each other. PYTHON=... names the python to take.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)
venv=$root/.venv
python=$venv/bin/python
locks=(requirements.lock)
[ "${1:-}" = oracle ] && locks+=(requirements-oracle.lock)

say() { printf 'sora_jax: %s\n' "$*" >&2; }
die() { say "$*"; exit 1; }

works() { "$python" -c 'import sys, pip; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; }

installed() {
  local lock
  works || return 1
  for lock in "${locks[@]}"; do cmp -s "$root/$lock" "$venv/installed-$lock" || return 1; done
}

find_python() {
  local name path bare=""
  for name in ${PYTHON:+"$PYTHON"} python3.11 python3.12 python3.13 python3.14 python3 python; do
    while IFS= read -r path; do
      "$path" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1 || continue
      "$path" -c 'import ensurepip, venv' >/dev/null 2>&1 && { printf '%s\n' "$path"; return; }
      bare=${bare:-$path}
    done < <(type -aP "$name")
  done
  [ -z "$bare" ] || die "$bare has no venv module; install it (Debian, Ubuntu: apt-get install python3-venv), or set PYTHON=..."
  die "no python >= 3.11 is on PATH; install one, or set PYTHON=/path/to/python3.11"
}

room() {  # room FOLDER MEGABYTES
  local free
  free=$(df -Pk "$1" | awk 'NR == 2 {print int($4 / 1024)}')
  [ "$free" -ge "$2" ] || die "no disk: $1 has $free MB free; installing needs $2 MB; free some, or clone to a larger disk"
}

progress() {  # pip's lines on stdin: all go to the log, and where a terminal watches, one moving line to it
  local line seen=0
  while IFS= read -r line; do
    printf '%s\n' "$line" >>"$2"
    [ -t 2 ] || continue
    case $line in
      Collecting* | "Requirement already satisfied"*)
        seen=$((seen + 1))
        line=${line#Requirement already satisfied: } line=${line#Collecting }
        printf '\r\033[K  %d of %d: %s' "$seen" "$1" "${line%% *}" >&2 ;;
      Installing*) printf '\r\033[K  all %d fetched; unpacking them' "$1" >&2 ;;
    esac
  done
  if [ -t 2 ]; then printf '\r\033[K' >&2; fi
}

install() {  # install LOCK MEGABYTES
  local lock=$1 log=$venv/install.log count
  cmp -s "$root/$lock" "$venv/installed-$lock" && return
  room "$root" "$2"
  room "${TMPDIR:-/tmp}" 400
  count=$(grep -c == "$root/$lock")
  say "installing the $count exact versions of $lock into .venv ($2 MB; a minute or a few) ..."
  : >"$log"
  "$python" -m pip install --no-input --no-deps --progress-bar off --disable-pip-version-check -r "$root/$lock" \
    </dev/null 2>&1 | progress "$count" "$log" ||
    die "could not install: $(grep -E 'ERROR|rror:' "$log" | tail -n 1 | cut -c 1-300); all of it: $log; then run the same command again"
  cp "$root/$lock" "$venv/installed-$lock.part"
  mv "$venv/installed-$lock.part" "$venv/installed-$lock"
}

installed && exit 0

mkdir -p "$root/.cache" || die "cannot write to $root; clone to a folder of your own"
exec 9>"$root/.cache/bootstrap.lock"
if command -v flock >/dev/null && ! flock -n 9; then      # pip inherits the lock: it holds until pip, too, has ended
  say "another run is installing; waiting for it ..."
  flock 9
  installed && exit 0
fi

start=$SECONDS
if ! works; then
  from=$(find_python)
  room "$root" 1800
  say "making .venv with $("$from" --version) ($from) ..."
  "$from" -m venv --clear "$venv" >/dev/null || die "$from -m venv $venv failed"
fi
for lock in "${locks[@]}"; do
  case $lock in requirements.lock) install "$lock" 1800 ;; *) install "$lock" 1700 ;; esac
done
say "installed in $((SECONDS - start)) s"
