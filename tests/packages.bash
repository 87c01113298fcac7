# Sourced by the scripts that set this machine up: installs Debian packages that are missing, and becomes root where that
# takes it. Nothing is installed a second time, so that a machine without a network that has everything is fine.

# Runs the script again as root, with the caller's Rust.
become_root() {
    [ "$(id -u)" = 0 ] && return
    command -v sudo > /dev/null || { echo "$0: namespaces and ptrace need root, and there is no sudo" >&2; exit 1; }
    exec sudo env "PATH=$PATH" "CARGO_HOME=${CARGO_HOME:-$HOME/.cargo}" "RUSTUP_HOME=${RUSTUP_HOME:-$HOME/.rustup}" "$0" "$@"
}

# Installs those of the packages that are missing.
need_packages() {
    local package missing=()
    for package; do
        dpkg-query --show --showformat '${Status}' "$package" 2> /dev/null | grep -q 'ok installed' || missing+=("$package")
    done
    [ ${#missing[@]} = 0 ] && return
    echo "Installing ${missing[*]}"
    # A daemon that comes with a package is wanted as a program only: policy-rc.d keeps it from being started.
    local policy=/usr/sbin/policy-rc.d ours=
    if [ ! -e "$policy" ]; then
        printf '#!/bin/sh\nexit 101\n' > "$policy" && chmod 755 "$policy" && ours=yes
    fi
    local status=0
    { apt-get update --quiet --quiet &&
        DEBIAN_FRONTEND=noninteractive apt-get install --yes --quiet --quiet --no-install-recommends "${missing[@]}"; } \
        > "${TMPDIR:-/tmp}/godwit-packages.log" 2>&1 || status=$?
    [ -z "$ours" ] || rm -f "$policy"
    if [ "$status" != 0 ]; then
        tail -n 20 "${TMPDIR:-/tmp}/godwit-packages.log" >&2
        echo "$0: cannot install ${missing[*]}" >&2
        exit 1
    fi
    rm -f "${TMPDIR:-/tmp}/godwit-packages.log"
}

# Says what is missing when there is no Rust.
need_rust() {
    command -v cargo > /dev/null && return
    echo "$0: there is no cargo: install Rust from https://rustup.rs and open a new shell" >&2
    exit 1
}
