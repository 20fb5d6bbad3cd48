// The time loop of lookahead.py for CPUs: the steps of one chunk, forward and backward, in one call.
//
// Rows of a batch never meet inside a chunk, so each thread takes some rows through all of its steps without waiting for the
// others. The products are too thin for a BLAS call each: they are done here, on register blocks, with the matrix in cache.
//
// Names and formulas are those of lookahead.py and gates.py. Matrices come in panels, see Panels.

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/custom_class.h>
#include <torch/library.h>

#include <algorithm>
#include <array>
#include <cstring>
#include <optional>
#include <string>
#include <type_traits>
#include <vector>

namespace {

constexpr int64_t PANEL = 16;
constexpr int64_t TILE = 60;  // rows that go through the steps together

#if defined(__AVX512F__)
constexpr int64_t BYTES = 64, BLOCK = 24;  // of a vector; vectors of sums held in registers at a time
#elif defined(__AVX__)
constexpr int64_t BYTES = 32, BLOCK = 12;
#else
constexpr int64_t BYTES = 16, BLOCK = 12;
#endif

// ---- products

template <typename T>
struct Vector;
template <>
struct Vector<float> {
  typedef float type __attribute__((vector_size(BYTES), aligned(4)));
};
template <>
struct Vector<double> {
  typedef double type __attribute__((vector_size(BYTES), aligned(8)));
};

// A matrix (inner, columns) cut into panels of PANEL columns, the last filled up with zeros, as a tensor (panels, inner, PANEL):
// what a block of a product needs of it lies in one piece, or a few, whatever the width.
template <typename T>
struct Panels {
  const T* data;
  int64_t stride;  // from one panel to the next

