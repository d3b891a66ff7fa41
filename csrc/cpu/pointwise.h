// How the products of 1x1 convolutions lay out what they read: common to their driver and their kernels.
#pragma once

#include <cstdint>

namespace ban_fast::pointwise {

inline constexpr std::int64_t kVectorBytes = 64;
inline constexpr std::int64_t kPanelVectors = 3;

template <class T>
inline constexpr std::int64_t kLanes = kVectorBytes / std::int64_t(sizeof(T));

inline constexpr std::int64_t vectors_of(std::int64_t count, std::int64_t lanes) { return (count + lanes - 1) / lanes; }

// A matrix [steps, columns] as panels of up to kPanelVectors vectors of columns, one after the other, each with its
// rows contiguous: a product's inner loop reads it from the first to the last. Columns beyond the matrix's are 0.
template <class T>
struct Panels {
  const T* data;
  std::int64_t steps, vectors;

  // Row 0 of vector number v, and from there the way to the next row.
  const T* at(std::int64_t v) const { return data + (first(v) * steps + v - first(v)) * kLanes<T>; }
  std::int64_t pitch(std::int64_t v) const {
    const std::int64_t left = vectors - first(v);
    return (left < kPanelVectors ? left : kPanelVectors) * kLanes<T>;
  }

 private:
  static std::int64_t first(std::int64_t v) { return v / kPanelVectors * kPanelVectors; }
};

}  // namespace ban_fast::pointwise
