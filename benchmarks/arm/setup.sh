#!/usr/bin/env bash
# Makes what `make test-arm` and `make bench-arm` need, once: qemu's user-mode emulator, an arm64
# Python with aarch64 wheels, one overlay of /proc and /sys for each board, and the plugin that
# counts instructions. Needs Debian or Ubuntu, root (for apt), a network and gcc; 400 MB.
#
#   setup.sh [FOLDER]     default: ${XDG_CACHE_HOME:-~/.cache}/edgeq-arm
set -euo pipefail

here=$(dirname "$(realpath "$0")")
root=$(realpath -m "${1:-${XDG_CACHE_HOME:-$HOME/.cache}/edgeq-arm}")
suite=bookworm python=3.11
packages=(numpy numba safetensors tokenizers click rich jinja2 pytest)

# Done already, by this very version of the script?
stamp=$root/installed-$(cat "$here"/{setup.sh,count.c} | sha256sum | cut -c1-16)
[ -e "$stamp" ] && exit 0

fail() { echo "setup.sh: $1" >&2; exit 1; }
command -v apt-get > /dev/null || fail "needs apt-get (Debian or Ubuntu); on an arm64 board run plain 'make test'"
[ "$(id -u)" = 0 ] || fail "must run as root: it installs qemu-user with apt-get"

echo "setting up emulated boards in $root ..."
rm -rf "$root"/{installed-*,system,site,boards,apt}
mkdir -p "$root"/{system,boards} "$root"/apt/{lists/partial,cache/archives/partial}

if ! command -v qemu-aarch64 > /dev/null || ! command -v gcc > /dev/null; then
  apt-get -qq update
  DEBIAN_FRONTEND=noninteractive apt-get -qq install -y --no-install-recommends \
    qemu-user gcc libc6-dev > /dev/null
fi

# arm64 packages by an apt state of their own: this machine's stays as it is, and nothing of
# theirs is executed.
mirror=$(apt-get indextargets --format '$(SITE)' "Created-By: Packages" 2> /dev/null |
  grep -v security | head -1)
case $mirror in *debian*) ;; *) mirror=http://deb.debian.org/debian ;; esac
keys=/usr/share/keyrings/debian-archive-keyring.gpg
[ -e $keys ] || fail "no $keys; install the package debian-archive-keyring"
echo "deb [arch=arm64 signed-by=$keys] $mirror $suite main" > "$root/apt/sources.list"
touch "$root/apt/status"
private=(
  -o "Dir::Etc::SourceList=$root/apt/sources.list" -o Dir::Etc::SourceParts=/dev/null
  -o Dir::Etc::Preferences=/dev/null -o Dir::Etc::PreferencesParts=/dev/null
  -o "Dir::State::Lists=$root/apt/lists" -o "Dir::State::Status=$root/apt/status"
  -o "Dir::Cache=$root/apt/cache" -o APT::Architecture=arm64 -o APT::Architectures=arm64
  -o Acquire::Languages=none -o APT::Install-Recommends=false -o APT::Sandbox::User=root
  -o Debug::NoLocking=1
)
apt-get "${private[@]}" -qq update
apt-get "${private[@]}" -qq -y --download-only install python3 libstdc++6 libgcc-s1 > /dev/null
for package in "$root"/apt/cache/archives/*.deb; do dpkg -x "$package" "$root/system"; done
rm -rf "$root/apt"

pip=(--quiet --disable-pip-version-check --no-compile --target "$root/site"
  --only-binary=:all: --python-version $python --implementation cp)
for level in 2_28 2_27 2_17; do pip+=(--platform "manylinux_${level}_aarch64"); done
python3 -m pip install "${pip[@]}" --platform manylinux2014_aarch64 "${packages[@]}"

# qemu -L looks absolute paths up in the overlay first, so what a program reads of /proc and /sys
# is the board's. LLVM names the processor by these numbers.
board() { # folder, features, part, variant, revision, model
  local folder=$root/boards/$1 entry core
  mkdir -p "$folder"/proc/device-tree "$folder"/sys/class/thermal/thermal_zone0
  for entry in "$root"/system/*; do ln -sfn "$entry" "$folder/$(basename "$entry")"; done
  for core in 0 1 2 3; do
    printf 'processor\t: %s\nBogoMIPS\t: 108.00\nFeatures\t: %s\nCPU implementer\t: 0x41\n' \
      $core "$2"
    printf 'CPU architecture: 8\nCPU variant\t: %s\nCPU part\t: %s\nCPU revision\t: %s\n\n' \
      "$4" "$3" "$5"
  done > "$folder/proc/cpuinfo"
  printf 'Model\t\t: %s\n' "$6" >> "$folder/proc/cpuinfo"
  printf '%s\0' "$6" > "$folder/proc/device-tree/model"
  echo cpu-thermal > "$folder/sys/class/thermal/thermal_zone0/type"
  echo 48312 > "$folder/sys/class/thermal/thermal_zone0/temp"
}
old="fp asimd evtstrm crc32 cpuid"
new="fp asimd evtstrm aes pmull sha1 sha2 crc32 atomics fphp asimdhp cpuid asimdrdm lrcpc dcpop asimddp"
board pi5 "$new" 0xd0b 0x4 1 "Raspberry Pi 5 Model B Rev 1.0"
board pi4 "$old" 0xd08 0x0 3 "Raspberry Pi 4 Model B Rev 1.4"
board zero2 "$old" 0xd03 0x0 4 "Raspberry Pi Zero 2 W Rev 1.0"
board generic "$new" 0xfff 0x0 0 "a board with a processor LLVM does not know"

gcc -O2 -Wall -shared -fPIC "$here/count.c" -o "$root/count.so"
touch "$stamp"
