#!/usr/bin/env bash
# Build the wheel and use it from an empty folder: recipes, schema, the embedded default and the mark
# that the package is typed must have travelled in it.
set -euo pipefail
python=$(cd "$(dirname "$1")" && pwd)/$(basename "$1")
root=$(cd "$(dirname "$0")/.." && pwd)
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
"$python" -m pip wheel --quiet --no-deps --wheel-dir "$scratch/wheel" "$root"
"$python" -m pip install --quiet --no-deps --no-compile --target "$scratch/site" "$scratch"/wheel/*.whl
mkdir "$scratch/empty" && cd "$scratch/empty"
run() { PYTHONPATH="$scratch/site" "$python" -m aligndistil "$@"; }
test "$(PYTHONPATH="$scratch/site" "$python" -c 'import aligndistil; print(aligndistil.__file__)')" = \
    "$scratch/site/aligndistil/__init__.py"
test -f "$scratch/site/aligndistil/py.typed"
run recipes ls
run recipes cp quickstart .
run validate quickstart.yaml --rows 1
run train quickstart --dry-run
run schema > schema.json
run generate builtin:tiny --prompt "Review The Silent Harbor."
echo "the wheel ($(du -h "$scratch"/wheel/*.whl | cut -f1)) works from an empty folder"
