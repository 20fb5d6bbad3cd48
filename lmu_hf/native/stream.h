// A whole layer, one step of some streams, as in stepper.py.
#pragma once

#include <ATen/EmptyTensor.h>
#include <torch/custom_class.h>

#include <cstddef>
#include <memory_resource>

#include "feedback.h"
#include "hodlr.h"

namespace {

// The cell of a layer without one, whose output is [m, x].
struct None {
  static constexpr int states = 0, kept = 0;
  template <typename T>
  static void step(int64_t, const T*, const T* const*, T* const*) {}
};

// A layer and the states of its streams, prepared: looking up what a step needs would take longer than many a step.
struct Stream : torch::CustomClassHolder {
  // states: m (B, D, N) and the hidden ones, contiguous; all are updated. Of the encoder come the columns (D, ...), which read
  // [x, h, m], h and m only where they are fed back; the other matrices in panels, the transposed A as the two parts of its HODLR
  // form with these ranks, B (S, panels, 1, PANEL). The rows of the weight are those of [m, x, h].
  Stream(
      std::string kind, std::vector<at::Tensor> states, at::Tensor encoder, bool from_hidden, bool from_memory,
      std::string activation, std::optional<at::Tensor> u_bias, at::Tensor inward, at::Tensor outward,
      std::vector<int64_t> ranks, at::Tensor B, at::Tensor weight, std::optional<at::Tensor> bias, int64_t inputs,
      int64_t outputs)
      : kind(std::move(kind)),
        activation(std::move(activation)),
        states(std::move(states)),
        encoder(std::move(encoder)),
        A(std::move(inward), std::move(outward), std::move(ranks)),
        B(std::move(B)),
        weight(std::move(weight)),
        u_bias(std::move(u_bias)),
        bias(std::move(bias)),
        from_hidden(from_hidden),
        from_memory(from_memory),
        inputs(inputs),
        outputs(outputs) {
    // All that a step would otherwise have to look at.
    with_type(this->states[0], [](auto) {});
    if (this->kind != "none") with_cell(this->kind, [](auto) {});
    with_activation(this->activation, [](auto) {});
    TORCH_CHECK(this->B.is_contiguous() && this->B.size(3) == PANEL, "expected panels");
    for (const at::Tensor& state : this->states) TORCH_CHECK(state.is_contiguous(), "expected contiguous states");
    TORCH_CHECK(this->encoder.is_contiguous(), "expected a contiguous encoder");
  }

  // x (B, inputs) of the dtype of the states -> (B, outputs)
  at::Tensor step(const at::Tensor& given) const {
    const at::Tensor& first = states[0];
    const bool plain = given.is_cpu() && given.is_contiguous() && !given.is_neg();
    const at::Tensor x = plain ? given : given.detach().cpu().resolve_neg().contiguous();
    const bool fits = x.dim() == 2 && x.size(0) == first.size(0) && x.size(1) == inputs;
    TORCH_CHECK(fits && x.scalar_type() == first.scalar_type(), "expected (B, inputs) of the dtype of the states");
    at::Tensor output = at::detail::empty_cpu({first.size(0), outputs}, first.options());
    run(x.const_data_ptr(), output.mutable_data_ptr());
    return output;
  }

 private:
  const std::string kind, activation;
  const std::vector<at::Tensor> states;
  const at::Tensor encoder;
  const Hodlr A;
  const at::Tensor B, weight;
  const std::optional<at::Tensor> u_bias, bias;
  const bool from_hidden, from_memory;
  const int64_t inputs, outputs;

  void run(const void* x, void* output) const {
    with_type(states[0], [&](auto scalar) {
      using T = decltype(scalar);
      const auto take = [&](auto cell) {
        using Cell = decltype(cell);
        // A thread of its own pays only where it gets several streams.
        at::parallel_for(0, states[0].size(0), 4, [&](int64_t begin, int64_t end) {
          rows<T, Cell>(begin, end, static_cast<const T*>(x), static_cast<T*>(output));
        });
      };
      if (kind == "none") return take(None());
      with_cell(kind, take);
    });
  }

