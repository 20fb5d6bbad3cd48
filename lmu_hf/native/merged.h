// The matrix of a small LMU as one recurrence, as in merged.py: [m, h, what comes in, 1] -> [m', gates].
#pragma once

#include <ATen/ops/empty_like.h>
#include <ATen/ops/zeros.h>

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

  // Calls function(part, first, row, count) for every part that goes to u: rows `first` on of the part are rows `row` on of all.
  template <typename Function>
  void of_u(const at::Tensor& kernel, const Part& recurrent, const Part& bias, const Function& function) const {
    function(kernel, 0, at_entering, entering);
    function(kernel, entering, linear, kernel.size(0) - entering);
    if (recurrent) function(*recurrent, 0, 0, recurrent->size(0));
    if (bias) function(*bias, 0, rows - 1, 1);
  }
  // The same for the gates, but for what comes of m'.
  template <typename Function>
  void of_gates(const at::Tensor& weight, const Part& hidden, const Part& bias, const Function& function) const {
    function(weight, linear, at_input, weight.size(0) - linear);
    if (hidden) function(*hidden, 0, linear, hidden->size(0));
    if (bias) function(*bias, 0, rows - 1, 1);
  }
};

// The matrix takes u = of_u^T [m, h, what comes in, 1] to m' = A m + B u, and m' on to the gates. So all that these need of m' is what
// they make of A and of B: few rows, where a product with m' itself would have all of them.
struct Passing {
  at::Tensor of_u, ahead;  // (rows, D); and [A^T; B] (D * N + D, D * N), of all dimensions side by side

  Passing(
      const Layout& layout, const at::Tensor& A, const at::Tensor& B, const at::Tensor& kernel, const Part& recurrent,
      const Part& u_bias)
      : of_u(at::zeros({layout.rows, kernel.size(1)}, kernel.options())),
        ahead(at::zeros({layout.linear + kernel.size(1), layout.linear}, kernel.options())) {
    TORCH_CHECK(A.is_contiguous(), "expected a contiguous A");
    const int64_t dims = kernel.size(1), order = B.size(1), linear = layout.linear;
    with_type(kernel, [&](auto scalar) {
      using T = decltype(scalar);
      const Matrix<T> passes(ahead), drives(B);
      layout.of_u(kernel, recurrent, u_bias, [&](const at::Tensor& part, int64_t first, int64_t row, int64_t count) {
        copy_rows<T>(part, first, of_u, row, count);
      });
      for (int64_t d = 0; d < dims; ++d) {
        const T* numbers = A.data_ptr<T>() + (A.size(0) > 1 ? d : 0) * order * order;
        for (int64_t i = 0; i < order; ++i)
          for (int64_t j = 0; j < order; ++j) passes.at(d * order + i, d * order + j) = numbers[j * order + i];
        for (int64_t n = 0; n < order; ++n) passes.at(linear + d, d * order + n) = drives.at(B.size(0) > 1 ? d : 0, n);
      }
    });
  }
};

at::Tensor merged_operator(
    at::IntArrayRef numbers, const at::Tensor& A, const at::Tensor& B, const at::Tensor& kernel, const Part& recurrent,
    const Part& u_bias, const at::Tensor& weight, const Part& hidden, const Part& bias) {
  const Layout layout(numbers);
  const Passing passing(layout, A, B, kernel, recurrent, u_bias);
  const int64_t dims = kernel.size(1), order = B.size(1), linear = layout.linear, gates = weight.size(1);
  const auto result = empty({layout.rows, linear + gates}, weight);
  const auto to_gates = result.narrow(1, linear, gates), read = empty({linear + dims, gates}, weight);
  add_product(read, passing.ahead, weight.narrow(0, 0, linear), false);
  with_type(weight, [&](auto scalar) {
    using T = decltype(scalar);
    const Matrix<T> of_u(passing.of_u), ahead(passing.ahead), reading(read);
    // Rows that are a part's from end to end.
    std::vector<char> covered(layout.rows);
    layout.of_gates(weight, hidden, bias, [&](const at::Tensor& part, int64_t first, int64_t row, int64_t count) {
      copy_rows<T>(part, first, to_gates, row, count);
      std::fill_n(covered.begin() + row, count, 1);
    });
    const int64_t least = std::max<int64_t>(1, (1 << 15) / std::max<int64_t>(1, linear + gates));
    at::parallel_for(0, layout.rows, least, [&](int64_t begin, int64_t end) {
      for (int64_t r = begin; r < end; ++r) {
        T* __restrict to = result.data_ptr<T>() + r * (linear + gates);
        if (r < linear)
          std::copy_n(&ahead.at(r, 0), linear, to), std::copy_n(&reading.at(r, 0), gates, to + linear);
        else
          std::fill_n(to, covered[r] ? linear : linear + gates, T(0));
        for (int64_t d = 0; d < dims; ++d) {
          const T factor = of_u.at(r, d), *__restrict driven = &ahead.at(linear + d, 0);
          for (int64_t i = d * order; i < (d + 1) * order; ++i) to[i] += factor * driven[i];
        }
      }
    });
  });
  add_product(to_gates, passing.of_u, read.narrow(0, linear, dims), true);
  return result;
}

// Gradients of the parts, in their order, given that of the matrix.
std::vector<Part> merged_operator_backward(
    at::IntArrayRef numbers, const at::Tensor& grad, const at::Tensor& A, const at::Tensor& B, const at::Tensor& kernel,
    const Part& recurrent, const Part& u_bias, const at::Tensor& weight, const Part& hidden, const Part& bias) {
  const Layout layout(numbers);
  TORCH_CHECK(grad.is_contiguous(), "expected a contiguous gradient");
  const Passing passing(layout, A, B, kernel, recurrent, u_bias);
  const int64_t dims = kernel.size(1), linear = layout.linear, gates = weight.size(1);
  const auto like = [](const Part& part) { return part ? Part(at::empty_like(*part)) : Part(); };
  std::vector<Part> grads{like(kernel), like(recurrent), like(u_bias), like(weight), like(hidden), like(bias)};
  const auto to_gates = grad.narrow(1, linear, gates), of_memory = weight.narrow(0, 0, linear);
  const auto driven = passing.ahead.narrow(0, linear, dims);
  // Of what the gates make of A and of B.
  const auto of_read = empty({linear + dims, gates}, grad), of_u = empty({layout.rows, dims}, grad);
  add_product(of_read.narrow(0, linear, dims), passing.of_u.t(), to_gates, false);
  with_type(weight, [&](auto scalar) {
    using T = decltype(scalar);
    copy_rows<T>(to_gates, 0, of_read, 0, linear);
  });
  add_product_either_way(grads[3]->narrow(0, 0, linear), passing.ahead.t(), of_read, false);
  // Of u, which reaches m' and with it the gates.
  const auto read = empty({dims, gates}, grad);
  add_product(read, driven, of_memory, false);
  add_product(of_u, grad.narrow(1, 0, linear), driven.t(), false);
  add_product(of_u, to_gates, read.t(), true);
  with_type(weight, [&](auto scalar) {
    using T = decltype(scalar);
    layout.of_u(*grads[0], grads[1], grads[2], [&](const at::Tensor& part, int64_t first, int64_t row, int64_t count) {
      copy_rows<T>(of_u, row, part, first, count);
    });
    layout.of_gates(*grads[3], grads[4], grads[5], [&](const at::Tensor& part, int64_t first, int64_t row, int64_t count) {
      copy_rows<T>(to_gates, row, part, first, count);
    });
  });
  return grads;
}
}  // namespace
