# Sourced by ops/up and ops/test: finds Python, makes the virtual environment .venv, installs pinned dependencies.
# Call `muster_setup EXTRAS` (for example `peer` or `peer,test`). Nothing is installed when nothing changed.
# MUSTER_PYTHON chooses the interpreter, MUSTER_PIP_ARGS adds arguments to pip (an index with CPU builds of torch, say).

muster_find_python() {
  local candidate
  for candidate in ${MUSTER_PYTHON:-python3.11 python3 python3.12}; do
    if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
      command -v "$candidate"
      return
    fi
  done
  echo "no Python >= 3.11 found (looked for ${MUSTER_PYTHON:-python3.11, python3, python3.12});" \
    "install it (Debian, Ubuntu: apt-get install python3 python3-venv) or name one in MUSTER_PYTHON" >&2
  return 4
}

muster_need_venv_module() {
  local python=$1
  "$python" -c 'import ensurepip, venv' 2>/dev/null && return
  local package
  package=python$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')-venv
  if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
    echo "this Python has no venv module; installing $package"
    { apt-get update -qq && apt-get install -y -qq "$package" >/dev/null; } || return 4
  else
    echo "this Python has no venv module; install it (Debian, Ubuntu: sudo apt-get install $package) and run this again" >&2
    return 4
  fi
}

muster_setup() {
  local extras=$1 python version stamp wanted
  python=$(muster_find_python) || return
  version=$("$python" -c 'import platform; print(platform.python_version())')
  case "$version" in
    3.11.*) echo "Python $version ($python): tested" >&2 ;;
    *) echo "Python $version ($python): expected to work, untested (3.11 is tested)" >&2 ;;
  esac
  muster_need_venv_module "$python" || return
  wanted="$version $extras $(cat pyproject.toml ops/constraints.txt | sha256sum | cut -c1-16)"
  stamp=.venv/muster-setup
  [ -e "$stamp" ] && [ "$(cat "$stamp")" = "$wanted" ] && return
  [ -x .venv/bin/python ] && [ "$(.venv/bin/python -c 'import platform; print(platform.python_version())')" = "$version" ] \
    || "$python" -m venv --clear .venv || return 4
  local install=(install --disable-pip-version-check --constraint ops/constraints.txt ${MUSTER_PIP_ARGS:-} --editable ".[$extras]")
  local report
  report=$(mktemp)
  .venv/bin/pip "${install[@]}" --dry-run --quiet --report "$report" || { rm -f "$report"; return 4; }
  .venv/bin/python - "$report" <<'PY' >&2
import json, sys
items = json.load(open(sys.argv[1]))["install"]
names = {item["metadata"]["name"].lower() for item in items}
cuda = any(name.startswith(("nvidia-", "triton")) for name in names)
size = "about 3.5 GB (torch with CUDA)" if cuda else "about 0.4 GB (torch for CPU)" if "torch" in names else "less than 0.1 GB"
print(f"pip will install {len(items)} packages and fetch {size} unless they are cached; this takes a few minutes once")
PY
  rm -f "$report"
  .venv/bin/pip "${install[@]}" --quiet || return 4
  echo "$wanted" > "$stamp"
}
