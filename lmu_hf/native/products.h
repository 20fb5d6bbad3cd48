// Thin products, on register blocks, with the matrix in cache.
#pragma once

#include <ATen/Parallel.h>

#include <algorithm>
#include <cstring>
#include <type_traits>
#include <vector>

#include "allocator.h"
#include "tensors.h"

namespace {

constexpr int64_t PANEL = 16;

#if defined(__AVX512F__)
// Of a vector; vectors of sums held in registers at a time, and of how many rows at most.
constexpr int64_t BYTES = 64, BLOCK = 24, ROWS = 8;
#elif defined(__AVX__)
constexpr int64_t BYTES = 32, BLOCK = 12, ROWS = 6;
#else
constexpr int64_t BYTES = 16, BLOCK = 12, ROWS = 6;
#endif

template <typename T>
struct Vector;
template <>
struct Vector<float> {
  typedef float type __attribute__((vector_size(BYTES), aligned(4)));
};
template <>
struct Vector<double> {
  typedef double type __attribute__((vector_size(BYTES), aligned(8)));
};

// A matrix (inner, columns) cut into panels of PANEL columns, the last filled up with zeros, as a tensor (panels, inner, PANEL):
// what a block of a product needs of it lies in one piece, or a few, whatever the width.
template <typename T>
struct Panels {
  const T* data;
  int64_t stride;  // from one panel to the next

  Panels(const T* data, int64_t stride) : data(data), stride(stride) {}
  explicit Panels(const at::Tensor& tensor) : Panels(tensor.data_ptr<T>(), tensor.size(1) * PANEL) {
    TORCH_CHECK(tensor.is_contiguous() && tensor.size(2) == PANEL, "expected panels");
  }
  // Of stacked matrices (S, panels, inner, PANEL), that with this index.
  static Panels of(const at::Tensor& stack, int64_t index) {
    TORCH_CHECK(stack.is_contiguous() && stack.size(3) == PANEL, "expected panels");
    return {stack.data_ptr<T>() + index * stack.stride(0), stack.size(2) * PANEL};
  }
  Panels from_row(int64_t row) const { return {data + row * PANEL, stride}; }
  const T* column(int64_t column) const { return data + column / PANEL * stride + column % PANEL; }
};

// Writes a matrix (inner, width) of any strides as such panels.
template <typename T>
void lay_out(const T* from, int64_t row, int64_t column, int64_t inner, int64_t width, T* to) {
  for (int64_t first = 0; first < width; first += PANEL, to += inner * PANEL) {
    const int64_t count = std::min(PANEL, width - first);
    const T* panel = from + first * column;
    // Where rows are what is contiguous, so many of a column at a time are read in one go.
    const int64_t together = row == 1 ? PANEL : 1;
    for (int64_t k = 0; k < inner; k += together) {
      const int64_t rows = std::min(together, inner - k);
      const T* numbers = panel + k * row;
      T* tile = to + k * PANEL;
      if (column == 1 && count == PANEL) {
        std::memcpy(tile, numbers, PANEL * sizeof(T));
        continue;
      }
      for (int64_t c = 0; c < count; ++c)
        for (int64_t r = 0; r < rows; ++r) tile[r * PANEL + c] = numbers[r * row + c * column];
      for (int64_t r = 0; r < rows && count < PANEL; ++r) std::fill(tile + r * PANEL + count, tile + (r + 1) * PANEL, T(0));
    }
  }
}

// The panels of a matrix (.., inner, width): (.., panels, inner, PANEL).
at::Tensor panels_of(const at::Tensor& matrix) {
  const int64_t inner = matrix.size(-2), width = matrix.size(-1), count = (width + PANEL - 1) / PANEL;
  const int64_t row = matrix.stride(-2), column = matrix.stride(-1), leading = matrix.dim() - 2;
  std::vector<int64_t> sizes(matrix.sizes().begin(), matrix.sizes().begin() + leading);
  sizes.insert(sizes.end(), {count, inner, PANEL});
  const at::Tensor result = empty(sizes, matrix);
  with_type(matrix, [&](auto scalar) {
    using T = decltype(scalar);
    T* to = result.data_ptr<T>();
    const int64_t numbers = PANEL * inner, least = std::max<int64_t>(1, (1 << 15) / std::max<int64_t>(1, numbers));
    at::parallel_for(0, numbers ? result.numel() / numbers : 0, least, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const int64_t first = i % count * PANEL;
        const T* from = matrix.const_data_ptr<T>() + first * column;
        for (int64_t d = leading - 1, index = i / count; d >= 0; index /= matrix.size(d), --d)
          from += index % matrix.size(d) * matrix.stride(d);
        lay_out(from, row, column, inner, std::min(PANEL, width - first), to + i * numbers);
      }
    });
  });
  return result;
}

