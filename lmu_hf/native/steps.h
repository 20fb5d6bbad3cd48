// The steps of one cell.
#pragma once

#include "cells.h"
#include "shared.h"

namespace {

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

  void forward_shared(
      int64_t threads, int64_t first, int64_t count, const Sequence<T>& known, const Elements<T>& matrix,
      const SharedInputs<T>* inputs) const override {
    SharedSteps<T, Cell>(*this).forward(threads, first, count, known, matrix, inputs);
  }

  void backward_shared(
      int64_t threads, int64_t first, int64_t count, const SharedAdjoint<T>& adjoint, const Sequence<T>& grad_sums,
      const SharedReading<T>* reading) const override {
    SharedSteps<T, Cell>(*this).backward(threads, first, count, adjoint, grad_sums, reading);
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
