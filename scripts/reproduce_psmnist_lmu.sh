#!/usr/bin/env bash
# The LMU of 2019 on permuted sequential MNIST, three seeds. Options go to `lmu-hf train`.
exec "$(dirname "$0")/reproduce" psmnist-lmu -- "$@"
