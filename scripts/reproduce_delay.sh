#!/usr/bin/env bash
# Delays of up to 100,000 steps: memory of an LMU and LSTM, three seeds each. Options go to `lmu-hf train`.
exec "$(dirname "$0")/reproduce" delay-lmu-100 delay-lmu-1000 delay-lmu-10000 delay-lmu-100000 delay-lstm-100 delay-lstm-1000 delay-lstm-10000 delay-lstm-100000 -- "$@"
