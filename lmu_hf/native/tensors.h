// Tensors as rows of numbers.
#pragma once

#include <ATen/core/Tensor.h>

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

// A matrix, or a vector as its only row, of any strides.
template <typename T>
struct Matrix {
  T* data;
  int64_t row, column;
  explicit Matrix(const at::Tensor& tensor)
      : data(tensor.data_ptr<T>()), row(tensor.dim() > 1 ? tensor.stride(0) : 0), column(tensor.stride(-1)) {}
  T& at(int64_t r, int64_t c) const { return data[r * row + c * column]; }
};

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