  Panels(const T* data, int64_t stride) : data(data), stride(stride) {}
  explicit Panels(const at::Tensor& tensor) : Panels(tensor.data_ptr<T>(), tensor.size(1) * PANEL) {
    TORCH_CHECK(tensor.is_contiguous() && tensor.size(2) == PANEL, "expected panels");
  }
  Panels from_row(int64_t row) const { return {data + row * PANEL, stride}; }
  const T* column(int64_t column) const { return data + column / PANEL * stride + column % PANEL; }
};

// c (R, V vectors) += a (R, inner) @ b (inner, V vectors)
template <typename T, int R, int V>
__attribute__((noinline)) void block(
    int64_t inner, const T* a, int64_t a_stride, const T* b, int64_t panel, T* c, int64_t c_stride) {
  using Vec = typename Vector<T>::type;
  constexpr int64_t lanes = BYTES / sizeof(T);
  Vec sum[R][V];
  for (int r = 0; r < R; ++r)
    for (int v = 0; v < V; ++v) sum[r][v] = *reinterpret_cast<const Vec*>(c + r * c_stride + v * lanes);
  for (int64_t k = 0; k < inner; ++k) {
    Vec row[V];
    for (int v = 0; v < V; ++v)
      row[v] = *reinterpret_cast<const Vec*>(b + k * PANEL + v * lanes / PANEL * panel + v * lanes % PANEL);
    for (int r = 0; r < R; ++r) {
      const T factor = a[r * a_stride + k];
      for (int v = 0; v < V; ++v) sum[r][v] += factor * row[v];
    }
  }
  for (int r = 0; r < R; ++r)
    for (int v = 0; v < V; ++v) *reinterpret_cast<Vec*>(c + r * c_stride + v * lanes) = sum[r][v];
}

// Columns `done` to `width`; `done` is a multiple of V vectors.
template <typename T, int R, int V>
void columns(
    int64_t done, int64_t width, int64_t inner, const T* a, int64_t a_stride, const Panels<T>& b, T* c, int64_t c_stride) {
  constexpr int64_t lanes = BYTES / sizeof(T), span = V * lanes;
  for (; done + span <= width; done += span)
    block<T, R, V>(inner, a, a_stride, b.column(done), b.stride, c + done, c_stride);
  if constexpr (V > 1) {
    if (done < width) columns<T, R, V / 2>(done, width, inner, a, a_stride, b, c, c_stride);
  } else if (done < width) {
    // Reads and writes up to a vector past the width; every buffer here has room for that.
    block<T, R, 1>(inner, a, a_stride, b.column(done), b.stride, c + done, c_stride);
  }
}

// c (rows, width) += a (rows, inner) @ b (inner, width)
template <typename T>
void product(
    int64_t rows, int64_t width, int64_t inner, const T* a, int64_t a_stride, const Panels<T>& b, T* c, int64_t c_stride) {
  if (inner == 0 || width == 0) return;
  const auto take = [&](auto count) {
    constexpr int R = decltype(count)::value, most = std::min<int64_t>(BLOCK / R, 8);
    constexpr int V = most >= 8 ? 8 : most >= 4 ? 4 : most >= 2 ? 2 : 1;
    columns<T, R, V>(0, width, inner, a, a_stride, b, c, c_stride);
    a += R * a_stride, c += R * c_stride, rows -= R;
  };
  while (rows > 0) {
    // As many rows at a time as share each vector of b from registers, and no single row left over where it can be helped.
    if (rows >= 6 && rows != 7 && rows != 8 && rows != 11)
      take(std::integral_constant<int, 6>());
    else if (rows >= 4 && rows != 5)
      take(std::integral_constant<int, 4>());
    else if (rows >= 3)
      take(std::integral_constant<int, 3>());
    else if (rows == 2)
      take(std::integral_constant<int, 2>());
    else
      take(std::integral_constant<int, 1>());
  }
}

// ---- pointwise functions, written so that the compiler vectorizes the loops that call them

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

// ---- the cells: one row, one step. `kept` are the rows of the tensors of gates.py's allocate(), `before` those of the step
// before (or of the initial states), `hidden` what the next step multiplies.

template <typename F>
struct Simple {
  static constexpr int states = 1, kept = 1;
  template <typename T>
  static void step(int64_t size, const T* __restrict gates, const T* const*, T* const* keep) {
    T* __restrict hidden = keep[0];
    each(size, gates, hidden, [](T x, auto) { return F::value(x); });
  }
  // grad: of the output. carried: of further states, in and out. direct: what reaches the output before past the gates.
  template <typename T>
  static void back(
      int64_t size, const T* __restrict grad, const T* const*, const T* const* keep, T* __restrict grad_gates, T*, T*) {
    const T* __restrict hidden = keep[0];
    for (int64_t i = 0; i < size; ++i) grad_gates[i] = grad[i] * F::slope(hidden[i]);
  }
};

struct Lstm {
  static constexpr int states = 2, kept = 3;
  template <typename T>
  static void step(int64_t size, const T* __restrict gates, const T* const* before, T* const* keep) {
    T *__restrict hidden = keep[0], *__restrict cell = keep[1], *__restrict g = keep[2];
    const T* __restrict previous = before[1];
    const typename Bits<T>::type first = 2 * size, last = 3 * size;
    each(4 * size, gates, g, [=](T x, auto i) { return tanh_or_sigmoid(x, i >= first && i < last); });
    for (int64_t i = 0; i < size; ++i) cell[i] = g[size + i] * previous[i] + g[i] * g[2 * size + i];
    each(size, cell, hidden, [](T x, auto) { return tanh_(x); });
    for (int64_t i = 0; i < size; ++i) hidden[i] *= g[3 * size + i];
  }
  template <typename T>
  static void back(
      int64_t size, const T* __restrict grad, const T* const* before, const T* const* keep, T* __restrict grad_gates,
      T* __restrict carried, T*) {
    const T *__restrict g = keep[2], *__restrict previous = before[1];
    each(size, keep[1], grad_gates, [](T x, auto) { return tanh_(x); });
    for (int64_t i = 0; i < size; ++i) {
      const T in = g[i], forget = g[size + i], candidate = g[2 * size + i], out = g[3 * size + i];
      const T squashed = grad_gates[i];
      const T grad_cell = carried[i] + grad[i] * out * (T(1) - squashed * squashed);
      grad_gates[i] = grad_cell * candidate * Sigmoid::slope(in);
      grad_gates[size + i] = grad_cell * previous[i] * Sigmoid::slope(forget);
      grad_gates[2 * size + i] = grad_cell * in * Tanh::slope(candidate);
      grad_gates[3 * size + i] = grad[i] * squashed * Sigmoid::slope(out);
      carried[i] = grad_cell * forget;
    }
  }
};

struct Gru {
  static constexpr int states = 1, kept = 2;
  template <typename T>
  static void step(int64_t size, const T* __restrict gates, const T* const* before, T* const* keep) {
    T *__restrict hidden = keep[0], *__restrict g = keep[1];
    const T* __restrict previous = before[0];
    each(2 * size, gates, g, [](T x, auto) { return sigmoid_(x); });
    for (int64_t i = 0; i < size; ++i) {
      g[3 * size + i] = gates[3 * size + i];
      hidden[i] = gates[2 * size + i] + g[i] * g[3 * size + i];
    }
    each(size, hidden, g + 2 * size, [](T x, auto) { return tanh_(x); });
    for (int64_t i = 0; i < size; ++i) hidden[i] = g[2 * size + i] + g[size + i] * (previous[i] - g[2 * size + i]);
  }
  template <typename T>
  static void back(
      int64_t size, const T* __restrict grad, const T* const* before, const T* const* keep, T* __restrict grad_gates, T*,
      T* __restrict direct) {
    const T *__restrict g = keep[1], *__restrict previous = before[0];
    for (int64_t i = 0; i < size; ++i) {
      const T r = g[i], z = g[size + i], n = g[2 * size + i], h_n = g[3 * size + i];
      const T grad_x = grad[i] * (T(1) - z) * Tanh::slope(n);
      grad_gates[i] = grad_x * h_n * Sigmoid::slope(r);
      grad_gates[size + i] = grad[i] * (previous[i] - n) * Sigmoid::slope(z);
      grad_gates[2 * size + i] = grad_x;
      grad_gates[3 * size + i] = grad_x * r;
      direct[i] = grad[i] * z;
    }
  }
};

// The stride of rows into which products write: whole vectors, and no power of two, which would share few lines of the cache.
int64_t padded(int64_t size) { return (size + PANEL - 1) / PANEL * PANEL + PANEL; }

// A (B, T, F) tensor whose features are contiguous.
template <typename T>
struct Sequence {
  T* data;
  int64_t row, step, features;
  explicit Sequence(const at::Tensor& tensor)
      : data(tensor.data_ptr<T>()), row(tensor.stride(0)), step(tensor.stride(1)), features(tensor.size(2)) {
    TORCH_CHECK(features <= 1 || tensor.stride(2) == 1, "expected contiguous features");
  }
  T* at(int64_t b, int64_t t) const { return data + b * row + t * step; }
};

template <typename T>
std::vector<Sequence<T>> sequences(at::TensorList tensors) {
  std::vector<Sequence<T>> result;
  for (const auto& tensor : tensors) result.emplace_back(tensor);
  return result;
}

// Points `rows` at step t of every kept tensor, or, before the first step, at the initial states; past the `linear` numbers of
// memory in front of the first.
template <typename T, typename Cell>
void rows_at(
    const std::vector<Sequence<T>>& kept, const std::vector<const T*>& initial, int64_t linear, int64_t b, int64_t t,
    T* (&rows)[3]) {
  for (int i = 0; i < Cell::kept; ++i)
    rows[i] = t >= 0 ? kept[i].at(b, t) : (i < Cell::states ? const_cast<T*>(initial[i] + b * kept[i].features) : nullptr);
  rows[0] += linear;
}

// How u comes of the state before it where it is no linear function of it, or not the same one in each row; scan.Encoding.
// Forwards `in` is h -> u and `direct` u -> gates; backwards they are transposed, and `u` holds that of all steps.
template <typename T>
struct Encoding {
  Panels<T> in, direct;
  const T* mask;
  std::string activation;
  std::optional<Sequence<T>> u;

