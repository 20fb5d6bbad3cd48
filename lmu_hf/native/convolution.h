// Causal convolutions by spectra, as in convolution.py: of a few signals with kernels of many columns.
//
// Spectra only meet each other, so their order is free: forwards transforms decimate in frequency and leave them permuted, inverse
// ones take them so. Columns are lanes of vectors. Two rows of a batch make one complex signal, which spares the separation that
// real transforms need: what is real on both sides of a product comes out apart again.
#pragma once

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>

#include <cmath>
#include <limits>
#include <vector>

#include "products.h"
#include "tensors.h"

namespace {

template <typename T>
constexpr int64_t LANES = BYTES / sizeof(T);

template <typename T>
struct Complex {
  using Vec = typename Vector<T>::type;
  Vec re, im;

  static Complex load(const T* from) {
    return {*reinterpret_cast<const Vec*>(from), *reinterpret_cast<const Vec*>(from + LANES<T>)};
  }
  void store(T* to) const {
    *reinterpret_cast<Vec*>(to) = re;
    *reinterpret_cast<Vec*>(to + LANES<T>) = im;
  }
  Complex operator+(const Complex& other) const { return {re + other.re, im + other.im}; }
  Complex operator-(const Complex& other) const { return {re - other.re, im - other.im}; }
  Complex scaled(T factor) const { return {re * factor, im * factor}; }
  Complex times(T real, T imaginary) const { return {re * real - im * imaginary, re * imaginary + im * real}; }
  // Times -i, or i for the inverse.
  template <bool INVERSE>
  Complex turned() const {
    return INVERSE ? Complex{-im, re} : Complex{im, -re};
  }
};

// The transform of R numbers.
template <bool INVERSE, typename T>
void transform_few(Complex<T> (&x)[2]) {
  const Complex<T> a = x[0], b = x[1];
  x[0] = a + b, x[1] = a - b;
}

template <bool INVERSE, typename T>
void transform_few(Complex<T> (&x)[3]) {
  const Complex<T> sum = x[1] + x[2], half = x[0] - sum.scaled(T(0.5));
  const Complex<T> turned = (x[1] - x[2]).scaled(T(0.86602540378443864676)).template turned<INVERSE>();
  x[0] = x[0] + sum, x[1] = half + turned, x[2] = half - turned;
}

template <bool INVERSE, typename T>
void transform_few(Complex<T> (&x)[4]) {
  const Complex<T> a = x[0] + x[2], b = x[0] - x[2], c = x[1] + x[3], d = (x[1] - x[3]).template turned<INVERSE>();
  x[0] = a + c, x[1] = b + d, x[2] = a - c, x[3] = b - d;
}

template <bool INVERSE, typename T>
void transform_few(Complex<T> (&x)[5]) {
  constexpr T cos1 = T(0.30901699437494742410), cos2 = T(-0.80901699437494742410);  // of 72 and 144 degrees
  constexpr T sin1 = T(0.95105651629515357212), sin2 = T(0.58778525229247312917);
  const Complex<T> a = x[1] + x[4], b = x[2] + x[3], c = x[1] - x[4], d = x[2] - x[3];
  const Complex<T> first = x[0] + a.scaled(cos1) + b.scaled(cos2), second = x[0] + a.scaled(cos2) + b.scaled(cos1);
  const Complex<T> turned = (c.scaled(sin1) + d.scaled(sin2)).template turned<INVERSE>();
  const Complex<T> further = (c.scaled(sin2) - d.scaled(sin1)).template turned<INVERSE>();
  x[0] = x[0] + a + b;
  x[1] = first + turned, x[4] = first - turned, x[2] = second + further, x[3] = second - further;
}

// Transforms of `size` points, each a vector of real parts and one of imaginary parts, in place.
template <typename T>
class Transform {
 public:
  static constexpr int64_t POINT = 2 * LANES<T>;
  const int64_t size;

  explicit Transform(int64_t size) : size(size), cosines(size), sines(size) {
    for (int64_t radix : {4, 2, 3, 5})
      for (; size % radix == 0; size /= radix) radices.push_back(radix);
    TORCH_CHECK(size == 1, "expected a size without prime factors above 5, found ", this->size);
    for (int64_t k = 0; k < this->size; ++k) {
      const double angle = 2 * M_PI * k / this->size;
      cosines[k] = std::cos(angle), sines[k] = std::sin(angle);
    }
  }

