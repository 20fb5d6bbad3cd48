// Causal convolutions by spectra, as in convolution.py: of a few signals with kernels of many columns, which are lanes of vectors.
#pragma once

#include <ATen/Parallel.h>

#include <optional>

#include "tensors.h"
#include "transform.h"

namespace {

int64_t parts(int64_t total, int64_t size) { return (total + size - 1) / size; }

// Some lanes of a row, zero past `count`.
template <typename T>
typename Vector<T>::type some(const T* from, int64_t count) {
  using Vec = typename Vector<T>::type;
  if (count >= LANES<T>) return *reinterpret_cast<const Vec*>(from);
  Vec result = {};
  for (int64_t lane = 0; lane < count; ++lane) result[lane] = from[lane];
  return result;
}

// Adds them to a row, or, unless that is kept, writes them.
template <typename T>
void add(typename Vector<T>::type value, T* to, int64_t count, bool kept = true) {
  if (count >= LANES<T>) {
    *reinterpret_cast<typename Vector<T>::type*>(to) =
        kept ? *reinterpret_cast<const typename Vector<T>::type*>(to) + value : value;
  } else {
    for (int64_t lane = 0; lane < count; ++lane) to[lane] = kept ? to[lane] + value[lane] : value[lane];
  }
}

template <typename T>
T sum(const T* lanes) {
  T total[LANES<T>];
  std::copy_n(lanes, LANES<T>, total);
  for (int64_t half = LANES<T> / 2; half > 0; half /= 2)
    for (int64_t lane = 0; lane < half; ++lane) total[lane] += total[lane + half];
  return total[0];
}

// Steps of a sequence (B, T, F): `count` from `first` on, the first of them at point `offset` of a signal.
template <typename T>
struct Span {
  const Sequence<T>& sequence;
  int64_t first, count, offset = 0;
};

// The spectra of some rows of u (B, T, D), one after the other: (rows, D, points, 2). As lanes, so for many rows at a time.
template <typename T>
void transform_signals(const RealTransform<T>& transform, const Span<T>& u, int64_t begin, int64_t end, T* spectra) {
  const int64_t dims = u.sequence.features, numbers = 2 * transform.points;
  Buffer<T> points(transform.numbers());
  for (; begin < end; begin += LANES<T>) {
    const int64_t rows = std::min(LANES<T>, end - begin);
    for (int64_t dim = 0; dim < dims; ++dim) {
      std::fill(points.begin(), points.end(), T(0));
      for (int64_t row = 0; row < rows; ++row)
        for (int64_t t = 0; t < u.count; ++t)
          points[transform.at(u.offset + t) + row] = u.sequence.at(begin + row, u.first + t)[dim];
      transform.forward(points.data());
      for (int64_t row = 0; row < rows; ++row)
        for (int64_t i = 0; i < numbers; ++i) spectra[(row * dims + dim) * numbers + i] = points[i * LANES<T> + row];
    }
    spectra += rows * dims * numbers;
  }
}

// Products of a column's spectrum with that of a signal, which is `factor`.
template <bool CONJUGATE, typename T>
Complex<T> times_signal(int64_t place, const Complex<T>& column, const T* factor) {
  if (place == 0) return {column.re * factor[0], column.im * factor[1]};  // both real, see RealTransform
  return column.times(factor[0], CONJUGATE ? -factor[1] : factor[1]);
}

constexpr int64_t AHEAD = 8;  // steps whose places are asked for before they are needed

// The convolution with kernels (D, lags, W) by their spectra, divided by the size of the transform: (D, groups, points, 2, lanes).
template <typename T>
class Convolution {
 public:
  const RealTransform<T> transform;
  const int64_t dims, groups, width;

  Convolution(const at::Tensor& spectrum, int64_t width)
      : transform(2 * spectrum.size(2)),
        dims(spectrum.size(0)),
        groups(spectrum.size(1)),
        width(width),
        spectrum(spectrum.data_ptr<T>()) {
    TORCH_CHECK(
        spectrum.is_contiguous() && spectrum.size(4) == LANES<T> && groups == parts(width, LANES<T>),
        "expected a spectrum of that width");
  }

  int64_t numbers() const { return dims * groups * transform.numbers(); }  // of the spectrum
  int64_t sent_numbers() const { return dims * transform.numbers(); }      // that `back` adds up for a row

  // Adds to a group of columns of row b, or writes them unless they are kept. Takes the row's signals, as transformed, and room for
  // one.
  void add_to(const T* signals, int64_t group, const Span<T>& out, int64_t b, T* points, bool kept) const {
    const auto product = [&](int64_t dim, int64_t f) {
      const T* kernel = spectrum + (dim * groups + group) * transform.numbers() + f * POINT;
      return times_signal<false>(f, Complex<T>::load(kernel), signals + 2 * (dim * transform.points + f));
    };
    transform.inverse(points, [&](int64_t f) {
      Complex<T> total = product(0, f);
      for (int64_t dim = 1; dim < dims; ++dim) total = total + product(dim, f);
      return total;
    });
    const int64_t column = group * LANES<T>;
    for (int64_t t = 0; t < out.count; ++t) {
      __builtin_prefetch(out.sequence.at(b, out.first + t + AHEAD) + column, 1);
      add<T>(
          *reinterpret_cast<const Vec*>(points + transform.at(out.offset + t)), out.sequence.at(b, out.first + t) + column,
          width - column, kept);
    }
  }

