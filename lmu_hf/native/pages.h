// Memory in large pages.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace {

// Asks that memory not touched yet be taken from the system in pages of 2 MiB rather than 4 KiB, of which each costs a fault: for
// results of many megabytes that takes as long as computing them. Where this is not possible, nothing happens.
void prefer_large_pages(const at::Tensor& tensor) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr std::uintptr_t page = 1 << 21;
  const auto first = reinterpret_cast<std::uintptr_t>(tensor.data_ptr()), begin = (first + page - 1) / page * page;
  const std::uintptr_t end = (first + tensor.nbytes()) / page * page;
  if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#endif
}
}  // namespace
