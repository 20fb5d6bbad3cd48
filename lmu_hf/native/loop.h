// The time loop: the steps of one chunk for some rows, forwards and backwards, as in scan.py.
#pragma once

#include <ATen/Parallel.h>

#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "team.h"
#include "tensors.h"

namespace {

constexpr int64_t TILE = 60;   // rows that go through the steps together
constexpr int64_t FEWEST = 16;  // steps that threads share: with fewer, laying out their columns takes longer than it saves

// How u comes of the state before it where it is no linear function of it, or not the same one in each row; time_loop.Encoding.
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

// Calls function(begin, end) for tiles of the rows, each thread for some of them.
template <typename Function>
void over_rows(int64_t batch, const Function& function, int64_t tile_size = TILE) {
  at::parallel_for(0, batch, 1, [&](int64_t begin, int64_t end) {
    const int64_t tiles = (end - begin + tile_size - 1) / tile_size;
    for (int64_t tile = 0; tile < tiles; ++tile)
      function(begin + (end - begin) * tile / tiles, begin + (end - begin) * (tile + 1) / tiles);
  });
}

// What the adjoint of the steps needs beside: transposed matrices, the gradients of the state sequences, and those that pass from
// step to step.
template <typename T>
struct Adjoint {
  Panels<T> to_hidden, to_u;
  std::vector<Sequence<T>> grads;
  T *carry, *carried;

  Adjoint(
      const Panels<T>& to_hidden, const Panels<T>& to_u, at::TensorList grads, const at::Tensor& carry, const at::Tensor& carried)
      : to_hidden(to_hidden),
        to_u(to_u),
        grads(sequences<T>(grads)),
        carry(carry.data_ptr<T>()),
        carried(carried.data_ptr<T>()) {}
};

// The memory of some rows at the start of a chunk (rows, D * N), of which the steps themselves add what it contributes to their
// sums: step j by matrix j of the stack (C, D * N, W). Backwards the matrices are transposed, and `memory`, whose rows are
// padded, takes what the steps send back.
template <typename T>
struct Start {
  const at::Tensor& stack;
  T* memory;
  int64_t flat, stride;
};

// What steps make their sums of where these are not known in advance, or not all of them: x @ weight + bias.
template <typename T>
struct Inputs {
  Sequence<T> x;
  Panels<T> weight;
  const T* bias;                               // or nullptr
  Sequence<T> alone = Sequence<T>::none(0);  // where h goes once more, without the memory in front of it
};

// The gradient of a matrix [u before, h, x, 1] -> sums, of rows that are collected until they make a product: so they never leave
// the cache of their core.
template <typename T>
class WeightGradient {
 public:
  WeightGradient(int64_t features, int64_t width)
      : features(features),
        width(width),
        stride(padded(width)),
        left(COLLECTED * features, T(1)),
        right(padded(width) * COLLECTED),
        total(features * stride) {}

  // Adds a row, whose u are those of the last `lags` steps, the first `missing` of them zeros. Features past those of x are ones.
  void add(
      int64_t missing, const T* u, int64_t lags, const T* h, int64_t size, const T* x, int64_t inputs, const T* grad) {
    T* row = &left[filled * features];
    std::fill_n(row, missing, T(0));
    std::copy_n(u, lags - missing, row + missing);
    std::copy_n(h, size, row + lags);
    std::copy_n(x, inputs, row + lags + size);
    for (int64_t column = 0; column < width; column += PANEL)
      std::memcpy(&right[column * COLLECTED + filled * PANEL], grad + column, PANEL * sizeof(T));
    if (++filled == COLLECTED) finish();
  }

  // What is collected goes into the sum.
  void finish() {
    product<T, true>(
        features, width, filled, left.data(), features, Panels<T>(right.data(), COLLECTED * PANEL), total.data(), stride);
    filled = 0;
  }

  // The sum, once it is finished.
  const T* row(int64_t feature) const { return &total[feature * stride]; }

 private:
  static constexpr int64_t COLLECTED = 128;
  const int64_t features, width, stride;
  Buffer<T> left, right, total;
  int64_t filled = 0;
};

// The gradient of one matrix by threads, none where it is not wanted.
template <typename T>
class PartialSums {
 public:
  explicit PartialSums(const std::optional<at::Tensor>& total) : total(total) {
    TORCH_CHECK(!total || total->is_contiguous(), "expected a contiguous gradient");
  }
  // That of this thread.
  WeightGradient<T>* own() {
    if (!total) return nullptr;
    auto& part = parts[at::get_thread_num()];
    if (!part) part = std::make_unique<WeightGradient<T>>(total->size(0), total->size(1));
    return part.get();
  }
  // Adds all of them to what there is, or writes them; in the order of threads, so that equal runs round alike.
  void gather(bool kept) const {
    if (!total) return;
    const int64_t width = total->size(1);
    T* all = total->data_ptr<T>();
    const int64_t least = std::max<int64_t>(1, (1 << 14) / std::max<int64_t>(width, 1));
    at::parallel_for(0, total->size(0), least, [&](int64_t begin, int64_t end) {
      for (int64_t f = begin; f < end; ++f) {
        T* __restrict to = all + f * width;
        if (!kept) std::fill_n(to, width, T(0));
        for (const auto& part : parts) {
          const T* __restrict from = part ? part->row(f) : nullptr;
          for (int64_t i = 0; from && i < width; ++i) to[i] += from[i];
        }
      }
    });
  }

