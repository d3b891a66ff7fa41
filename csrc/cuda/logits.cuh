// Rows of logits and gradients in their own types: what a thread reads of them, and writes.
#pragma once

#include "../losses.h"
#include "teams.cuh"

namespace ban_fast::cuda {

// Calls use(value of the row's own type). Students of an arithmetic type: float's are f32, f16 and bf16.
template <class T, class Use>
BAN_FAST_DEVICE void with_student_type(DType dtype, Use use) {
  if constexpr (sizeof(T) == sizeof(double)) {
    use(double{});
  } else if (dtype == DType::f32) {
    use(float{});
  } else if (dtype == DType::f16) {
    use(Half{});
  } else {
    use(BFloat16{});
  }
}

template <class Use>
BAN_FAST_DEVICE void with_teacher_type(DType dtype, Use use) {
  if (dtype == DType::f64) {
    use(double{});
  } else {
    with_student_type<float>(dtype, use);
  }
}

BAN_FAST_DEVICE int bytes_of(DType dtype) { return dtype == DType::f64 ? 8 : dtype == DType::f32 ? 4 : 2; }

template <class From>
BAN_FAST_DEVICE From lowest() {
  From x;
  narrow(negative_infinity<decltype(widen(From{}))>(), x);
  return x;
}

// A row of a matrix.
struct LogitRow {
  const char* data;
  DType dtype;
  std::int64_t stride;

  BAN_FAST_MEMBER LogitRow(const Matrix& matrix, std::int64_t row)
      : data(static_cast<const char*>(matrix.data) + row * matrix.row_stride * bytes_of(matrix.dtype)),
        dtype(matrix.dtype),
        stride(matrix.column_stride) {}

  template <class T>
  BAN_FAST_MEMBER T at(std::int64_t i) const {
    T value;
    with_teacher_type(dtype, [&](auto type) { value = T(widen(typed(type)[i * stride])); });
    return value;
  }

  template <class From>
  BAN_FAST_MEMBER const From* typed(From) const {
    return reinterpret_cast<const From*>(data);
  }
};

// Which classes a thread holds at a time: first, first + step, ...; those below limit are there.
struct Positions {
  int first, step, limit;

  BAN_FAST_MEMBER int operator[](int v) const { return first + v * step; }
  BAN_FAST_MEMBER bool has(int v) const { return first + v * step < limit; }
  // V neighbours, aligned for one access.
  template <int V>
  BAN_FAST_MEMBER bool is_vector() const {
    return V > 1 && step == 1 && first + V <= limit;
  }
};

// V values in their own type, as they lie in memory.
template <class From, int V>
struct alignas(V * sizeof(From) < 16 ? V * sizeof(From) : 16) Raw {
  From x[V];
};

template <int kBytes>
BAN_FAST_DEVICE void copy_aligned(const void* from, void* to) {
  if constexpr (kBytes >= 16) {
    BAN_FAST_UNROLL
    for (int i = 0; i < kBytes; i += 16) {
      device::copy16(static_cast<const char*>(from) + i, static_cast<char*>(to) + i);
    }
  } else if constexpr (kBytes == 8) {
    device::copy8(from, to);
  } else {
    static_assert(kBytes == 4);
    device::copy4(from, to);
  }
}

// -inf where there is no class.
template <int V, class From>
BAN_FAST_DEVICE Raw<From, V> read(const From* row, std::int64_t stride, const Positions& at) {
  Raw<From, V> raw;
  if constexpr (V > 1) {
    if (at.is_vector<V>()) {
      copy_aligned<V * int(sizeof(From))>(row + at.first, raw.x);
      return raw;
    }
  }
  BAN_FAST_UNROLL
  for (int v = 0; v < V; ++v) raw.x[v] = at.has(v) ? row[at[v] * stride] : lowest<From>();
  return raw;
}

template <class T, int V>
BAN_FAST_DEVICE void read(const LogitRow& row, const Positions& at, T (&to)[V]) {
  with_teacher_type(row.dtype, [&](auto type) {
    const auto raw = read<V>(row.typed(type), row.stride, at);
    BAN_FAST_UNROLL
    for (int v = 0; v < V; ++v) to[v] = T(widen(raw.x[v]));
  });
}

// A gradient's row, contiguous.
struct GradientRow {
  char* data;  // null: nobody wants it
  DType dtype;
  static constexpr std::int64_t stride = 1;