  static std::optional<Encoding> of(
      at::TensorList tensors, const std::optional<at::Tensor>& mask, const std::string& activation) {
    if (tensors.empty()) return std::nullopt;
    TORCH_CHECK(!mask || mask->is_contiguous(), "expected a contiguous mask");
    Encoding made{Panels<T>(tensors[0]), Panels<T>(tensors[1]), mask ? mask->data_ptr<T>() : nullptr, activation, std::nullopt};
    if (tensors.size() > 2) made.u.emplace(tensors[2]);
    return made;
  }
};

template <typename Function>
void with_activation(const std::string& name, const Function& function) {
  if (name == "tanh") return function(Tanh());
  if (name == "sigmoid") return function(Sigmoid());
  if (name == "relu") return function(Relu());
  if (name == "linear") return function(Linear());
  TORCH_CHECK(false, "no activation ", name);
}

template <typename T, typename Cell>
void forward_rows(
    int64_t begin, int64_t end, int64_t linear, int64_t first, int64_t count, int64_t chunk, const Sequence<T>& known,
    const Panels<T>& matrix, const std::vector<const T*>& initial, const std::vector<Sequence<T>>& kept, const Sequence<T>& u,
    const std::optional<Encoding<T>>& encoding) {
  const int64_t dims = u.features, size = kept[0].features, width = known.features;
  const int64_t u_stride = chunk * dims + 1, rows = end - begin;
  const Panels<T> from_hidden = matrix.from_row(dims ? (chunk - 1) * dims : 0);
  std::vector<T> sums(rows * padded(width)), past(rows * u_stride), masked(encoding ? rows * size : 0);
  const int64_t sum_stride = padded(width);
  for (int64_t j = 0; j < count; ++j) {
    const int64_t t = first + j;
    for (int64_t r = 0; r < rows; ++r) std::memcpy(&sums[r * sum_stride], known.at(begin + r, j), width * sizeof(T));
    const T* hidden = t > 0 ? kept[0].at(begin, t - 1) : initial[0] + begin * size;
    product<T>(rows, width, size, hidden, t > 0 ? kept[0].row : size, from_hidden, sums.data(), sum_stride);
    if (dims)
      product<T>(
          rows, width, j * dims, past.data(), u_stride, matrix.from_row((chunk - 1 - j) * dims), sums.data(), sum_stride);
    if (encoding) {
      const T* read = hidden;
      int64_t read_stride = t > 0 ? kept[0].row : size;
      if (encoding->mask) {
        for (int64_t r = 0; r < rows; ++r)
          for (int64_t i = 0; i < size; ++i)
            masked[r * size + i] = hidden[r * read_stride + i] * encoding->mask[(begin + r) * size + i];
        read = masked.data(), read_stride = size;
      }
      // What a product adds past its width is zero: the gates behind u stay as they are.
      product<T>(rows, dims, size, read, read_stride, encoding->in, sums.data(), sum_stride);
      with_activation(encoding->activation, [&](auto function) {
        for (int64_t r = 0; r < rows; ++r)
          for (int64_t d = 0; d < dims; ++d) sums[r * sum_stride + d] = function.value(sums[r * sum_stride + d]);
      });
      product<T>(rows, width - dims, dims, sums.data(), sum_stride, encoding->direct, sums.data() + dims, sum_stride);
    }
    for (int64_t r = 0; r < rows; ++r) {
      T *now[3], *before[3];
      rows_at<T, Cell>(kept, initial, linear, begin + r, t, now);
      rows_at<T, Cell>(kept, initial, linear, begin + r, t - 1, before);
      const T* sum = &sums[r * sum_stride];
      if (dims) {
        std::memcpy(&past[r * u_stride + j * dims], sum, dims * sizeof(T));
        std::memcpy(u.at(begin + r, t), sum, dims * sizeof(T));
      }
      std::memcpy(now[0] - linear, sum + dims, linear * sizeof(T));
      Cell::template step<T>(size - linear, sum + dims + linear, before, now);
    }
  }
}

template <typename T, typename Cell>
void backward_rows(
    int64_t begin, int64_t end, int64_t linear, int64_t first, int64_t count, int64_t chunk, const Panels<T>& to_hidden,
    const Panels<T>& to_u, const std::vector<const T*>& initial, const std::vector<Sequence<T>>& kept,
    const std::vector<Sequence<T>>& grads, const Sequence<T>& grad_u, const Sequence<T>& grad_sums, T* carry,
    T* carried, const std::optional<Encoding<T>>& encoding) {
  const int64_t dims = grad_u.features, size = kept[0].features, width = grad_sums.features;
  const int64_t rows = end - begin, h_stride = padded(size), w_stride = padded(width), u_stride = padded(chunk * dims);
  std::vector<T> grad(rows * h_stride), wide(rows * w_stride), inputs(PANEL + rows * u_stride), rest(rows * h_stride);
  std::vector<T> masked(encoding && encoding->mask ? rows * h_stride : 0);
  T* to_inputs = inputs.data() + PANEL;
  for (int64_t r = 0; r < rows; ++r) {
    std::memcpy(&grad[r * h_stride], carry + (begin + r) * size, size * sizeof(T));
    for (int64_t j = 0; j < count; ++j)
      std::memcpy(to_inputs + r * u_stride + j * dims, grad_u.at(begin + r, j), dims * sizeof(T));
  }
  for (int64_t j = count - 1; j >= 0; --j) {
    const int64_t t = first + j;
    for (int64_t r = 0; r < rows; ++r) {
      T *now[3], *before[3];
      rows_at<T, Cell>(kept, initial, linear, begin + r, t, now);
      rows_at<T, Cell>(kept, initial, linear, begin + r, t - 1, before);
      T *sum = &grad[r * h_stride], *further = nullptr;
      // Of [m, h], or of h alone.
      const T* outer = grads[0].at(begin + r, t);
      for (int64_t i = 0, skipped = size - grads[0].features; i < grads[0].features; ++i) sum[skipped + i] += outer[i];
      if constexpr (Cell::states > 1) {
        further = carried + (begin + r) * (size - linear);
        const T* outer_cell = grads[1].at(begin + r, t);
        for (int64_t i = 0; i < size - linear; ++i) further[i] += outer_cell[i];
      }
      T *gates = &wide[r * w_stride], *direct = &rest[r * h_stride];
      std::memcpy(gates, to_inputs + r * u_stride + j * dims, dims * sizeof(T));
      std::memcpy(gates + dims, sum, linear * sizeof(T));
      Cell::template back<T>(size - linear, sum + linear, before, now, gates + dims + linear, further, direct + linear);
      std::memcpy(sum, direct, size * sizeof(T));  // zeros but for what a cell wrote there
    }
    if (encoding) {
      product<T>(rows, dims, width - dims, wide.data() + dims, w_stride, encoding->direct, wide.data(), w_stride);
      with_activation(encoding->activation, [&](auto function) {
        for (int64_t r = 0; r < rows; ++r)
          for (int64_t d = 0; d < dims; ++d) wide[r * w_stride + d] *= function.slope(encoding->u->at(begin + r, t)[d]);
      });
      T* back = encoding->mask ? masked.data() : grad.data();
      std::fill(masked.begin(), masked.end(), T(0));
      product<T>(rows, size, dims, wide.data(), w_stride, encoding->in, back, h_stride);
      if (encoding->mask)
        for (int64_t r = 0; r < rows; ++r)
          for (int64_t i = 0; i < size; ++i)
            grad[r * h_stride + i] += masked[r * h_stride + i] * encoding->mask[(begin + r) * size + i];
    }
    for (int64_t r = 0; r < rows; ++r) std::memcpy(grad_sums.at(begin + r, j), &wide[r * w_stride], width * sizeof(T));
    product<T>(rows, size, width, wide.data(), w_stride, to_hidden, grad.data(), h_stride);
    // The columns of lags 1 to j, from the start of a panel on. What that adds before the first u falls into the room between
    // rows, what the last vector adds past u j - 1 is spent: neither is ever read.
    const int64_t column = (chunk - 1 - j) * dims, panel = column / PANEL;
    if (dims)
      product<T>(
          rows, (chunk - 1) * dims - panel * PANEL, width, wide.data(), w_stride,
          Panels<T>(to_u.column(panel * PANEL), to_u.stride), to_inputs - column % PANEL, u_stride);
  }
  for (int64_t r = 0; r < rows; ++r) std::memcpy(carry + (begin + r) * size, &grad[r * h_stride], size * sizeof(T));
}

template <typename Function>
void over_rows(int64_t batch, const Function& function) {
  at::parallel_for(0, batch, 1, [&](int64_t begin, int64_t end) {
    const int64_t tiles = (end - begin + TILE - 1) / TILE;
    for (int64_t tile = 0; tile < tiles; ++tile)
      function(begin + (end - begin) * tile / tiles, begin + (end - begin) * (tile + 1) / tiles);
  });
}

template <typename Function>
void with_cell(const std::string& kind, const Function& function) {
  if (kind == "tanh") return function(Simple<Tanh>());
  if (kind == "sigmoid") return function(Simple<Sigmoid>());
  if (kind == "relu") return function(Simple<Relu>());
  if (kind == "linear") return function(Simple<Linear>());
  if (kind == "lstm") return function(Lstm());
  if (kind == "gru") return function(Gru());
  TORCH_CHECK(false, "no cell ", kind);
}

template <typename T>
std::vector<const T*> pointers(at::TensorList tensors) {
  std::vector<const T*> result;
  for (const auto& tensor : tensors) {
    TORCH_CHECK(tensor.is_contiguous(), "expected contiguous states");
    result.push_back(tensor.data_ptr<T>());
  }
  return result;
}

template <typename Function>
void with_type(const at::Tensor& tensor, const Function& function) {
  if (tensor.scalar_type() == at::kFloat) return function(float());
  if (tensor.scalar_type() == at::kDouble) return function(double());
  TORCH_CHECK(false, "expected float32 or float64, found ", tensor.scalar_type());
}

void forward(
    const std::string kind, int64_t linear, int64_t first, int64_t count, int64_t chunk, const at::Tensor& known,
    const at::Tensor& matrix, at::TensorList states, at::TensorList kept, const at::Tensor& u, at::TensorList encoding,
    const std::optional<at::Tensor>& mask, const std::string activation) {
  with_type(known, [&](auto scalar) {
    using T = decltype(scalar);
    with_cell(kind, [&](auto cell) {
      using Cell = decltype(cell);
      const Sequence<T> knowns(known), inputs(u);
      const auto keep = sequences<T>(kept);
      const auto initial = pointers<T>(states);
      const auto encodes = Encoding<T>::of(encoding, mask, activation);
      over_rows(known.size(0), [&](int64_t begin, int64_t end) {
        forward_rows<T, Cell>(
            begin, end, linear, first, count, chunk, knowns, Panels<T>(matrix), initial, keep, inputs, encodes);
      });
    });
  });
}

void backward(
    const std::string kind, int64_t linear, int64_t first, int64_t count, int64_t chunk, const at::Tensor& to_hidden,
    const at::Tensor& to_u, at::TensorList states, at::TensorList kept, at::TensorList grads, const at::Tensor& grad_u,
    const at::Tensor& grad_sums, const at::Tensor& carry, const at::Tensor& carried, at::TensorList encoding,
    const std::optional<at::Tensor>& mask, const std::string activation) {
  with_type(grad_sums, [&](auto scalar) {
    using T = decltype(scalar);
    with_cell(kind, [&](auto cell) {
      using Cell = decltype(cell);
      const Sequence<T> inputs(grad_u), bases(grad_sums);
      const auto keep = sequences<T>(kept), outer = sequences<T>(grads);
      const auto initial = pointers<T>(states);
      const auto encodes = Encoding<T>::of(encoding, mask, activation);
      over_rows(grad_sums.size(0), [&](int64_t begin, int64_t end) {
        backward_rows<T, Cell>(
            begin, end, linear, first, count, chunk, Panels<T>(to_hidden), Panels<T>(to_u), initial, keep, outer, inputs, bases,
            carry.data_ptr<T>(), carried.data_ptr<T>(), encodes);
      });
    });
  });
}

// ---- the memory over a chunk, where the state is fed back into it

// Stacked matrices in panels (S, panels, inner, PANEL): that of system s.
template <typename T>
Panels<T> of_system(const at::Tensor& stack, int64_t s) {
  TORCH_CHECK(stack.is_contiguous() && stack.size(3) == PANEL, "expected panels");
  return Panels<T>(stack.data_ptr<T>() + s * stack.stride(0), stack.size(2) * PANEL);
}

// to (rows * D, width) += from (rows * D, inner) @ the matrix of the system of each memory dimension
template <typename T>
void by_system(
    int64_t rows, int64_t dims, int64_t width, int64_t inner, const T* from, int64_t from_stride, const at::Tensor& stack, T* to,
    int64_t to_stride) {
  if (stack.size(0) == 1)
    return product<T>(rows * dims, width, inner, from, from_stride, of_system<T>(stack, 0), to, to_stride);
  for (int64_t d = 0; d < dims; ++d)
    product<T>(
        rows, width, inner, from + d * from_stride, dims * from_stride, of_system<T>(stack, d), to + d * to_stride,
        dims * to_stride);
}

// memory (rows * D, N) = memory @ power + inputs (rows * D, count) @ response
template <typename T>
void advance(
    int64_t rows, int64_t dims, int64_t order, int64_t count, const T* inputs, const at::Tensor& power,
    const at::Tensor& response, T* memory) {
  const int64_t stride = padded(order);
  std::vector<T> next(rows * dims * stride);
  by_system<T>(rows, dims, order, count, inputs, count, response, next.data(), stride);
  by_system<T>(rows, dims, order, order, memory, order, power, next.data(), stride);
  for (int64_t row = 0; row < rows * dims; ++row) std::memcpy(memory + row * order, &next[row * stride], order * sizeof(T));
}

// A part of a (B, L, F) tensor as a matrix (B, length * F).
at::Tensor flat_steps(const at::Tensor& tensor, int64_t first, int64_t length) {
  return tensor.narrow(1, first, length).as_strided(
      {tensor.size(0), length * tensor.size(2)}, {tensor.stride(0), 1}, tensor.storage_offset() + first * tensor.stride(1));
}

void feedback_forward(
    const std::string kind, int64_t first, const at::Tensor& known, const at::Tensor& fold, const at::Tensor& power,
    const at::Tensor& response, const at::Tensor& matrix, at::TensorList states, at::TensorList kept, const at::Tensor& u,
    const at::Tensor& starts, const at::Tensor& memory, at::TensorList encoding, const std::optional<at::Tensor>& mask,
    const std::string activation) {
  const int64_t chunk = response.size(2), steps = kept[0].size(1), total = u.size(1), batch = u.size(0), dims = u.size(2);
  const int64_t order = memory.size(2), grain = std::max<int64_t>(1, 64 / dims);
  TORCH_CHECK(memory.is_contiguous() && known.stride(1) == known.size(2), "expected contiguous tensors");
  for (int64_t at = first; at < first + known.size(1); at += chunk) {
    const at::Tensor start = starts.select(1, at / chunk);
    start.copy_(memory.view_as(start));
    flat_steps(known, at - first, chunk).addmm_(start, fold);
    forward(
        kind, 0, at, std::min(chunk, steps - at), chunk, known.narrow(1, at - first, chunk), matrix, states, kept, u, encoding,
        mask, activation);
    if (at + chunk >= total) return;
    with_type(u, [&](auto scalar) {
      using T = decltype(scalar);
      const Sequence<T> inputs(u);
      at::parallel_for(0, batch, grain, [&](int64_t begin, int64_t end) {
        std::vector<T> rows((end - begin) * dims * chunk);
        for (int64_t b = begin; b < end; ++b)
          for (int64_t j = 0; j < chunk; ++j)
            for (int64_t d = 0; d < dims; ++d) rows[((b - begin) * dims + d) * chunk + j] = inputs.at(b, at + j)[d];
        advance<T>(
            end - begin, dims, order, chunk, rows.data(), power, response, memory.data_ptr<T>() + begin * dims * order);
      });
    });
  }
}

void feedback_backward(
    const std::string kind, int64_t first, const at::Tensor& fold, const at::Tensor& power, const at::Tensor& response,
    const at::Tensor& to_hidden, const at::Tensor& to_u, at::TensorList states, at::TensorList kept, at::TensorList grads,
    const at::Tensor& grad_u, const at::Tensor& grad_sums, const at::Tensor& carry, const at::Tensor& carried,
    const std::optional<at::Tensor>& grad_starts, const at::Tensor& arrived, at::TensorList encoding,
    const std::optional<at::Tensor>& mask, const std::string activation) {
  const int64_t chunks = arrived.size(1) - 1, chunk = grad_sums.size(1) / chunks, steps = kept[0].size(1);
  const int64_t batch = grad_u.size(0), dims = grad_u.size(2), order = response.size(2), flat = dims * order;
  const at::Tensor transposed = fold.t();
  for (int64_t index = chunks - 1; index >= 0; --index) {
    const int64_t at = first + index * chunk;
    const at::Tensor start = at::empty({batch, flat}, fold.options());
    // What the memory at the end of the chunk sends back, to the u of the chunk and to the memory at its start.
    with_type(fold, [&](auto scalar) {
      using T = decltype(scalar);
      const Sequence<T> inputs(grad_u), later(arrived);
      T* starts = start.data_ptr<T>();
      at::parallel_for(0, batch, std::max<int64_t>(1, 64 / dims), [&](int64_t begin, int64_t end) {
        const int64_t rows = end - begin, stride = padded(chunk);
        std::vector<T> sent(rows * dims * stride), memory(rows * flat);
        for (int64_t r = 0; r < rows; ++r) std::memcpy(&memory[r * flat], later.at(begin + r, index + 1), flat * sizeof(T));
        by_system<T>(rows, dims, chunk, order, memory.data(), order, response, sent.data(), stride);
        for (int64_t r = 0; r < rows; ++r)
          for (int64_t j = 0; j < chunk; ++j)
            for (int64_t d = 0; d < dims; ++d) inputs.at(begin + r, at + j)[d] += sent[(r * dims + d) * stride + j];
        advance<T>(rows, dims, order, 0, nullptr, power, response, memory.data());
        std::memcpy(starts + begin * flat, memory.data(), rows * flat * sizeof(T));
      });
    });
    backward(
        kind, 0, at, std::min(chunk, steps - at), chunk, to_hidden, to_u, states, kept, grads, grad_u.narrow(1, at, chunk),
        grad_sums.narrow(1, at - first, chunk), carry, carried, encoding, mask, activation);
    start.addmm_(flat_steps(grad_sums, at - first, chunk), transposed);
    if (grad_starts) start.add_(grad_starts->select(1, at / chunk));
    arrived.select(1, index).copy_(start);
  }
}

// ---- the memory itself, step by step, for orders so small that a step of it fits a few vectors

// The memory's numbers, padded to Lanes; Order is 0 where it is known at run time only.
template <int Lanes, int Order>
struct Width {
  static constexpr int lanes = Lanes, order = Order;
};

template <typename Function, int N = 8>
void with_width(int64_t order, const Function& function) {
  TORCH_CHECK(order <= 32, "expected an order up to 32, found ", order);
  if (order > 16) return function(Width<32, 0>());
  if (order > 8) return function(Width<16, 0>());
  if (order == N) return function(Width<8, N>());
  if constexpr (N > 1) return with_width<Function, N - 1>(order, function);
}

// Numbers in as few vectors of the processor as hold them: compilers split longer ones by way of memory.
template <typename T, int Lanes>
struct Numbers {
  static constexpr int width = std::min<int>(Lanes, BYTES / sizeof(T)), parts = Lanes / width;
  typedef T Part __attribute__((vector_size(width * sizeof(T)), aligned(sizeof(T))));
  Part part[parts] = {};

