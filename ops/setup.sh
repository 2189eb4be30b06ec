# Sourced by ops/up and ops/test: finds Python, makes the virtual environment .venv, installs the pinned packages.
# Call `muster_setup EXTRAS` (`peer,scaling` or `peer,scaling,test`) in the root of the repository. Nothing is done when nothing changed.
# MUSTER_PYTHON names the interpreter; MUSTER_PIP_ARGS adds arguments to pip, an index with CPU builds of torch, say.
# Everything is said on standard error, so that `ops/up --json` keeps standard output for itself.

muster_say() { echo "$*" >&2; }

muster_find_python() {
  local candidate
  for candidate in ${MUSTER_PYTHON:-python3.11 python3 python3.12}; do
    if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
      command -v "$candidate"
      return
    fi
  done
  muster_say "no Python >= 3.11 found (looked for ${MUSTER_PYTHON:-python3.11, python3, python3.12});" \
    "install it (Debian, Ubuntu: apt-get install python3 python3-venv) or name one in MUSTER_PYTHON"
  return 4
}

muster_need_venv_module() {
  local python=$1 package
  "$python" -c 'import ensurepip, venv' 2>/dev/null && return
  package=python$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')-venv
  if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
    muster_say "this Python has no venv module; installing $package"
    DEBIAN_FRONTEND=noninteractive apt-get update -qq >&2 || true  # a stale list may still do
    DEBIAN_FRONTEND=noninteractive apt-get install -y -qq "$package" >/dev/null && return
    muster_say "apt-get could not install $package; install it, or name another Python in MUSTER_PYTHON"
  else
    muster_say "this Python has no venv module; install it (Debian, Ubuntu: sudo apt-get install $package) and run this again"
  fi
  return 4
}

# How much pip will fetch depends on torch's build; asking the index for its versions fetches no package.
muster_say_how_much() {
  local torch
  torch=$(sed -n 's/^torch==//p' ops/constraints.txt)
  if .venv/bin/python -c "import importlib.metadata as m; assert m.version('torch').split('+')[0] == '$torch'" 2>/dev/null; then
    muster_say "pip will fetch less than 0.1 GB: torch $torch is here already"
  elif .venv/bin/pip index versions torch ${MUSTER_PIP_ARGS:-} 2>/dev/null | grep -q "[ ,]$torch+cpu"; then
    muster_say "pip will fetch about 0.3 GB (torch for CPU) unless it is cached, 1.3 GB on disk; this takes minutes, once"
  elif [ "$(uname -m)" = x86_64 ]; then
    muster_say "pip will fetch about 3.5 GB (torch with CUDA) unless it is cached; this takes many minutes, once" \
      "(a tenth of it without a GPU: MUSTER_PIP_ARGS='--extra-index-url URL' of an index that has torch $torch+cpu)"
  else
    muster_say "pip will fetch about 0.4 GB unless it is cached; this takes minutes, once"
  fi
}

# True if .venv was made for this Python and these pins, with at least the wanted extras.
muster_has() {
  local made_for=$1 extra
  [ -e .venv/muster-setup ] && [ "$(sed -n 1p .venv/muster-setup)" = "$made_for" ] || return
  for extra in ${2//,/ }; do
    [[ ",$(sed -n 2p .venv/muster-setup)," = *",$extra,"* ]] || return
  done
}

muster_setup() {
  local extras=$1 python version made_for begin_seconds=$SECONDS quiet=(--quiet)
  python=$(muster_find_python) || return
  version=$("$python" -c 'import platform; print(platform.python_version())')
  made_for="$version $(cat pyproject.toml ops/constraints.txt | sha256sum | cut -c1-16)"
  muster_has "$made_for" "$extras" && return
  case "$version" in
    3.11.*) muster_say "Python $version ($python): tested" ;;
    3.12.*) muster_say "Python $version ($python): tested for the coordinator only; peers are expected to work, untested" ;;
    *) muster_say "Python $version ($python): expected to work, untested (3.11 is tested)" ;;
  esac
  muster_need_venv_module "$python" || return
  if [ "$(.venv/bin/python -c 'import platform; print(platform.python_version())' 2>/dev/null)" != "$version" ]; then
    "$python" -m venv --clear .venv || return 4
  fi
  muster_say_how_much
  [ ! -t 2 ] || quiet=() # on a terminal pip shows what it does
  .venv/bin/pip install "${quiet[@]}" --disable-pip-version-check --constraint ops/constraints.txt \
    ${MUSTER_PIP_ARGS:-} --editable ".[$extras]" >&2 || return 4
  printf '%s\n%s\n' "$made_for" "$extras" > .venv/muster-setup
  muster_say "installed in .venv after $((SECONDS - begin_seconds)) s"
}