  // u (rows, D) += from (rows, count) @ the columns of the encoder, each from place `first` on; so few that panels of 16 would be
  // mostly empty.
  template <typename T>
  void encode(int64_t rows, int64_t count, const T* from, int64_t first, T* u, int64_t u_stride) const {
    const int64_t length = encoder.size(1);
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t d = 0; d < encoder.size(0); ++d)
        u[r * u_stride + d] += dot(count, from + r * count, encoder.data_ptr<T>() + d * length + first);
  }

  template <typename T, typename Cell>
  void rows(int64_t begin, int64_t end, const T* x, T* output) const {
    const int64_t rows = end - begin, dims = states[0].size(1), order = states[0].size(2), flat = dims * order;
    const int64_t size = Cell::states ? states[1].size(1) : 0;
    const T* samples = x + begin * inputs;
    T* memory = states[0].data_ptr<T>() + begin * flat;
    const T* hidden = Cell::states ? states[1].data_ptr<T>() + begin * size : nullptr;

    // Small buffers lie on the stack: asking for memory takes as long as a thin product.
    std::byte room[16384];
    std::pmr::monotonic_buffer_resource pool(room, sizeof room);
    const int64_t u_stride = padded(dims);
    std::pmr::vector<T> u(rows * u_stride, &pool), inputs_of(rows * dims, &pool);
    if (u_bias)
      for (int64_t r = 0; r < rows; ++r) std::memcpy(&u[r * u_stride], u_bias->data_ptr<T>(), dims * sizeof(T));
    const int64_t after_hidden = inputs + (from_hidden ? size : 0);
    encode<T>(rows, inputs, samples, 0, u.data(), u_stride);
    if (from_hidden) encode<T>(rows, size, hidden, inputs, u.data(), u_stride);
    if (from_memory) encode<T>(rows, flat, memory, after_hidden, u.data(), u_stride);
    with_activation(activation, [&](auto function) {
      for (int64_t r = 0; r < rows; ++r)
        for (int64_t d = 0; d < dims; ++d) inputs_of[r * dims + d] = function.value(u[r * u_stride + d]);
    });
    advance_by<T>(rows, dims, order, 1, inputs_of.data(), B, memory, &pool, [&](T* next, int64_t stride) {
      by_system<T>(
          A.systems(), rows, dims, memory, order, next, stride,
          [&](int64_t system, int64_t count, const T* from, int64_t from_stride, T* to, int64_t to_stride) {
            A.product<T>(system, count, order, from, from_stride, to, to_stride, &pool);
          });
    });

    T* result = output + begin * outputs;
    if constexpr (Cell::states == 0) {
      for (int64_t r = 0; r < rows; ++r, result += outputs) {
        std::memcpy(result, memory + r * flat, flat * sizeof(T));
        std::memcpy(result + flat, samples + r * inputs, (outputs - flat) * sizeof(T));
      }
    } else {
      const int64_t width = bias->size(0), g_stride = padded(width);
      constexpr int numbers = Cell::states + 4 * (Cell::kept - Cell::states);  // of H, that a step keeps: states, and gates
      std::pmr::vector<T> gates(rows * g_stride, &pool), kept(numbers * size, &pool);
      for (int64_t r = 0; r < rows; ++r) std::memcpy(&gates[r * g_stride], bias->data_ptr<T>(), width * sizeof(T));
      const Panels<T> w(weight);
      product<T>(rows, width, flat, memory, flat, w, gates.data(), g_stride);
      product<T>(rows, width, inputs, samples, inputs, w.from_row(flat), gates.data(), g_stride);
      product<T>(rows, width, size, hidden, size, w.from_row(flat + inputs), gates.data(), g_stride);
      for (int64_t r = 0; r < rows; ++r) {
        const T* before[3] = {};
        T* now[3] = {};
        for (int i = 0; i < Cell::kept; ++i) now[i] = kept.data() + i * size;  // the gates come last
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