  T* begin() { return reinterpret_cast<T*>(part); }
  const T* begin() const { return reinterpret_cast<const T*>(part); }
  void add(const Numbers& other) {
    for (int p = 0; p < parts; ++p) part[p] += other.part[p];
  }
  void add(const Numbers& other, T factor) {
    for (int p = 0; p < parts; ++p) part[p] += other.part[p] * factor;
  }
};

// S systems: the columns of A (N, N), or of its transpose, and B (N), each filled up to Lanes.
template <typename T, int Lanes>
struct Systems {
  std::vector<Numbers<T, Lanes>> columns, inputs;
  Systems(const at::Tensor& A, const at::Tensor& B, bool transposed) {
    const int64_t scales = A.size(0), order = A.size(1);
    const auto a = A.accessor<T, 3>();
    const auto b = B.accessor<T, 2>();
    for (int64_t s = 0; s < scales; ++s) {
      Numbers<T, Lanes> input;
      for (int64_t k = 0; k < order; ++k) {
        Numbers<T, Lanes> column;
        for (int64_t n = 0; n < order; ++n) column.begin()[n] = transposed ? a[s][k][n] : a[s][n][k];
        columns.push_back(column);
        input.begin()[k] = b[s][k];
      }
      inputs.push_back(input);
    }
  }
};

// sum += columns @ values, in two sums so that one addition need not wait for the other.
template <typename T, int Lanes, int Order>
inline void apply(const Numbers<T, Lanes>* columns, const T* values, int64_t order, Numbers<T, Lanes>& sum) {
  const int64_t count = Order ? Order : order;
  Numbers<T, Lanes> other;
  int64_t k = 0;
  for (; k + 1 < count; k += 2) {
    sum.add(columns[k], values[k]);
    other.add(columns[k + 1], values[k + 1]);
  }
  if (k < count) sum.add(columns[k], values[k]);
  sum.add(other);
}

// Rows and memory dimensions never meet: calls function(row, first dimension, last) for parts of both.
template <typename Function>
void over_memories(int64_t rows, int64_t dims, const Function& function) {
  const int64_t parts = std::min(dims, std::max<int64_t>(1, at::get_num_threads() / std::max<int64_t>(rows, 1)));
  at::parallel_for(0, rows * parts, 1, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t row = task / parts, part = task % parts;
      function(row, dims * part / parts, dims * (part + 1) / parts);
    }
  });
}

