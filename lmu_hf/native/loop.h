// The time loop: the steps of one chunk for some rows, forwards and backwards, as in scan.py.
#pragma once

#include <ATen/Parallel.h>

#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "cells.h"
#include "tensors.h"

namespace {

constexpr int64_t TILE = 60;  // rows that go through the steps together

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

// Rows lie far apart, too many for the processor to foresee: asks for what the next step needs of one.
template <typename T>
inline void fetch(const T* from, int64_t count) {
  constexpr int64_t line = 64 / sizeof(T);
  for (int64_t i = 0; i < count; i += line) __builtin_prefetch(from + i);
}

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
    if (++filled == COLLECTED) multiply();
  }

  int64_t size() const { return features * width; }

  // The sum so far, which is added to `to` (features, width).
  void add_to(T* to) {
    multiply();
    for (int64_t f = 0; f < features; ++f)
      for (int64_t i = 0; i < width; ++i) to[f * width + i] += total[f * stride + i];
  }

 private:
  static constexpr int64_t COLLECTED = 128;
  const int64_t features, width, stride;
  Buffer<T> left, right, total;
  int64_t filled = 0;

  void multiply() {
    product<T, true>(
        features, width, filled, left.data(), features, Panels<T>(right.data(), COLLECTED * PANEL), total.data(), stride);
    filled = 0;
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

// Such gradients by thread.
template <typename T>
class PartialSums {
 public:
  void add(WeightGradient<T>& gradient) {
    auto& part = parts[at::get_thread_num()];
    part.resize(gradient.size());
    gradient.add_to(part.data());
  }
  void add_to(const at::Tensor& total) const { add_parts(parts, total.data_ptr<T>(), total.numel()); }

 private:
  std::vector<std::vector<T>> parts = std::vector<std::vector<T>>(at::get_num_threads());
};

// The adjoint of Inputs, and the gradient of the matrix of a step; u are those of the chunk, if they are in it.
template <typename T>
struct InputsAdjoint {
  Sequence<T> x, u;
  WeightGradient<T>* weights;  // or nullptr
  std::optional<Panels<T>> to_x = std::nullopt;  // if the gradient of x is wanted
  Sequence<T> grad_x = Sequence<T>::none(0);
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
    over_rows(batch, [&](int64_t begin, int64_t end) { forward_rows(begin, end, first, count, known, matrix, u, nullptr); });
  }

  // `grad_u` and `grad_sums` begin with step `first`.
  void backward(
      int64_t first, int64_t count, const Adjoint<T>& adjoint, const Sequence<T>& grad_u, const Sequence<T>& grad_sums) const {
    over_rows(batch, [&](int64_t begin, int64_t end) {
      backward_rows(begin, end, first, count, adjoint, grad_u, grad_sums, nullptr);
    });
  }

  // The same for the rows from `begin` to `end`.
  virtual void forward_rows(
      int64_t begin, int64_t end, int64_t first, int64_t count, const Sequence<T>& known, const Panels<T>& matrix,
      const Sequence<T>& u, const Start<T>* start, const Inputs<T>* inputs = nullptr) const = 0;
  virtual void backward_rows(
      int64_t begin, int64_t end, int64_t first, int64_t count, const Adjoint<T>& adjoint, const Sequence<T>& grad_u,
      const Sequence<T>& grad_sums, const Start<T>* start, InputsAdjoint<T>* reading = nullptr) const = 0;
};

template <typename T, typename Cell>
struct CellLoop final : Loop<T> {
  using Loop<T>::Loop, Loop<T>::linear, Loop<T>::chunk, Loop<T>::initial, Loop<T>::kept, Loop<T>::encoding;

