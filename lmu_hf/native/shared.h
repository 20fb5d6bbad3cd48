// The steps of rows too few for all threads: these then share each step. A thread has some of the memory in front of h and some
// units of the cell, makes their sums for all rows, and waits for the others once a step.
#pragma once

#include "loop.h"

namespace {

template <typename T, typename Cell>
class SharedSteps {
 public:
  explicit SharedSteps(const Loop<T>& loop)
      : batch(loop.batch),
        linear(loop.linear),
        size(loop.kept[0].features),
        units(size - linear),
        initial(loop.initial),
        kept(loop.kept) {}

  void forward(
      int64_t threads, int64_t first, int64_t count, const Sequence<T>& known, const Elements<T>& matrix,
      const SharedInputs<T>* inputs) const {
    const int64_t gates = (known.features - linear) / units, inner = inputs ? inputs->x.features : 0;
    in_team(threads, [&](Member& member) {
      const Share own(member, linear, units, gates);
      const int64_t stride = padded(own.columns);
      const Buffer<T> of_hidden = own.take(matrix, size), of_x = inputs ? own.take(inputs->weight, inner) : Buffer<T>();
      Buffer<T> sums(batch * stride), bias(own.columns);
      if (inputs) own.take(inputs->bias, bias.data());
      Rows rows(*this, member);
      for (int64_t t = first; t < first + count; ++t) {
        for (int64_t r = 0; r < batch; ++r) {
          T* to = &sums[r * stride];
          known ? own.take(known.at(r, t - first), to) : void(std::copy(bias.begin(), bias.end(), to));
        }
        if (inputs) {
          const Sequence<T> x = inputs->x.from(t - first);
          product<T>(batch, own.columns, inner, x.data, x.row, Panels<T>(of_x.data(), inner * PANEL), sums.data(), stride);
        }
        const T* hidden = t > 0 ? kept[0].at(0, t - 1) : initial[0];
        for (int64_t r = 0; r < batch && t > first; ++r) ::fetch(kept[0].at(r, t - 1), size);
        product<T>(
            batch, own.columns, size, hidden, t > 0 ? kept[0].row : size, Panels<T>(of_hidden.data(), size * PANEL),
            sums.data(), stride);
        for (int64_t r = 0; r < batch; ++r) {
          if (known && t + 1 < first + count) own.fetch(known.at(r, t + 1 - first));
          rows.point(r, t);
          const T* sum = &sums[r * stride];
          std::copy_n(sum, own.memory, kept[0].at(r, t) + own.at);
          Cell::template step<T>(own.units, sum + own.memory, rows.before, rows.now);
          rows.put(r, t);
          if (inputs && inputs->alone) std::copy_n(rows.now[0], own.units, inputs->alone.at(r, t) + own.first);
        }
        member.wait();
      }
    });
  }