void memory_forward(
    const at::Tensor& starts, const at::Tensor& u, const at::Tensor& A, const at::Tensor& B, const at::Tensor& states) {
  TORCH_CHECK(starts.is_contiguous() && u.is_contiguous() && states.is_contiguous(), "expected contiguous tensors");
  const int64_t steps = u.size(1), dims = u.size(2), order = B.size(1);
  with_type(u, [&](auto scalar) {
    using T = decltype(scalar);
    const T *from = starts.data_ptr<T>(), *inputs = u.data_ptr<T>();
    T* to = states.data_ptr<T>();
    with_width(order, [&](auto width) {
      constexpr int Lanes = decltype(width)::lanes, Order = decltype(width)::order;
      const Systems<T, Lanes> systems(A, B, false);
      const bool shared = B.size(0) == 1;
      const int64_t count = Order ? Order : order;
      over_memories(u.size(0), dims, [&](int64_t row, int64_t first, int64_t last) {
        const T* before = from + row * dims * count;
        for (int64_t t = 0; t < steps; ++t) {
          const T* input = inputs + (row * steps + t) * dims;
          T* state = to + (row * steps + t) * dims * count;
          for (int64_t d = first; d < last; ++d) {
            const int64_t s = shared ? 0 : d;
            Numbers<T, Lanes> after;
            after.add(systems.inputs[s], input[d]);
            apply<T, Lanes, Order>(&systems.columns[s * count], before + d * count, count, after);
            std::memcpy(state + d * count, after.begin(), count * sizeof(T));
          }
          before = state;
        }
      });
    });
  });
}

