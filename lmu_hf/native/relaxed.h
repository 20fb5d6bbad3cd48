// Chunks whose state is fed back into a memory that never exists: a relaxed convolution, as in relaxed.py.
#pragma once

#include <memory>

#include "convolution.h"
#include "loop.h"

namespace {

// What u of each so many chunks contributes to the sums of as many chunks after them, and the way back.
template <typename T>
class Levels {
 public:
  Levels(at::TensorList spectra, int64_t chunk, int64_t steps, int64_t width) : chunk(chunk), steps(steps) {
    for (const at::Tensor& spectrum : spectra) {
      TORCH_CHECK(spectrum.size(2) == chunk << convolutions.size(), "expected spectra of twice as many steps each");
      convolutions.push_back(std::make_unique<Convolution<T>>(spectrum, width));
    }
    TORCH_CHECK(chunk << convolutions.size() >= steps, "expected a spectrum for each power of two");
  }

  // Of the gradients of all kernels' spectra, one after the other.
  int64_t numbers() const {
    int64_t total = 0;
    for (const auto& convolution : convolutions) total += convolution->numbers();
    return total;
  }

  // Adds to sums (B, T, W), from step `at` on, for some rows: what u (B, T, D) before it is due to contribute there.
  void forward(int64_t begin, int64_t end, int64_t at, const Sequence<T>& u, const Sequence<T>& sums) const {
    const Convolution<T>& convolution = *convolutions[level_at(at)];
    const int64_t length = convolution.transform.points, signal = 2 * length * convolution.dims;
    const Span<T> out{sums, at, std::min(length, steps - at), length};
    Buffer<T> signals((end - begin) * signal), points(convolution.transform.numbers());
    transform_signals<T>(convolution.transform, {u, at - length, length}, begin, end, signals.data());
    for (int64_t group = 0; group < convolution.groups; ++group)
      for (int64_t b = begin; b < end; ++b) convolution.add_to(&signals[(b - begin) * signal], group, out, b, points.data());
  }

  // The adjoint, which adds to grad_u and, where it is wanted, to the spectra of the gradients of the kernels.
  void backward(
      int64_t begin, int64_t end, int64_t at, const Sequence<T>& u, const Sequence<T>& grad_sums, const Sequence<T>& grad_u,
      T* kernels) const {
    const int64_t level = level_at(at);
    const Convolution<T>& convolution = *convolutions[level];
    const int64_t length = convolution.transform.points, signal = 2 * length * convolution.dims;
    const int64_t sending = convolution.sent_numbers();
    const Span<T> from{grad_sums, at, std::min(length, steps - at), length};
    for (int64_t before = 0; kernels && before < level; ++before) kernels += convolutions[before]->numbers();
    Buffer<T> signals(kernels ? (end - begin) * signal : 0), points(convolution.transform.numbers()), sent(SENDING * sending);
    if (kernels) transform_signals<T>(convolution.transform, {u, at - length, length}, begin, end, signals.data());
    for (int64_t first = begin; first < end; first += SENDING) {
      const int64_t past = std::min(end, first + SENDING);
      std::fill(sent.begin(), sent.end(), T(0));
      for (int64_t group = 0; group < convolution.groups; ++group)
        for (int64_t b = first; b < past; ++b)
          convolution.back(
              kernels ? &signals[(b - begin) * signal] : nullptr, group, from, b, points.data(), &sent[(b - first) * sending],
              kernels);
      convolution.send(sent.data(), first, past, {grad_u, at - length, length});
    }
  }

  // Adds the gradients of the kernel (D, lags, W) to `grad`, whose first lag is 1. Overwrites their spectra.
  void add_kernel_gradient(T* kernels, const at::Tensor& grad) const {
    for (const auto& convolution : convolutions) {
      convolution->add_kernel_gradient(kernels, Sequence<T>(grad), grad.size(1), 1);
      kernels += convolution->numbers();
    }
  }

 private:
  const int64_t chunk, steps;
  std::vector<std::unique_ptr<const Convolution<T>>> convolutions;

  // Of as many chunks as the largest power of two in the number of those before.
  int64_t level_at(int64_t at) const {
    int64_t level = 0;
    for (int64_t chunks = at / chunk; chunks % 2 == 0; chunks /= 2) ++level;
    return level;
  }
};

void relaxed_forward(
    const std::string kind, int64_t chunk, const at::Tensor& known, const at::Tensor& matrix, at::TensorList spectra,
    at::TensorList states, at::TensorList kept, const at::Tensor& u, at::TensorList encoding,
    const std::optional<at::Tensor>& mask, const std::string activation) {
  with_loop(kind, 0, chunk, states, kept, encoding, mask, activation, [&](const auto& loop) {
    using T = typename std::decay_t<decltype(loop)>::Type;
    const int64_t steps = known.size(1);
    const Levels<T> levels(spectra, chunk, steps, known.size(2));
    const Sequence<T> sums(known), inputs(u);
    const Panels<T> panels(matrix);
    over_rows(known.size(0), [&](int64_t begin, int64_t end) {
      for (int64_t at = 0; at < steps; at += chunk) {
        if (at) levels.forward(begin, end, at, inputs, sums);
        loop.forward_rows(begin, end, at, std::min(chunk, steps - at), sums.from(at), panels, inputs, nullptr);
      }
    });
  });
}

void relaxed_backward(
    const std::string kind, int64_t chunk, const at::Tensor& to_hidden, const at::Tensor& to_u, at::TensorList spectra,
    at::TensorList states, at::TensorList kept, at::TensorList grads, const at::Tensor& u, const at::Tensor& grad_u,
    const at::Tensor& grad_sums, const at::Tensor& carry, const at::Tensor& carried, at::TensorList encoding,
    const std::optional<at::Tensor>& mask, const std::string activation, const std::optional<at::Tensor>& grad_kernel) {
  with_loop(kind, 0, chunk, states, kept, encoding, mask, activation, [&](const auto& loop) {
    using T = typename std::decay_t<decltype(loop)>::Type;
    const int64_t steps = grad_sums.size(1);
    const Levels<T> levels(spectra, chunk, steps, grad_sums.size(2));
    const Adjoint<T> adjoint(Panels<T>{to_hidden}, Panels<T>{to_u}, grads, carry, carried);
    const Sequence<T> sums(grad_sums), inputs(u), to_inputs(grad_u);
    std::vector<Buffer<T>> kernels(at::get_num_threads());  // of each thread
    over_rows(grad_sums.size(0), [&](int64_t begin, int64_t end) {
      Buffer<T>& own = kernels[at::get_thread_num()];
      if (grad_kernel) own.resize(levels.numbers());
      for (int64_t at = (steps - 1) / chunk * chunk; at >= 0; at -= chunk) {
        loop.backward_rows(
            begin, end, at, std::min(chunk, steps - at), adjoint, to_inputs.from(at), sums.from(at), nullptr);
        if (at) levels.backward(begin, end, at, inputs, sums, to_inputs, grad_kernel ? own.data() : nullptr);
      }
    });
    if (!grad_kernel) return;
    Buffer<T>* total = nullptr;  // in the order of threads, so that equal runs round alike
    for (Buffer<T>& part : kernels) {
      if (part.empty()) continue;
      if (total) for (size_t i = 0; i < part.size(); ++i) (*total)[i] += part[i];
      else total = &part;
    }
    if (total) levels.add_kernel_gradient(total->data(), *grad_kernel);
  });
}
}  // namespace
