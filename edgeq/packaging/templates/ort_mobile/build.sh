#!/bin/sh
# Builds an ONNX Runtime with only the operators that the model "@NAME@" has.
#
#   ./build.sh android ONNXRUNTIME     for arm64-v8a; ANDROID_HOME and ANDROID_NDK_HOME are needed
#   ./build.sh ios ONNXRUNTIME         on a Mac with Xcode
#   ./build.sh linux ONNXRUNTIME       for the machine it runs on, such as a Raspberry Pi
#
# ONNXRUNTIME is a checkout of onnxruntime's sources at the tag v@ORT_VERSION@, the version that this
# package was made and tested with.
set -eu
here=$(CDPATH='' cd "$(dirname "$0")" && pwd)
usage() {
  sed -n '2,9s/^# \{0,1\}//p' "$0" >&2
  exit 2
}

[ $# = 2 ] || usage
case $1 in
  android) set -- "$2" --android --android_abi arm64-v8a --android_api 24 \
    --android_sdk_path "$ANDROID_HOME" --android_ndk_path "$ANDROID_NDK_HOME" ;;
  ios) set -- "$2" --ios --use_xcode --apple_sysroot iphoneos --osx_arch arm64 \
    --apple_deploy_target 15.1 ;;
  linux) set -- "$2" ;;
  *) usage ;;
esac
sources=$1
shift
"$sources/build.sh" --config MinSizeRel --build_shared_lib --parallel --skip_tests \
  --include_ops_by_config "$here/required_operators.config" \
  @FLAGS@ "$@"
