#!/bin/sh
# Runs the tests under AddressSanitizer and ThreadSanitizer. Needs a nightly toolchain; with its `rust-src` component std
# is instrumented too, without it only this crate and its dependencies are.
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
    flags="-Zsanitizer=$kind --cfg sanitized"
    [ -n "$build_std" ] || flags="$flags -Cunsafe-allow-abi-mismatch=sanitizer"
    export RUSTFLAGS="$flags" RUSTDOCFLAGS="$flags" CARGO_TARGET_DIR="$all/sanitizer-$kind"
    # First, because a chosen test does not build what it starts.
    cargo +nightly build $build_std --target "$target" --examples
    cargo +nightly test $build_std --target "$target" "$@"
done