void memory_backward(
    const at::Tensor& grads, const at::Tensor& A, const at::Tensor& B, const at::Tensor& grad_starts, const at::Tensor& grad_u,
    const std::optional<at::Tensor>& arriving) {
  TORCH_CHECK(grads.is_contiguous() && grad_starts.is_contiguous() && grad_u.is_contiguous(), "expected contiguous tensors");
  TORCH_CHECK(!arriving || arriving->is_contiguous(), "expected contiguous tensors");
  const int64_t steps = grad_u.size(1), dims = grad_u.size(2), order = B.size(1);
  with_type(grad_u, [&](auto scalar) {
    using T = decltype(scalar);
    const T* from = grads.data_ptr<T>();
    T *to_starts = grad_starts.data_ptr<T>(), *to_u = grad_u.data_ptr<T>();
    T* arrived = arriving ? arriving->data_ptr<T>() : nullptr;
    with_width(order, [&](auto width) {
      constexpr int Lanes = decltype(width)::lanes, Order = decltype(width)::order;
      const Systems<T, Lanes> systems(A, B, true);
      const bool shared = B.size(0) == 1;
      const int64_t count = Order ? Order : order;
      over_memories(grad_u.size(0), dims, [&](int64_t row, int64_t first, int64_t last) {
        std::vector<Numbers<T, Lanes>> memory(last - first);
        for (int64_t t = steps - 1; t >= 0; --t) {
          const int64_t at = (row * steps + t) * dims;
          for (int64_t d = first; d < last; ++d) {
            const int64_t s = shared ? 0 : d;
            Numbers<T, Lanes> now, earlier;
            std::memcpy(now.begin(), from + (at + d) * count, count * sizeof(T));
            now.add(memory[d - first]);
            if (arrived) std::memcpy(arrived + (at + d) * count, now.begin(), count * sizeof(T));
            const T *values = now.begin(), *input = systems.inputs[s].begin();
            T sum = 0;
            for (int64_t n = 0; n < count; ++n) sum += values[n] * input[n];
            to_u[at + d] = sum;
            apply<T, Lanes, Order>(&systems.columns[s * count], values, count, earlier);
            memory[d - first] = earlier;
          }
        }
        T* start = to_starts + row * dims * count;
        for (int64_t d = first; d < last; ++d) std::memcpy(start + d * count, memory[d - first].begin(), count * sizeof(T));
      });
    });
  });
}