  BAN_FAST_MEMBER GradientRow(void* gradient, DType type, std::int64_t row, std::int64_t classes)
      : data(gradient == nullptr ? nullptr : static_cast<char*>(gradient) + row * classes * bytes_of(type)),
        dtype(type) {}

  template <class T, int V>
  BAN_FAST_MEMBER void write(const Positions& at, const T (&from)[V]) const {
    with_student_type<T>(dtype, [&](auto type) {
      using To = decltype(type);
      To* row = reinterpret_cast<To*>(data);
      Raw<To, V> raw;
      BAN_FAST_UNROLL
      for (int v = 0; v < V; ++v) narrow(from[v], raw.x[v]);
      if constexpr (V > 1) {
        if (at.is_vector<V>()) return copy_aligned<V * int(sizeof(To))>(raw.x, row + at.first);
      }
      BAN_FAST_UNROLL
      for (int v = 0; v < V; ++v) {
        if (at.has(v)) row[at[v]] = raw.x[v];
      }
    });
  }
};

// How long rows are cut into tiles, one for a warp at a time with V classes a lane: neighbours where every matrix can
// be read and written 16 bytes at a time (the student's; others may need more or fewer), from the first class `head`
// on that is aligned in all of them; the classes before it are a tile of their own. Else the lanes take classes in turn.
template <int V>
struct Tiling {
  static constexpr int kTile = kWarp * V;
  int classes, head, count;
  bool vector;

  // Of the rows that share it; the first is aligned to 16 bytes.
  template <class First, class... Rest>
  BAN_FAST_MEMBER explicit Tiling(int classes_, const First& first, const Rest&... rest) : classes(classes_), head(0) {
    const int astray = int(reinterpret_cast<std::uintptr_t>(first.data) % 16);
    if (astray != 0) head = (16 - astray) / bytes_of(first.dtype);
    if (head > classes) head = classes;
    vector = fits(first) && (fits(rest) && ...);
    if (!vector) head = 0;
    count = (classes - head + kTile - 1) / kTile + (head > 0 ? 1 : 0);
  }

  BAN_FAST_MEMBER Positions tile(int i) const {
    const int lane = device::thread() % kWarp;
    if (head > 0 && i == 0) return {lane, kWarp, head};
    const int begin = head > 0 ? head + (i - 1) * kTile : i * kTile;
    return vector ? Positions{begin + lane * V, 1, classes} : Positions{begin + lane, kWarp, classes};
  }

  struct Place {
    int tile, lane, v;
  };
  BAN_FAST_MEMBER Place place(int i) const {
    if (i < head) return {0, i, 0};
    const int beyond = i - head, tile = beyond / kTile, in_tile = beyond % kTile;
    const int number = tile + (head > 0 ? 1 : 0);
    return vector ? Place{number, in_tile / V, in_tile % V} : Place{number, in_tile % kWarp, in_tile / kWarp};
  }

 private:
  template <class Row>
  BAN_FAST_MEMBER bool fits(const Row& row) const {
    if (row.data == nullptr) return true;
    const std::uintptr_t size = std::uintptr_t(bytes_of(row.dtype)), unit = V * size < 16 ? V * size : 16;
    return row.stride == 1 && (reinterpret_cast<std::uintptr_t>(row.data) + std::uintptr_t(head) * size) % unit == 0;
  }
};

}  // namespace ban_fast::cuda
