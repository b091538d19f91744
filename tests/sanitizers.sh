#!/bin/sh
# Runs the tests under AddressSanitizer and ThreadSanitizer. Needs a nightly toolchain. ThreadSanitizer also needs its
# `rust-src` component: it must see the locks of std, or it takes everything that they guard for a race.
#
#     tests/sanitizers.sh                 # both
#     tests/sanitizers.sh address         # one
#     tests/sanitizers.sh thread --lib    # and what to test
set -eu
cd "$(dirname "$0")/.."
target=$(rustc -vV | sed -n 's/^host: //p')
kinds=${1:-"address thread"}
[ $# -eq 0 ] || shift
build_std=
all=${CARGO_TARGET_DIR:-target}
if [ -e "$(rustc +nightly --print sysroot)/lib/rustlib/src/rust/library" ]; then
    build_std=-Zbuild-std
fi
for kind in $kinds; do
    echo "== $kind"
    # Processes are made by fork alone: in a child of clone(CLONE_VM) the sanitizer's runtime would share its thread-local
    # storage with the parent, and hang.
    # And rustix calls the C library instead of the kernel, because the sanitizers look at no other calls.
    flags="-Zsanitizer=$kind --cfg sanitized --cfg rustix_use_libc"
    if [ -z "$build_std" ]; then
        if [ "$kind" = thread ]; then
            echo "skipped: the nightly toolchain has no rust-src" >&2
            continue
        fi
        flags="$flags -Cunsafe-allow-abi-mismatch=sanitizer"
    fi
    export RUSTFLAGS="$flags" RUSTDOCFLAGS="$flags" CARGO_TARGET_DIR="$all/sanitizer-$kind"
    # Some tests have a server panic or crash on purpose; to look up the lines of a backtrace takes a minute here.
    export RUST_BACKTRACE=0
    export ASAN_OPTIONS="handle_segv=0:handle_sigbus=0"
    # Else every process would take a second to end.
    export TSAN_OPTIONS="handle_segv=0:handle_sigbus=0:atexit_sleep_ms=0"
    # The runtime of the thread sanitizer has a thread of its own, which `endurance` counts and a filter in `passing`
    # forbids; and it keeps a signal back while the thread that got it waits, which is how a test waits for its server.
    if [ "$kind" = thread ] && [ $# -eq 0 ]; then
        set -- --lib --test it -- --skip endurance:: --skip passing:: --skip post_fork:: --skip takeover_faults::
    fi
    # First, because a chosen test does not build what it starts.
    cargo +nightly build $build_std --target "$target" --examples
    cargo +nightly test $build_std --target "$target" "$@"
done
