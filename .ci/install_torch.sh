#!/bin/sh
# Installs PyTorch VERSION with the pip of `make`: $PIP is its whole command.
#
# Linux without an NVIDIA driver asks for the CPU build, first where pip's configured indexes have it, then
# on PyTorch's own index. Neither may be there, so neither is an error. PyPI's build is for everyone else;
# on Linux it brings the CUDA libraries along.
set -u
version=$1
index=${TORCH_INDEX:-https://download.pytorch.org/whl/cpu}

if [ "$(uname -s)" = Linux ] && ! command -v nvidia-smi >/dev/null 2>&1; then
  $PIP --quiet "torch==$version+cpu" 2>/dev/null && exit 0
  # Only PyTorch comes from there, so that a slow mirror gets all its time for the rest.
  $PIP --quiet --no-deps --retries 0 --timeout 10 --index-url "$index" "torch==$version+cpu" 2>/dev/null &&
    exit 0
  echo "No CPU build of PyTorch can be reached; PyPI's includes CUDA: 2.7 GB to download, 5 GB on disk."
fi
$PIP "torch==$version" && exit 0
cat >&2 <<MESSAGE

pip could not install torch $version for this Python; its message is above. Name an index or a proxy with
    make run PIP_FLAGS="--extra-index-url ADDRESS"
MESSAGE
exit 1
