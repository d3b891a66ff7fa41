// The C++ API of the images on the CPU: views of stored images, as the network takes them.
#pragma once

#include <cstdint>

namespace ban_fast {

// Images [*, height, width, channels] of bytes, and where the pixels of a view come from. View v of an image takes its
// rows from entry v / columns of `ys` and its columns from entry v % columns of `xs`; -1 stands for black.
struct Stored {
  const std::uint8_t* pixels;
  std::int64_t height, width, channels;
  const std::int32_t* ys;  // [*, height]
  const std::int32_t* xs;  // [columns, width]
  std::int64_t columns;
};

// A batch [count, channels, height, width] of words of 2, 4 or 8 bytes; strides in words.
struct Shown {
  void* images;
  int word;
  std::int64_t count, image_stride, channel_stride, row_stride, column_stride;
};

// Image i shows view views[i] of image rows[i], each byte b of channel c as `words[256 * c + b]`, on up to `threads`
// threads. Nothing is checked: rows, views and both tables must be within bounds.
void show_views(const Stored& stored, const std::int64_t* rows, const std::int64_t* views, const void* words,
                const Shown& shown, int threads);

}  // namespace ban_fast
