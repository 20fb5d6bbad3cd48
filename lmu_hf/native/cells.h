// The cells in affine gates, as in gates.py: what a step makes of the sums of its gates, and the adjoint.
#pragma once

#include <string>

#include "pointwise.h"

namespace {

// Cells: one row, one step. `kept` are the rows of the tensors of gates.py's allocate(), `before` those of the step
// before (or of the initial states), `hidden` what the next step multiplies.

template <typename F>
struct Simple {
  static constexpr int states = 1, kept = 1;
  template <typename T>
  static void step(int64_t size, const T* __restrict gates, const T* const*, T* const* keep) {
    T* __restrict hidden = keep[0];
    each(size, gates, hidden, [](T x, auto) { return F::value(x); });
  }
  // grad: of the output. carried: of further states, in and out. direct: what reaches the output before past the gates.
  template <typename T>
  static void back(
      int64_t size, const T* __restrict grad, const T* const*, const T* const* keep, T* __restrict grad_gates, T*, T*) {
    const T* __restrict hidden = keep[0];
    for (int64_t i = 0; i < size; ++i) grad_gates[i] = grad[i] * F::slope(hidden[i]);
  }
};

struct Lstm {
  static constexpr int states = 2, kept = 3;
  template <typename T>
  static void step(int64_t size, const T* __restrict gates, const T* const* before, T* const* keep) {
    T *__restrict hidden = keep[0], *__restrict cell = keep[1], *__restrict g = keep[2];
    const T* __restrict previous = before[1];
    const typename Bits<T>::type first = 2 * size, last = 3 * size;
    each(4 * size, gates, g, [=](T x, auto i) { return tanh_or_sigmoid(x, i >= first && i < last); });
    for (int64_t i = 0; i < size; ++i) cell[i] = g[size + i] * previous[i] + g[i] * g[2 * size + i];
    each(size, cell, hidden, [](T x, auto) { return tanh_(x); });
    for (int64_t i = 0; i < size; ++i) hidden[i] *= g[3 * size + i];
  }
  template <typename T>
  static void back(
      int64_t size, const T* __restrict grad, const T* const* before, const T* const* keep, T* __restrict grad_gates,
      T* __restrict carried, T*) {
    const T *__restrict g = keep[2], *__restrict previous = before[1];
    each(size, keep[1], grad_gates, [](T x, auto) { return tanh_(x); });
    for (int64_t i = 0; i < size; ++i) {
      const T in = g[i], forget = g[size + i], candidate = g[2 * size + i], out = g[3 * size + i];
      const T squashed = grad_gates[i];
      const T grad_cell = carried[i] + grad[i] * out * (T(1) - squashed * squashed);
      grad_gates[i] = grad_cell * candidate * Sigmoid::slope(in);
      grad_gates[size + i] = grad_cell * previous[i] * Sigmoid::slope(forget);
      grad_gates[2 * size + i] = grad_cell * in * Tanh::slope(candidate);
      grad_gates[3 * size + i] = grad[i] * squashed * Sigmoid::slope(out);
      carried[i] = grad_cell * forget;
    }
  }
};

struct Gru {
  static constexpr int states = 1, kept = 2;
  template <typename T>
  static void step(int64_t size, const T* __restrict gates, const T* const* before, T* const* keep) {
    T *__restrict hidden = keep[0], *__restrict g = keep[1];
    const T* __restrict previous = before[0];
    each(2 * size, gates, g, [](T x, auto) { return sigmoid_(x); });
    for (int64_t i = 0; i < size; ++i) {
      g[3 * size + i] = gates[3 * size + i];
      hidden[i] = gates[2 * size + i] + g[i] * g[3 * size + i];
    }
    each(size, hidden, g + 2 * size, [](T x, auto) { return tanh_(x); });
    for (int64_t i = 0; i < size; ++i) hidden[i] = g[2 * size + i] + g[size + i] * (previous[i] - g[2 * size + i]);
  }
  template <typename T>
  static void back(
      int64_t size, const T* __restrict grad, const T* const* before, const T* const* keep, T* __restrict grad_gates, T*,
      T* __restrict direct) {
    const T *__restrict g = keep[1], *__restrict previous = before[0];
    for (int64_t i = 0; i < size; ++i) {
      const T r = g[i], z = g[size + i], n = g[2 * size + i], h_n = g[3 * size + i];
      const T grad_x = grad[i] * (T(1) - z) * Tanh::slope(n);
      grad_gates[i] = grad_x * h_n * Sigmoid::slope(r);
      grad_gates[size + i] = grad[i] * (previous[i] - n) * Sigmoid::slope(z);
      grad_gates[2 * size + i] = grad_x;
      grad_gates[3 * size + i] = grad_x * r;
      direct[i] = grad[i] * z;
    }
  }
};

template <typename Function>
void with_cell(const std::string& kind, const Function& function) {
  if (kind == "tanh") return function(Simple<Tanh>());
  if (kind == "sigmoid") return function(Simple<Sigmoid>());
  if (kind == "relu") return function(Simple<Relu>());
  if (kind == "linear") return function(Simple<Linear>());
  if (kind == "lstm") return function(Lstm());
  if (kind == "gru") return function(Gru());
  TORCH_CHECK(false, "no cell ", kind);
}
}  // namespace
