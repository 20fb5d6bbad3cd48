// A recurrence whose steps read the inputs themselves and, backwards, add up the gradients of their matrix: with few units, tensors
// of the sums and of their gradients, and the products with these, would take longer than the steps.
#pragma once

#include "loop.h"

namespace {

void recurrent_forward(
    const std::string kind, int64_t linear, const at::Tensor& given, const at::Tensor& weight,
    const std::optional<at::Tensor>& bias, const at::Tensor& matrix, at::TensorList states, at::TensorList kept, int64_t width) {
  TORCH_CHECK(!bias || (bias->is_contiguous() && bias->size(0) == width), "expected a contiguous bias");
  with_loop(kind, linear, 1, states, kept, {}, std::nullopt, "linear", [&](const auto& loop) {
    using T = typename std::decay_t<decltype(loop)>::Type;
    const Inputs<T> inputs{Sequence<T>(given), Panels<T>(weight), bias ? bias->data_ptr<T>() : nullptr};
    const auto no_sums = Sequence<T>::none(width), no_u = Sequence<T>::none(0);
    over_rows(given.size(0), [&](int64_t begin, int64_t end) {
      loop.forward_rows(begin, end, 0, given.size(1), no_sums, Panels<T>(matrix), no_u, nullptr, &inputs);
    });
  });
}

void recurrent_backward(
    const std::string kind, int64_t linear, const at::Tensor& given, const at::Tensor& to_hidden,
    const std::optional<at::Tensor>& to_given, at::TensorList states, at::TensorList kept, at::TensorList grads,
    const at::Tensor& carry, const at::Tensor& carried, const std::optional<at::Tensor>& grad_given,
    const std::optional<at::Tensor>& grad_matrix, int64_t width) {
  TORCH_CHECK(to_given.has_value() == grad_given.has_value(), "expected both, the way to the inputs and their gradient");
  TORCH_CHECK(
      !grad_matrix || (grad_matrix->is_contiguous() && grad_matrix->size(1) == width), "expected a contiguous gradient");
  with_loop(kind, linear, 1, states, kept, {}, std::nullopt, "linear", [&](const auto& loop) {
    using T = typename std::decay_t<decltype(loop)>::Type;
    const Adjoint<T> adjoint(to_hidden, to_hidden, grads, carry, carried);
    const Sequence<T> x(given);
    const auto no_sums = Sequence<T>::none(width), no_u = Sequence<T>::none(0);
    // By thread, and added up in their order, so that equal runs round alike.
    std::vector<std::vector<T>> parts(at::get_num_threads());
    over_rows(given.size(0), [&](int64_t begin, int64_t end) {
      InputsAdjoint<T> reading{x, std::nullopt, std::nullopt, Sequence<T>::none(x.features)};
      if (grad_matrix) reading.weights.emplace(grad_matrix->size(0), width);
      if (to_given) reading.to_x.emplace(*to_given), reading.grad_x = Sequence<T>(*grad_given);
      loop.backward_rows(begin, end, 0, given.size(1), adjoint, no_u, no_sums, nullptr, &reading);
      if (!grad_matrix) return;
      auto& part = parts[at::get_thread_num()];
      part.resize(grad_matrix->numel());
      reading.weights->add_to(part.data());
    });
    if (!grad_matrix) return;
    T* total = grad_matrix->data_ptr<T>();
    std::fill_n(total, grad_matrix->numel(), T(0));
    for (const auto& part : parts)
      for (size_t i = 0; i < part.size(); ++i) total[i] += part[i];
  });
}
}  // namespace
