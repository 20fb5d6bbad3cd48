// Threads that share the steps of few rows: which columns each has, and how they wait for one another.
#pragma once

#include <ATen/Parallel.h>

#ifdef _OPENMP
#include <omp.h>
#endif

#include <atomic>
#include <fstream>
#include <thread>
#include <tuple>
#include <vector>

#include "products.h"
#include "tensors.h"

namespace {

// Numbers of the matrix that a thread has at least: with fewer it waits more than it saves. As in layer_costs.py.
constexpr int64_t SHARE = 1 << 13;
// Numbers of a matrix from which on they share the steps of as many rows as they are. Of a smaller one nothing is saved but reading,
// and where cores are far from one another they wait longer than that takes.
constexpr int64_t EACH = 1 << 16;
// Numbers of a matrix that the caches of cores cannot hold: of those each thread reads its part for all of so many rows per thread,
// rather than everything for its own.
constexpr int64_t FAR = 1 << 21, FAR_ROWS = 4;

// Processors of this process: threads that wait for one another must all have one, or each step takes as long as the system takes
// to pass one on. Containers see those of their host, and get shares of time by their control group (version 2, or 1).
int64_t processors() {
  static const int64_t found = [] {
    int64_t count = std::max<int64_t>(1, std::thread::hardware_concurrency()), quota = 0, period = 0;
    std::ifstream both("/sys/fs/cgroup/cpu.max"), first("/sys/fs/cgroup/cpu/cpu.cfs_quota_us");
    std::ifstream second("/sys/fs/cgroup/cpu/cpu.cfs_period_us");
    // Where there is no limit the file says "max", or -1.
    if ((both >> quota >> period || (first >> quota && second >> period)) && quota > 0 && period > 0)
      count = std::min(count, std::max<int64_t>(1, quota / period));
    return count;
  }();
  return found;
}

// How many threads share the steps of rows by a matrix of so many numbers, for so many units; 1 where each takes its own rows. What
// the sums are made of, if steps read it, is worth sharing with a row for each thread too.
int64_t threads_that_share(int64_t batch, int64_t units, int64_t numbers, bool reads) {
#ifdef _OPENMP
  if (at::in_parallel_region()) return 1;
  const int64_t most = std::min<int64_t>({at::get_num_threads(), processors(), (units + PANEL - 1) / PANEL});
  const int64_t threads = std::min(most, numbers / SHARE);
  const int64_t rows = numbers >= FAR ? threads * FAR_ROWS : reads && numbers >= EACH ? threads : threads - 1;
  return rows >= batch ? threads : 1;
#else
  return 1;
#endif
}

// How often one thread of a team has arrived. Each has lines of its own: a common counter would go from core to core once per thread,
// one after the other, and take with it what lies beside it.
struct alignas(128) Arrivals {
  std::atomic<int64_t> count{0};
};

// One thread of a team.
class Member {
 public:
  const int64_t index, threads;
  Member(int64_t index, int64_t threads, Arrivals* arrivals) : index(index), threads(threads), arrivals(arrivals) {}

  // Until all have come here as often as this one.
  void wait() {
    arrivals[index].count.store(++expected, std::memory_order_release);
    for (int64_t i = 0; i < threads; ++i)
      for (int64_t spins = 0; arrivals[i].count.load(std::memory_order_acquire) < expected; ++spins) {
        if (spins > 1 << 12) std::this_thread::yield();  // it has lost its processor
#if defined(__x86_64__)
        __builtin_ia32_pause();
#endif
      }
  }

 private:
  Arrivals* const arrivals;
  int64_t expected = 0;
};

// Calls function(member) in each thread of a team.
template <typename Function>
void in_team(int64_t threads, const Function& function) {
  std::vector<Arrivals> arrivals(threads);
#ifdef _OPENMP
#pragma omp parallel num_threads(threads)
  {
    Member member(omp_get_thread_num(), omp_get_num_threads(), arrivals.data());
    function(member);
  }
#else
  Member member(0, 1, arrivals.data());
  function(member);
#endif
}

// A matrix as it lies, or in panels.
template <typename T>
struct Elements {
  const T* data;
  int64_t row, group, far, near;  // strides: of rows, and from one group of so many columns to the next, and inside of it

  explicit Elements(const Matrix<T>& matrix) : Elements{matrix.data, matrix.row, 1, matrix.column, 0} {}
  explicit Elements(const Panels<T>& panels) : Elements{panels.data, PANEL, PANEL, panels.stride, 1} {}
  Elements(const T* data, int64_t row, int64_t group, int64_t far, int64_t near)
      : data(data), row(row), group(group), far(far), near(near) {}
  const T* column(int64_t c) const { return data + c / group * far + c % group * near; }
};

// Columns that follow one another, and where the first of them goes.
struct Run {
  int64_t from, to, count;
};

// The columns that a thread has, of something that consists of `linear` numbers of memory and, `gates` times, of one per unit.
struct Share {
  std::vector<Run> runs;
  int64_t at, memory, first, units, columns = 0;  // the first number of memory, and how many; the first unit; all columns

  Share(const Member& member, int64_t linear, int64_t all, int64_t gates) {
    int64_t end, last;
    std::tie(at, end) = part(linear, member.threads - 1 - member.index, member.threads);  // who has more units has less memory
    std::tie(first, last) = part(all, member.index, member.threads);
    memory = end - at, units = last - first;
    add(at, memory);
    for (int64_t gate = 0; gate < gates; ++gate) add(linear + gate * all + first, units);
  }

  // Whole panels as far as there are.
  static std::pair<int64_t, int64_t> part(int64_t count, int64_t index, int64_t parts) {
    const int64_t panels = (count + PANEL - 1) / PANEL;
    const auto edge = [&](int64_t i) { return std::min(count, panels * i / parts * PANEL); };
    return {edge(index), edge(index + 1)};
  }

  // From a row of everything to one of these columns alone, and back.
  template <typename T>
  void take(const T* all, T* own) const {
    for (const Run& run : runs) std::copy_n(all + run.from, run.count, own + run.to);
  }
  template <typename T>
  void put(const T* own, T* all) const {
    for (const Run& run : runs) std::copy_n(own + run.to, run.count, all + run.from);
  }

  // Asks for these columns of a row.
  template <typename T>
  void fetch(const T* all) const {
    for (const Run& run : runs) ::fetch(all + run.from, run.count);
  }

  // These columns of a matrix with `inner` rows, in panels.
  template <typename T>
  Buffer<T> take(const Elements<T>& from, int64_t inner) const {
    Buffer<T> laid((columns + PANEL - 1) / PANEL * PANEL * inner);
    for (const Run& run : runs)
      for (int64_t c = 0; c < run.count;) {
        const int64_t to = run.to + c, count = std::min(run.count - c, PANEL - to % PANEL);
        const T* column[PANEL];
        for (int64_t i = 0; i < count; ++i) column[i] = from.column(run.from + c + i);
        const bool adjoin = column[count - 1] - column[0] == count - 1;
        T* at = &laid[to / PANEL * inner * PANEL + to % PANEL];
        for (int64_t k = 0; k < inner; ++k, at += PANEL)
          if (adjoin)
            std::copy_n(column[0] + k * from.row, count, at);
          else
            for (int64_t i = 0; i < count; ++i) at[i] = column[i][k * from.row];
        c += count;
      }
    return laid;
  }

 private:
  void add(int64_t from, int64_t count) {
    if (count) runs.push_back({from, columns, count});
    columns += count;
  }
};
}  // namespace
