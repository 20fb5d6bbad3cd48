// Tensors as rows of numbers.
#pragma once

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

// Copies rows of a matrix, or a vector that is the only row of one.
template <typename T>
void copy_rows(const at::Tensor& from, int64_t first, const at::Tensor& to, int64_t row, int64_t count) {
  constexpr int64_t many = 1 << 12;  // numbers for which calls of PyTorch take less time than they save
  const int64_t columns = from.size(-1);
  if (count * columns >= many && from.dim() == to.dim()) {
    to.narrow(0, row, count).copy_(from.narrow(0, first, count));
    return;
  }
  const Matrix<T> read = Matrix<T>(from).from_row(first), written = Matrix<T>(to).from_row(row);
  for (int64_t r = 0; r < count; ++r)
    for (int64_t c = 0; c < columns; ++c) written.at(r, c) = read.at(r, c);
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
