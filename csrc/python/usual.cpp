// A [128, 100] loss takes the kernel 10 us. Checking the arguments in Python, asking tensors for addresses and strides,
// packing those for pybind11 and allocating results took another 7 us; here all of that takes 0.8: DLPack's C exchange
// API describes a tensor in tens of nanoseconds, and makes one of given memory in 0.25 us, where torch.empty_like takes
// 0.7.
//
// Nothing is refused here: whatever is unusual, mistaken or out of range is left to the general path, which serves it
// or says what is wrong.
#include "python/usual.h"

#include <cfloat>
#include <cstdlib>
#include <memory>
#include <new>
#include <optional>
#include <utility>

#include "losses.h"
#include "python/dlpack.h"

namespace py = pybind11;

namespace ban_fast {
namespace {

// Bytes of a gradient: as ban_fast/backends/native.py, where larger ones are of the pool's memory.
constexpr std::int64_t kPooledFrom = 1 << 20;
// Elements: for less, letting other Python threads run meanwhile costs more than it gives.
constexpr std::int64_t kReleaseFrom = 1 << 16;
// As ban_fast/ops/checks.py.
constexpr double kColdest = 1e-18, kHottest = 1e18;

// Types exactly: a subclass may mean more than its data says.
struct Torch {
  const PyTypeObject *tensor = nullptr, *parameter = nullptr;
  const dlpack::ExchangeAPI* api = nullptr;  // null where torch has none of this major version
};

Torch find_torch() {
  const py::object tensor = py::module_::import("torch").attr("Tensor");
  const py::object parameter = py::module_::import("torch.nn").attr("Parameter");
  const py::object capsule = py::getattr(tensor, "__dlpack_c_exchange_api__", py::none());
  if (!PyCapsule_IsValid(capsule.ptr(), "dlpack_exchange_api")) return {};
  auto* api = static_cast<const dlpack::ExchangeAPI*>(PyCapsule_GetPointer(capsule.ptr(), "dlpack_exchange_api"));
  while (api != nullptr && api->version.major > dlpack::kMajor) api = api->older;
  if (api == nullptr || api->version.major != dlpack::kMajor || api->borrow == nullptr) return {};
  return {reinterpret_cast<PyTypeObject*>(tensor.ptr()), reinterpret_cast<PyTypeObject*>(parameter.ptr()), api};
}

// The interpreter's lock is the guard: a static initializer's own would be held while Python runs, and two threads
// could wait for one another.
const Torch& torch() {
  static Torch found;
  static bool searched = false;
  if (!searched) {
    found = find_torch();
    searched = true;
  }
  return found;
}

// ---- Arguments: each reader says whether it found what is usual --------------------------------------------------

bool read(PyObject* object, dlpack::Tensor& to) {
  const PyTypeObject* type = Py_TYPE(object);
  if (type != torch().tensor && type != torch().parameter) return false;
  if (torch().api->borrow(object, &to) != 0) {
    PyErr_Clear();
    return false;
  }
  if (to.data == nullptr || to.device.type != dlpack::kCPU) return false;
  to.data = static_cast<char*>(to.data) + to.byte_offset;
  return true;
}

std::optional<DType> float_type(dlpack::DataType type) {
  if (type.code == dlpack::Code::bfloat && type.bits == 16) return DType::bf16;
  if (type.code != dlpack::Code::floating) return {};
  if (type.bits == 32) return DType::f32;
  if (type.bits == 64) return DType::f64;
  if (type.bits == 16) return DType::f16;
  return {};
}

bool read_matrix(PyObject* object, Matrix& to, std::int64_t& classes) {
  dlpack::Tensor tensor;
  if (!read(object, tensor) || tensor.dims != 2) return false;
  const std::optional<DType> dtype = float_type(tensor.dtype);
  if (!dtype) return false;
  to = {tensor.data, *dtype, tensor.shape[0], tensor.strides[0], tensor.strides[1]};
  classes = tensor.shape[1];
  return true;
}

// None, or one int64 a row.
bool read_indices(PyObject* object, std::int64_t rows, const std::int64_t*& to) {
  to = nullptr;
  if (object == Py_None) return true;
  dlpack::Tensor tensor;
  if (!read(object, tensor) || tensor.dims != 1 || tensor.shape[0] != rows || tensor.strides[0] != 1) return false;
  to = static_cast<const std::int64_t*>(tensor.data);
  return tensor.dtype.code == dlpack::Code::integer && tensor.dtype.bits == 64;
}

bool read_number(PyObject* object, double least, double most, double& to) {
  if (PyFloat_CheckExact(object)) {
    to = PyFloat_AS_DOUBLE(object);
  } else if (PyLong_CheckExact(object)) {
    to = PyLong_AsDouble(object);  // -1 beyond double's range
    PyErr_Clear();
  } else {
    return false;
  }
  return least <= to && to <= most;
}

bool read_integer(PyObject* object, std::int64_t& to) {
  int overflow = 0;
  to = PyLong_CheckExact(object) ? PyLong_AsLongLongAndOverflow(object, &overflow) : 0;
  return PyLong_CheckExact(object) && overflow == 0;
}

bool read_flag(PyObject* object, bool& to) {
  to = object == Py_True;
  return PyBool_Check(object);
}

// Which of two words it is: whether the second.
bool read_choice(PyObject* object, const char* first, const char* second, bool& is_second) {
  if (!PyUnicode_CheckExact(object)) return false;
  is_second = PyUnicode_CompareWithASCIIString(object, second) == 0;
  return is_second || PyUnicode_CompareWithASCIIString(object, first) == 0;
}

// ---- Results -----------------------------------------------------------------------------------------------------

// A contiguous tensor to be, in one block: its description, and its elements from kElements bytes on. Like memory of
// numpy's it cannot grow.
struct Fresh {
  dlpack::ManagedTensor managed;
  std::int64_t shape[2], strides[2];

