#include "cpu/pool.h"

#include <pthread.h>
#include <sys/mman.h>

#include <algorithm>
#include <cerrno>
#include <cstdint>
#include <cstdlib>
#include <mutex>
#include <new>
#include <stdexcept>
#include <string>
#include <vector>

namespace ban_fast {
namespace {

constexpr std::size_t kPage = 4096, kHugePage = std::size_t(2) << 20;
// Blocks from here on are made of huge pages: 22 faults instead of 11,000 for 45 MB, and no more than an eighth unused.
constexpr std::size_t kHugeFrom = 8 * kHugePage;
// A kept block serves a request down to this part of it: batches of changing size share one.
constexpr std::size_t kLoosest = 2;

struct Block {
  void* memory;
  std::size_t size;
};

std::size_t rounded(std::size_t bytes, std::size_t unit) { return (bytes + unit - 1) / unit * unit; }

std::size_t block_size(std::size_t bytes) {
  return rounded(std::max<std::size_t>(bytes, 1), bytes >= kHugeFrom ? kHugePage : kPage);
}

void* map(std::size_t size) {
  const bool huge = size >= kHugeFrom;
  const std::size_t extra = huge ? kHugePage - kPage : 0;  // to begin at a huge page
  void* const mapped = mmap(nullptr, size + extra, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (mapped == MAP_FAILED) throw std::bad_alloc();
  if (!huge) return mapped;
  char* const start = static_cast<char*>(mapped);
  const std::size_t before = rounded(reinterpret_cast<std::uintptr_t>(start), kHugePage) -
                             reinterpret_cast<std::uintptr_t>(start);
  if (before > 0) munmap(start, before);
  if (before < extra) munmap(start + before + size, extra - before);
#if defined(MADV_HUGEPAGE)
  madvise(start + before, size, MADV_HUGEPAGE);  // where it is refused, small pages serve
#endif
  return start + before;
}

std::size_t limit_of_environment() {
  const char* text = std::getenv("BAN_FAST_POOL_MIB");
  if (text == nullptr || *text == '\0') return std::size_t(1) << 30;
  char* end = nullptr;
  errno = 0;
  const unsigned long long mib = std::strtoull(text, &end, 10);
  if (*text < '0' || *text > '9' || *end != '\0' || errno != 0 || mib > (std::size_t(-1) >> 20)) {
    throw std::invalid_argument("BAN_FAST_POOL_MIB is '" + std::string(text) +
                                "'; a number of MiB is needed, such as 256");
  }
  return std::size_t(mib) << 20;
}

// Never destroyed: tensors may outlive every static object.
class Pool {
 public:
  explicit Pool(std::size_t limit) : limit_(limit) { kept_.reserve(kMostKept + 1); }

  Block take(std::size_t bytes) {
    const std::size_t size = block_size(bytes);
    std::lock_guard<std::mutex> lock(mutex_);
    const auto found = best_fit(size);
    const bool is_new = found == kept_.end();
    const Block block = is_new ? Block{map(size), size} : *found;
    if (!is_new) {
      kept_.erase(found);
      kept_bytes_ -= block.size;
    }
    owned_ += block.size;
    most_owned_ = std::max(most_owned_, owned_);
    trim(most_owned_ - owned_);
    return block;
  }

  void give(Block block) noexcept {
    std::lock_guard<std::mutex> lock(mutex_);
    owned_ -= block.size;
    kept_.push_back(block);  // there is room: no allocation, and nothing that can fail
    kept_bytes_ += block.size;
    trim(limit_);
  }

  void empty() {
    std::lock_guard<std::mutex> lock(mutex_);
    trim(0);
  }

  PoolUse use() {
    std::lock_guard<std::mutex> lock(mutex_);
    return {owned_, most_owned_, kept_bytes_};
  }

  // Around a fork. Blocks that are owned are the child's too, as copies; what was kept stays with the parent alone,
  // whose next writes to it then need not make copies.
  void before_fork() { mutex_.lock(); }
  void after_fork_in_parent() { mutex_.unlock(); }
  void after_fork_in_child() {
    trim(0);
    mutex_.unlock();
  }

 private:
  std::vector<Block>::iterator best_fit(std::size_t size) {
    auto best = kept_.end();
    for (auto block = kept_.begin(); block != kept_.end(); ++block) {
      if (block->size < size || block->size / kLoosest > size) continue;
      if (best == kept_.end() || block->size < best->size) best = block;
    }
    return best;
  }

  // Gives back what is more than `most` bytes, longest unused first.
  void trim(std::size_t most) {
    auto end = kept_.begin();
    for (; kept_bytes_ > most || kept_.end() - end > kMostKept; ++end) {
      munmap(end->memory, end->size);
      kept_bytes_ -= end->size;
    }
    kept_.erase(kept_.begin(), end);
  }

  static constexpr int kMostKept = 64;

  std::mutex mutex_;
  const std::size_t limit_;
  std::size_t owned_ = 0, most_owned_ = 0, kept_bytes_ = 0;
  std::vector<Block> kept_;  // in the order in which they were given back
};

Pool* forking = nullptr;

Pool& pool() {
  static Pool& only = *[] {
    forking = new Pool(limit_of_environment());
    pthread_atfork([] { forking->before_fork(); }, [] { forking->after_fork_in_parent(); },
                   [] { forking->after_fork_in_child(); });
    return forking;
  }();
  return only;
}

}  // namespace

PooledMemory::PooledMemory(std::size_t bytes) : bytes_(bytes) {
  const Block block = pool().take(bytes);
  memory_ = block.memory;
  capacity_ = block.size;
}

PooledMemory::~PooledMemory() { pool().give({memory_, capacity_}); }

PoolUse pool_use() { return pool().use(); }

void empty_pool() { pool().empty(); }

}  // namespace ban_fast