  void forward_rows(
      int64_t begin, int64_t end, int64_t first, int64_t count, const Sequence<T>& known, const Panels<T>& matrix,
      const Sequence<T>& u, const Start<T>* start, const Inputs<T>* inputs) const override {
    const int64_t dims = u.features, size = kept[0].features, width = known.features;
    const int64_t u_stride = chunk * dims + 1, rows = end - begin;
    const Panels<T> from_hidden = matrix.from_row(dims ? (chunk - 1) * dims : 0);
    Buffer<T> sums(rows * padded(width)), past(rows * u_stride), masked(encoding ? rows * size : 0);
    const int64_t sum_stride = padded(width);
    for (int64_t j = 0; j < count; ++j) {
      const int64_t t = first + j;
      for (int64_t r = 0; r < rows; ++r) {
        const T* from = known ? known.at(begin + r, j) : inputs ? inputs->bias : nullptr;
        T* to = &sums[r * sum_stride];
        from ? std::copy_n(from, width, to) : std::fill_n(to, width, T(0));
        if (known && inputs && inputs->bias)
          for (int64_t i = 0; i < width; ++i) to[i] += inputs->bias[i];
      }
      if (inputs) {
        const Sequence<T>& x = inputs->x;
        product<T>(rows, width, x.features, x.at(begin, j), x.row, inputs->weight, sums.data(), sum_stride);
      }
      if (start)
        product<T>(
            rows, width, start->flat, start->memory, start->stride, Panels<T>::of(start->stack, j), sums.data(), sum_stride);
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
        rows_at(begin + r, t, now);
        rows_at(begin + r, t - 1, before);
        const T* sum = &sums[r * sum_stride];
        if (j + 1 < count) {
          if (known) fetch(known.at(begin + r, j + 1), width);
          if (inputs) fetch(inputs->x.at(begin + r, j + 1), inputs->x.features);
          for (int i = 0; i < Cell::kept; ++i) fetch(kept[i].at(begin + r, t + 1), kept[i].features);
        }
        if (dims) {
          std::memcpy(&past[r * u_stride + j * dims], sum, dims * sizeof(T));
          std::memcpy(u.at(begin + r, t), sum, dims * sizeof(T));
        }
        std::memcpy(now[0] - linear, sum + dims, linear * sizeof(T));
        Cell::template step<T>(size - linear, sum + dims + linear, before, now);
        if (inputs && inputs->alone) std::copy_n(now[0], size - linear, inputs->alone.at(begin + r, t));
      }
    }
  }

  void backward_rows(
      int64_t begin, int64_t end, int64_t first, int64_t count, const Adjoint<T>& adjoint, const Sequence<T>& grad_u,
      const Sequence<T>& grad_sums, const Start<T>* start, InputsAdjoint<T>* reading) const override {
    const int64_t dims = grad_u.features, size = kept[0].features, width = grad_sums.features;
    const int64_t rows = end - begin, h_stride = padded(size), w_stride = padded(width), u_stride = padded(chunk * dims);
    Buffer<T> grad(rows * h_stride), wide(rows * w_stride), inputs(PANEL + rows * u_stride), rest(rows * h_stride);
    Buffer<T> masked(encoding && encoding->mask ? rows * h_stride : 0);
    const int64_t x_stride = reading ? padded(reading->x.features) : 0;
    Buffer<T> to_x(rows * x_stride);
    T* to_inputs = inputs.data() + PANEL;
    for (int64_t r = 0; r < rows; ++r) {
      std::memcpy(&grad[r * h_stride], adjoint.carry + (begin + r) * size, size * sizeof(T));
      for (int64_t j = 0; dims && j < count; ++j)
        std::memcpy(to_inputs + r * u_stride + j * dims, grad_u.at(begin + r, j), dims * sizeof(T));
    }
    for (int64_t j = count - 1; j >= 0; --j) {
      const int64_t t = first + j;
      for (int64_t r = 0; r < rows; ++r) {
        T *now[3], *before[3];
        rows_at(begin + r, t, now);
        rows_at(begin + r, t - 1, before);
        if (j > 0) {
          for (const auto& outer : adjoint.grads) fetch(outer.at(begin + r, t - 1), outer.features);
          for (int i = 0; i < Cell::kept; ++i)
            if (t > 1) fetch(kept[i].at(begin + r, t - 2), kept[i].features);
          if (grad_sums) fetch(grad_sums.at(begin + r, j - 1), width);
          if (reading) fetch(reading->x.at(begin + r, j - 1), reading->x.features);
        }
        T *sum = &grad[r * h_stride], *further = nullptr;
        // Their first features may be missing: nothing reaches these.
        const T* outer = adjoint.grads[0].at(begin + r, t);
        const int64_t given = adjoint.grads[0].features;
        for (int64_t i = 0; i < given; ++i) sum[size - given + i] += outer[i];
        if constexpr (Cell::states > 1) {
          further = adjoint.carried + (begin + r) * (size - linear);
          const T* outer_cell = adjoint.grads[1].at(begin + r, t);
          for (int64_t i = 0; i < adjoint.grads[1].features; ++i) further[i] += outer_cell[i];
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
      if (grad_sums)
        for (int64_t r = 0; r < rows; ++r) std::memcpy(grad_sums.at(begin + r, j), &wide[r * w_stride], width * sizeof(T));
      if (reading) {
        const int64_t features = reading->x.features;
        if (reading->weights)
          for (int64_t r = 0; r < rows; ++r)
            reading->weights->add(
                (chunk - 1 - j) * dims, reading->u.at(begin + r, 0), (chunk - 1) * dims,
                t > 0 ? kept[0].at(begin + r, t - 1) : initial[0] + (begin + r) * size, size, reading->x.at(begin + r, j),
                features, &wide[r * w_stride]);
        if (reading->to_x) {
          std::fill(to_x.begin(), to_x.end(), T(0));
          product<T>(rows, features, width, wide.data(), w_stride, *reading->to_x, to_x.data(), x_stride);
          for (int64_t r = 0; r < rows; ++r)
            std::memcpy(reading->grad_x.at(begin + r, j), &to_x[r * x_stride], features * sizeof(T));
        }
      }
      if (start)
        product<T>(
            rows, start->flat, width, wide.data(), w_stride, Panels<T>::of(start->stack, j), start->memory, start->stride);
      product<T>(rows, size, width, wide.data(), w_stride, adjoint.to_hidden, grad.data(), h_stride);
      // The columns of lags 1 to j, from the start of a panel on. What that adds before the first u falls into the room between
      // rows, what the last vector adds past u j - 1 is spent: neither is ever read.
      const int64_t column = (chunk - 1 - j) * dims, panel = column / PANEL;
      if (dims)
        product<T>(
            rows, (chunk - 1) * dims - panel * PANEL, width, wide.data(), w_stride,
            Panels<T>(adjoint.to_u.column(panel * PANEL), adjoint.to_u.stride), to_inputs - column % PANEL, u_stride);
    }
    for (int64_t r = 0; r < rows; ++r) std::memcpy(adjoint.carry + (begin + r) * size, &grad[r * h_stride], size * sizeof(T));
  }

 private:
  // Points `rows` at step t of every kept tensor, or, before the first step, at the initial states; past the `linear` numbers of
  // memory in front of the first.
  void rows_at(int64_t b, int64_t t, T* (&rows)[3]) const {
    for (int i = 0; i < Cell::kept; ++i)
      rows[i] = t >= 0 ? kept[i].at(b, t) : (i < Cell::states ? const_cast<T*>(initial[i] + b * kept[i].features) : nullptr);
    rows[0] += linear;
  }
};

// Calls function(loop) with the loop for tensors of the type of these states.
template <typename Function>
void with_loop(
    const std::string& kind, int64_t linear, int64_t chunk, at::TensorList states, at::TensorList kept, at::TensorList encoding,
    const std::optional<at::Tensor>& mask, const std::string& activation, const Function& function) {
  with_type(states[0], [&](auto scalar) {
    using T = decltype(scalar);
    std::unique_ptr<const Loop<T>> loop;
    with_cell(kind, [&](auto cell) {
      loop = std::make_unique<CellLoop<T, decltype(cell)>>(linear, chunk, states, kept, encoding, mask, activation);
    });
    function(*loop);
  });
}

void forward(
    const std::string kind, int64_t linear, int64_t first, int64_t count, int64_t chunk, const at::Tensor& known,
    const at::Tensor& matrix, at::TensorList states, at::TensorList kept, const at::Tensor& u, at::TensorList encoding,
    const std::optional<at::Tensor>& mask, const std::string activation) {
  with_loop(kind, linear, chunk, states, kept, encoding, mask, activation, [&](const auto& loop) {
    using T = typename std::decay_t<decltype(loop)>::Type;
    loop.forward(first, count, Sequence<T>(known), Panels<T>(matrix), Sequence<T>(u));
  });
}

void backward(
    const std::string kind, int64_t linear, int64_t first, int64_t count, int64_t chunk, const at::Tensor& to_hidden,
    const at::Tensor& to_u, at::TensorList states, at::TensorList kept, at::TensorList grads, const at::Tensor& grad_u,
    const at::Tensor& grad_sums, const at::Tensor& carry, const at::Tensor& carried, at::TensorList encoding,
    const std::optional<at::Tensor>& mask, const std::string activation) {
  with_loop(kind, linear, chunk, states, kept, encoding, mask, activation, [&](const auto& loop) {
    using T = typename std::decay_t<decltype(loop)>::Type;
    const Adjoint<T> adjoint(Panels<T>{to_hidden}, Panels<T>{to_u}, grads, carry, carried);
    loop.backward(first, count, adjoint, Sequence<T>(grad_u), Sequence<T>(grad_sums));
  });
}
}  // namespace
