// The matrix of a small LMU as one recurrence, as in merged.py: [m, h, what comes in, 1] -> [m', gates].
#pragma once

#include <ATen/ops/zeros.h>
#include <ATen/ops/zeros_like.h>

#include <optional>
#include <vector>

#include "products.h"
#include "tensors.h"

namespace {

using Part = std::optional<at::Tensor>;

// merged._Layout.
struct Layout {
  int64_t linear, entering, at_entering, at_input, rows;

  explicit Layout(at::IntArrayRef numbers)
      : linear(numbers[0]), entering(numbers[1]), at_entering(numbers[2]), at_input(numbers[3]), rows(numbers[4]) {}

  // Calls function(row, part, first, count) for every part that goes to u: rows `first` on of the part, from row `row` on of the
  // matrix.
  template <typename Function>
  void of_u(const at::Tensor& kernel, const Part& recurrent, const Part& bias, const Function& function) const {
    function(at_entering, kernel, 0, entering);
    function(linear, kernel, entering, kernel.size(0) - entering);
    if (recurrent) function(0, *recurrent, 0, recurrent->size(0));
    if (bias) function(rows - 1, *bias, 0, 1);
  }
  // The same for the gates, but for what comes of m'.
  template <typename Function>
  void of_gates(const at::Tensor& weight, const Part& hidden, const Part& bias, const Function& function) const {
    function(at_input, weight, linear, weight.size(0) - linear);
    if (hidden) function(linear, *hidden, 0, hidden->size(0));
    if (bias) function(rows - 1, *bias, 0, 1);
  }
};

at::Tensor merged_operator(
    at::IntArrayRef numbers, const at::Tensor& A, const at::Tensor& B, const at::Tensor& kernel, const Part& recurrent,
    const Part& u_bias, const at::Tensor& weight, const Part& hidden, const Part& bias) {
  const Layout layout(numbers);
  TORCH_CHECK(A.is_contiguous(), "expected a contiguous A");
  const int64_t dims = kernel.size(1), order = B.size(1), linear = layout.linear, gates = weight.size(1);
  const auto result = at::zeros({layout.rows, linear + gates}, weight.options());
  with_type(weight, [&](auto scalar) {
    using T = decltype(scalar);
    const Matrix<T> to(result), drives(B);
    layout.of_u(kernel, recurrent, u_bias, [&](int64_t row, const at::Tensor& part, int64_t first, int64_t count) {
      const Matrix<T> from(part);
      for (int64_t r = 0; r < count; ++r)
        for (int64_t d = 0; d < dims; ++d)
          for (int64_t n = 0; n < order; ++n)
            to.at(row + r, d * order + n) = from.at(first + r, d) * drives.at(B.size(0) > 1 ? d : 0, n);
    });
    for (int64_t d = 0; d < dims; ++d) {
      const T* ahead = A.data_ptr<T>() + (A.size(0) > 1 ? d : 0) * order * order;
      for (int64_t i = 0; i < order; ++i)
        for (int64_t j = 0; j < order; ++j) to.at(d * order + i, d * order + j) += ahead[j * order + i];
    }
    const OwnPanels<T> read(weight.narrow(0, 0, linear));
    const int64_t stride = padded(gates);
    Buffer<T> sums(layout.rows * stride);
    layout.of_gates(weight, hidden, bias, [&](int64_t row, const at::Tensor& part, int64_t first, int64_t count) {
      const Matrix<T> from(part);
      for (int64_t r = 0; r < count; ++r)
        for (int64_t c = 0; c < gates; ++c) sums[(row + r) * stride + c] = from.at(first + r, c);
    });
    product<T>(layout.rows, gates, linear, to.data, to.row, read.panels(), sums.data(), stride);
    for (int64_t r = 0; r < layout.rows; ++r) std::copy_n(&sums[r * stride], gates, &to.at(r, linear));
  });
  return result;
}

// Gradients of the parts, in their order, given that of the matrix.
std::vector<Part> merged_operator_backward(
    at::IntArrayRef numbers, const at::Tensor& grad, const at::Tensor& B, const at::Tensor& matrix, const at::Tensor& kernel,
    const Part& recurrent, const Part& u_bias, const at::Tensor& weight, const Part& hidden, const Part& bias) {
  const Layout layout(numbers);
  TORCH_CHECK(grad.is_contiguous() && matrix.is_contiguous(), "expected contiguous matrices");
  const int64_t dims = kernel.size(1), order = B.size(1), linear = layout.linear, gates = weight.size(1), rows = layout.rows;
  const auto like = [](const Part& part) { return part ? Part(at::zeros_like(*part)) : Part(); };
  std::vector<Part> grads{like(kernel), like(recurrent), like(u_bias), like(weight), like(hidden), like(bias)};
  with_type(weight, [&](auto scalar) {
    using T = decltype(scalar);
    const Matrix<T> from(grad), drives(B), of_weight(*grads[3]);
    // What arrives at m', also through the gates.
    const int64_t stride = padded(linear), width = padded(gates);
    Buffer<T> arrived(rows * stride), read(linear * width);
    for (int64_t r = 0; r < rows; ++r) std::copy_n(&from.at(r, 0), linear, &arrived[r * stride]);
    const auto to_gates = grad.narrow(1, linear, gates);
    product<T>(
        rows, linear, gates, &from.at(0, linear), from.row, OwnPanels<T>(weight.narrow(0, 0, linear).t()).panels(),
        arrived.data(), stride);
    product<T, true>(
        linear, gates, rows, matrix.data_ptr<T>(), matrix.stride(0), OwnPanels<T>(to_gates).panels(), read.data(), width);
    for (int64_t r = 0; r < linear; ++r)
      for (int64_t c = 0; c < gates; ++c) of_weight.at(r, c) = read[r * width + c];
    layout.of_u(*grads[0], grads[1], grads[2], [&](int64_t row, const at::Tensor& part, int64_t first, int64_t count) {
      const Matrix<T> to(part);
      for (int64_t r = 0; r < count; ++r)
        for (int64_t d = 0; d < dims; ++d)
          for (int64_t n = 0; n < order; ++n)
            to.at(first + r, d) += arrived[(row + r) * stride + d * order + n] * drives.at(B.size(0) > 1 ? d : 0, n);
    });
    layout.of_gates(*grads[3], grads[4], grads[5], [&](int64_t row, const at::Tensor& part, int64_t first, int64_t count) {
      const Matrix<T> to(part);
      for (int64_t r = 0; r < count; ++r)
        for (int64_t c = 0; c < gates; ++c) to.at(first + r, c) = from.at(row + r, linear + c);
    });
  });
  return grads;
}
}  // namespace
