#include "cpu/scratch.h"

#include <cstdlib>
#include <new>

namespace ban_fast {
namespace {

struct Buffer {
  void* memory = nullptr;
  std::size_t size = 0;

  ~Buffer() { std::free(memory); }
};

thread_local Buffer buffer;

}  // namespace

void* thread_scratch(std::size_t bytes) {
  if (bytes > buffer.size) {
    std::free(buffer.memory);
    buffer.size = 0;
    const std::size_t size = (bytes + bytes / 4 + 4095) / 4096 * 4096;
    buffer.memory = std::aligned_alloc(64, size);
    if (buffer.memory == nullptr) throw std::bad_alloc();
    buffer.size = size;
  }
  return buffer.memory;
}

}  // namespace ban_fast
