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
    void* data = take(bytes);
    return {data, data, &give_back, c10::kCPU};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &give_back; }
  void copy_data(void* to, const void* from, size_t bytes) const override { default_copy_data(to, from, bytes); }

  // Memory that begins with a line of the cache, not initialised.
  void* take(size_t bytes) {
    const std::lock_guard guard(mutex);
    // The smallest block that is large enough, but not much too large, as lengths of sequences vary from batch to batch; of equal
    // ones the last, which is likeliest still in a cache.
    auto best = idle.end();
    for (auto block = idle.begin(); block != idle.end(); ++block) {
      const size_t found = (*block)->bytes;
      if (found >= bytes && found - bytes <= bytes / 2 && (best == idle.end() || found <= (*best)->bytes)) best = block;
    }
    std::unique_ptr<Block> block;
    if (best != idle.end()) {
      block = std::move(*best);
      idle.erase(best);
      kept -= block->bytes;
      block->offered = false;
    } else {
      const size_t bound = std::max(most, used + bytes) + SLACK;
      for (; !idle.empty() && used + kept + bytes > bound; idle.erase(idle.begin())) kept -= idle.front()->bytes;
      block = std::make_unique<Block>(Block{c10::GetCPUAllocator()->allocate(LINE + bytes), bytes});
#ifdef MADV_HUGEPAGE
      // Of large pages, there are fewer to find and to fill, as NumPy does it.
      if (bytes >= 2 * LARGE_PAGE) advise(*block, LARGE_PAGE, MADV_HUGEPAGE);
#endif
    }
    most = std::max(most, used += block->bytes);
    char* begin = static_cast<char*>(block->memory.get());
    *reinterpret_cast<Block**>(begin) = block.release();
    return begin + LINE;
  }

  static void give_back(void* data) {
    std::unique_ptr<Block> block(*reinterpret_cast<Block**>(static_cast<char*>(data) - LINE));
    CachingAllocator& self = only();
    const std::lock_guard guard(self.mutex);
    self.used -= block->bytes;
    self.kept += block->bytes;
    self.idle.push_back(std::move(block));
    size_t newer = 0;
    for (auto one = self.idle.rbegin(); one != self.idle.rend(); ++one)
      if ((newer += (*one)->bytes) > SLACK && !(*one)->offered) offer(**one);
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
  static constexpr size_t LINE = 64, LARGE_PAGE = 2 << 20;

  struct Block {
    c10::DataPtr memory;  // in use, its first line says which block it is of
    size_t bytes;         // behind that
    bool offered = false;  // to the system
  };

  std::mutex mutex;
  std::vector<std::unique_ptr<Block>> idle;  // the one that was given back last comes last
  size_t used = 0, kept = 0, most = 0;

  // Lets the system take the pages of a block if it runs short; until then they stay, and cost no fault when they are written again.
  static void offer(Block& block) {
    block.offered = true;
#ifdef MADV_FREE
    advise(block, sysconf(_SC_PAGESIZE), MADV_FREE);
#endif
  }

  // Tells the system about the pages of this size that are the block's alone. Where it knows no such advice, nothing changes.
  static void advise(const Block& block, uintptr_t page, int advice) {
    const auto begin = reinterpret_cast<uintptr_t>(block.memory.get());
    const uintptr_t first = (begin + page - 1) / page * page, last = (begin + LINE + block.bytes) / page * page;
    if (first < last) madvise(reinterpret_cast<void*>(first), last - first, advice);
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
  static constexpr std::align_val_t line{64};

  Lines() = default;
  template <typename Other>
  Lines(const Lines<Other>&) {}
  T* allocate(size_t count) {
    const size_t bytes = count * sizeof(T);
    return static_cast<T*>(bytes < LARGE ? ::operator new(bytes, line) : CachingAllocator::only().take(bytes));
  }
  void deallocate(T* numbers, size_t count) {
    if (count * sizeof(T) < LARGE)
      ::operator delete(numbers, line);
    else
      CachingAllocator::give_back(numbers);
  }
  friend bool operator==(const Lines&, const Lines&) { return true; }
  friend bool operator!=(const Lines&, const Lines&) { return false; }
};

template <typename T>
using Buffer = std::vector<T, Lines<T>>;

void release_memory() { CachingAllocator::only().clear(); }
}  // namespace
