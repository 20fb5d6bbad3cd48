#!/usr/bin/env bash
# What the LMUs are compared with on permuted sequential MNIST, three seeds each. Options go to `lmu-hf train`.
exec "$(dirname "$0")/reproduce" psmnist-lmu-keras psmnist-lstm psmnist-gru -- "$@"
