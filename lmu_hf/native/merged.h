// The matrix of a small LMU as one recurrence, as in merged.py: [m, h, what comes in, 1] -> [m', gates].
#pragma once

#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/zeros_like.h>

#include <optional>
#include <vector>

#include "matrices.h"

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
  const auto result = at::empty({layout.rows, linear + gates}, weight.options());
  const auto ahead = result.narrow(1, 0, linear), to_gates = result.narrow(1, linear, gates);
  with_type(weight, [&](auto scalar) {
    using T = decltype(scalar);
    const Matrix<T> to(result), of_gates(to_gates), drives(B);
    for (int64_t r = 0; r < layout.rows; ++r) std::fill_n(&to.at(r, 0), linear + gates, T(0));
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
    layout.of_gates(weight, hidden, bias, [&](int64_t row, const at::Tensor& part, int64_t first, int64_t count) {
      copy(Matrix<T>(part).from_row(first), of_gates.from_row(row), count, gates);
    });
  });
  add_product(to_gates, ahead, weight.narrow(0, 0, linear), true);
  return result;
}

// Gradients of the parts, in their order, given that of the matrix.
std::vector<Part> merged_operator_backward(
    at::IntArrayRef numbers, const at::Tensor& grad, const at::Tensor& B, const at::Tensor& matrix, const at::Tensor& kernel,
    const Part& recurrent, const Part& u_bias, const at::Tensor& weight, const Part& hidden, const Part& bias) {
  const Layout layout(numbers);
  TORCH_CHECK(grad.is_contiguous() && matrix.is_contiguous(), "expected contiguous matrices");
  const int64_t dims = kernel.size(1), order = B.size(1), linear = layout.linear, gates = weight.size(1);
  const auto zeros = [](const Part& part) { return part ? Part(at::zeros_like(*part)) : Part(); };
  const auto room = [](const Part& part) { return part ? Part(at::empty_like(*part)) : Part(); };
  std::vector<Part> grads{zeros(kernel), zeros(recurrent), zeros(u_bias), room(weight), room(hidden), room(bias)};
  const auto to_gates = grad.narrow(1, linear, gates), of_memory = weight.narrow(0, 0, linear);
  // What arrives at m', also through the gates.
  const auto arrived = grad.narrow(1, 0, linear).clone(at::MemoryFormat::Contiguous);
  add_product(arrived, to_gates, of_memory.t(), true);
  add_product_either_way(grads[3]->narrow(0, 0, linear), matrix.narrow(1, 0, linear).t(), to_gates, false);
  with_type(weight, [&](auto scalar) {
    using T = decltype(scalar);
    const Matrix<T> from(to_gates), reached(arrived), drives(B);
    layout.of_u(*grads[0], grads[1], grads[2], [&](int64_t row, const at::Tensor& part, int64_t first, int64_t count) {
      const Matrix<T> to(part);
      for (int64_t r = 0; r < count; ++r)
        for (int64_t d = 0; d < dims; ++d)
          for (int64_t n = 0; n < order; ++n)
            to.at(first + r, d) += reached.at(row + r, d * order + n) * drives.at(B.size(0) > 1 ? d : 0, n);
    });
    layout.of_gates(*grads[3], grads[4], grads[5], [&](int64_t row, const at::Tensor& part, int64_t first, int64_t count) {
      copy(from.from_row(row), Matrix<T>(part).from_row(first), count, gates);
    });
  });
  return grads;
}
}  // namespace
