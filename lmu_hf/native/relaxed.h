// Chunks whose state is fed back into a memory that never exists: a relaxed convolution, as in relaxed.py.
#pragma once

#include <memory>

#include "convolution.h"
#include "steps.h"

namespace {

// What u of each so many chunks contributes to the sums of as many chunks after them, and the way back.
template <typename T>
class Levels {
 public:
  Levels(at::TensorList spectra, int64_t chunk, int64_t steps, int64_t width) : chunk(chunk), steps(steps) {
    for (const at::Tensor& spectrum : spectra) {
      TORCH_CHECK(spectrum.size(2) == chunk << convolutions.size(), "expected spectra of twice as many steps each");
      convolutions.push_back(std::make_unique<Convolution<T>>(spectrum, parts(width, LANES<T>) * LANES<T>));
    }
    TORCH_CHECK(chunk << convolutions.size() >= steps, "expected a spectrum for each power of two");
  }

  // Of the gradients of all kernels' spectra, one after the other.
  int64_t numbers() const {
    int64_t total = 0;
    for (const auto& convolution : convolutions) total += convolution->numbers();
    return total;
  }

  // Adds to the sums of some rows (B, T, stride), from step `at` on, what u (B, T, D) before it is due to contribute there. Sums that
  // receive something for the first time need not have been there before.
  void forward(int64_t begin, int64_t end, int64_t at, const Sequence<T>& u, const Sequence<T>& sums) const {
    const Convolution<T>& convolution = *convolutions[level_at(at)];
    const int64_t length = convolution.transform.points, signal = 2 * length * convolution.dims;
    const Span<T> out{sums, at, std::min(length, steps - at), length};
    Buffer<T> signals((end - begin) * signal), points(convolution.transform.numbers());
    transform_signals<T>(convolution.transform, {u, at - length, length}, begin, end, signals.data());
    for (int64_t group = 0; group < convolution.groups; ++group)
      for (int64_t b = begin; b < end; ++b)
        convolution.add_to(&signals[(b - begin) * signal], group, out, b, points.data(), at != length);
  }

  // The adjoint: of the gradients of the sums of some rows (B, T, stride), it adds to grad_u (B, T, D) and, where it is wanted, to the
  // spectra of the gradients of the kernels.
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
              kernels ? &signals[(b - begin) * signal] : nullptr, group, from, b, points.data(),
              &sent[(b - first) * sending], kernels);
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

// Adds to numbers what each thread has summed up, or nothing; in the order of threads, so that equal runs round alike.
template <typename T, typename Part>
void add_parts(const std::vector<Part>& parts, T* to, int64_t numbers) {
  at::parallel_for(0, numbers, 1 << 14, [&](int64_t begin, int64_t end) {
    for (const Part& part : parts)
      for (int64_t i = begin; i < end && !part.empty(); ++i) to[i] += part[i];
  });
}

constexpr int64_t ABREAST = ROWS;  // rows of a thread, whose sums of all steps exist at a time

// Sums of some rows, by steps of whole vectors (rows, T, stride); the room stays for the rows after them.
template <typename T>
class Sums {
 public:
  Sequence<T> of(const at::Tensor& like, int64_t begin, int64_t end, int64_t steps, int64_t width) {
    const int64_t stride = parts(width, LANES<T>) * LANES<T>, row = steps * stride;
    if (!room.defined() || room.size(0) < end - begin) {
      room = empty({end - begin, steps, stride}, like);
      room.narrow(2, width, stride - width).zero_();  // vectors reach there
    }
    return Sequence<T>(room.data_ptr<T>() - begin * row, row, stride, width);
  }

