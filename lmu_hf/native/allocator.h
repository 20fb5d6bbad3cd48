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

// A tensor of that allocator, not initialised.
at::Tensor empty(at::IntArrayRef shape, at::ScalarType type) {
  constexpr c10::DispatchKeySet keys(c10::DispatchKey::CPU);
  return at::detail::empty_generic(shape, &CachingAllocator::only(), keys, type, std::nullopt);
}

void release_memory() { CachingAllocator::only().clear(); }
}  // namespace