// ---- a whole layer, one step of some streams

// The cell of a layer without one, whose output is [m, x].
struct None {
  static constexpr int states = 0, kept = 0;
  template <typename T>
  static void step(int64_t, const T*, const T* const*, T* const*) {}
};

// A layer and the states of its streams, prepared: looking up what a step needs would take longer than many a step.
struct Stream : torch::CustomClassHolder {
  // Matrices in panels, A transposed, B (S, panels, 1, PANEL). states: m (B, D, N) and the hidden ones, contiguous; all are
  // updated. The rows of the encoder are those of [x, h, m], with h and m only where they are fed back; of the weight those of
  // [m, x, h].
  Stream(
      std::string kind, std::vector<at::Tensor> states, at::Tensor encoder, bool from_hidden, bool from_memory,
      std::optional<at::Tensor> u_bias, at::Tensor A, at::Tensor B, at::Tensor weight, std::optional<at::Tensor> bias,
      int64_t inputs, int64_t outputs)
      : kind(std::move(kind)),
        states(std::move(states)),
        encoder(std::move(encoder)),
        A(std::move(A)),
        B(std::move(B)),
        weight(std::move(weight)),
        u_bias(std::move(u_bias)),
        bias(std::move(bias)),
        from_hidden(from_hidden),
        from_memory(from_memory),
        inputs(inputs),
        outputs(outputs) {}

  // One sample per stream (B, inputs) -> the outputs (B, outputs).
  at::Tensor step(const at::Tensor& x) {
    const at::Tensor samples = x.contiguous(), output = at::empty({x.size(0), outputs}, states[0].options());
    TORCH_CHECK(
        x.size(0) == states[0].size(0) && x.size(1) == inputs && x.scalar_type() == states[0].scalar_type(),
        "expected one sample per stream");
    with_type(x, [&](auto scalar) {
      using T = decltype(scalar);
      const auto run = [&](auto cell) {
        using Cell = decltype(cell);
        // A thread of its own pays only where it gets several streams.
        at::parallel_for(0, x.size(0), 4, [&](int64_t begin, int64_t end) {
          rows<T, Cell>(begin, end, samples.data_ptr<T>(), output.data_ptr<T>());
        });
      };
      if (kind == "none") return run(None());
      with_cell(kind, run);
    });
    return output;
  }

 private:
  const std::string kind;
  const std::vector<at::Tensor> states;
  const at::Tensor encoder, A, B, weight;
  const std::optional<at::Tensor> u_bias, bias;
  const bool from_hidden, from_memory;
  const int64_t inputs, outputs;

