#!/usr/bin/env bash
# The LMU of 2019 on permuted sequential MNIST, as published, with a falling learning rate, and with adversarial training, three
# seeds each. Options go to `lmu-hf train`.
exec "$(dirname "$0")/reproduce" psmnist-lmu psmnist-lmu-cosine psmnist-lmu-adversarial -- "$@"