  void backward(
      int64_t threads, int64_t first, int64_t count, const SharedAdjoint<T>& adjoint, const Sequence<T>& grad_sums,
      const SharedReading<T>* reading) const {
    const int64_t width = grad_sums.features, gates = (width - linear) / units, wide = padded(width);
    const int64_t inner = reading ? reading->x.features : 0;
    // The gradients of all sums of a step: who is done with one may go on with the next while others still read it.
    Buffer<T> all(2 * batch * wide);
    in_team(threads, [&](Member& member) {
      const Share own(member, linear, units, gates), state(member, linear, units, 1), of_x(member, inner, 0, 0);
      const Buffer<T> to_state = state.take(adjoint.to_hidden, width);
      const Buffer<T> to_x = reading && reading->grad_x ? of_x.take(reading->to_x, width) : Buffer<T>();
      const int64_t stride = padded(own.columns), s_stride = padded(state.columns), x_stride = padded(of_x.columns);
      Buffer<T> sums(batch * stride), grad(batch * s_stride), direct(s_stride), back(batch * x_stride);
      std::optional<WeightGradient<T>> weights;
      if (reading && reading->grad_matrix) weights.emplace(reading->features, own.columns);
      Rows rows(*this, member);
      for (int64_t r = 0; r < batch; ++r) state.take(adjoint.carry + r * size, &grad[r * s_stride]);
      for (int64_t t = first + count - 1; t >= first; --t) {
        T* step = &all[t % 2 * batch * wide];
        for (int64_t r = 0; r < batch; ++r) {
          rows.point(r, t);
          rows.take(r, t);
          if (t > first) {
            rows.fetch(r, t - 1);
            ::fetch(adjoint.grads[0].at(r, t - 1), adjoint.grads[0].features);
            if (grad_sums) own.fetch(grad_sums.at(r, t - 1 - first));
          }
          T *to = &sums[r * stride], *arrived = &grad[r * s_stride], *further = nullptr;
          // Their first features may be missing: nothing reaches these.
          const T* outer = adjoint.grads[0].at(r, t) - (size - adjoint.grads[0].features);
          for (const Run& run : state.runs)
            for (int64_t i = std::max<int64_t>(0, size - adjoint.grads[0].features - run.from); i < run.count; ++i)
              arrived[run.to + i] += outer[run.from + i];
          if constexpr (Cell::states > 1) {
            further = adjoint.carried + r * units + own.first;
            const T* outer_cell = adjoint.grads[1].at(r, t) + own.first;
            for (int64_t i = 0; adjoint.grads[1].features && i < own.units; ++i) further[i] += outer_cell[i];
          }
          std::copy_n(arrived, own.memory, to);
          std::fill(direct.begin(), direct.end(), T(0));
          Cell::template back<T>(
              own.units, arrived + own.memory, rows.before, rows.now, to + own.memory, further, direct.data() + own.memory);
          std::copy_n(direct.data(), state.columns, arrived);
          own.put(to, step + r * wide);
          if (grad_sums) own.put(to, grad_sums.at(r, t - first));
          if (weights)
            weights->add(
                0, nullptr, 0, t > 0 ? kept[0].at(r, t - 1) : initial[0] + r * size, size, reading->x.at(r, t - first), inner,
                to);
        }
        member.wait();
        // Others have them in their caches: all at once, not one as the product comes to it.
        for (int64_t r = 0; r < batch; ++r) ::fetch(step + r * wide, width);
        product<T>(
            batch, state.columns, width, step, wide, Panels<T>(to_state.data(), width * PANEL), grad.data(), s_stride);
        if (to_x.empty()) continue;
        std::fill(back.begin(), back.end(), T(0));
        product<T>(batch, of_x.columns, width, step, wide, Panels<T>(to_x.data(), width * PANEL), back.data(), x_stride);
        for (int64_t r = 0; r < batch; ++r) of_x.put(&back[r * x_stride], reading->grad_x.at(r, t - first));
      }
      for (int64_t r = 0; r < batch; ++r) state.put(&grad[r * s_stride], adjoint.carry + r * size);
      if (!weights) return;
      weights->finish();
      for (int64_t f = 0; f < reading->features; ++f) own.put(weights->row(f), &reading->grad_matrix->at(f, 0));
    });
  }

 private:
  const int64_t batch, linear, size, units;
  const std::vector<const T*>& initial;
  const std::vector<Sequence<T>>& kept;

  // What a cell keeps of a row and step, for some units: states where they lie, and the rest in room of its own.
  struct Rows {
    T *now[3] = {}, *before[3] = {};

    Rows(const SharedSteps& steps, const Member& member) : steps(steps) {
      for (int i = 0; i < Cell::kept; ++i) {
        shares.emplace_back(member, 0, steps.units, i < Cell::states ? 1 : steps.kept[i].features / steps.units);
        rest.emplace_back(shares[i].columns);
      }
    }
    void point(int64_t r, int64_t t) {
      for (int i = 0; i < Cell::states; ++i) {
        const int64_t column = shares[i].first + (i == 0 ? steps.linear : 0);
        now[i] = steps.kept[i].at(r, t) + column;
        T* initial = const_cast<T*>(steps.initial[i]) + r * steps.kept[i].features;
        before[i] = (t > 0 ? steps.kept[i].at(r, t - 1) : initial) + column;
      }
      for (int i = Cell::states; i < Cell::kept; ++i) now[i] = rest[i].data();
    }
    void put(int64_t r, int64_t t) const {
      for (int i = Cell::states; i < Cell::kept; ++i) shares[i].put(now[i], steps.kept[i].at(r, t));
    }
    void fetch(int64_t r, int64_t t) const {
      for (int i = 0; i < Cell::kept; ++i) shares[i].fetch(steps.kept[i].at(r, t) + (i == 0 ? steps.linear : 0));
    }
    void take(int64_t r, int64_t t) {
      for (int i = Cell::states; i < Cell::kept; ++i) shares[i].take(steps.kept[i].at(r, t), now[i]);
    }

   private:
    const SharedSteps& steps;
    std::vector<Share> shares;
    std::vector<Buffer<T>> rest;
  };
};
}  // namespace
