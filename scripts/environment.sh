# Sourced by the scripts beside it.

# Can this python make our environments? Debian ships venv without ensurepip, which fails only half-way.
usable() {
  "$1" -c 'import sys, venv, ensurepip; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 12))' >/dev/null 2>&1
}

# make_environment DIR: makes a virtual environment unless it is there; ends the script where no Python can.
make_environment() {
  local candidate name=${0##*/}
  if [ -x "$1/bin/python" ]; then
    if ! "$1/bin/python" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 12))'; then
      echo "$name: $1 must have python 3.11 or 3.12, has $("$1/bin/python" --version 2>&1); remove it and run again" >&2
      exit 2
    fi
    return
  fi
  for candidate in python3.12 python3.11 python3; do
    if usable "$candidate"; then
      echo "== making $1 with $("$candidate" --version)"
      "$candidate" -m venv "$1"
      return
    fi
  done
  echo "$name: needs python 3.11 or 3.12 with venv; none of python3.12, python3.11, python3 is one" >&2
  exit 2
}