  template <typename T, typename Cell>
  void rows(int64_t begin, int64_t end, const T* x, T* output) const {
    const int64_t rows = end - begin, dims = states[0].size(1), order = states[0].size(2), flat = dims * order;
    const int64_t size = Cell::states ? states[1].size(1) : 0;
    const T* samples = x + begin * inputs;
    T* memory = states[0].data_ptr<T>() + begin * flat;
    const T* hidden = Cell::states ? states[1].data_ptr<T>() + begin * size : nullptr;

    const int64_t u_stride = padded(dims);
    std::vector<T> u(rows * u_stride), inputs_of(rows * dims);
    if (u_bias)
      for (int64_t r = 0; r < rows; ++r) std::memcpy(&u[r * u_stride], u_bias->data_ptr<T>(), dims * sizeof(T));
    const Panels<T> e(encoder);
    product<T>(rows, dims, inputs, samples, inputs, e, u.data(), u_stride);
    if (from_hidden) product<T>(rows, dims, size, hidden, size, e.from_row(inputs), u.data(), u_stride);
    if (from_memory)
      product<T>(rows, dims, flat, memory, flat, e.from_row(inputs + (from_hidden ? size : 0)), u.data(), u_stride);
    for (int64_t r = 0; r < rows; ++r) std::memcpy(&inputs_of[r * dims], &u[r * u_stride], dims * sizeof(T));
    advance<T>(rows, dims, order, 1, inputs_of.data(), A, B, memory);

    T* result = output + begin * outputs;
    if constexpr (Cell::states == 0) {
      for (int64_t r = 0; r < rows; ++r, result += outputs) {
        std::memcpy(result, memory + r * flat, flat * sizeof(T));
        std::memcpy(result + flat, samples + r * inputs, (outputs - flat) * sizeof(T));
      }
    } else {
      const int64_t width = bias->size(0), g_stride = padded(width);
      std::vector<T> gates(rows * g_stride), kept(3 * 4 * size);
      for (int64_t r = 0; r < rows; ++r) std::memcpy(&gates[r * g_stride], bias->data_ptr<T>(), width * sizeof(T));
      const Panels<T> w(weight);
      product<T>(rows, width, flat, memory, flat, w, gates.data(), g_stride);
      product<T>(rows, width, inputs, samples, inputs, w.from_row(flat), gates.data(), g_stride);
      product<T>(rows, width, size, hidden, size, w.from_row(flat + inputs), gates.data(), g_stride);
      for (int64_t r = 0; r < rows; ++r) {
        const T* before[3] = {};
        T* now[3];
        for (int i = 0; i < 3; ++i) now[i] = &kept[i * 4 * size];
        for (int i = 0; i < Cell::states; ++i) before[i] = states[1 + i].data_ptr<T>() + (begin + r) * size;
        Cell::template step<T>(size, &gates[r * g_stride], before, now);
        for (int i = 0; i < Cell::states; ++i)
          std::memcpy(states[1 + i].data_ptr<T>() + (begin + r) * size, now[i], size * sizeof(T));
        std::memcpy(result + r * size, now[0], size * sizeof(T));
      }
    }
  }
};

}  // namespace

TORCH_LIBRARY(lmu_hf, library) {
  library.class_<Stream>("Stream")
      .def(torch::init<
           std::string, std::vector<at::Tensor>, at::Tensor, bool, bool, std::optional<at::Tensor>, at::Tensor, at::Tensor,
           at::Tensor, std::optional<at::Tensor>, int64_t, int64_t>())
      .def("step", &Stream::step);
  library.def(
      "scan_forward(str kind, int linear, int first, int count, int chunk, Tensor known, Tensor matrix, Tensor[] states, "
      "Tensor(a!)[] kept, Tensor(b!) u, Tensor[] encoding, Tensor? mask, str activation) -> ()");
  library.def(
      "scan_backward(str kind, int linear, int first, int count, int chunk, Tensor to_hidden, Tensor to_u, Tensor[] states, "
      "Tensor[] kept, Tensor[] grads, Tensor grad_u, Tensor(a!) grad_sums, Tensor(b!) carry, Tensor(c!) carried, "
      "Tensor[] encoding, Tensor? mask, str activation) -> ()");
  // The chunks of a segment, L steps from `first` on: fold (D * N, C * W), starts (B, K, D * N), memory (B, D, N), which is
  // updated, and known (B, L, W); powers, A^C transposed (S, N, N), and responses (S, C, N) in panels.
  library.def(
      "feedback_forward(str kind, int first, Tensor(d!) known, Tensor fold, Tensor power, Tensor response, Tensor matrix, "
      "Tensor[] states, Tensor(a!)[] kept, Tensor(b!) u, Tensor(c!) starts, Tensor(e!) memory, Tensor[] encoding, Tensor? mask, "
      "str activation) -> ()");
  // Its adjoint, with power A^C and response (S, N, C) in panels. `arrived` (B, K + 1, D * N) takes the gradients of the memory
  // at the start of each of these K chunks; in its last place comes that of the memory after them.
  library.def(
      "feedback_backward(str kind, int first, Tensor fold, Tensor power, Tensor response, Tensor to_hidden, Tensor to_u, "
      "Tensor[] states, Tensor[] kept, Tensor[] grads, Tensor(a!) grad_u, Tensor(b!) grad_sums, Tensor(c!) carry, "
      "Tensor(d!) carried, Tensor? grad_starts, Tensor(e!) arrived, Tensor[] encoding, Tensor? mask, str activation) -> ()");
  // starts (M, D, N), u (M, C, D), A (S, N, N), B (S, N), states (M, C, D, N); N up to 32. `arriving` takes the gradients that
  // reach each state, later ones included.
  library.def("memory_forward(Tensor starts, Tensor u, Tensor A, Tensor B, Tensor(a!) states) -> ()");
  library.def(
      "memory_backward(Tensor grads, Tensor A, Tensor B, Tensor(a!) grad_starts, Tensor(b!) grad_u, Tensor(c!)? arriving) -> ()");
}

TORCH_LIBRARY_IMPL(lmu_hf, CPU, library) {
  library.impl("scan_forward", &forward);
  library.impl("scan_backward", &backward);
  library.impl("feedback_forward", &feedback_forward);
  library.impl("feedback_backward", &feedback_backward);
  library.impl("memory_forward", &memory_forward);
  library.impl("memory_backward", &memory_backward);
}
