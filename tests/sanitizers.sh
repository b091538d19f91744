#!/bin/sh
# Runs the tests under AddressSanitizer and ThreadSanitizer. Needs a nightly toolchain. ThreadSanitizer also needs its
# `rust-src` component: it must see the locks of std. Otherwise it reports everything that they guard as a race.
#
#     tests/sanitizers.sh                 # both
#     tests/sanitizers.sh address         # one
#     tests/sanitizers.sh thread --lib    # one, with arguments for cargo test
set -eu
[ "${1:-}" != --help ] || { sed -n '2,/^[^#]/s/^# \{0,1\}//p' "$0"; exit; }
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
    # `sanitized` makes the library use only fork: in a child of clone(CLONE_VM) the sanitizer's runtime would share its
    # thread-local storage with the parent, and hang. rustix calls the C library instead of the kernel, because the sanitizers
    # intercept only these calls.
    flags="-Zsanitizer=$kind --cfg sanitized --cfg rustix_use_libc"
    if [ -z "$build_std" ]; then
        if [ "$kind" = thread ]; then
            echo "skipped: the nightly toolchain has no rust-src" >&2
            continue
        fi
        flags="$flags -Cunsafe-allow-abi-mismatch=sanitizer"
    fi
    export RUSTFLAGS="$flags" RUSTDOCFLAGS="$flags" CARGO_TARGET_DIR="$all/sanitizer-$kind"
    # In some tests a server panics or crashes on purpose. With sanitizers, a backtrace with line numbers takes a minute.
    export RUST_BACKTRACE=0
    export ASAN_OPTIONS="handle_segv=0:handle_sigbus=0"
    # Otherwise every process would take a second to exit.
    export TSAN_OPTIONS="handle_segv=0:handle_sigbus=0:atexit_sleep_ms=0"
    # ThreadSanitizer's runtime starts a thread, which `endurance` would count and a filter in `passing` forbids. It also
    # delays a signal while the receiving thread waits, but some tests wait for their server in this way.
    if [ "$kind" = thread ] && [ $# -eq 0 ]; then
        set -- --lib --test it -- --skip endurance:: --skip passing:: --skip post_fork:: --skip takeover_faults::
    fi
    # Build these first, because a single test does not build the programs that it starts.
    cargo +nightly build $build_std --target "$target" --examples
    cargo +nightly test $build_std --target "$target" "$@"
done