 private:
  at::Tensor room;
};

void relaxed_forward(
    const std::string kind, int64_t chunk, const at::Tensor& given, const at::Tensor& weight, const std::optional<at::Tensor>& bias,
    const at::Tensor& matrix, int64_t width, at::TensorList spectra, at::TensorList states, at::TensorList kept,
    const at::Tensor& u) {
  TORCH_CHECK(!bias || bias->is_contiguous(), "expected a contiguous bias");
  with_loop(kind, 0, chunk, states, kept, {}, std::nullopt, "linear", [&](const auto& loop) {
    using T = typename std::decay_t<decltype(loop)>::Type;
    const int64_t batch = u.size(0), steps = u.size(1);
    const Levels<T> levels(spectra, chunk, steps, width);
    const Sequence<T> inputs(u), x(given);
    const Panels<T> panels(matrix), of_x(weight);
    std::vector<Sums<T>> room(at::get_num_threads());  // of each thread
    const auto run = [&](int64_t begin, int64_t end) {
      const Sequence<T> sums = room[at::get_thread_num()].of(u, begin, end, steps, width);
      for (int64_t at = 0; at < steps; at += chunk) {
        if (at) levels.forward(begin, end, at, inputs, sums);
        const Inputs<T> reading{x.from(at), of_x, bias ? bias->data_ptr<T>() : nullptr};
        loop.forward_rows(
            begin, end, at, std::min(chunk, steps - at), at ? sums.from(at) : Sequence<T>::none(width), panels, inputs, nullptr,
            &reading);
      }
    };
    over_rows(batch, run, ABREAST);
  });
}

void relaxed_backward(
    const std::string kind, int64_t chunk, const at::Tensor& given, const std::optional<at::Tensor>& to_given,
    const at::Tensor& to_hidden, const at::Tensor& to_u, int64_t width, at::TensorList spectra, at::TensorList states,
    at::TensorList kept, at::TensorList grads, const at::Tensor& u, const at::Tensor& grad_u, const at::Tensor& carry,
    const at::Tensor& carried, const std::optional<at::Tensor>& grad_given, const std::optional<at::Tensor>& grad_matrix,
    const std::optional<at::Tensor>& grad_kernel, int64_t first_row, const std::optional<at::Tensor>& grad_sums) {
  TORCH_CHECK(u.is_contiguous() && grad_given.has_value() == to_given.has_value(), "expected all that the gradients take");
  with_loop(kind, 0, chunk, states, kept, {}, std::nullopt, "linear", [&](const auto& loop) {
    using T = typename std::decay_t<decltype(loop)>::Type;
    const int64_t steps = u.size(1), count = grad_sums ? grad_sums->size(0) : u.size(0);
    const Levels<T> levels(spectra, chunk, steps, width);
    const Adjoint<T> adjoint(Panels<T>{to_hidden}, Panels<T>{to_u}, grads, carry, carried);
    const Sequence<T> inputs(u), to_inputs(grad_u), x(given);
    Sequence<T> given_sums = grad_sums ? Sequence<T>(*grad_sums) : Sequence<T>::none(width);
    given_sums.data -= first_row * given_sums.row;
    TORCH_CHECK(!grad_sums || given_sums.step % PANEL == 0, "expected room for whole vectors");
    std::vector<Sums<T>> room(at::get_num_threads());  // of each thread
    std::vector<Buffer<T>> kernels(room.size());
    PartialSums<T> matrices(grad_matrix);
    const auto run = [&](int64_t begin, int64_t end) {
      const Sequence<T> sums = grad_sums ? given_sums : room[at::get_thread_num()].of(u, begin, end, steps, width);
      Buffer<T>& of_kernels = kernels[at::get_thread_num()];
      if (grad_kernel) of_kernels.resize(levels.numbers());
      WeightGradient<T>* weights = matrices.own();
      for (int64_t at = (steps - 1) / chunk * chunk; at >= 0; at -= chunk) {
        InputsAdjoint<T> reading{x.from(at), inputs.from(at), weights};
        if (grad_given) reading.to_x.emplace(*to_given), reading.grad_x = Sequence<T>(*grad_given).from(at);
        loop.backward_rows(
            begin, end, at, std::min(chunk, steps - at), adjoint, to_inputs.from(at), sums.from(at), nullptr, &reading);
        if (at) levels.backward(begin, end, at, inputs, sums, to_inputs, grad_kernel ? of_kernels.data() : nullptr);
      }
      if (weights) weights->finish();
    };
    over_rows(count, [&](int64_t begin, int64_t end) { run(first_row + begin, first_row + end); }, ABREAST);
    matrices.gather(true);
    if (!grad_kernel) return;
    Buffer<T> total(levels.numbers());
    add_parts(kernels, total.data(), total.size());
    levels.add_kernel_gradient(total.data(), *grad_kernel);
  });
}
}  // namespace