  void forward(T* x) const { descend(x, size, 0); }
  // Without the division by the size.
  void inverse(T* x) const { ascend(x, size, 0); }

 private:
  static constexpr int64_t NEAR = 16384 / (POINT * sizeof(T));  // points that stay in the cache next to the processor
  std::vector<T> cosines, sines;
  std::vector<int64_t> radices;

  // Points that do not fit go depth first, the others breadth first.
  void descend(T* x, int64_t length, size_t depth) const {
    if (length > NEAR) {
      const int64_t part = length / radices[depth];
      stage<false>(x, length, length, radices[depth]);
      for (int64_t first = 0; first < length; first += part) descend(x + first * POINT, part, depth + 1);
      return;
    }
    for (int64_t own = length; depth < radices.size(); own /= radices[depth++]) stage<false>(x, length, own, radices[depth]);
  }

  void ascend(T* x, int64_t length, size_t depth) const {
    if (length > NEAR) {
      const int64_t part = length / radices[depth];
      for (int64_t first = 0; first < length; first += part) ascend(x + first * POINT, part, depth + 1);
      stage<true>(x, length, length, radices[depth]);
      return;
    }
    int64_t own = 1;
    for (size_t at = radices.size(); at-- > depth;) stage<true>(x, length, own *= radices[at], radices[at]);
  }

  template <bool INVERSE>
  void stage(T* x, int64_t total, int64_t length, int64_t radix) const {
    if (radix == 4) return stage<4, INVERSE>(x, total, length);
    if (radix == 2) return stage<2, INVERSE>(x, total, length);
    if (radix == 3) return stage<3, INVERSE>(x, total, length);
    stage<5, INVERSE>(x, total, length);
  }

