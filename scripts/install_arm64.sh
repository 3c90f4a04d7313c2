#!/bin/sh
# Makes .arm64: Python, numpy and onnxruntime for aarch64, to be run by user-mode emulation (qemu-aarch64). No root file
# system and no container: Debian's arm64 packages are unpacked beside the wheels. `make test-arm` uses it.
# Emulated times are times of no device. onnxruntime 1.27 is known to start under emulation; some other versions crash.
set -eu

target=.arm64
python="${1:-python3}"
test ! -e "$target/ready" || exit 0
if ! command -v apt-get >/dev/null 2>&1 || ! command -v dpkg-deb >/dev/null 2>&1; then
    echo "install_arm64: needs apt-get and dpkg-deb (Debian, Ubuntu)" >&2
    exit 1
fi
if ! command -v qemu-aarch64 >/dev/null 2>&1; then
    if [ "$(id -u)" -ne 0 ]; then
        echo "install_arm64: qemu-aarch64 is missing: apt-get install qemu-user" >&2
        exit 1
    fi
    apt-get update -qq
    DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends qemu-user >/dev/null
fi

mkdir -p "$target/apt/lists/partial" "$target/apt/cache/archives/partial" "$target/deb" "$target/wheels" "$target/root/site"
here="$(cd "$target" && pwd)"
cat >"$here/apt/conf" <<END
APT::Architecture "arm64";
APT::Architectures { "arm64"; };
APT::Sandbox::User "root";
Dir::State::Lists "$here/apt/lists";
Dir::State::status "/dev/null";
Dir::Cache "$here/apt/cache";
END
export APT_CONFIG="$here/apt/conf"
apt-get update -qq
version="$(apt-cache depends python3 | sed -n 's/^ *Depends: \(python3\.[0-9]*\)$/\1/p' | head -n 1)"
(cd "$here/deb" && apt-get download -qq "$version-minimal" "lib$version-minimal" "lib$version-stdlib" libc6 libgcc-s1 \
    libstdc++6 zlib1g libexpat1 libssl3 libffi8 libbz2-1.0 liblzma5 libuuid1)
for package in "$here"/deb/*.deb; do
    dpkg-deb -x "$package" "$here/root"
done
"$python" -m pip download -q --no-deps --only-binary=:all: -d "$here/wheels" --platform manylinux_2_28_aarch64 \
    --platform manylinux_2_27_aarch64 --platform manylinux2014_aarch64 --python-version "${version#python}" \
    --implementation cp "onnxruntime==1.27.0" "numpy==2.3.5"
for wheel in "$here"/wheels/*.whl; do
    "$python" -m zipfile -e "$wheel" "$here/root/site"
done
ln -sf "$version" "$here/root/usr/bin/python3"
touch "$here/ready"
