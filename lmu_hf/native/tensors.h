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

// Copies a matrix. In tiles, since one of them may lie transposed: of that, lines of the cache are then read or written as a whole.
template <typename T>
void copy_tiles(const Matrix<T>& from, const Matrix<T>& to, int64_t rows, int64_t columns) {
  constexpr int64_t tile = 8;
  // What is written has contiguous rows, if it has anything contiguous.
  if (to.column != 1 && to.row == 1)
    return copy_tiles<T>({from.data, from.column, from.row}, {to.data, to.column, to.row}, columns, rows);
  for (int64_t top = 0; top < rows; top += tile)
    for (int64_t left = 0; left < columns; left += tile) {
      const int64_t height = std::min(tile, rows - top), width = std::min(tile, columns - left);
      const T* __restrict read = &from.at(top, left);
      T* __restrict written = &to.at(top, left);
      if (from.row == 1 && to.column == 1 && height == tile && width == tile) {
        for (int64_t r = 0; r < tile; ++r)
          for (int64_t c = 0; c < tile; ++c) written[r * to.row + c] = read[c * from.column + r];
        continue;
      }
      for (int64_t r = 0; r < height; ++r)
        for (int64_t c = 0; c < width; ++c) written[r * to.row + c * to.column] = read[r * from.row + c * from.column];
    }
}

// Copies rows of a matrix, or a vector that is the only row of one.
template <typename T>
void copy_rows(const at::Tensor& from, int64_t first, const at::Tensor& to, int64_t row, int64_t count) {
  const int64_t columns = from.size(-1), least = std::max<int64_t>(1, (1 << 15) / std::max<int64_t>(1, columns));
  const Matrix<T> read = Matrix<T>(from).from_row(first), written = Matrix<T>(to).from_row(row);
  const bool whole = read.column == 1 && written.column == 1;
  at::parallel_for(0, count, least, [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; whole && r < end; ++r) std::copy_n(&read.at(r, 0), columns, &written.at(r, 0));
    if (!whole) copy_tiles(read.from_row(begin), written.from_row(begin), end - begin, columns);
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
