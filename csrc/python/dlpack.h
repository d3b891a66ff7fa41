// DLPack's C exchange API as far as it is used here: how tensors of Python are read and made without linking to their
// library. Declared after the public specification, version 1.3 (https://dmlc.github.io/dlpack/latest/c_api.html). It
// calls these DLTensor, DLManagedTensorVersioned and so on; everything of the same major version has this layout.
#pragma once

#include <cstdint>

namespace ban_fast::dlpack {

inline constexpr std::uint32_t kMajor = 1, kMinor = 3;
inline constexpr std::int32_t kCPU = 1;
enum class Code : std::uint8_t { integer = 0, floating = 2, bfloat = 4 };

struct Version {
  std::uint32_t major, minor;
};

struct Device {
  std::int32_t type, id;
};

struct DataType {
  Code code;
  std::uint8_t bits;
  std::uint16_t lanes;
};

// DLTensor. Strides in elements.
struct Tensor {
  void* data;
  Device device;
  std::int32_t dims;
  DataType dtype;
  std::int64_t* shape;
  std::int64_t* strides;
  std::uint64_t byte_offset;
};

// DLManagedTensorVersioned.
struct ManagedTensor {
  Version version;
  void* owner;
  void (*deleter)(ManagedTensor* self);
  std::uint64_t flags;
  Tensor tensor;
};

// DLPackExchangeAPI. What returns int returns 0, or -1 with an exception of Python's.
struct ExchangeAPI {
  Version version;
  const ExchangeAPI* older;
  void (*unused[2])();
  int (*to_python)(ManagedTensor* given_away, void** object);
  int (*borrow)(void* object, Tensor* to);  // shape and strides stay the object's; may be null
};

}  // namespace ban_fast::dlpack
