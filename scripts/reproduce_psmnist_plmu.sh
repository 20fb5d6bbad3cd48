#!/usr/bin/env bash
# The parallel LMU of 2021 on permuted sequential MNIST, three seeds. Options go to `lmu-hf train`.
exec "$(dirname "$0")/reproduce" psmnist-plmu -- "$@"
