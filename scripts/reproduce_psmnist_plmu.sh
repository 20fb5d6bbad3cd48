#!/usr/bin/env bash
# The parallel LMU of 2021 on permuted sequential MNIST, and one with two dense layers, three seeds each. Options go to `lmu-hf train`.
exec "$(dirname "$0")/reproduce" psmnist-plmu psmnist-plmu-adversarial psmnist-plmu-deep -- "$@"