  // The adjoint: adds to `sent`, from whose lanes `send` makes the gradient of the row's u, and to `sums`, the spectrum of that of
  // the kernel. Either may be nullptr.
  void back(const T* signals, int64_t group, const Span<T>& grad, int64_t b, T* points, T* sent, T* sums) const {
    const int64_t column = group * LANES<T>;
    std::fill_n(points, transform.numbers(), T(0));
    for (int64_t t = 0; t < grad.count; ++t) {
      __builtin_prefetch(grad.sequence.at(b, grad.first + t + AHEAD) + column);
      *reinterpret_cast<Vec*>(points + transform.at(grad.offset + t)) =
          some<T>(grad.sequence.at(b, grad.first + t) + column, width - column);
    }
    transform.forward(points);
    for (int64_t dim = 0; dim < dims; ++dim) {
      const int64_t own = (dim * groups + group) * transform.numbers();
      if (sent) {
        const T* kernel = spectrum + own;
        T* to = sent + dim * transform.numbers();
        for (int64_t f = 0; f < transform.points; ++f, kernel += POINT, to += POINT) {
          const auto z = Complex<T>::load(points + f * POINT), k = Complex<T>::load(kernel), before = Complex<T>::load(to);
          const Complex<T> product =
              f ? Complex<T>{z.re * k.re + z.im * k.im, z.im * k.re - z.re * k.im} : Complex<T>{z.re * k.re, z.im * k.im};
          (before + product).store(to);
        }
      }
      if (sums) {
        const T* signal = signals + dim * 2 * transform.points;
        T* to = sums + own;
        for (int64_t f = 0; f < transform.points; ++f, to += POINT)
          (Complex<T>::load(to) + times_signal<true>(f, Complex<T>::load(points + f * POINT), signal + 2 * f)).store(to);
      }
    }
  }

  // Adds to the gradient of u of some rows what all groups have sent: (rows, D, points, 2, lanes).
  void send(const T* sent, int64_t begin, int64_t end, const Span<T>& grad_u) const {
    Buffer<T> points(transform.numbers());
    for (; begin < end; begin += LANES<T>) {
      const int64_t rows = std::min(LANES<T>, end - begin);
      for (int64_t dim = 0; dim < dims; ++dim) {
        std::fill(points.begin(), points.end(), T(0));
        for (int64_t row = 0; row < rows; ++row)
          for (int64_t i = 0; i < 2 * transform.points; ++i)
            points[i * LANES<T> + row] = sum<T>(sent + ((row * dims + dim) * 2 * transform.points + i) * LANES<T>);
        transform.inverse(points.data());
        for (int64_t row = 0; row < rows; ++row)
          for (int64_t t = 0; t < grad_u.count; ++t)
            grad_u.sequence.at(begin + row, grad_u.first + t)[dim] += points[transform.at(grad_u.offset + t) + row];
      }
      sent += rows * sent_numbers();
    }
  }

  // Adds the gradient of the kernel to `grad` (D, lags, W), of which the first lag lies at point `offset`. Overwrites `sums`.
  void add_kernel_gradient(T* sums, const Sequence<T>& grad, int64_t lags, int64_t offset) const {
    at::parallel_for(0, dims * groups, 1, [&](int64_t begin, int64_t end) {
      for (int64_t index = begin; index < end; ++index) {
        const int64_t dim = index / groups, column = index % groups * LANES<T>;
        T* points = sums + index * transform.numbers();
        transform.inverse(points);
        for (int64_t lag = 0; lag < std::min(lags, transform.size - offset); ++lag)
          add<T>(
              *reinterpret_cast<const Vec*>(points + transform.at(offset + lag)) / T(transform.size),
              grad.at(dim, lag) + column, grad.features - column);
      }
    });
  }