constexpr int64_t TERMS = 64;  // of a sum at a time: a long sum in one go would round as often as it has terms

// c (R, V vectors) += a (R, inner) @ b (inner, V vectors); with Across, a is (inner, R) and taken transposed.
template <typename T, int R, int V, bool Across>
__attribute__((noinline)) void block(
    int64_t inner, const T* a, int64_t a_stride, const T* b, int64_t panel, T* c, int64_t c_stride) {
  using Vec = typename Vector<T>::type;
  constexpr int64_t lanes = BYTES / sizeof(T);
  // Few sums would each wait for their last addition, so they are then taken in several parts.
  constexpr int parts = R * V <= 2 ? 4 : R * V <= 4 ? 2 : 1;
  for (int64_t first = 0; first < inner; first += TERMS) {
    Vec sum[parts][R][V] = {};
    const auto add = [&](int64_t k, int part) __attribute__((always_inline)) {
      Vec row[V];
      for (int v = 0; v < V; ++v)
        row[v] = *reinterpret_cast<const Vec*>(b + k * PANEL + v * lanes / PANEL * panel + v * lanes % PANEL);
      for (int r = 0; r < R; ++r) {
        const T factor = Across ? a[k * a_stride + r] : a[r * a_stride + k];
        for (int v = 0; v < V; ++v) sum[part][r][v] += factor * row[v];
      }
    };
    const int64_t last = std::min(first + TERMS, inner);
    int64_t k = first;
    for (; k + parts <= last; k += parts)
      for (int part = 0; part < parts; ++part) add(k + part, part);
    for (; k < last; ++k) add(k, 0);
    for (int r = 0; r < R; ++r)
      for (int v = 0; v < V; ++v) {
        Vec total = sum[0][r][v];
        for (int part = 1; part < parts; ++part) total += sum[part][r][v];
        *reinterpret_cast<Vec*>(c + r * c_stride + v * lanes) += total;
      }
  }
}

// Columns `done` to `width`; `done` is a multiple of V vectors.
template <typename T, int R, int V, bool Across>
void columns(
    int64_t done, int64_t width, int64_t inner, const T* a, int64_t a_stride, const Panels<T>& b, T* c, int64_t c_stride) {
  constexpr int64_t lanes = BYTES / sizeof(T), span = V * lanes;
  const auto take = [&] { block<T, R, V, Across>(inner, a, a_stride, b.column(done), b.stride, c + done, c_stride); };
  for (; done + span <= width; done += span) take();
  if (done == width) return;
  // What is left may reach past the width, up to a vector and to the end of its panel: the panel's columns there are zeros, and
  // every buffer here has room. One row waits for its sums rather than for such columns.
  const int64_t left = width - done;
  if (V == 1 || (R == 1 && left > V / 2 * lanes && span <= (left + PANEL - 1) / PANEL * PANEL)) return take();
  if constexpr (V > 1) columns<T, R, V / 2, Across>(done, width, inner, a, a_stride, b, c, c_stride);
}

// More than ROWS are never asked for, nor compiled.
template <int R>
using Rows = std::integral_constant<int, std::min<int64_t>(R, ROWS)>;

