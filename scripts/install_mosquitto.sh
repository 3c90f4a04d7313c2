#!/bin/sh
# Installs the mosquitto broker where that is ours to do: as root, or in CI through sudo. Elsewhere it says so and the
# demo takes the embedded broker. No system service is started: the package's own service stays off, now and at boot,
# since Edgewise runs mosquitto as a child process on a port of its own.
set -eu

if PATH="$PATH:/usr/sbin:/usr/local/sbin" command -v mosquitto >/dev/null 2>&1; then
    exit 0
fi
if ! command -v apt-get >/dev/null 2>&1; then
    echo "mosquitto is not installed and there is no apt-get here: the demo will use the embedded broker."
    exit 0
fi
if [ "$(id -u)" -eq 0 ]; then
    as_root=""
elif [ "${CI:-}" = true ] && sudo -n true 2>/dev/null; then
    as_root="sudo -n"
else
    echo "mosquitto is not installed and apt-get needs root: the demo will use the embedded broker."
    exit 0
fi

policy=/usr/sbin/policy-rc.d
made_policy=no
if [ ! -e "$policy" ]; then # tells the package scripts of Debian not to start what they install
    printf '#!/bin/sh\nexit 101\n' | $as_root tee "$policy" >/dev/null
    $as_root chmod 755 "$policy"
    made_policy=yes
fi
trap '[ "$made_policy" = no ] || $as_root rm -f "$policy"' EXIT INT TERM

$as_root apt-get update -qq
DEBIAN_FRONTEND=noninteractive $as_root apt-get install -y -qq --no-install-recommends mosquitto >/dev/null
$as_root rm -f /etc/systemd/system/multi-user.target.wants/mosquitto.service # not at the next boot either
if command -v update-rc.d >/dev/null 2>&1; then
    $as_root update-rc.d mosquitto disable >/dev/null 2>&1 || true
fi
echo "mosquitto installed; its system service is left switched off."