 private:
  using Vec = typename Vector<T>::type;
  static constexpr int64_t POINT = RealTransform<T>::POINT;
  const T* spectrum;
};

// The spectrum of a kernel (D, lags, W) whose first lag lies at point `offset`, for transforms of `size` points; lags past these are
// left out.
at::Tensor convolution_spectrum(const at::Tensor& kernel, int64_t size, int64_t offset) {
  at::Tensor spectrum;
  with_type(kernel, [&](auto scalar) {
    using T = decltype(scalar);
    const Sequence<T> from(kernel);
    const RealTransform<T> transform(size);
    const int64_t dims = kernel.size(0), lags = std::min(kernel.size(1), size - offset), width = kernel.size(2);
    const int64_t groups = parts(width, LANES<T>);
    spectrum = empty({dims, groups, transform.points, 2, LANES<T>}, kernel);
    at::parallel_for(0, dims * groups, 1, [&](int64_t begin, int64_t end) {
      for (int64_t index = begin; index < end; ++index) {
        const int64_t dim = index / groups, column = index % groups * LANES<T>;
        T* points = spectrum.data_ptr<T>() + index * transform.numbers();
        std::fill_n(points, transform.numbers(), T(0));
        for (int64_t lag = 0; lag < lags; ++lag)
          add<T>(some<T>(from.at(dim, lag) + column, width - column) / T(size), points + transform.at(offset + lag), LANES<T>);
        transform.forward(points);
      }
    });
  });
  return spectrum;
}

void check_sizes(const at::Tensor& u, const at::Tensor& spectrum, const at::Tensor& out) {
  TORCH_CHECK(
      u.size(0) == out.size(0) && u.size(1) == out.size(1) && u.size(2) == spectrum.size(0) &&
          2 * spectrum.size(2) >= 2 * out.size(1) - 1,
      "expected sizes that belong together");
}

constexpr int64_t TOGETHER = 16;  // rows, whose places in a (B, T, W) tensor stay in the cache while its columns pass
constexpr int64_t SENDING = 4;    // rows, of which what each column sends back stays in the cache of a core

// out (B, T, W) += u (B, T, D) convolved with the kernels of the spectrum, summed over D
void convolution_forward(const at::Tensor& u, const at::Tensor& spectrum, const at::Tensor& out) {
  with_type(out, [&](auto scalar) {
    using T = decltype(scalar);
    check_sizes(u, spectrum, out);
    const Sequence<T> from(u), to(out);
    const int64_t batch = out.size(0), steps = out.size(1);
    const Convolution<T> convolution(spectrum, out.size(2));
    const int64_t signal = convolution.dims * 2 * convolution.transform.points;
    Buffer<T> signals(std::min(batch, TOGETHER) * signal);
    for (int64_t tile = 0; tile < batch; tile += TOGETHER) {
      const int64_t past = std::min(batch, tile + TOGETHER);
      transform_signals<T>(convolution.transform, {from, 0, steps}, tile, past, signals.data());
      at::parallel_for(0, convolution.groups, 1, [&](int64_t begin, int64_t end) {
        Buffer<T> points(convolution.transform.numbers());
        for (int64_t group = begin; group < end; ++group)
          for (int64_t b = tile; b < past; ++b)
            convolution.add_to(&signals[(b - tile) * signal], group, {to, 0, steps}, b, points.data(), true);
      });
    }
  });
}

// The adjoint: of grad (B, T, W) to u (B, T, D) and to the kernel (D, T, W), where they are wanted; adds to both.
void convolution_backward(
    const at::Tensor& u, const at::Tensor& spectrum, const at::Tensor& grad, const std::optional<at::Tensor>& grad_u,
    const std::optional<at::Tensor>& grad_kernel) {
  with_type(grad, [&](auto scalar) {
    using T = decltype(scalar);
    check_sizes(u, spectrum, grad);
    const Sequence<T> inputs(u), from(grad);
    const int64_t batch = grad.size(0), steps = grad.size(1), threads = at::get_num_threads();
    const Convolution<T> convolution(spectrum, grad.size(2));
    const int64_t signal = convolution.dims * 2 * convolution.transform.points, sending = convolution.sent_numbers();
    Buffer<T> signals(std::min(batch, TOGETHER) * signal), sums(grad_kernel ? convolution.numbers() : 0);
    Buffer<T> sent(grad_u ? threads * std::min(batch, SENDING) * sending : 0);  // of each thread
    for (int64_t tile = 0; tile < batch; tile += SENDING) {
      const int64_t past = std::min(batch, tile + SENDING), numbers = (past - tile) * sending;
      if (grad_kernel && tile % TOGETHER == 0)
        transform_signals<T>(
            convolution.transform, {inputs, 0, steps}, tile, std::min(batch, tile + TOGETHER), signals.data());
      std::fill(sent.begin(), sent.end(), T(0));
      at::parallel_for(0, convolution.groups, 1, [&](int64_t begin, int64_t end) {
        Buffer<T> points(convolution.transform.numbers());
        T* own = grad_u ? &sent[at::get_thread_num() * numbers] : nullptr;
        for (int64_t group = begin; group < end; ++group)
          for (int64_t b = tile; b < past; ++b)
            convolution.back(
                grad_kernel ? &signals[b % TOGETHER * signal] : nullptr, group, {from, 0, steps}, b, points.data(),
                own ? own + (b - tile) * sending : nullptr, grad_kernel ? sums.data() : nullptr);
      });
      if (!grad_u) continue;
      for (int64_t thread = 1; thread < threads; ++thread)
        for (int64_t i = 0; i < numbers; ++i) sent[i] += sent[thread * numbers + i];
      convolution.send(sent.data(), tile, past, {Sequence<T>(*grad_u), 0, steps});
    }
    if (grad_kernel) convolution.add_kernel_gradient(sums.data(), Sequence<T>(*grad_kernel), steps, 0);
  });
}
}  // namespace
