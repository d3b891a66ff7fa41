// Crop, flip, normalisation and cast in one pass. A byte has 256 values, so that the arithmetic is a table, made by the
// caller in any way and type: 3 KB of floats, which the first cache keeps.
#include "images.h"

#include <algorithm>

#include "cpu/threads.h"

namespace ban_fast {
namespace {

// Bytes a piece: fewer, and waking a thread costs more than it saves (10 us, at 1 ns a byte).
constexpr std::int64_t kPiece = 1 << 15;

struct Job {
  const Stored& stored;
  const std::int64_t* rows;
  const std::int64_t* views;
  const void* words;
  const Shown& shown;
};

template <class Word>
void show(const Job& job, std::int64_t begin, std::int64_t end) {
  const Stored& stored = job.stored;
  const Shown& shown = job.shown;
  const std::int64_t row_bytes = stored.width * stored.channels, step = shown.column_stride;
  for (std::int64_t i = begin; i < end; ++i) {
    const std::int32_t* ys = stored.ys + job.views[i] / stored.columns * stored.height;
    const std::int32_t* xs = stored.xs + job.views[i] % stored.columns * stored.width;
    const std::uint8_t* image = stored.pixels + job.rows[i] * stored.height * row_bytes;
    for (std::int64_t y = 0; y < stored.height; ++y) {
      for (std::int64_t c = 0; c < stored.channels; ++c) {
        const Word* words = static_cast<const Word*>(job.words) + 256 * c;
        Word* to = static_cast<Word*>(shown.images) + i * shown.image_stride + c * shown.channel_stride +
                   y * shown.row_stride;
        if (ys[y] < 0) {
          for (std::int64_t x = 0; x < stored.width; ++x) to[x * step] = words[0];
          continue;
        }
        const std::uint8_t* from = image + ys[y] * row_bytes + c;
        for (std::int64_t x = 0; x < stored.width; ++x) {
          to[x * step] = words[xs[x] < 0 ? 0 : from[xs[x] * stored.channels]];
        }
      }
    }
  }
}

template <class Word>
void run(const Job& job, int threads) {
  const std::int64_t bytes = job.stored.height * job.stored.width * job.stored.channels;
  parallel_for(
      job.shown.count, std::max<std::int64_t>(1, kPiece / std::max<std::int64_t>(1, bytes)), threads,
      [](void* job, std::int64_t begin, std::int64_t end) { show<Word>(*static_cast<const Job*>(job), begin, end); },
      const_cast<Job*>(&job));
}

}  // namespace

void show_views(const Stored& stored, const std::int64_t* rows, const std::int64_t* views, const void* words,
                const Shown& shown, int threads) {
  const Job job{stored, rows, views, words, shown};
  switch (shown.word) {
    case 2: return run<std::uint16_t>(job, threads);
    case 4: return run<std::uint32_t>(job, threads);
    default: return run<std::uint64_t>(job, threads);
  }
}

}  // namespace ban_fast
