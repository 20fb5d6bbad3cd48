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
  // Reads all lanes at once, but takes 0 where there is nothing of its own: for single numbers it would have to wait for each.
  void load(const T* from, const Numbers& own) {
    for (int p = 0; p < parts; ++p)
      part[p] = own.part[p] != 0 ? *reinterpret_cast<const Part*>(from + p * width) : Part{};
  }
  T times(const Numbers& other) const {
    Part products = part[0] * other.part[0];
    for (int p = 1; p < parts; ++p) products += part[p] * other.part[p];
    T sums[width];
    std::memcpy(sums, &products, sizeof products);
    for (int half = width / 2; half > 0; half /= 2)
      for (int i = 0; i < half; ++i) sums[i] += sums[i + half];
    return sums[0];
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

// sums += columns @ values of some memories, whose steps need not wait for each other's.
template <typename T, int Lanes, int Order, int Together>
inline void apply(
    const Numbers<T, Lanes>* columns, const Numbers<T, Lanes>* values, int64_t order, Numbers<T, Lanes> (&sums)[Together]) {
  const int64_t count = Order ? Order : order;
  Numbers<T, Lanes> others[Together];  // two sums each, so that one addition need not wait for the other
  int64_t k = 0;
  for (; k + 1 < count; k += 2) {
    for (int m = 0; m < Together; ++m) sums[m].add(columns[k], values[m].begin()[k]);
    for (int m = 0; m < Together; ++m) others[m].add(columns[k + 1], values[m].begin()[k + 1]);
  }
  if (k < count)
    for (int m = 0; m < Together; ++m) sums[m].add(columns[k], values[m].begin()[k]);
  for (int m = 0; m < Together; ++m) sums[m].add(others[m]);
}

// Memories of one row each that go through the steps together.
template <typename T, int Lanes>
constexpr int TOGETHER_OF = Numbers<T, Lanes>::parts > 1 ? 2 : 4;

// Rows and memory dimensions never meet: calls function(first row, how many, first dimension, last) for parts of both, with one row
// or so many as a number that the compiler knows.
template <int Together, typename Function>
void over_memories(int64_t rows, int64_t dims, const Function& function) {
  const int64_t threads = at::get_num_threads();
  const int64_t parts = std::min(dims, std::max<int64_t>(1, threads / std::max<int64_t>(rows, 1)));
  // With as many rows as that, no thread is left without.
  const int64_t size = dims > 2 || rows < Together * threads ? 1 : Together, tiles = (rows + size - 1) / size;
  at::parallel_for(0, tiles * parts, 1, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t part = task % parts, first = dims * part / parts, last = dims * (part + 1) / parts;
      int64_t row = task / parts * size;
      const int64_t past = std::min(row + size, rows);
      for (; row + Together <= past; row += Together) function(std::integral_constant<int, Together>(), row, first, last);
      for (; row < past; ++row) function(std::integral_constant<int, 1>(), row, first, last);
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
      over_memories<TOGETHER_OF<T, Lanes>>(u.size(0), dims, [&](auto together, int64_t row, int64_t first, int64_t last) {
        constexpr int Together = decltype(together)::value;
        using Memories = Numbers<T, Lanes>[Together];
        // Here as well as in the tensor: numbers that were just written in parts are slow to read.
        Buffer<Numbers<T, Lanes>> memories((last - first) * Together);
        const auto of = [&](int64_t d) { return &memories[(d - first) * Together]; };
        for (int64_t d = first; d < last; ++d)
          for (int m = 0; m < Together; ++m)
            std::memcpy(of(d)[m].begin(), from + ((row + m) * dims + d) * count, count * sizeof(T));
        for (int64_t t = 0; t < steps; ++t)
          for (int64_t d = first; d < last; ++d) {
            const int64_t s = shared ? 0 : d;
            Memories after;
            for (int m = 0; m < Together; ++m) after[m].add(systems.inputs[s], inputs[((row + m) * steps + t) * dims + d]);
            apply<T, Lanes, Order>(&systems.columns[s * count], of(d), count, after);
            for (int m = 0; m < Together; ++m) {
              of(d)[m] = after[m];
              std::memcpy(to + (((row + m) * steps + t) * dims + d) * count, of(d)[m].begin(), count * sizeof(T));
            }
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
      Numbers<T, Lanes> own;
      std::fill_n(own.begin(), count, T(1));
      // Memories behind which the tensor goes on for as many lanes.
      const int64_t whole = std::max<int64_t>(0, grad_u.numel() - (Lanes + count - 1) / count + 1);
      over_memories<TOGETHER_OF<T, Lanes>>(grad_u.size(0), dims, [&](auto together, int64_t row, int64_t first, int64_t last) {
        constexpr int Together = decltype(together)::value;
        using Memories = Numbers<T, Lanes>[Together];
        Buffer<Numbers<T, Lanes>> memories((last - first) * Together);
        for (int64_t t = steps - 1; t >= 0; --t)
          for (int64_t d = first; d < last; ++d) {
            const int64_t s = shared ? 0 : d;
            Numbers<T, Lanes>* const later = &memories[(d - first) * Together];
            Memories now, earlier;
            for (int m = 0; m < Together; ++m) {
              const int64_t at = ((row + m) * steps + t) * dims + d;
              if (at < whole)
                now[m].load(from + at * count, own);
              else
                std::memcpy(now[m].begin(), from + at * count, count * sizeof(T));
              now[m].add(later[m]);
              if (arrived) std::memcpy(arrived + at * count, now[m].begin(), count * sizeof(T));
              to_u[at] = now[m].times(systems.inputs[s]);
            }
            apply<T, Lanes, Order>(&systems.columns[s * count], now, count, earlier);
            std::copy_n(earlier, Together, later);
          }
        for (int64_t d = first; d < last; ++d)
          for (int m = 0; m < Together; ++m)
            std::memcpy(
                to_starts + ((row + m) * dims + d) * count, memories[(d - first) * Together + m].begin(), count * sizeof(T));
      });
    });
  });
}
}  // namespace
