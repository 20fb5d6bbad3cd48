// Products with matrices whose blocks off the diagonal are of low rank, as in hodlr.py.
#pragma once

#include <memory_resource>

#include "products.h"

namespace {

struct Hodlr {
  at::Tensor inward, outward;  // (S, P, panels, leaf, PANEL) and (S, P, panels, leaf + R, PANEL)
  std::vector<int64_t> ranks;  // of each level, from the halves of the whole to pairs of leaves

  Hodlr(at::Tensor inward, at::Tensor outward, std::vector<int64_t> ranks)
      : inward(std::move(inward)), outward(std::move(outward)), ranks(std::move(ranks)) {
    for (const at::Tensor& part : {this->inward, this->outward}) {
      TORCH_CHECK(part.dim() == 5 && part.is_contiguous() && part.size(4) == PANEL, "expected panels");
      TORCH_CHECK(part.size(1) == int64_t(1) << this->ranks.size(), "expected a rank per level");
    }
  }

  int64_t systems() const { return outward.size(0); }

  // to (rows, order) += from (rows, order) @ the matrix of one system
  template <typename T>
  void product(
      int64_t system, int64_t rows, int64_t order, const T* from, int64_t from_stride, T* to, int64_t to_stride,
      std::pmr::memory_resource* pool) const {
    const int64_t leaves = inward.size(1), leaf = inward.size(3), rank = outward.size(3) - leaf, stride = padded(rank);
    const T *in = inward.data_ptr<T>() + system * inward.stride(0), *out = outward.data_ptr<T>() + system * outward.stride(0);
    std::pmr::vector<T> sent(leaves * rows * stride, pool), arrived(leaves * rows * stride, pool);
    // Leaves lie outside: the rows of one are a matrix (rows, stride).
    const int64_t apart = rows * stride;
    for (int64_t p = 0; p * leaf < order; ++p)
      ::product<T>(
          rows, rank, std::min(leaf, order - p * leaf), from + p * leaf, from_stride,
          Panels<T>(in + p * inward.stride(1), leaf * PANEL), &sent[p * apart], stride);
    int64_t first = 0, half = leaves / 2;
    for (const int64_t count : ranks) {
      for (int64_t begin = 0; begin < leaves; begin += half)
        for (int64_t r = 0; r < rows; ++r) {
          T* sum = &sent[begin * apart + r * stride + first];
          for (int64_t p = 1; p < half; ++p)
            for (int64_t i = 0; i < count; ++i) sum[i] += sum[p * apart + i];
          const int64_t other = begin / half % 2 ? begin - half : begin + half;
          for (int64_t p = other; p < other + half; ++p)
            std::memcpy(&arrived[p * apart + r * stride + first], sum, count * sizeof(T));
        }
      first += count, half /= 2;
    }
    for (int64_t p = 0; p * leaf < order; ++p) {
      const Panels<T> panels(out + p * outward.stride(1), (leaf + rank) * PANEL);
      const int64_t width = std::min(leaf, order - p * leaf);
      ::product<T>(rows, width, width, from + p * leaf, from_stride, panels, to + p * leaf, to_stride);
      ::product<T>(rows, width, rank, &arrived[p * apart], stride, panels.from_row(leaf), to + p * leaf, to_stride);
    }
  }
};
}  // namespace
