// Pointwise functions, written so that the compiler vectorizes the loops that call them.
#pragma once

#include <array>
#include <cstring>
#include <string>

#include "products.h"

namespace {

template <typename T>
struct Bits;
template <>
struct Bits<float> {
  using type = int32_t;
  static constexpr int mantissa = 23, terms = 7;
  static constexpr float round = 12582912.0f, high = 0.693359375f, low = -2.12194440e-4f, limit = 40.0f;
};
template <>
struct Bits<double> {
  using type = int64_t;
  static constexpr int mantissa = 52, terms = 13;
  static constexpr double round = 6755399441055744.0, high = 0.693147180369123816490, low = 1.90821492927058770002e-10,
                          limit = 80.0;
};

template <typename T>
constexpr auto inverse_factorials = [] {
  std::array<T, Bits<T>::terms + 1> values{};
  double value = 1;
  for (int k = 0; k <= Bits<T>::terms; value /= ++k) values[k] = static_cast<T>(value);
  return values;
}();

// exp(x) - 1 for -limit <= x <= 0, to the last digits also near 0: with x = n ln 2 + r, 2^n (exp(r) - 1) + (2^n - 1).
template <typename T>
inline T expm1_negative(T x) {
  using B = Bits<T>;
  using Int = typename B::type;
  x = x < -B::limit ? -B::limit : x;
  const T shifted = x * T(1.4426950408889634) + B::round;
  const T n = shifted - B::round;
  const T r = (x - n * B::high) - n * B::low;
  // exp(r) - 1 = r (1 / 1! + r (1 / 2! + ...
  T series = inverse_factorials<T>[B::terms];
  for (int k = B::terms - 1; k >= 1; --k) series = series * r + inverse_factorials<T>[k];
  Int bits;
  std::memcpy(&bits, &shifted, sizeof(T));
  bits = static_cast<Int>(static_cast<typename std::make_unsigned<Int>::type>(bits) << B::mantissa);
  const T one = 1;
  Int exponent;
  std::memcpy(&exponent, &one, sizeof(T));
  exponent += bits;
  T scale;
  std::memcpy(&scale, &exponent, sizeof(T));
  return scale * (series * r) + (scale - T(1));
}

template <typename T>
inline T tanh_(T x) {
  const T size = x < 0 ? -x : x;
  const T e = expm1_negative(T(-2) * size);
  const T result = -e / (e + T(2));
  return x < 0 ? -result : result;
}

template <typename T>
inline T sigmoid_(T x) {
  // exp(-|x|) = 1 + e: never overflows.
  const T e = expm1_negative(x < 0 ? x : -x);
  return x < 0 ? (e + T(1)) / (e + T(2)) : T(1) / (e + T(2));
}

// Either of the two, to the same digits.
template <typename T>
inline T tanh_or_sigmoid(T x, bool tanh) {
  const T size = x < 0 ? -x : x;
  const T e = expm1_negative(tanh ? T(-2) * size : -size);
  const T result = (tanh ? -e : x < 0 ? e + T(1) : T(1)) / (e + T(2));
  return tanh && x < 0 ? -result : result;
}

// Out of line, so that the compiler does not know how few numbers may come and vectorizes.
template <typename T, typename Index, typename Function>
__attribute__((noinline)) void whole_vectors(
    Index count, const T* __restrict in, T* __restrict out, Index first, Function function) {
  for (Index i = 0; i < count; ++i) out[i] = function(in[i], first + i);
}

// out[i] = function(in[i], i). What is left over is filled up: single numbers would take as long as a vector each.
template <typename T, typename Function>
inline void each(int64_t size, const T* in, T* out, const Function& function) {
  using Index = typename Bits<T>::type;  // as wide as T, to be compared in vectors of the same length
  constexpr Index lanes = BYTES / sizeof(T);
  const Index whole = size / lanes * lanes;
  whole_vectors<T, Index>(whole, in, out, 0, function);
  if (whole == size) return;
  T left[lanes] = {}, result[lanes];
  std::memcpy(left, in + whole, (size - whole) * sizeof(T));
  whole_vectors<T, Index>(lanes, left, result, whole, function);
  std::memcpy(out + whole, result, (size - whole) * sizeof(T));
}

struct Tanh {
  template <typename T>
  static T value(T x) { return tanh_(x); }
  template <typename T>
  static T slope(T y) { return T(1) - y * y; }
};
struct Sigmoid {
  template <typename T>
  static T value(T x) { return sigmoid_(x); }
  template <typename T>
  static T slope(T y) { return y * (T(1) - y); }
};
struct Relu {
  template <typename T>
  static T value(T x) { return x > 0 ? x : (x == x ? T(0) : x); }
  template <typename T>
  static T slope(T y) { return y > 0 ? T(1) : T(0); }
};
struct Linear {
  template <typename T>
  static T value(T x) { return x; }
  template <typename T>
  static T slope(T) { return T(1); }
};

template <typename Function>
void with_activation(const std::string& name, const Function& function) {
  if (name == "tanh") return function(Tanh());
  if (name == "sigmoid") return function(Sigmoid());
  if (name == "relu") return function(Relu());
  if (name == "linear") return function(Linear());
  TORCH_CHECK(false, "no activation ", name);
}
}  // namespace
