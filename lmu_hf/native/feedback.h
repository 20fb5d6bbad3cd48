// The chunks of a segment whose state is fed back into the memory, as in feedback.py.
#pragma once

#include <ATen/ops/empty.h>

#include "loop.h"

namespace {

// Stacked matrices in panels (S, panels, inner, PANEL): that of system s.
template <typename T>
Panels<T> of_system(const at::Tensor& stack, int64_t s) {
  TORCH_CHECK(stack.is_contiguous() && stack.size(3) == PANEL, "expected panels");
  return Panels<T>(stack.data_ptr<T>() + s * stack.stride(0), stack.size(2) * PANEL);
}

// to (rows * D, width) += from (rows * D, inner) @ the matrix of the system of each memory dimension
template <typename T>
void by_system(
    int64_t rows, int64_t dims, int64_t width, int64_t inner, const T* from, int64_t from_stride, const at::Tensor& stack, T* to,
    int64_t to_stride) {
  if (stack.size(0) == 1)
    return product<T>(rows * dims, width, inner, from, from_stride, of_system<T>(stack, 0), to, to_stride);
  for (int64_t d = 0; d < dims; ++d)
    product<T>(
        rows, width, inner, from + d * from_stride, dims * from_stride, of_system<T>(stack, d), to + d * to_stride,
        dims * to_stride);
}

// memory (rows * D, N) = memory @ power + inputs (rows * D, count) @ response
template <typename T>
void advance(
    int64_t rows, int64_t dims, int64_t order, int64_t count, const T* inputs, const at::Tensor& power,
    const at::Tensor& response, T* memory) {
  const int64_t stride = padded(order);
  std::vector<T> next(rows * dims * stride);
  by_system<T>(rows, dims, order, count, inputs, count, response, next.data(), stride);
  by_system<T>(rows, dims, order, order, memory, order, power, next.data(), stride);
  for (int64_t row = 0; row < rows * dims; ++row) std::memcpy(memory + row * order, &next[row * stride], order * sizeof(T));
}

// A part of a (B, L, F) tensor as a matrix (B, length * F).
at::Tensor flat_steps(const at::Tensor& tensor, int64_t first, int64_t length) {
  return tensor.narrow(1, first, length).as_strided(
      {tensor.size(0), length * tensor.size(2)}, {tensor.stride(0), 1}, tensor.storage_offset() + first * tensor.stride(1));
}

void feedback_forward(
    const std::string kind, int64_t first, const at::Tensor& known, const at::Tensor& fold, const at::Tensor& power,
    const at::Tensor& response, const at::Tensor& matrix, at::TensorList states, at::TensorList kept, const at::Tensor& u,
    const at::Tensor& starts, const at::Tensor& memory, at::TensorList encoding, const std::optional<at::Tensor>& mask,
    const std::string activation) {
  const int64_t chunk = response.size(2), steps = kept[0].size(1), total = u.size(1), batch = u.size(0), dims = u.size(2);
  const int64_t order = memory.size(2), grain = std::max<int64_t>(1, 64 / dims);
  TORCH_CHECK(memory.is_contiguous() && known.stride(1) == known.size(2), "expected contiguous tensors");
  for (int64_t at = first; at < first + known.size(1); at += chunk) {
    const at::Tensor start = starts.select(1, at / chunk);
    start.copy_(memory.view_as(start));
    flat_steps(known, at - first, chunk).addmm_(start, fold);
    forward(
        kind, 0, at, std::min(chunk, steps - at), chunk, known.narrow(1, at - first, chunk), matrix, states, kept, u, encoding,
        mask, activation);
    if (at + chunk >= total) return;
    with_type(u, [&](auto scalar) {
      using T = decltype(scalar);
      const Sequence<T> inputs(u);
      at::parallel_for(0, batch, grain, [&](int64_t begin, int64_t end) {
        std::vector<T> rows((end - begin) * dims * chunk);
        for (int64_t b = begin; b < end; ++b)
          for (int64_t j = 0; j < chunk; ++j)
            for (int64_t d = 0; d < dims; ++d) rows[((b - begin) * dims + d) * chunk + j] = inputs.at(b, at + j)[d];
        advance<T>(
            end - begin, dims, order, chunk, rows.data(), power, response, memory.data_ptr<T>() + begin * dims * order);
      });
    });
  }
}

void feedback_backward(
    const std::string kind, int64_t first, const at::Tensor& fold, const at::Tensor& power, const at::Tensor& response,
    const at::Tensor& to_hidden, const at::Tensor& to_u, at::TensorList states, at::TensorList kept, at::TensorList grads,
    const at::Tensor& grad_u, const at::Tensor& grad_sums, const at::Tensor& carry, const at::Tensor& carried,
    const std::optional<at::Tensor>& grad_starts, const at::Tensor& arrived, at::TensorList encoding,
    const std::optional<at::Tensor>& mask, const std::string activation) {
  const int64_t chunks = arrived.size(1) - 1, chunk = grad_sums.size(1) / chunks, steps = kept[0].size(1);
  const int64_t batch = grad_u.size(0), dims = grad_u.size(2), order = response.size(2), flat = dims * order;
  const at::Tensor transposed = fold.t();
  for (int64_t index = chunks - 1; index >= 0; --index) {
    const int64_t at = first + index * chunk;
    const at::Tensor start = at::empty({batch, flat}, fold.options());
    // What the memory at the end of the chunk sends back, to the u of the chunk and to the memory at its start.
    with_type(fold, [&](auto scalar) {
      using T = decltype(scalar);
      const Sequence<T> inputs(grad_u), later(arrived);
      T* starts = start.data_ptr<T>();
      at::parallel_for(0, batch, std::max<int64_t>(1, 64 / dims), [&](int64_t begin, int64_t end) {
        const int64_t rows = end - begin, stride = padded(chunk);
        std::vector<T> sent(rows * dims * stride), memory(rows * flat);
        for (int64_t r = 0; r < rows; ++r) std::memcpy(&memory[r * flat], later.at(begin + r, index + 1), flat * sizeof(T));
        by_system<T>(rows, dims, chunk, order, memory.data(), order, response, sent.data(), stride);
        for (int64_t r = 0; r < rows; ++r)
          for (int64_t j = 0; j < chunk; ++j)
            for (int64_t d = 0; d < dims; ++d) inputs.at(begin + r, at + j)[d] += sent[(r * dims + d) * stride + j];
        advance<T>(rows, dims, order, 0, nullptr, power, response, memory.data());
        std::memcpy(starts + begin * flat, memory.data(), rows * flat * sizeof(T));
      });
    });
    backward(
        kind, 0, at, std::min(chunk, steps - at), chunk, to_hidden, to_u, states, kept, grads, grad_u.narrow(1, at, chunk),
        grad_sums.narrow(1, at - first, chunk), carry, carried, encoding, mask, activation);
    start.addmm_(flat_steps(grad_sums, at - first, chunk), transposed);
    if (grad_starts) start.add_(grad_starts->select(1, at / chunk));
    arrived.select(1, index).copy_(start);
  }
}
}  // namespace
