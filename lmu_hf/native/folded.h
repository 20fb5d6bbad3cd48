// The chunks of a segment whose u is known in advance and whose memory is folded into the sums of their steps, as in
// time_loop.py. Their starts are known, so that each thread takes its rows through all of them.
#pragma once

#include "steps.h"

namespace {

void folded_forward(
    const std::string kind, int64_t first, int64_t count, int64_t chunk, const at::Tensor& known, const at::Tensor& folds,
    const at::Tensor& starts, const at::Tensor& matrix, at::TensorList states, at::TensorList kept) {
  with_loop(kind, 0, chunk, states, kept, {}, std::nullopt, "linear", [&](const auto& loop) {
    using T = typename std::decay_t<decltype(loop)>::Type;
    const Sequence<T> sums(known), begun(starts), no_u(known.narrow(2, 0, 0));
    const Panels<T> panels(matrix);
    over_rows(starts.size(0), [&](int64_t begin, int64_t end) {
      for (int64_t at = 0; at < count; at += chunk) {
        const Start<T> start{folds, begun.at(begin, at / chunk), begun.features, begun.row};
        loop.forward_rows(begin, end, first + at, std::min(chunk, count - at), sums.from(at), panels, no_u, &start);
      }
    });
  });
}

void folded_backward(
    const std::string kind, int64_t first, int64_t count, int64_t chunk, const at::Tensor& folds, const at::Tensor& to_hidden,
    at::TensorList states, at::TensorList kept, at::TensorList grads, const at::Tensor& grad_sums, const at::Tensor& to_starts,
    const at::Tensor& carry, const at::Tensor& carried) {
  with_loop(kind, 0, chunk, states, kept, {}, std::nullopt, "linear", [&](const auto& loop) {
    using T = typename std::decay_t<decltype(loop)>::Type;
    const Adjoint<T> adjoint(Panels<T>{to_hidden}, Panels<T>{to_hidden}, grads, carry, carried);
    const Sequence<T> sums(grad_sums), begun(to_starts), no_u(grad_sums.narrow(2, 0, 0));
    const int64_t flat = begun.features, stride = padded(flat);
    over_rows(to_starts.size(0), [&](int64_t begin, int64_t end) {
      Buffer<T> reached((end - begin) * stride);
      const Start<T> start{folds, reached.data(), flat, stride};
      for (int64_t index = (count - 1) / chunk; index >= 0; --index) {
        const int64_t at = index * chunk;
        std::fill(reached.begin(), reached.end(), T(0));
        loop.backward_rows(
            begin, end, first + at, std::min(chunk, count - at), adjoint, no_u, sums.from(at), &start);
        for (int64_t b = begin; b < end; ++b)
          std::memcpy(begun.at(b, index), &reached[(b - begin) * stride], flat * sizeof(T));
      }
    });
  });
}
}  // namespace
