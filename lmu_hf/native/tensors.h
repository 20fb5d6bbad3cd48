// Tensors as rows of numbers.
#pragma once

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>

#include <algorithm>
#include <vector>

namespace {

// A (B, T, F) tensor whose features are contiguous.
template <typename T>
struct Sequence {
  T* data;
  int64_t row, step, features;
  explicit Sequence(const at::Tensor& tensor)
      : data(tensor.data_ptr<T>()), row(tensor.stride(0)), step(tensor.stride(1)), features(tensor.size(2)) {
    TORCH_CHECK(features <= 1 || tensor.stride(2) == 1, "expected contiguous features");
  }
  Sequence(T* data, int64_t row, int64_t step, int64_t features) : data(data), row(row), step(step), features(features) {}
  // None, whose rows would have so many features.
  static Sequence none(int64_t features) { return Sequence(nullptr, 0, 0, features); }
  explicit operator bool() const { return data != nullptr; }
  T* at(int64_t b, int64_t t) const { return data + b * row + t * step; }
  // The same from step t on.
  Sequence from(int64_t t) const { return Sequence(data + t * step, row, step, features); }
};

// Rows lie far apart, too many for the processor to foresee: asks for what the next step needs of one.
template <typename T>
inline void fetch(const T* from, int64_t count) {
  constexpr int64_t line = 64 / sizeof(T);
  for (int64_t i = 0; i < count; i += line) __builtin_prefetch(from + i);
}

// A matrix, or a vector as its only row, of any strides.
template <typename T>
struct Matrix {
  T* data;
  int64_t row, column;
  Matrix(T* data, int64_t row, int64_t column) : data(data), row(row), column(column) {}
  explicit Matrix(const at::Tensor& tensor)
      : data(tensor.data_ptr<T>()), row(tensor.dim() > 1 ? tensor.stride(0) : 0), column(tensor.stride(-1)) {}
  T& at(int64_t r, int64_t c) const { return data[r * row + c * column]; }
  Matrix from_row(int64_t first) const { return {data + first * row, row, column}; }
};

// Copies a matrix in tiles: one of both may lie by columns, and would bring a line of the cache for each of their numbers.
template <typename T>
void copy(const Matrix<T>& from, const Matrix<T>& to, int64_t rows, int64_t columns) {
  constexpr int64_t tile = 16, least = 1 << 14;  // numbers that are worth a thread
  const int64_t tiles = (rows + tile - 1) / tile;
  at::parallel_for(0, tiles, std::max<int64_t>(1, least / (tile * std::max<int64_t>(columns, 1))), [&](int64_t begin, int64_t end) {
    for (int64_t first = begin * tile; first < end * tile; first += tile)
      for (int64_t column = 0; column < columns; column += tile)
        for (int64_t r = first; r < std::min(rows, first + tile); ++r)
          for (int64_t c = column; c < std::min(columns, column + tile); ++c) to.at(r, c) = from.at(r, c);
  });
}

template <typename T>
std::vector<Sequence<T>> sequences(at::TensorList tensors) {
  std::vector<Sequence<T>> result;
  for (const auto& tensor : tensors) result.emplace_back(tensor);
  return result;
}

template <typename T>
std::vector<const T*> pointers(at::TensorList tensors) {
  std::vector<const T*> result;
  for (const auto& tensor : tensors) {
    TORCH_CHECK(tensor.is_contiguous(), "expected contiguous states");
    result.push_back(tensor.data_ptr<T>());
  }
  return result;
}

template <typename Function>
void with_type(const at::Tensor& tensor, const Function& function) {
  if (tensor.scalar_type() == at::kFloat) return function(float());
  if (tensor.scalar_type() == at::kDouble) return function(double());
  TORCH_CHECK(false, "expected float32 or float64, found ", tensor.scalar_type());
}
}  // namespace
