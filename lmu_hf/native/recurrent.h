// A recurrence whose steps read the inputs themselves and, backwards, add up the gradients of their matrix. Tensors of the sums and
// of their gradients, and products with these, would not stay in the cache; with few units they take longer than the steps.
#pragma once

#include "steps.h"

namespace {

void recurrent_forward(
    const std::string kind, int64_t linear, const at::Tensor& given, const at::Tensor& matrix, at::TensorList states,
    at::TensorList kept, const std::optional<at::Tensor>& alone) {
  with_loop(kind, linear, 1, states, kept, {}, std::nullopt, "linear", [&](const auto& loop) {
    using T = typename std::decay_t<decltype(loop)>::Type;
    const int64_t size = states[0].size(1), width = matrix.size(1), end = size + given.size(2);
    const bool reads = matrix.size(0) > size;
    TORCH_CHECK(reads || !alone, "expected inputs behind a memory");
    std::vector<T> bias(width);
    const Matrix<T> rows(matrix);
    for (int64_t c = 0; end < matrix.size(0) && c < width; ++c) bias[c] = rows.at(end, c);
    const auto repeated = alone ? Sequence<T>(*alone) : Sequence<T>::none(0);
    const auto sums = reads ? Sequence<T>::none(width) : Sequence<T>(given), no_u = Sequence<T>::none(0);
    if (const int64_t threads = loop.sharing(given.size(1), width, reads); threads > 1) {
      const SharedInputs<T> inputs{Sequence<T>(given), Elements<T>(rows.from_row(size)), bias.data(), repeated};
      return loop.forward_shared(threads, 0, given.size(1), sums, Elements<T>(rows), reads ? &inputs : nullptr);
    }
    const at::Tensor panels = panels_of(matrix);
    const Panels<T> laid(panels);
    const Inputs<T> inputs{Sequence<T>(given), laid.from_row(size), bias.data(), repeated};
    over_rows(given.size(0), [&](int64_t begin, int64_t end) {
      loop.forward_rows(begin, end, 0, given.size(1), sums, laid, no_u, nullptr, reads ? &inputs : nullptr);
    });
  });
}

void recurrent_backward(
    const std::string kind, int64_t linear, const at::Tensor& given, const at::Tensor& matrix, at::TensorList states,
    at::TensorList kept, at::TensorList grads, const at::Tensor& carry, const at::Tensor& carried,
    const std::optional<at::Tensor>& grad_given, const std::optional<at::Tensor>& grad_matrix) {
  with_loop(kind, linear, 1, states, kept, {}, std::nullopt, "linear", [&](const auto& loop) {
    using T = typename std::decay_t<decltype(loop)>::Type;
    const int64_t size = states[0].size(1), width = matrix.size(1);
    const bool reads = matrix.size(0) > size;
    const auto x = reads ? Sequence<T>(given) : Sequence<T>::none(0), no_u = Sequence<T>::none(0);
    // Where the inputs are the sums, the gradient of the sums is theirs.
    const auto sums = !reads && grad_given ? Sequence<T>(*grad_given) : Sequence<T>::none(width);
    const Matrix<T> back(matrix.t()), to_x{&back.at(0, size), back.row, back.column};
    if (const int64_t threads = loop.sharing(given.size(1), width, reads); threads > 1) {
      const SharedAdjoint<T> adjoint{Elements<T>(back), sequences<T>(grads), carry.data_ptr<T>(), carried.data_ptr<T>()};
      SharedReading<T> reading{x, Elements<T>(to_x), Sequence<T>::none(0), std::nullopt, matrix.size(0)};
      if (reads && grad_given) reading.grad_x = Sequence<T>(*grad_given);
      if (grad_matrix) reading.grad_matrix.emplace(*grad_matrix);
      return loop.backward_shared(threads, 0, given.size(1), adjoint, sums, &reading);
    }
    const at::Tensor to_hidden = panels_of(matrix.narrow(0, 0, size).t());
    const at::Tensor to_given = panels_of(matrix.narrow(0, size, reads && grad_given ? given.size(2) : 0).t());
    const Panels<T> back_to_hidden(to_hidden);
    const Adjoint<T> adjoint(back_to_hidden, back_to_hidden, grads, carry, carried);
    PartialSums<T> parts(grad_matrix);
    over_rows(given.size(0), [&](int64_t begin, int64_t end) {
      InputsAdjoint<T> reading{x, no_u, parts.own()};
      if (reads && grad_given) reading.to_x.emplace(to_given), reading.grad_x = Sequence<T>(*grad_given);
      loop.backward_rows(begin, end, 0, given.size(1), adjoint, no_u, sums, nullptr, &reading);
      if (reading.weights) reading.weights->finish();
    });
    parts.gather(false);
  });
}
}  // namespace
