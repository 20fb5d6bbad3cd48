// Large products, for processors whose vectors BLAS does not use in full: MKL takes those of AMD for no longer than 256 bits.
#pragma once

#include <ATen/Parallel.h>

#include "products.h"
#include "tensors.h"

namespace {

// Whether products here are faster than those of BLAS.
bool outdoes_blas() {
#if defined(__AVX512F__)
  return __builtin_cpu_is("amd");
#else
  return false;
#endif
}

// Of b that are laid out at a time, and rows of the result that take them: all together they stay in the cache of a core.
constexpr int64_t DEPTH = 256, SPAN = 128, HEIGHT = 256;
// Multiply-adds of a product that one thread has done before others have begun.
constexpr int64_t SMALL = 1 << 18;

// total (M, N) = a (M, K) @ b (K, N), added to what is there if it is `kept`. The rows of the total are contiguous.
void add_product(const at::Tensor& total, const at::Tensor& left, const at::Tensor& right, bool kept) {
  const int64_t height = total.size(0), width = total.size(1), inner = left.size(1);
  TORCH_CHECK(
      left.size(0) == height && right.size(0) == inner && right.size(1) == width && (width <= 1 || total.stride(1) == 1),
      "expected matrices that fit, and contiguous rows");
  // Rows or columns of a follow one another in memory.
  const bool across = left.stride(1) != 1 && left.stride(0) == 1;
  const at::Tensor given = across || left.stride(1) == 1 ? left : left.contiguous();
  with_type(total, [&](auto scalar) {
    using T = decltype(scalar);
    const Matrix<T> a(given), b(right), c(total);
    // A part of the total for each task, as high as is left to share.
    const int64_t threads = at::get_num_threads(), spans = (width + SPAN - 1) / SPAN;
    const bool alone = height * width * inner < SMALL;
    const int64_t wanted = alone || spans % threads == 0 || spans > 4 * threads ? 1 : threads;
    const int64_t parts = std::max<int64_t>(1, std::min(wanted, height / 8));
    at::parallel_for(0, spans * parts, alone ? spans : 1, [&](int64_t begin, int64_t end) {
      Buffer<T> panels(std::min(SPAN, (width + PANEL - 1) / PANEL * PANEL) * std::min(DEPTH, inner));
      Buffer<T> rest(std::min(HEIGHT, height) * PANEL);
      for (int64_t task = begin; task < end; ++task) {
        const int64_t column = task / parts * SPAN, columns = std::min(SPAN, width - column);
        const int64_t whole = columns / PANEL * PANEL, last = height * (task % parts + 1) / parts;
        for (int64_t row = height * (task % parts) / parts; row < last; row += HEIGHT) {
          const int64_t rows = std::min(HEIGHT, last - row);
          if (!kept)
            for (int64_t r = 0; r < rows; ++r) std::fill_n(&c.at(row + r, column), columns, T(0));
          if (whole < columns) std::fill(rest.begin(), rest.end(), T(0));
          for (int64_t first = 0; first < inner; first += DEPTH) {
            const int64_t depth = std::min(DEPTH, inner - first);
            lay_out(&b.at(first, column), b.row, b.column, depth, columns, panels.data());
            const Panels<T> laid(panels.data(), depth * PANEL);
            const T* from = &a.at(row, first);
            const auto take = [&](int64_t count, const Panels<T>& by, T* to, int64_t stride) {
              across ? product<T, true>(rows, count, depth, from, a.column, by, to, stride)
                     : product<T>(rows, count, depth, from, a.row, by, to, stride);
            };
            take(whole, laid, &c.at(row, column), c.row);
            // A product may write past what is left, up to a vector.
            if (whole < columns) take(PANEL, Panels<T>(laid.column(whole), laid.stride), rest.data(), PANEL);
          }
          for (int64_t r = 0; whole < columns && r < rows; ++r)
            for (int64_t i = whole; i < columns; ++i) c.at(row + r, column + i) += rest[r * PANEL + i - whole];
        }
      }
    });
  });
}

// The same where the columns of the total may be what is contiguous.
void add_product_either_way(const at::Tensor& total, const at::Tensor& left, const at::Tensor& right, bool kept) {
  if (total.stride(1) == 1) return add_product(total, left, right, kept);
  add_product(total.t(), right.t(), left.t(), kept);
}
}  // namespace