// c (rows, width) += a (rows, inner) @ b (inner, width); with Across, a is (inner, rows) and taken transposed.
template <typename T, bool Across = false>
void product(
    int64_t rows, int64_t width, int64_t inner, const T* a, int64_t a_stride, const Panels<T>& b, T* c, int64_t c_stride) {
  if (inner == 0 || width == 0) return;
  const auto take = [&](auto count) {
    constexpr int R = decltype(count)::value, most = std::min<int64_t>(BLOCK / R, 8);
    constexpr int V = most >= 8 ? 8 : most >= 4 ? 4 : most >= 2 ? 2 : 1;
    columns<T, R, V, Across>(0, width, inner, a, a_stride, b, c, c_stride);
    a += R * (Across ? 1 : a_stride), c += R * c_stride, rows -= R;
  };
  while (rows > 0) {
    // As many rows at a time as share each vector of b from registers, and as evenly as they go: a few left over would leave the
    // processor idle.
    const int64_t blocks = (rows + ROWS - 1) / ROWS;
    switch ((rows + blocks - 1) / blocks) {
      case 8: take(Rows<8>()); break;
      case 7: take(Rows<7>()); break;
      case 6: take(Rows<6>()); break;
      case 5: take(Rows<5>()); break;
      case 4: take(Rows<4>()); break;
      case 3: take(Rows<3>()); break;
      case 2: take(Rows<2>()); break;
      default: take(Rows<1>());
    }
  }
}

// The sum of a[i] * b[i], in several sums, so that no addition need wait for the one before.
template <typename T>
T dot(int64_t count, const T* a, const T* b) {
  using Vec = typename Vector<T>::type;
  constexpr int64_t lanes = BYTES / sizeof(T), sums = 4;
  Vec sum[sums] = {};
  int64_t i = 0;
  for (; i + sums * lanes <= count; i += sums * lanes)
    for (int s = 0; s < sums; ++s)
      sum[s] += *reinterpret_cast<const Vec*>(a + i + s * lanes) * *reinterpret_cast<const Vec*>(b + i + s * lanes);
  const Vec all = (sum[0] + sum[1]) + (sum[2] + sum[3]);
  T total = 0;
  for (int64_t lane = 0; lane < lanes; ++lane) total += all[lane];
  for (; i < count; ++i) total += a[i] * b[i];
  return total;
}

// c (rows, width) += a (rows, inner) @ b (inner, width), for few rows: b as it lies, read once and in order.
template <typename T>
void thin_product(
    int64_t rows, int64_t width, int64_t inner, const T* a, int64_t a_stride, const T* b, int64_t b_stride, T* c,
    int64_t c_stride) {
  constexpr int64_t together = 4;
  for (int64_t k = 0; k < inner; k += together) {
    const T* __restrict from[together];
    for (int64_t i = 0; i < together; ++i) from[i] = b + std::min(k + i, inner - 1) * b_stride;
    for (int64_t r = 0; r < rows; ++r) {
      T factor[together];
      for (int64_t i = 0; i < together; ++i) factor[i] = k + i < inner ? a[r * a_stride + k + i] : T(0);
      T* __restrict to = c + r * c_stride;
      for (int64_t j = 0; j < width; ++j)
        to[j] += (factor[0] * from[0][j] + factor[1] * from[1][j]) + (factor[2] * from[2][j] + factor[3] * from[3][j]);
    }
  }
}

// c (rows, inner) += a (rows, width) @ the transposed b.
template <typename T>
void thin_transposed(
    int64_t rows, int64_t width, int64_t inner, const T* a, int64_t a_stride, const T* b, int64_t b_stride, T* c,
    int64_t c_stride) {
  for (int64_t k = 0; k < inner; ++k)
    for (int64_t r = 0; r < rows; ++r) c[r * c_stride + k] += dot(width, a + r * a_stride, b + k * b_stride);
}

// The stride of rows into which products write: whole vectors, and no power of two, which would share few lines of the cache.
int64_t padded(int64_t size) { return (size + PANEL - 1) / PANEL * PANEL + PANEL; }
}  // namespace
