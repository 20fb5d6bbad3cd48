// The chunks of a segment whose state is fed back into the memory, as in time_loop.py.
#pragma once


#include <memory_resource>

#include "steps.h"

namespace {

// to (rows * D, ..) += from (rows * D, ..) @ the matrix of the system of each memory dimension, by `product`, which takes the
// system, a number of rows, and both.
template <typename T, typename Product>
void by_system(
    int64_t systems, int64_t rows, int64_t dims, const T* from, int64_t from_stride, T* to, int64_t to_stride,
    const Product& product) {
  if (systems == 1) return product(0, rows * dims, from, from_stride, to, to_stride);
  for (int64_t d = 0; d < dims; ++d)
    product(d, rows, from + d * from_stride, dims * from_stride, to + d * to_stride, dims * to_stride);
}

// The same with a stack of matrices in panels: to (rows * D, width) += from (rows * D, inner) @ stack
template <typename T>
void by_system(
    int64_t rows, int64_t dims, int64_t width, int64_t inner, const T* from, int64_t from_stride, const at::Tensor& stack, T* to,
    int64_t to_stride) {
  by_system<T>(
      stack.size(0), rows, dims, from, from_stride, to, to_stride,
      [&](int64_t system, int64_t count, const T* a, int64_t a_stride, T* c, int64_t c_stride) {
        product<T>(count, width, inner, a, a_stride, Panels<T>::of(stack, system), c, c_stride);
      });
}

// memory (rows * D, N) = inputs (rows * D, count) @ response + what `multiply` adds to a matrix (rows * D, stride): memory @ a power
// of the transposed A.
template <typename T, typename Multiply>
void advance_by(
    int64_t rows, int64_t dims, int64_t order, int64_t count, const T* inputs, const at::Tensor& response, T* memory,
    std::pmr::memory_resource* pool, const Multiply& multiply) {
  const int64_t stride = padded(order);
  std::pmr::vector<T> next(rows * dims * stride, pool);
  by_system<T>(rows, dims, order, count, inputs, count, response, next.data(), stride);
  multiply(next.data(), stride);
  for (int64_t row = 0; row < rows * dims; ++row) std::memcpy(memory + row * order, &next[row * stride], order * sizeof(T));
}

template <typename T>
void advance(
    int64_t rows, int64_t dims, int64_t order, int64_t count, const T* inputs, const at::Tensor& power,
    const at::Tensor& response, T* memory) {
  const auto multiply = [&](T* next, int64_t stride) {
    by_system<T>(rows, dims, order, order, memory, order, power, next, stride);
  };
  advance_by<T>(rows, dims, order, count, inputs, response, memory, std::pmr::get_default_resource(), multiply);
}

// A part of a (B, L, F) tensor as a matrix (B, length * F).
at::Tensor flat_steps(const at::Tensor& tensor, int64_t first, int64_t length) {
  return tensor.narrow(1, first, length).as_strided(
      {tensor.size(0), length * tensor.size(2)}, {tensor.stride(0), 1}, tensor.storage_offset() + first * tensor.stride(1));
}

constexpr int64_t FEW = 2;  // rows, for which a call of a product costs as much as its arithmetic

// sums (B, L, W), the C steps from `at` on, += memory (B, D * N) @ fold (D * N, C * W)
template <typename T>
void add_folded(const at::Tensor& sums, int64_t at, int64_t chunk, const at::Tensor& memory, const at::Tensor& fold) {
  const int64_t batch = memory.size(0), flat = fold.size(0), width = fold.size(1);
  if (batch > FEW) {
    flat_steps(sums, at, chunk).addmm_(memory, fold);
    return;
  }
  const T *from = memory.data_ptr<T>(), *matrix = fold.data_ptr<T>();
  T* to = Sequence<T>(sums).at(0, at);
  at::parallel_for(0, width, std::max<int64_t>(64, 32768 / flat), [&](int64_t begin, int64_t end) {
    thin_product<T>(batch, end - begin, flat, from, flat, matrix + begin, width, to + begin, sums.stride(0));
  });
}

// Its adjoint: memory (B, D * N) += sums @ the transposed fold
template <typename T>
void add_unfolded(const at::Tensor& sums, int64_t at, int64_t chunk, const at::Tensor& memory, const at::Tensor& fold) {
  const int64_t batch = memory.size(0), flat = fold.size(0), width = fold.size(1);
  if (batch > FEW) {
    memory.addmm_(flat_steps(sums, at, chunk), fold.t());
    return;
  }
  const T *from = Sequence<T>(sums).at(0, at), *matrix = fold.data_ptr<T>();
  T* to = memory.data_ptr<T>();
  at::parallel_for(0, flat, std::max<int64_t>(1, 32768 / width), [&](int64_t begin, int64_t end) {
    thin_transposed<T>(
        batch, width, end - begin, from, sums.stride(0), matrix + begin * width, width, to + begin, flat);
  });
}

void feedback_forward(
    const std::string kind, int64_t first, const at::Tensor& known, const at::Tensor& fold,
    const std::optional<at::Tensor>& folds, const at::Tensor& power, const at::Tensor& response, const at::Tensor& matrix,
    at::TensorList states, at::TensorList kept, const at::Tensor& u, const at::Tensor& starts, const at::Tensor& memory,
    at::TensorList encoding, const std::optional<at::Tensor>& mask, const std::string activation,
    const std::optional<at::Tensor>& given, const std::optional<at::Tensor>& weight, const std::optional<at::Tensor>& bias) {
  const int64_t chunk = response.size(2), steps = kept[0].size(1), total = u.size(1), batch = u.size(0), dims = u.size(2);
  const int64_t order = memory.size(2), flat = dims * order, grain = std::max<int64_t>(1, 64 / dims);
  TORCH_CHECK(!given || (folds && weight), "rows that wait for one another do not read their inputs");
  TORCH_CHECK(
      memory.is_contiguous() && fold.is_contiguous() && (given || known.stride(1) == known.size(2)),
      "expected contiguous tensors");
  TORCH_CHECK(!bias || bias->is_contiguous(), "expected a contiguous bias");
  const at::Tensor rows = memory.view({batch, flat});
  with_loop(kind, 0, chunk, states, kept, encoding, mask, activation, [&](const auto& loop) {
    using T = typename std::decay_t<decltype(loop)>::Type;
    const Sequence<T> inputs(u), begun(starts);
    const auto sums = given ? Sequence<T>::none(fold.size(1) / chunk) : Sequence<T>(known);
    const auto x = given ? Sequence<T>(*given) : Sequence<T>::none(0);
    const Panels<T> panels(matrix);
    T* now = memory.data_ptr<T>();
    const auto keep = [&](int64_t begin, int64_t end, int64_t at) {
      for (int64_t b = begin; b < end; ++b) std::memcpy(begun.at(b, at / chunk), now + b * flat, flat * sizeof(T));
    };
    const auto go_on = [&](int64_t begin, int64_t end, int64_t at) {
      Buffer<T> driving((end - begin) * dims * chunk);
      for (int64_t b = begin; b < end; ++b)
        for (int64_t j = 0; j < chunk; ++j)
          for (int64_t d = 0; d < dims; ++d) driving[((b - begin) * dims + d) * chunk + j] = inputs.at(b, at + j)[d];
      advance<T>(end - begin, dims, order, chunk, driving.data(), power, response, now + begin * flat);
    };
    const int64_t last = first + known.size(1);
    if (folds)  // rows never meet
      return over_rows(batch, [&](int64_t begin, int64_t end) {
        const Start<T> start{*folds, now + begin * flat, flat, flat};
        for (int64_t at = first; at < last; at += chunk) {
          keep(begin, end, at);
          std::optional<Inputs<T>> reading;
          if (given) reading = Inputs<T>{x.from(at), Panels<T>(*weight), bias ? bias->data_ptr<T>() : nullptr};
          loop.forward_rows(
              begin, end, at, std::min(chunk, steps - at), sums.from(at - first), panels, inputs, &start,
              reading ? &*reading : nullptr);
          if (at + chunk < total) go_on(begin, end, at);
        }
      });
    for (int64_t at = first; at < last; at += chunk) {
      keep(0, batch, at);
      add_folded<T>(known, at - first, chunk, rows, fold);
      loop.forward(at, std::min(chunk, steps - at), sums.from(at - first), panels, inputs);
      if (at + chunk < total)
        at::parallel_for(0, batch, grain, [&](int64_t begin, int64_t end) { go_on(begin, end, at); });
    }
  });
}

void feedback_backward(
    const std::string kind, int64_t first, const at::Tensor& fold, const std::optional<at::Tensor>& folds,
    const at::Tensor& power, const at::Tensor& response, const at::Tensor& to_hidden, const at::Tensor& to_u,
    at::TensorList states, at::TensorList kept, at::TensorList grads, const at::Tensor& grad_u, const at::Tensor& grad_sums,
    const at::Tensor& carry, const at::Tensor& carried, const std::optional<at::Tensor>& grad_starts, const at::Tensor& arrived,
    at::TensorList encoding, const std::optional<at::Tensor>& mask, const std::string activation,
    const std::optional<at::Tensor>& given, const std::optional<at::Tensor>& to_given, const std::optional<at::Tensor>& u,
    const std::optional<at::Tensor>& grad_given, const std::optional<at::Tensor>& grad_matrix) {
  const int64_t chunks = arrived.size(1) - 1, chunk = grad_sums.size(1) / chunks, steps = kept[0].size(1);
  const int64_t batch = grad_u.size(0), dims = grad_u.size(2), order = response.size(2), flat = dims * order;
  TORCH_CHECK(fold.is_contiguous() && grad_sums.stride(1) == grad_sums.size(2), "expected contiguous tensors");
  TORCH_CHECK(
      !given || (folds && u && u->is_contiguous() && grad_given.has_value() == to_given.has_value()),
      "expected all that the gradients of the inputs take");
  with_loop(kind, 0, chunk, states, kept, encoding, mask, activation, [&](const auto& loop) {
    using T = typename std::decay_t<decltype(loop)>::Type;
    const Adjoint<T> adjoint(Panels<T>{to_hidden}, Panels<T>{to_u}, grads, carry, carried);
    const Sequence<T> inputs(grad_u), sums(grad_sums), later(arrived);
    std::optional<Sequence<T>> elsewhere;
    if (grad_starts) elsewhere.emplace(*grad_starts);
    // What the memory at the end of the chunk sends back, to the u of the chunk and to the memory at its start (rows, D * N).
    const auto send_back = [&](int64_t begin, int64_t end, int64_t index, T* memory) {
      const int64_t at = first + index * chunk, rows = end - begin, stride = padded(chunk);
      Buffer<T> sent(rows * dims * stride);
      for (int64_t r = 0; r < rows; ++r) std::memcpy(memory + r * flat, later.at(begin + r, index + 1), flat * sizeof(T));
      by_system<T>(rows, dims, chunk, order, memory, order, response, sent.data(), stride);
      for (int64_t r = 0; r < rows; ++r)
        for (int64_t j = 0; j < chunk; ++j)
          for (int64_t d = 0; d < dims; ++d) inputs.at(begin + r, at + j)[d] += sent[(r * dims + d) * stride + j];
      advance<T>(rows, dims, order, 0, nullptr, power, response, memory);
    };
    const auto keep = [&](int64_t begin, int64_t end, int64_t index, const T* from, int64_t stride) {
      for (int64_t b = begin; b < end; ++b, from += stride) {
        const T* more = elsewhere ? elsewhere->at(b, first / chunk + index) : nullptr;
        T* to = later.at(b, index);
        for (int64_t i = 0; i < flat; ++i) to[i] = from[i] + (more ? more[i] : T(0));
      }
    };
    if (folds) {
      PartialSums<T> parts(grad_matrix);
      over_rows(batch, [&](int64_t begin, int64_t end) {
        const int64_t rows = end - begin, stride = padded(flat);
        WeightGradient<T>* weights = parts.own();
        Buffer<T> now(rows * flat), reached(rows * stride);
        const Start<T> memory{*folds, reached.data(), flat, stride};
        for (int64_t index = chunks - 1; index >= 0; --index) {
          const int64_t at = first + index * chunk;
          send_back(begin, end, index, now.data());
          for (int64_t r = 0; r < rows; ++r) std::memcpy(&reached[r * stride], &now[r * flat], flat * sizeof(T));
          std::optional<InputsAdjoint<T>> reading;
          if (given) {
            reading = InputsAdjoint<T>{Sequence<T>(*given).from(at), Sequence<T>(*u).from(at), weights};
            if (grad_given) reading->to_x.emplace(*to_given), reading->grad_x = Sequence<T>(*grad_given).from(at);
          }
          loop.backward_rows(
              begin, end, at, std::min(chunk, steps - at), adjoint, inputs.from(at), sums.from(at - first), &memory,
              reading ? &*reading : nullptr);
          keep(begin, end, index, reached.data(), stride);
        }
        if (weights) weights->finish();
      });
      parts.gather(true);
      return;
    }
    const at::Tensor start = empty({batch, flat}, fold);
    T* now = start.data_ptr<T>();
    for (int64_t index = chunks - 1; index >= 0; --index) {
      const int64_t at = first + index * chunk;
      at::parallel_for(0, batch, std::max<int64_t>(1, 64 / dims), [&](int64_t begin, int64_t end) {
        send_back(begin, end, index, now + begin * flat);
      });
      loop.backward(at, std::min(chunk, steps - at), adjoint, inputs.from(at), sums.from(at - first));
      add_unfolded<T>(grad_sums, at - first, chunk, start, fold);
      keep(0, batch, index, now, flat);
    }
  });
}
}  // namespace
