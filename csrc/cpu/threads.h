// Loops over ranges on torch's threads; where there are none, and after a fork, on a small pool that lasts.
#pragma once

#include <cstdint>

namespace ban_fast {

using RangeBody = void (*)(void* context, std::int64_t begin, std::int64_t end);

// Calls body on ranges of at most `chunk` that make up [0, count), on up to `threads` threads, the caller's among them.
// Which thread takes which range is left to chance: body's result must not depend on it.
void parallel_for(std::int64_t count, std::int64_t chunk, int threads, RangeBody body, void* context);

}  // namespace ban_fast
