#!/bin/sh
# Checks that a Python of at least 3.11 with venv and pip was found; as root or in CI on Debian it installs the two.
set -eu
if [ -n "${1:-}" ]; then
    exit 0
fi
if [ "$(id -u)" -eq 0 ] && command -v apt-get >/dev/null 2>&1; then
    apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq python3-venv python3-pip >/dev/null
    echo "python3-venv was installed: run the same make command again." >&2
else
    echo "Edgewise needs Python 3.11 or newer with venv (Debian: apt install python3-venv)." >&2
fi
exit 4