 private:
  const std::optional<at::Tensor>& total;
  std::vector<std::unique_ptr<WeightGradient<T>>> parts = decltype(parts)(at::get_num_threads());
};

// The adjoint of Inputs, and the gradient of the matrix of a step; u are those of the chunk, if they are in it.
template <typename T>
struct InputsAdjoint {
  Sequence<T> x, u;
  WeightGradient<T>* weights;  // or nullptr
  std::optional<Panels<T>> to_x = std::nullopt;  // if the gradient of x is wanted
  Sequence<T> grad_x = Sequence<T>::none(0);
};

// Inputs, Adjoint and InputsAdjoint of steps that threads share, of matrices that lie as they please.
template <typename T>
struct SharedInputs {
  Sequence<T> x;
  Elements<T> weight;
  const T* bias;
  Sequence<T> alone;
};

template <typename T>
struct SharedAdjoint {
  Elements<T> to_hidden;
  std::vector<Sequence<T>> grads;
  T *carry, *carried;
};

template <typename T>
struct SharedReading {
  Sequence<T> x;
  Elements<T> to_x;
  Sequence<T> grad_x;                    // or none
  std::optional<Matrix<T>> grad_matrix;  // with `features` rows, which are written
  int64_t features;
};

// The steps of the chunks of one sequence, of whatever cell: what calls them is compiled once for all.
template <typename T>
struct Loop {
  using Type = T;
  int64_t batch, linear, chunk;
  std::vector<const T*> initial;
  std::vector<Sequence<T>> kept;
  std::optional<Encoding<T>> encoding;

  Loop(
      int64_t linear, int64_t chunk, at::TensorList states, at::TensorList kept, at::TensorList encoding,
      const std::optional<at::Tensor>& mask, const std::string& activation)
      : batch(states[0].size(0)),
        linear(linear),
        chunk(chunk),
        initial(pointers<T>(states)),
        kept(sequences<T>(kept)),
        encoding(Encoding<T>::of(encoding, mask, activation)) {}
  virtual ~Loop() = default;

  // Runs `count` steps from step `first` on; `known` begins with it.
  void forward(
      int64_t first, int64_t count, const Sequence<T>& known, const Panels<T>& matrix, const Sequence<T>& u) const {
    if (const int64_t threads = u.features ? 1 : sharing(count, known.features, false); threads > 1)
      return forward_shared(threads, first, count, known, Elements<T>(matrix), nullptr);
    over_rows(batch, [&](int64_t begin, int64_t end) { forward_rows(begin, end, first, count, known, matrix, u, nullptr); });
  }

  // `grad_u` and `grad_sums` begin with step `first`.
  void backward(
      int64_t first, int64_t count, const Adjoint<T>& adjoint, const Sequence<T>& grad_u, const Sequence<T>& grad_sums) const {
    if (const int64_t threads = grad_u.features ? 1 : sharing(count, grad_sums.features, false); threads > 1) {
      const SharedAdjoint<T> shared{Elements<T>(adjoint.to_hidden), adjoint.grads, adjoint.carry, adjoint.carried};
      return backward_shared(threads, first, count, shared, grad_sums, nullptr);
    }
    over_rows(batch, [&](int64_t begin, int64_t end) {
      backward_rows(begin, end, first, count, adjoint, grad_u, grad_sums, nullptr);
    });
  }

  // How many threads share `count` steps of such a width; 1 where each has rows of its own.
  int64_t sharing(int64_t count, int64_t width, bool reads) const {
    const int64_t size = kept[0].features;
    return count < FEWEST || encoding ? 1 : threads_that_share(batch, size - linear, size * width, reads);
  }
  virtual void forward_shared(
      int64_t threads, int64_t first, int64_t count, const Sequence<T>& known, const Elements<T>& matrix,
      const SharedInputs<T>* inputs) const = 0;
  virtual void backward_shared(
      int64_t threads, int64_t first, int64_t count, const SharedAdjoint<T>& adjoint, const Sequence<T>& grad_sums,
      const SharedReading<T>* reading) const = 0;

  // The same for the rows from `begin` to `end`.
  virtual void forward_rows(
      int64_t begin, int64_t end, int64_t first, int64_t count, const Sequence<T>& known, const Panels<T>& matrix,
      const Sequence<T>& u, const Start<T>* start, const Inputs<T>* inputs = nullptr) const = 0;
  virtual void backward_rows(
      int64_t begin, int64_t end, int64_t first, int64_t count, const Adjoint<T>& adjoint, const Sequence<T>& grad_u,
      const Sequence<T>& grad_sums, const Start<T>* start, InputsAdjoint<T>* reading = nullptr) const = 0;
};
}  // namespace
