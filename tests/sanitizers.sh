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
if [ -e "$(rustc +nightly --print sysroot)/lib/rustlib/src/rust/library" ]; then
    build_std=-Zbuild-std
fi
for kind in $kinds; do
    echo "== $kind"
    flags="-Zsanitizer=$kind"
    [ -n "$build_std" ] || flags="$flags -Cunsafe-allow-abi-mismatch=sanitizer"
    # A child of clone(CLONE_VM) shares the sanitizer's own memory with its parent until execve, which no sanitizer knows:
    # what it does there is assembly and plain reads, made before.
    RUSTFLAGS="$flags" RUSTDOCFLAGS="$flags" CARGO_TARGET_DIR="${CARGO_TARGET_DIR:-target}/sanitizer-$kind" \
        cargo +nightly test $build_std --target "$target" "$@"
done