  static constexpr std::size_t kElements = 128;
};
static_assert(sizeof(Fresh) <= Fresh::kElements);

struct Free {
  void operator()(Fresh* fresh) const { std::free(fresh); }
};
using FreshPointer = std::unique_ptr<Fresh, Free>;

void* data_of(const FreshPointer& made) {
  return made == nullptr ? nullptr : reinterpret_cast<char*>(made.get()) + Fresh::kElements;
}

FreshPointer fresh(dlpack::DataType dtype, std::int32_t dims, std::int64_t rows, std::int64_t columns) {
  constexpr std::size_t kLine = 64;
  const std::size_t bytes = std::size_t(rows * columns) * dtype.bits / 8;
  const std::size_t lines = (Fresh::kElements + bytes + kLine - 1) / kLine;
  FreshPointer made(static_cast<Fresh*>(std::aligned_alloc(kLine, lines * kLine)));
  if (made == nullptr) throw std::bad_alloc();
  const auto deleter = [](dlpack::ManagedTensor* self) { std::free(self); };
  *made = {{{dlpack::kMajor, dlpack::kMinor}, nullptr, deleter, 0, {}}, {rows, columns}, {columns, 1}};
  made->managed.tensor = {data_of(made), {dlpack::kCPU, 0}, dims, dtype, made->shape, made->strides, 0};
  return made;
}

py::object to_python(FreshPointer made) {
  void* object = nullptr;
  if (made == nullptr) return py::none();
  if (torch().api->to_python(&made.release()->managed, &object) != 0) throw py::error_already_set();
  return py::reinterpret_steal<py::object>(static_cast<PyObject*>(object));
}

dlpack::DataType data_type(DType dtype) {
  if (dtype == DType::bf16) return {dlpack::Code::bfloat, 16, 1};
  return {dlpack::Code::floating, std::uint8_t(dtype == DType::f64 ? 64 : dtype == DType::f32 ? 32 : 16), 1};
}

// ---- The call ----------------------------------------------------------------------------------------------------

enum Argument {
  kStudent,
  kTeacher,
  kLabels,
  kTeacherRows,
  kTemperature,
  kKDWeight,
  kLabelWeight,
  kDivergence,
  kScaleT2,
  kIgnoreIndex,
  kReduction,
  kNeedGrad,
  kThreads,
  kArguments
};

struct KDCall {
  Matrix student, teacher;
  Selection selection;
  KDOptions options;
  bool need_grad;
  std::int64_t threads;

