// Memory for large results, kept between calls: the kernel's faults for fresh pages cost three times what a loss does.
#pragma once

#include <cstddef>

namespace ban_fast {

// A block of the pool: the owner's alone as long as this lives, then kept for the next that asks. It holds anything.
class PooledMemory {
 public:
  // At least `bytes`, aligned to a page. std::bad_alloc where the system has no more.
  explicit PooledMemory(std::size_t bytes);
  ~PooledMemory();
  PooledMemory(const PooledMemory&) = delete;
  PooledMemory& operator=(const PooledMemory&) = delete;

  void* data() const { return memory_; }
  std::size_t size() const { return bytes_; }

 private:
  std::size_t bytes_, capacity_;
  void* memory_;
};

// Bytes of blocks now owned, the most that there were at once, and bytes of blocks kept.
struct PoolUse {
  std::size_t owned, most_owned, kept;
};

// What is kept is never more than the limit, and never so much that owned and kept blocks together are more than were
// owned at once some time: the pool may hold memory longer, but not more of it, than plain allocation. The limit is
// 1 GiB, the gradient of [8192, 32000] in fp32, or the environment variable BAN_FAST_POOL_MIB in MiB; with 0 nothing is
// kept. std::invalid_argument where that is no number.
PoolUse pool_use();

// Gives all blocks that are kept back to the system.
void empty_pool();

}  // namespace ban_fast
