#!/usr/bin/env bash
# Mackey-Glass, 15 steps ahead: LMU, hybrid, LSTM, parallel LMU, three seeds each. Options go to `lmu-hf train`.
exec "$(dirname "$0")/reproduce" mackey-glass-lmu mackey-glass-hybrid mackey-glass-lstm mackey-glass-plmu -- "$@"
