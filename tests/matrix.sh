#!/usr/bin/env bash
# The fast tests on Python 3.11, 3.12 and 3.13, each with the oldest and the newest JAX that the ranges in
# pyproject.toml admit there. Usage: tests/matrix.sh [PYTHON …], by default python3.11 python3.12 python3.13.
set -uo pipefail
cd "$(dirname "$0")/.."
pythons=("$@")
[ ${#pythons[@]} -gt 0 ] || pythons=(python3.11 python3.12 python3.13)
failed=0
for python in "${pythons[@]}"; do
  for jax in "jax==0.10.0" "jax"; do
    venv=$(mktemp -d)
    "$python" -m venv "$venv" && "$venv/bin/pip" install --quiet --upgrade pip \
      && "$venv/bin/pip" install --quiet -e '.[test]' "$jax" \
      && versions=$("$venv/bin/python" -c 'import sys, jax, flax; print(f"Python {sys.version.split()[0]}, jax {jax.__version__}, flax {flax.__version__}")') \
      && echo "== $versions" && PYTEST_DEBUG_TEMPROOT="$venv" "$venv/bin/pytest" -q
    status=$?
    [ $status -eq 0 ] && echo "== $versions: passed" || { echo "== $python with $jax: failed"; failed=1; }
    rm -rf "$venv"
  done
done
exit $failed
