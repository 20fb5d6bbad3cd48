// Transforms of many signals at a time, which are lanes of vectors.
//
// Spectra only meet each other, so their order is free: forwards transforms decimate in frequency and leave them permuted, inverse
// ones take them so.
#pragma once

#include <cmath>
#include <utility>
#include <vector>

#include "products.h"

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
  Complex conjugate() const { return {re, -im}; }
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

  // Where the forward transform leaves each frequency.
  std::vector<int64_t> places() const {
    std::vector<int64_t> result(size);
    for (int64_t at = 0; at < size; ++at) {
      // Each stage leaves one frequency after the other to each of its parts.
      int64_t frequency = 0, step = 1, rest = at, part = size;
      for (int64_t radix : radices) {
        part /= radix;
        frequency += rest / part * step;
        rest %= part, step *= radix;
      }
      result[frequency] = at;
    }
    return result;
  }

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

// Transforms of `size` real points, an even number, each two vectors: points 2p and 2p + 1 of the signal are the real and imaginary
// parts of one of half as many. A spectrum's frequency k > 0 lies at place k, in the order of the transform; what lies at its first
// place, both real, are frequency 0 and the highest.
template <typename T>
class RealTransform {
 public:
  static constexpr int64_t POINT = Transform<T>::POINT;
  const int64_t size, points;  // real points, and places of POINT numbers

  explicit RealTransform(int64_t size) : size(size), points(size / 2), half(points), place(half.places()), turns(points) {
    TORCH_CHECK(size % 2 == 0, "expected an even size, found ", size);
    for (int64_t k = 0; k < points; ++k) turns[k] = {T(std::cos(M_PI * k / points)), T(std::sin(M_PI * k / points))};
  }

  int64_t numbers() const { return points * POINT; }

  // Where real point i of a signal lies.
  static int64_t at(int64_t i) { return i / 2 * POINT + i % 2 * LANES<T>; }

  void forward(T* x) const {
    half.forward(x);
    const Complex<T> ends = Complex<T>::load(x);
    Complex<T>{ends.re + ends.im, ends.re - ends.im}.store(x);
    for (int64_t k = 1; 2 * k <= points; ++k) {
      T *low = x + place[k] * POINT, *high = x + place[points - k] * POINT;
      const Complex<T> near = Complex<T>::load(low), far = Complex<T>::load(high).conjugate();
      // Of even and odd points, which are real signals.
      const Complex<T> even = (near + far).scaled(T(0.5));
      const Complex<T> odd = (near - far).scaled(T(0.5)).times(-turns[k].second, -turns[k].first);
      (even + odd).store(low), (even - odd).conjugate().store(high);
    }
  }

  // Without the division by the size.
  void inverse(T* x) const {
    inverse(x, [&](int64_t place) { return Complex<T>::load(x + place * POINT); });
  }

  // The same of a spectrum that is not at x: give(place) is its value there.
  template <typename Give>
  void inverse(T* x, const Give& give) const {
    const Complex<T> ends = give(0);
    Complex<T>{ends.re + ends.im, ends.re - ends.im}.store(x);
    for (int64_t k = 1; 2 * k <= points; ++k) {
      const Complex<T> near = give(place[k]), far = give(place[points - k]).conjugate();
      const Complex<T> even = near + far, odd = (near - far).times(-turns[k].second, turns[k].first);
      (even + odd).store(x + place[k] * POINT);
      (even - odd).conjugate().store(x + place[points - k] * POINT);
    }
    half.inverse(x);
  }

 private:
  const Transform<T> half;
  const std::vector<int64_t> place;  // of frequency k of the half transform
  std::vector<std::pair<T, T>> turns;
};
}  // namespace