  // The blocks of `length` points among `total`, each R parts of a block at a time.
  template <int R, bool INVERSE>
  void stage(T* x, int64_t total, int64_t length) const {
    const int64_t part = length / R, step = size / length;
    for (T* end = x + total * POINT; x < end; x += length * POINT)
      for (int64_t j = 0; j < part; ++j) {
        T* at = x + j * POINT;
        Complex<T> y[R];
        for (int k = 0; k < R; ++k) y[k] = Complex<T>::load(at + k * part * POINT);
        if (INVERSE && part > 1)
          for (int k = 1; k < R; ++k) y[k] = y[k].times(cosines[j * k * step], sines[j * k * step]);
        transform_few<INVERSE>(y);
        if (!INVERSE && part > 1)
          for (int k = 1; k < R; ++k) y[k] = y[k].times(cosines[j * k * step], -sines[j * k * step]);
        for (int k = 0; k < R; ++k) y[k].store(at + k * part * POINT);
      }
  }
};

// Some lanes of a row, zero past `count`.
template <typename T>
typename Vector<T>::type some(const T* from, int64_t count) {
  using Vec = typename Vector<T>::type;
  if (count >= LANES<T>) return *reinterpret_cast<const Vec*>(from);
  Vec result = {};
  for (int64_t lane = 0; lane < count; ++lane) result[lane] = from[lane];
  return result;
}

template <typename T>
void add(typename Vector<T>::type value, T* to, int64_t count) {
  if (count >= LANES<T>) {
    *reinterpret_cast<typename Vector<T>::type*>(to) += value;
  } else {
    for (int64_t lane = 0; lane < count; ++lane) to[lane] += value[lane];
  }
}

template <typename T>
T sum(typename Vector<T>::type value) {
  T total[LANES<T>];
  for (int64_t lane = 0; lane < LANES<T>; ++lane) total[lane] = value[lane];
  for (int64_t half = LANES<T> / 2; half > 0; half /= 2)
    for (int64_t lane = 0; lane < half; ++lane) total[lane] += total[lane + half];
  return total[0];
}

int64_t parts(int64_t total, int64_t size) { return (total + size - 1) / size; }

// What each of some rows is multiplied with before it meets its partner in one signal, and what it is multiplied with afterwards.
template <typename T>
struct Factors {
  std::vector<T> before, after;
};

// Both rows of a signal share its rounding, so they come to the same size first: by powers of two that take the largest number of
// a row of (B, T, F) to between 1/2 and 1. Rows of zeros stay out of it, and come out as zeros. So do those that hold something
// infinite or not a number, which must not reach their partners, and which come out as such.
template <typename T>
Factors<T> normalizing(const Sequence<T>& rows, int64_t begin, int64_t end, int64_t steps) {
  Factors<T> factors{std::vector<T>(end - begin), std::vector<T>(end - begin)};
  at::parallel_for(begin, end, 1, [&](int64_t from, int64_t to) {
    for (int64_t b = from; b < to; ++b) {
      typename Vector<T>::type largest = {}, total = {};
      for (int64_t t = 0; t < steps; ++t)
        for (int64_t i = 0; i < rows.features; i += LANES<T>) {
          const auto value = some<T>(rows.at(b, t) + i, rows.features - i), size = value < 0 ? -value : value;
          largest = size > largest ? size : largest;
          total += value * 0;
        }
      T most = 0;
      for (int64_t lane = 0; lane < LANES<T>; ++lane) most = std::max(most, largest[lane]);
      T &before = factors.before[b - begin], &after = factors.after[b - begin];
      if (!std::isfinite(most) || sum<T>(total) != 0) {
        after = std::numeric_limits<T>::quiet_NaN();
      } else if (most > 0) {
        // Not so far that one of both factors is no normal number.
        using Limits = std::numeric_limits<T>;
        before = std::ldexp(T(1), std::clamp(-std::ilogb(most) - 1, Limits::min_exponent, Limits::max_exponent - 2));
        after = 1 / before;
      }
    }
  });
  return factors;
}

// The spectra of some rows of u (B, T, D), each times a factor and left out where that is zero, two rows as real and imaginary part of one: (ceil(rows / 2), D,
// size, 2).
template <typename T>
void pack(
    const Transform<T>& transform, const Sequence<T>& u, int64_t begin, int64_t end, int64_t steps, const std::vector<T>& factors,
    Buffer<T>& signals) {
  constexpr int64_t POINT = Transform<T>::POINT;
  const int64_t dims = u.features, pairs = parts(end - begin, 2), size = transform.size;
  signals.resize(pairs * dims * size * 2);
  at::parallel_for(0, dims * parts(pairs, LANES<T>), 1, [&](int64_t from, int64_t to) {
    Buffer<T> points(size * POINT);
    for (int64_t index = from; index < to; ++index) {
      const int64_t dim = index % dims, first = index / dims * LANES<T>, count = std::min(LANES<T>, pairs - first);
      std::fill(points.begin(), points.end(), T(0));
      for (int64_t row = 2 * first; row < std::min(end - begin, 2 * (first + count)); ++row) {
        T* to = &points[row % 2 * LANES<T> + row / 2 - first];
        if (factors[row] != 0)
          for (int64_t t = 0; t < steps; ++t) to[t * POINT] = u.at(begin + row, t)[dim] * factors[row];
      }
      transform.forward(points.data());
      for (int64_t lane = 0; lane < count; ++lane)
        for (int64_t i = 0; i < 2 * size; ++i)
          signals[((first + lane) * dims + dim) * size * 2 + i] = points[i * LANES<T> + lane];
    }
  });
}

// The way back: to rows of u, times factors.
template <typename T>
void unpack(
    const Transform<T>& transform, const Buffer<T>& signals, const std::vector<T>& factors, const Sequence<T>& u, int64_t begin,
    int64_t end, int64_t steps) {
  constexpr int64_t POINT = Transform<T>::POINT;
  const int64_t dims = u.features, pairs = parts(end - begin, 2), size = transform.size;
  at::parallel_for(0, dims * parts(pairs, LANES<T>), 1, [&](int64_t from, int64_t to) {
    Buffer<T> points(size * POINT);
    for (int64_t index = from; index < to; ++index) {
      const int64_t dim = index % dims, first = index / dims * LANES<T>, count = std::min(LANES<T>, pairs - first);
      for (int64_t lane = 0; lane < count; ++lane)
        for (int64_t i = 0; i < 2 * size; ++i)
          points[i * LANES<T> + lane] = signals[((first + lane) * dims + dim) * size * 2 + i];
      transform.inverse(points.data());
      for (int64_t row = 2 * first; row < std::min(end - begin, 2 * (first + count)); ++row) {
        const T* made = &points[row % 2 * LANES<T> + row / 2 - first];
        for (int64_t t = 0; t < steps; ++t) u.at(begin + row, t)[dim] = made[t * POINT] * factors[row];
      }
    }
  });
}

// Of a kernel (D, T, W), for transforms of `size` points and divided by it: (D, W / lanes, size, 2, lanes).
at::Tensor convolution_spectrum(const at::Tensor& kernel, int64_t size) {
  at::Tensor spectrum;
  with_type(kernel, [&](auto scalar) {
    using T = decltype(scalar);
    constexpr int64_t POINT = Transform<T>::POINT;
    const Sequence<T> from(kernel);
    const int64_t dims = kernel.size(0), steps = kernel.size(1), width = kernel.size(2), groups = parts(width, LANES<T>);
    spectrum = at::empty({dims, groups, size, 2, LANES<T>}, kernel.options());
    const Transform<T> transform(size);
    at::parallel_for(0, dims * groups, 1, [&](int64_t begin, int64_t end) {
      for (int64_t index = begin; index < end; ++index) {
        const int64_t dim = index / groups, column = index % groups * LANES<T>;
        T* points = spectrum.data_ptr<T>() + index * size * POINT;
        std::fill(points, points + size * POINT, T(0));
        for (int64_t t = 0; t < steps; ++t)
          add<T>(some<T>(from.at(dim, t) + column, width - column) / T(size), points + t * POINT, LANES<T>);
        transform.forward(points);
      }
    });
  });
  return spectrum;
}

void check_sizes(const at::Tensor& u, const at::Tensor& spectrum, const at::Tensor& out) {
  TORCH_CHECK(
      u.size(0) == out.size(0) && u.size(1) == out.size(1) && u.size(2) == spectrum.size(0) &&
          spectrum.size(2) >= 2 * out.size(1) - 1,
      "expected sizes that belong together");
}

constexpr int64_t TOGETHER = 16;  // rows, whose places in a (B, T, W) tensor stay in the cache while its columns pass
constexpr int64_t AHEAD = 8;      // steps whose places are asked for before they are needed

// out (B, T, W) += u (B, T, D) convolved with the kernels of the spectrum, summed over D
void convolution_forward(const at::Tensor& u, const at::Tensor& spectrum, const at::Tensor& out) {
  with_type(out, [&](auto scalar) {
    using T = decltype(scalar);
    constexpr int64_t POINT = Transform<T>::POINT;
    check_sizes(u, spectrum, out);
    const Sequence<T> from(u), to(out);
    const int64_t batch = out.size(0), steps = out.size(1), width = out.size(2);
    const int64_t dims = u.size(2), groups = spectrum.size(1), size = spectrum.size(2);
    const Transform<T> transform(size);
    Buffer<T> signals;
    for (int64_t tile = 0; tile < batch; tile += TOGETHER) {
      const int64_t past = std::min(batch, tile + TOGETHER);
      const Factors<T> factors = normalizing<T>(from, tile, past, steps);
      pack<T>(transform, from, tile, past, steps, factors.before, signals);
      at::parallel_for(0, groups, 1, [&](int64_t begin, int64_t end) {
        Buffer<T> points(size * POINT);
        for (int64_t group = begin; group < end; ++group)
          for (int64_t b = tile; b < past; b += 2) {
            for (int64_t dim = 0; dim < dims; ++dim) {
              const T* signal = &signals[((b - tile) / 2 * dims + dim) * size * 2];
              const T* kernel = spectrum.data_ptr<T>() + (dim * groups + group) * size * POINT;
              for (int64_t f = 0; f < size; ++f) {
                T* at = &points[f * POINT];
                const auto made = Complex<T>::load(kernel + f * POINT).times(signal[2 * f], signal[2 * f + 1]);
                (dim ? made + Complex<T>::load(at) : made).store(at);
              }
            }
            transform.inverse(points.data());
            const int64_t column = group * LANES<T>, count = width - column, rows = std::min<int64_t>(2, past - b);
            for (int64_t row = 0; row < rows; ++row) {
              const T factor = factors.after[b + row - tile];
              for (int64_t t = 0; t < steps; ++t) {
                __builtin_prefetch(to.at(b + row, t + AHEAD) + column, 1);
                const T* made = &points[t * POINT + row * LANES<T>];
                add<T>(*reinterpret_cast<const typename Vector<T>::type*>(made) * factor, to.at(b + row, t) + column, count);
              }
            }
          }
      });
    }
  });
}

// The adjoint: of grad (B, T, W) to u (B, T, D) and to the kernel (D, T, W), where they are wanted.
void convolution_backward(
    const at::Tensor& u, const at::Tensor& spectrum, const at::Tensor& grad, const std::optional<at::Tensor>& grad_u,
    const std::optional<at::Tensor>& grad_kernel) {
  with_type(grad, [&](auto scalar) {
    using T = decltype(scalar);
    using Vec = typename Vector<T>::type;
    constexpr int64_t POINT = Transform<T>::POINT;
    check_sizes(u, spectrum, grad);
    const Sequence<T> inputs(u), from(grad);
    const int64_t batch = grad.size(0), steps = grad.size(1), width = grad.size(2), threads = at::get_num_threads();
    const int64_t dims = u.size(2), groups = spectrum.size(1), size = spectrum.size(2);
    const Transform<T> transform(size);
    const at::Tensor sums = grad_kernel ? at::zeros(spectrum.sizes(), spectrum.options()) : spectrum;
    Buffer<T> signals, sent;
    for (int64_t tile = 0; tile < batch; tile += TOGETHER) {
      const int64_t past = std::min(batch, tile + TOGETHER), spectra = parts(past - tile, 2) * dims * size * 2;
      const Factors<T> factors = normalizing<T>(from, tile, past, steps);
      // What the kernel receives is a product of both, in which the factors have to vanish.
      if (grad_kernel) pack<T>(transform, inputs, tile, past, steps, factors.after, signals);
      sent.assign(grad_u ? threads * spectra : 0, T(0));  // of each thread
      at::parallel_for(0, groups, 1, [&](int64_t begin, int64_t end) {
        Buffer<T> points(size * POINT);
        T* own = sent.data() + (grad_u ? at::get_thread_num() * spectra : 0);
        for (int64_t group = begin; group < end; ++group)
          for (int64_t b = tile; b < past; b += 2) {
            const int64_t column = group * LANES<T>, count = width - column;
            std::fill(points.begin(), points.end(), T(0));
            for (int64_t row = 0; row < std::min<int64_t>(2, past - b); ++row) {
              const T factor = factors.before[b + row - tile];
              if (factor == 0) continue;
              for (int64_t t = 0; t < steps; ++t) {
                __builtin_prefetch(from.at(b + row, t + AHEAD) + column);
                *reinterpret_cast<Vec*>(&points[t * POINT + row * LANES<T>]) =
                    some<T>(from.at(b + row, t) + column, count) * factor;
              }
            }
            transform.forward(points.data());
            for (int64_t dim = 0; dim < dims; ++dim) {
              const int64_t at = (dim * groups + group) * size * POINT, signal = ((b - tile) / 2 * dims + dim) * size * 2;
              if (grad_u) {
                const T* kernel = spectrum.data_ptr<T>() + at;
                for (int64_t f = 0; f < size; ++f) {
                  const auto z = Complex<T>::load(&points[f * POINT]), k = Complex<T>::load(kernel + f * POINT);
                  own[signal + 2 * f] += sum<T>(z.re * k.re + z.im * k.im);
                  own[signal + 2 * f + 1] += sum<T>(z.im * k.re - z.re * k.im);
                }
              }
              if (grad_kernel) {
                T* total = sums.data_ptr<T>() + at;
                for (int64_t f = 0; f < size; ++f, total += POINT)
                  (Complex<T>::load(total) +
                   Complex<T>::load(&points[f * POINT]).times(signals[signal + 2 * f], -signals[signal + 2 * f + 1]))
                      .store(total);
              }
            }
          }
      });
      if (!grad_u) continue;
      for (int64_t thread = 1; thread < threads; ++thread)
        for (int64_t i = 0; i < spectra; ++i) sent[i] += sent[thread * spectra + i];
      unpack<T>(transform, sent, factors.after, Sequence<T>(*grad_u), tile, past, steps);
    }
    if (!grad_kernel) return;
    const Sequence<T> to(*grad_kernel);
    at::parallel_for(0, dims * groups, 1, [&](int64_t begin, int64_t end) {
      for (int64_t index = begin; index < end; ++index) {
        const int64_t dim = index / groups, column = index % groups * LANES<T>;
        T* points = sums.data_ptr<T>() + index * size * POINT;
        transform.inverse(points);
        for (int64_t t = 0; t < steps; ++t)
          add<T>(Complex<T>::load(points + t * POINT).re / T(size), to.at(dim, t) + column, width - column);
      }
    });
  });
}
}  // namespace
