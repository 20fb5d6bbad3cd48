// Memory for large tensors, kept for the next one.
#pragma once

#include <ATen/EmptyTensor.h>
#include <ATen/core/Tensor.h>
#include <c10/core/CPUAllocator.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <memory>
#include <mutex>
#include <new>
#include <vector>

namespace {

// A caching allocator, as PyTorch has one for GPUs. The C library gives a large block back to the system as soon as it is free, and
// each page of the next one costs a fault when it is first written: more than the step that writes it.
//
// What is kept and what is in use together are at most what was in use at one time, but for `SLACK`; and of what is kept the system
// may take back all but the last `SLACK` whenever it needs it, without asking.
class CachingAllocator final : public c10::Allocator {
 public:
  static CachingAllocator& only() {
    static auto* allocator = new CachingAllocator;  // never destroyed: tensors may outlive all else
    return *allocator;
  }

  c10::DataPtr allocate(size_t bytes) override {
    auto block = std::make_unique<Block>(take(bytes));
    void* data = block->memory.get();
    return {data, block.release(), &give_back, c10::kCPU};
  }
  void copy_data(void* to, const void* from, size_t bytes) const override { default_copy_data(to, from, bytes); }

  // Takes back what `allocate` gave, by its context.
  static void give_back(void* context) {
    const std::unique_ptr<Block> block(static_cast<Block*>(context));
    CachingAllocator& self = only();
    const std::lock_guard guard(self.mutex);
    self.used -= block->bytes;
    self.kept += block->bytes;
    self.idle.push_back(std::move(*block));
    size_t newer = 0;
    for (auto one = self.idle.rbegin(); one != self.idle.rend(); ++one)
      if ((newer += one->bytes) > SLACK && !one->offered) offer(*one);
  }

  // Gives the system what is kept.
  void clear() {
    const std::lock_guard guard(mutex);
    idle.clear();
    kept = 0;
    most = used;
  }

 private:
  static constexpr size_t SLACK = 64 << 20;  // what the C library holds on to, too

  struct Block {
    c10::DataPtr memory;
    size_t bytes;
    bool offered = false;  // to the system
  };

  std::mutex mutex;
  std::vector<Block> idle;  // the one that was given back last comes last
  size_t used = 0, kept = 0, most = 0;

  Block take(size_t bytes) {
    const std::lock_guard guard(mutex);
    // The smallest that is large enough, but not much too large; of equal ones the last, which is likeliest still in a cache.
    auto best = idle.end();
    for (auto block = idle.begin(); block != idle.end(); ++block)
      if (block->bytes >= bytes && block->bytes - bytes <= bytes / 8 && (best == idle.end() || block->bytes <= best->bytes))
        best = block;
    Block taken;
    if (best != idle.end()) {
      taken = std::move(*best);
      taken.offered = false;
      kept -= taken.bytes;
      idle.erase(best);
    } else {
      const size_t bound = std::max(most, used + bytes) + SLACK;
      for (; !idle.empty() && used + kept + bytes > bound; idle.erase(idle.begin())) kept -= idle.front().bytes;
      taken = {c10::GetCPUAllocator()->allocate(bytes), bytes};
    }
    most = std::max(most, used += taken.bytes);
    return taken;
  }

  // Lets the system take the pages of a block if it runs short; until then they stay, and cost no fault when they are written again.
  static void offer(Block& block) {
    block.offered = true;
#ifdef MADV_FREE
    const auto page = static_cast<uintptr_t>(sysconf(_SC_PAGESIZE)), begin = reinterpret_cast<uintptr_t>(block.memory.get());
    const uintptr_t first = (begin + page - 1) / page * page, last = (begin + block.bytes) / page * page;
    if (first < last) madvise(reinterpret_cast<void*>(first), last - first, MADV_FREE);
#endif
  }
};

// Bytes from which on the C library asks the system for a block of its own.
constexpr size_t LARGE = 1 << 17;

// A tensor, not initialised, of that allocator if it is large.
at::Tensor empty_of(at::IntArrayRef shape, at::ScalarType type) {
  constexpr c10::DispatchKeySet keys(c10::DispatchKey::CPU);
  const bool large = c10::multiply_integers(shape) * c10::elementSize(type) >= LARGE;
  c10::Allocator* allocator = large ? &CachingAllocator::only() : c10::GetCPUAllocator();
  return at::detail::empty_generic(shape, allocator, keys, type, std::nullopt);
}
at::Tensor empty(at::IntArrayRef shape, const at::Tensor& like) { return empty_of(shape, like.scalar_type()); }

// The memory of vectors. It begins with a line of the cache, as that of tensors does: vectors of the processor that lie across two
// lines take twice as long to read.
template <typename T>
struct Lines {
  using value_type = T;
  static constexpr size_t line = 64;

  Lines() = default;
  template <typename Other>
  Lines(const Lines<Other>&) {}
  T* allocate(size_t count) {
    const size_t bytes = count * sizeof(T);
    if (bytes < LARGE) return static_cast<T*>(::operator new(bytes, std::align_val_t(line)));
    // What gives it back lies in front of it.
    auto memory = CachingAllocator::only().allocate(bytes + line);
    char* begin = static_cast<char*>(memory.get());
    *reinterpret_cast<void**>(begin) = memory.release_context();
    return reinterpret_cast<T*>(begin + line);
  }
  void deallocate(T* numbers, size_t count) {
    if (count * sizeof(T) < LARGE) return ::operator delete(numbers, std::align_val_t(line));
    CachingAllocator::give_back(*reinterpret_cast<void**>(reinterpret_cast<char*>(numbers) - line));
  }
  friend bool operator==(const Lines&, const Lines&) { return true; }
  friend bool operator!=(const Lines&, const Lines&) { return false; }
};

template <typename T>
using Buffer = std::vector<T, Lines<T>>;

void release_memory() { CachingAllocator::only().clear(); }
}  // namespace
