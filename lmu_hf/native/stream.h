// A whole layer, one step of some streams, as in stepper.py.
#pragma once

#include <torch/custom_class.h>

#include "feedback.h"

namespace {

// The cell of a layer without one, whose output is [m, x].
struct None {
  static constexpr int states = 0, kept = 0;
  template <typename T>
  static void step(int64_t, const T*, const T* const*, T* const*) {}
};

// A layer and the states of its streams, prepared: looking up what a step needs would take longer than many a step.
struct Stream : torch::CustomClassHolder {
  // Matrices in panels, A transposed, B (S, panels, 1, PANEL). states: m (B, D, N) and the hidden ones, contiguous; all are
  // updated. The rows of the encoder are those of [x, h, m], with h and m only where they are fed back; of the weight those of
  // [m, x, h].
  Stream(
      std::string kind, std::vector<at::Tensor> states, at::Tensor encoder, bool from_hidden, bool from_memory,
      std::optional<at::Tensor> u_bias, at::Tensor A, at::Tensor B, at::Tensor weight, std::optional<at::Tensor> bias,
      int64_t inputs, int64_t outputs)
      : kind(std::move(kind)),
        states(std::move(states)),
        encoder(std::move(encoder)),
        A(std::move(A)),
        B(std::move(B)),
        weight(std::move(weight)),
        u_bias(std::move(u_bias)),
        bias(std::move(bias)),
        from_hidden(from_hidden),
        from_memory(from_memory),
        inputs(inputs),
        outputs(outputs) {}

  // One sample per stream (B, inputs) -> the outputs (B, outputs).
  at::Tensor step(const at::Tensor& x) {
    const at::Tensor samples = x.contiguous(), output = at::empty({x.size(0), outputs}, states[0].options());
    TORCH_CHECK(
        x.size(0) == states[0].size(0) && x.size(1) == inputs && x.scalar_type() == states[0].scalar_type(),
        "expected one sample per stream");
    with_type(x, [&](auto scalar) {
      using T = decltype(scalar);
      const auto run = [&](auto cell) {
        using Cell = decltype(cell);
        // A thread of its own pays only where it gets several streams.
        at::parallel_for(0, x.size(0), 4, [&](int64_t begin, int64_t end) {
          rows<T, Cell>(begin, end, samples.data_ptr<T>(), output.data_ptr<T>());
        });
      };
      if (kind == "none") return run(None());
      with_cell(kind, run);
    });
    return output;
  }

 private:
  const std::string kind;
  const std::vector<at::Tensor> states;
  const at::Tensor encoder, A, B, weight;
  const std::optional<at::Tensor> u_bias, bias;
  const bool from_hidden, from_memory;
  const int64_t inputs, outputs;

  template <typename T, typename Cell>
  void rows(int64_t begin, int64_t end, const T* x, T* output) const {
    const int64_t rows = end - begin, dims = states[0].size(1), order = states[0].size(2), flat = dims * order;
    const int64_t size = Cell::states ? states[1].size(1) : 0;
    const T* samples = x + begin * inputs;
    T* memory = states[0].data_ptr<T>() + begin * flat;
    const T* hidden = Cell::states ? states[1].data_ptr<T>() + begin * size : nullptr;

    const int64_t u_stride = padded(dims);
    std::vector<T> u(rows * u_stride), inputs_of(rows * dims);
    if (u_bias)
      for (int64_t r = 0; r < rows; ++r) std::memcpy(&u[r * u_stride], u_bias->data_ptr<T>(), dims * sizeof(T));
    const Panels<T> e(encoder);
    product<T>(rows, dims, inputs, samples, inputs, e, u.data(), u_stride);
    if (from_hidden) product<T>(rows, dims, size, hidden, size, e.from_row(inputs), u.data(), u_stride);
    if (from_memory)
      product<T>(rows, dims, flat, memory, flat, e.from_row(inputs + (from_hidden ? size : 0)), u.data(), u_stride);
    for (int64_t r = 0; r < rows; ++r) std::memcpy(&inputs_of[r * dims], &u[r * u_stride], dims * sizeof(T));
    advance<T>(rows, dims, order, 1, inputs_of.data(), A, B, memory);

    T* result = output + begin * outputs;
    if constexpr (Cell::states == 0) {
      for (int64_t r = 0; r < rows; ++r, result += outputs) {
        std::memcpy(result, memory + r * flat, flat * sizeof(T));
        std::memcpy(result + flat, samples + r * inputs, (outputs - flat) * sizeof(T));
      }
    } else {
      const int64_t width = bias->size(0), g_stride = padded(width);
      std::vector<T> gates(rows * g_stride), kept(3 * 4 * size);
      for (int64_t r = 0; r < rows; ++r) std::memcpy(&gates[r * g_stride], bias->data_ptr<T>(), width * sizeof(T));
      const Panels<T> w(weight);
      product<T>(rows, width, flat, memory, flat, w, gates.data(), g_stride);
      product<T>(rows, width, inputs, samples, inputs, w.from_row(flat), gates.data(), g_stride);
      product<T>(rows, width, size, hidden, size, w.from_row(flat + inputs), gates.data(), g_stride);
      for (int64_t r = 0; r < rows; ++r) {
        const T* before[3] = {};
        T* now[3];
        for (int i = 0; i < 3; ++i) now[i] = &kept[i * 4 * size];
        for (int i = 0; i < Cell::states; ++i) before[i] = states[1 + i].data_ptr<T>() + (begin + r) * size;
        Cell::template step<T>(size, &gates[r * g_stride], before, now);
        for (int i = 0; i < Cell::states; ++i)
          std::memcpy(states[1 + i].data_ptr<T>() + (begin + r) * size, now[i], size * sizeof(T));
        std::memcpy(result + r * size, now[0], size * sizeof(T));
      }
    }
  }
};
}  // namespace