  bool read(PyObject* const* args) {
    std::int64_t classes = 0;
    bool is_sum = false;
    if (!read_matrix(args[kStudent], student, selection.classes) || !read_matrix(args[kTeacher], teacher, classes) ||
        !read_indices(args[kLabels], student.rows, selection.labels) ||
        !read_indices(args[kTeacherRows], student.rows, selection.teacher_rows) ||
        !read_number(args[kTemperature], kColdest, kHottest, options.temperature) ||
        !read_number(args[kKDWeight], 0.0, DBL_MAX, options.kd_weight) ||
        !read_number(args[kLabelWeight], 0.0, DBL_MAX, options.label_weight) ||
        !read_choice(args[kDivergence], "kl", "ce", options.cross_entropy) ||
        !read_flag(args[kScaleT2], options.scale_t2) || !read_integer(args[kIgnoreIndex], selection.ignore_index) ||
        !read_choice(args[kReduction], "mean", "sum", is_sum) || !read_flag(args[kNeedGrad], need_grad) ||
        !read_integer(args[kThreads], threads)) {
      return false;
    }
    selection.rows = student.rows;
    options.reduction = is_sum ? Reduction::sum : Reduction::mean;
    const bool is_matched = selection.teacher_rows == nullptr ? teacher.rows == student.rows : teacher.rows > 0;
    const bool has_labels = selection.labels != nullptr || options.label_weight == 0.0;
    const std::int64_t bytes = student.rows * selection.classes * (data_type(student.dtype).bits / 8);
    return classes == selection.classes && is_matched && has_labels && 0 < bytes && bytes < kPooledFrom;
  }

  Offence run(const LossResult& result) const {
    const auto work = [&] { return kd(student, teacher, selection, nullptr, options, result, int(threads)); };
    if (selection.rows * selection.classes < kReleaseFrom) return work();
    py::gil_scoped_release released;
    return work();
  }
};

PyObject* usual_kd(PyObject*, PyObject* const* args, Py_ssize_t count) {
  try {
    KDCall call;
    if (count != kArguments || torch().api == nullptr || !call.read(args)) Py_RETURN_NONE;
    const DType dtype = call.student.dtype;
    const dlpack::DataType acc = data_type(is_double(dtype) ? DType::f64 : DType::f32);
    FreshPointer loss = fresh(acc, 0, 1, 1), gradient, grad_scale;
    if (call.need_grad) {
      gradient = fresh(data_type(dtype), 2, call.selection.rows, call.selection.classes);
      if (dtype == DType::f16) grad_scale = fresh(acc, 0, 1, 1);
    }
    const Offence offence =
        call.run({data_of(loss), nullptr, nullptr, data_of(gradient), static_cast<float*>(data_of(grad_scale))});
    if (offence.what != Offence::What::none) Py_RETURN_NONE;
    return py::make_tuple(to_python(std::move(loss)), to_python(std::move(gradient)), to_python(std::move(grad_scale)))
        .release()
        .ptr();
  } catch (...) {
    PyErr_Clear();
    Py_RETURN_NONE;
  }
}

PyMethodDef functions[] = {
    {"usual_kd", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(usual_kd)), METH_FASTCALL, nullptr}, {}};

}  // namespace

void add_usual_calls(PyObject* module) {
  if (PyModule_AddFunctions(module, functions) != 0) throw py::error_already_set();
}

}  // namespace ban_fast
