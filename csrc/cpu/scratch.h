// Memory that a thread keeps between calls for the rows it works on.
#pragma once

#include <cstddef>

namespace ban_fast {

// At least `bytes`, 64-byte aligned, this thread's alone until its next call; contents are not kept.
void* thread_scratch(std::size_t bytes);

}  // namespace ban_fast
