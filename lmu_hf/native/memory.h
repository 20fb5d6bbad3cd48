// The memory itself, step by step, for orders so small that a step of it fits a few vectors.
#pragma once

#include <ATen/Parallel.h>

#include <cstring>
#include <optional>
#include <vector>

#include "products.h"
#include "tensors.h"

namespace {

// The memory's numbers, padded to Lanes; Order is 0 where it is known at run time only.
template <int Lanes, int Order>
struct Width {
  static constexpr int lanes = Lanes, order = Order;
};

template <typename Function, int N = 8>
void with_width(int64_t order, const Function& function) {
  TORCH_CHECK(order <= 32, "expected an order up to 32, found ", order);
  if (order > 16) return function(Width<32, 0>());
  if (order > 8) return function(Width<16, 0>());
  if (order == N) return function(Width<8, N>());
  if constexpr (N > 1) return with_width<Function, N - 1>(order, function);
}

// Numbers in as few vectors of the processor as hold them: compilers split longer ones by way of memory.
template <typename T, int Lanes>
struct Numbers {
  static constexpr int width = std::min<int>(Lanes, BYTES / sizeof(T)), parts = Lanes / width;
  typedef T Part __attribute__((vector_size(width * sizeof(T)), aligned(sizeof(T))));
  Part part[parts] = {};

  T* begin() { return reinterpret_cast<T*>(part); }
  const T* begin() const { return reinterpret_cast<const T*>(part); }
  void add(const Numbers& other) {
    for (int p = 0; p < parts; ++p) part[p] += other.part[p];
  }
  void add(const Numbers& other, T factor) {
    for (int p = 0; p < parts; ++p) part[p] += other.part[p] * factor;
  }
};

// S systems: the columns of A (N, N), or of its transpose, and B (N), each filled up to Lanes.
template <typename T, int Lanes>
struct Systems {
  Buffer<Numbers<T, Lanes>> columns, inputs;
  Systems(const at::Tensor& A, const at::Tensor& B, bool transposed) {
    const int64_t scales = A.size(0), order = A.size(1);
    const auto a = A.accessor<T, 3>();
    const auto b = B.accessor<T, 2>();
    for (int64_t s = 0; s < scales; ++s) {
      Numbers<T, Lanes> input;
      for (int64_t k = 0; k < order; ++k) {
        Numbers<T, Lanes> column;
        for (int64_t n = 0; n < order; ++n) column.begin()[n] = transposed ? a[s][k][n] : a[s][n][k];
        columns.push_back(column);
        input.begin()[k] = b[s][k];
      }
      inputs.push_back(input);
    }
  }
};

// sum += columns @ values, in two sums so that one addition need not wait for the other.
template <typename T, int Lanes, int Order>
inline void apply(const Numbers<T, Lanes>* columns, const T* values, int64_t order, Numbers<T, Lanes>& sum) {
  const int64_t count = Order ? Order : order;
  Numbers<T, Lanes> other;
  int64_t k = 0;
  for (; k + 1 < count; k += 2) {
    sum.add(columns[k], values[k]);
    other.add(columns[k + 1], values[k + 1]);
  }
  if (k < count) sum.add(columns[k], values[k]);
  sum.add(other);
}

// Rows and memory dimensions never meet: calls function(row, first dimension, last) for parts of both.
template <typename Function>
void over_memories(int64_t rows, int64_t dims, const Function& function) {
  const int64_t parts = std::min(dims, std::max<int64_t>(1, at::get_num_threads() / std::max<int64_t>(rows, 1)));
  at::parallel_for(0, rows * parts, 1, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t row = task / parts, part = task % parts;
      function(row, dims * part / parts, dims * (part + 1) / parts);
    }
  });
}

void memory_forward(
    const at::Tensor& starts, const at::Tensor& u, const at::Tensor& A, const at::Tensor& B, const at::Tensor& states) {
  TORCH_CHECK(starts.is_contiguous() && u.is_contiguous() && states.is_contiguous(), "expected contiguous tensors");
  const int64_t steps = u.size(1), dims = u.size(2), order = B.size(1);
  with_type(u, [&](auto scalar) {
    using T = decltype(scalar);
    const T *from = starts.data_ptr<T>(), *inputs = u.data_ptr<T>();
    T* to = states.data_ptr<T>();
    with_width(order, [&](auto width) {
      constexpr int Lanes = decltype(width)::lanes, Order = decltype(width)::order;
      const Systems<T, Lanes> systems(A, B, false);
      const bool shared = B.size(0) == 1;
      const int64_t count = Order ? Order : order;
      over_memories(u.size(0), dims, [&](int64_t row, int64_t first, int64_t last) {
        const T* before = from + row * dims * count;
        for (int64_t t = 0; t < steps; ++t) {
          const T* input = inputs + (row * steps + t) * dims;
          T* state = to + (row * steps + t) * dims * count;
          for (int64_t d = first; d < last; ++d) {
            const int64_t s = shared ? 0 : d;
            Numbers<T, Lanes> after;
            after.add(systems.inputs[s], input[d]);
            apply<T, Lanes, Order>(&systems.columns[s * count], before + d * count, count, after);
            std::memcpy(state + d * count, after.begin(), count * sizeof(T));
          }
          before = state;
        }
      });
    });
  });
}

void memory_backward(
    const at::Tensor& grads, const at::Tensor& A, const at::Tensor& B, const at::Tensor& grad_starts, const at::Tensor& grad_u,
    const std::optional<at::Tensor>& arriving) {
  TORCH_CHECK(grads.is_contiguous() && grad_starts.is_contiguous() && grad_u.is_contiguous(), "expected contiguous tensors");
  TORCH_CHECK(!arriving || arriving->is_contiguous(), "expected contiguous tensors");
  const int64_t steps = grad_u.size(1), dims = grad_u.size(2), order = B.size(1);
  with_type(grad_u, [&](auto scalar) {
    using T = decltype(scalar);
    const T* from = grads.data_ptr<T>();
    T *to_starts = grad_starts.data_ptr<T>(), *to_u = grad_u.data_ptr<T>();
    T* arrived = arriving ? arriving->data_ptr<T>() : nullptr;
    with_width(order, [&](auto width) {
      constexpr int Lanes = decltype(width)::lanes, Order = decltype(width)::order;
      const Systems<T, Lanes> systems(A, B, true);
      const bool shared = B.size(0) == 1;
      const int64_t count = Order ? Order : order;
      over_memories(grad_u.size(0), dims, [&](int64_t row, int64_t first, int64_t last) {
        Buffer<Numbers<T, Lanes>> memory(last - first);
        for (int64_t t = steps - 1; t >= 0; --t) {
          const int64_t at = (row * steps + t) * dims;
          for (int64_t d = first; d < last; ++d) {
            const int64_t s = shared ? 0 : d;
            Numbers<T, Lanes> now, earlier;
            std::memcpy(now.begin(), from + (at + d) * count, count * sizeof(T));
            now.add(memory[d - first]);
            if (arrived) std::memcpy(arrived + (at + d) * count, now.begin(), count * sizeof(T));
            const T *values = now.begin(), *input = systems.inputs[s].begin();
            T sum = 0;
            for (int64_t n = 0; n < count; ++n) sum += values[n] * input[n];
            to_u[at + d] = sum;
            apply<T, Lanes, Order>(&systems.columns[s * count], values, count, earlier);
            memory[d - first] = earlier;
          }
        }
        T* start = to_starts + row * dims * count;
        for (int64_t d = first; d < last; ++d) std::memcpy(start + d * count, memory[d - first].begin(), count * sizeof(T));
      });
    });
  });
}
}  // namespace
