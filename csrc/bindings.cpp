// What Python can call: addresses, sizes and strides in, nothing owned; python/usual.cpp alone takes whole tensors.
// ban_fast/_native.pyi has the signatures.
#include <pybind11/pybind11.h>

#include <string>
#include <tuple>

#include "cpu/pool.h"
#include "dense.h"
#include "images.h"
#include "losses.h"
#include "python/usual.h"
#ifdef BAN_FAST_WITH_CUDA
#include "cuda/info.h"
#include "cuda/losses.h"
#endif

namespace py = pybind11;

namespace {

using Address = std::uintptr_t;

template <class T>
T* at(Address address) {
  return reinterpret_cast<T*>(address);
}

// Other Python threads may run meanwhile; for less work than this the hand-over costs more than it gives.
constexpr std::int64_t kReleaseFrom = 1 << 16;

template <class Work>
auto without_gil(std::int64_t elements, Work work) {
  if (elements < kReleaseFrom) return work();
  py::gil_scoped_release released;
  return work();
}

// What Python hands over, in tuples; null addresses where a tensor is not given.
using MatrixArgs = std::tuple<Address, int, std::int64_t, std::int64_t, std::int64_t>;  // data, dtype, rows, strides
using SelectionArgs =
    std::tuple<std::int64_t, std::int64_t, Address, Address, std::int64_t>;  // rows, classes, labels,
                                                                             // teacher_rows, ignore_index
using KeyArgs = std::tuple<std::uint64_t, std::uint64_t, Address>;           // seed, step, sample_ids
using OptionsArgs = std::tuple<double, double, double, bool, bool, int>;     // as KDOptions
using ResultArgs = std::tuple<Address, Address, Address, Address, Address>;  // as LossResult

ban_fast::Matrix matrix(const MatrixArgs& args) {
  const auto [data, dtype, rows, row_stride, column_stride] = args;
  // torch's zero tensors, and wrappers of its transforms, have a shape and no memory.
  if (data == 0 && rows > 0) throw py::value_error("logits: a tensor without memory of its own was given; clone it");
  return {at<const void>(data), ban_fast::DType(dtype), rows, row_stride, column_stride};
}

ban_fast::Selection selection(const SelectionArgs& args) {
  const auto [rows, classes, labels, teacher_rows, ignore_index] = args;
  return {rows, classes, at<const std::int64_t>(labels), at<const std::int64_t>(teacher_rows), ignore_index};
}

ban_fast::PermutationKey key(const KeyArgs& args) {
  const auto [seed, step, sample_ids] = args;
  return {seed, step, at<const std::int64_t>(sample_ids)};
}

ban_fast::KDOptions kd_options(const OptionsArgs& args) {
  const auto [temperature, kd_weight, label_weight, cross_entropy, scale_t2, reduction] = args;
  return {temperature, kd_weight, label_weight, cross_entropy, scale_t2, ban_fast::Reduction(reduction)};
}

ban_fast::LossResult result(const ResultArgs& args) {
  const auto [loss, kd_term, label_term, gradient, grad_scale] = args;
  return {at<void>(loss), at<void>(kd_term), at<void>(label_term), at<void>(gradient), at<float>(grad_scale)};
}

// (0, 0), or which index is out of range (1: label, 2: teacher row) and in which row.
py::tuple report(ban_fast::Offence offence) { return py::make_tuple(int(offence.what), offence.row); }

py::tuple kd(const MatrixArgs& student, const MatrixArgs& teacher, const SelectionArgs& rows,
             const OptionsArgs& options, const ResultArgs& to, int threads) {
  const ban_fast::Selection selected = selection(rows);
  return report(without_gil(selected.rows * selected.classes, [&] {
    return ban_fast::kd(matrix(student), matrix(teacher), selected, nullptr, kd_options(options), result(to), threads);
  }));
}

py::tuple dkpp(const MatrixArgs& student, const MatrixArgs& teacher, const SelectionArgs& rows,
               const KeyArgs& permutation, const OptionsArgs& options, const ResultArgs& to, int threads) {
  const ban_fast::Selection selected = selection(rows);
  const ban_fast::PermutationKey by = key(permutation);
  return report(without_gil(selected.rows * selected.classes, [&] {
    return ban_fast::kd(matrix(student), matrix(teacher), selected, &by, kd_options(options), result(to), threads);
  }));
}

// confidence: [M, 1]; without data, c comes from the teacher.
py::tuple cwtm(const MatrixArgs& student, const MatrixArgs& teacher, const MatrixArgs& confidence,
               const SelectionArgs& rows, bool has_normalizer, double normalizer, bool by_label, const ResultArgs& to,
               int threads) {
  const ban_fast::Selection selected = selection(rows);
  const ban_fast::Matrix logits = matrix(teacher), known = matrix(confidence);
  return report(without_gil(selected.rows * selected.classes, [&] {
    return ban_fast::cwtm(matrix(student), known.data == nullptr ? &logits : nullptr,
                          known.data == nullptr ? nullptr : &known, has_normalizer ? &normalizer : nullptr, by_label,
                          selected, result(to), threads);
  }));
}

py::tuple dkpp_targets(const MatrixArgs& teacher, const SelectionArgs& rows, const KeyArgs& permutation,
                       double temperature, Address targets, int threads) {
  const ban_fast::Selection selected = selection(rows);
  return report(without_gil(selected.rows * selected.classes, [&] {
    return ban_fast::dkpp_targets(matrix(teacher), selected, key(permutation), temperature, at<void>(targets), threads);
  }));
}

void dkpp_permutation(Address argmax, std::int64_t rows, std::int64_t classes, const KeyArgs& permutation,
                      Address sources, int threads) {
  without_gil(rows * classes, [&] {
    ban_fast::dkpp_permutation(at<const std::int64_t>(argmax), rows, classes, key(permutation),
                               at<std::int64_t>(sources), threads);
  });
}

void scale_gradient(Address gradient, int dtype, std::int64_t rows, std::int64_t classes, Address factors,
                    std::int64_t factor_stride, double scale, int threads) {
  without_gil(rows * classes, [&] {
    ban_fast::scale_gradient(at<void>(gradient), ban_fast::DType(dtype), rows, classes, at<const void>(factors),
                             factor_stride, scale, threads);
  });
}

using StoredArgs = std::tuple<Address, std::int64_t, std::int64_t, std::int64_t, Address, Address, std::int64_t>;
using ShownArgs = std::tuple<Address, int, std::int64_t, std::int64_t, std::int64_t, std::int64_t, std::int64_t>;

void show_views(const StoredArgs& from, Address rows, Address views, Address words, const ShownArgs& to, int threads) {
  const auto [pixels, height, width, channels, ys, xs, columns] = from;
  const auto [images, word, count, image_stride, channel_stride, row_stride, column_stride] = to;
  const ban_fast::Stored stored{at<const std::uint8_t>(pixels), height, width, channels, at<const std::int32_t>(ys),
                                at<const std::int32_t>(xs), columns};
  const ban_fast::Shown shown{at<void>(images), word, count, image_stride, channel_stride, row_stride, column_stride};
  without_gil(count * height * width * channels, [&] {
    ban_fast::show_views(stored, at<const std::int64_t>(rows), at<const std::int64_t>(views), at<const void>(words),
                         shown, threads);
  });
}

using SizeArgs = std::tuple<int, std::int64_t, std::int64_t>;  // dtype, rows, channels
using PixelsArgs = std::tuple<Address, std::int64_t>;          // data, pitch

ban_fast::dense::Size dense_size(const SizeArgs& args) {
  const auto [dtype, rows, channels] = args;
  return {ban_fast::DType(dtype), rows, channels};
}

template <class Data>
ban_fast::dense::Pixels<Data> pixels(const PixelsArgs& args) {
  return {at<Data>(std::get<0>(args)), std::get<1>(args)};
}

void dense_activate(const SizeArgs& of, const PixelsArgs& x, Address scale, Address shift, const PixelsArgs& out,
                    int threads) {
  const ban_fast::dense::Size size = dense_size(of);
  const ban_fast::dense::Activate job{size, pixels<const void>(x), at<const void>(scale), at<const void>(shift),
                                      pixels<void>(out)};
  without_gil(size.rows * size.channels, [&] { ban_fast::dense::activate(job, threads); });
}

void dense_moments(const SizeArgs& of, const PixelsArgs& x, Address mean, Address distances, int threads) {
  const ban_fast::dense::Size size = dense_size(of);
  const ban_fast::dense::Moments job{size, pixels<const void>(x), at<void>(mean), at<void>(distances)};
  without_gil(size.rows * size.channels, [&] { ban_fast::dense::moments(job, threads); });
}

void dense_deposit(const SizeArgs& of, const PixelsArgs& grad, const PixelsArgs& activation, const PixelsArgs& x,
                   Address scale, Address mean, const PixelsArgs& into, Address dz_sum, Address distance_sum, bool add,
                   int threads) {
  const ban_fast::dense::Size size = dense_size(of);
  const ban_fast::dense::Deposit job{size,
                                     pixels<const void>(grad),
                                     pixels<const void>(activation),
                                     pixels<const void>(x),
                                     at<const void>(scale),
                                     at<const void>(mean),
                                     pixels<void>(into),
                                     at<void>(dz_sum),
                                     at<void>(distance_sum),
                                     add};
  without_gil(size.rows * size.channels, [&] { ban_fast::dense::deposit(job, threads); });
}

void dense_correct(const SizeArgs& of, const PixelsArgs& grad, const PixelsArgs& x, Address mean, Address p, Address q,
                   const PixelsArgs& out, int threads) {
  const ban_fast::dense::Size size = dense_size(of);
  const ban_fast::dense::Correct job{size,
                                     pixels<const void>(grad),
                                     pixels<const void>(x),
                                     at<const void>(mean),
                                     at<const void>(p),
                                     at<const void>(q),
                                     pixels<void>(out)};
  without_gil(size.rows * size.channels, [&] { ban_fast::dense::correct(job, threads); });
}

void dense_pointwise(const SizeArgs& of, const PixelsArgs& x, Address scale, Address shift, Address weight,
                     std::int64_t outputs, const PixelsArgs& out, int threads) {
  const ban_fast::dense::Size size = dense_size(of);
  const ban_fast::dense::Pointwise job{size,
                                       pixels<const void>(x),
                                       at<const void>(scale),
                                       at<const void>(shift),
                                       at<const void>(weight),
                                       outputs,
                                       pixels<void>(out)};
  without_gil(size.rows * size.channels * outputs, [&] { ban_fast::dense::pointwise(job, threads); });
}

void dense_pointwise_backward(const SizeArgs& of, const PixelsArgs& grad, const PixelsArgs& x, Address scale,
                              Address shift, Address mean, Address weight, std::int64_t outputs, const PixelsArgs& into,
                              Address dz_sum, Address distance_sum, Address weight_grad, bool add, int threads) {
  const ban_fast::dense::Size size = dense_size(of);
  const ban_fast::dense::PointwiseBackward job{size,
                                               pixels<const void>(grad),
                                               pixels<const void>(x),
                                               at<const void>(scale),
                                               at<const void>(shift),
                                               at<const void>(mean),
                                               at<const void>(weight),
                                               outputs,
                                               pixels<void>(into),
                                               at<void>(dz_sum),
                                               at<void>(distance_sum),
                                               at<void>(weight_grad),
                                               add};
  without_gil(size.rows * size.channels * outputs, [&] { ban_fast::dense::pointwise_backward(job, threads); });
}

// The block's bytes, for torch.frombuffer: its tensor keeps the object, and so the block, as long as any storage does.
py::buffer_info bytes_of(ban_fast::PooledMemory& block) {
  return py::buffer_info(static_cast<std::uint8_t*>(block.data()), py::ssize_t(block.size()));
}

py::tuple pool_use() {
  const ban_fast::PoolUse use = ban_fast::pool_use();
  return py::make_tuple(use.owned, use.most_owned, use.kept);
}

#ifdef BAN_FAST_WITH_CUDA

using CudaKeyArgs = std::tuple<std::uint64_t, std::uint64_t, Address, Address>;  // as cuda::Key
using LaunchArgs = std::tuple<int, Address, Address, Address>;                   // as cuda::Launch

ban_fast::cuda::Key cuda_key(const CudaKeyArgs& args) {
  const auto [seed, step, step_at, sample_ids] = args;
  return {seed, step, at<const std::int64_t>(step_at), at<const std::int64_t>(sample_ids)};
}

ban_fast::cuda::Launch cuda_launch(const LaunchArgs& args) {
  const auto [device, stream, scratch, counter] = args;
  return {device, at<void>(stream), at<double>(scratch), at<std::uint32_t>(counter)};
}

void cuda_kd(const MatrixArgs& student, const MatrixArgs& teacher, const SelectionArgs& rows,
             const OptionsArgs& options, const ResultArgs& to, const LaunchArgs& launch) {
  ban_fast::cuda::kd(matrix(student), matrix(teacher), selection(rows), nullptr, kd_options(options), result(to),
                     cuda_launch(launch));
}

void cuda_dkpp(const MatrixArgs& student, const MatrixArgs& teacher, const SelectionArgs& rows,
               const CudaKeyArgs& permutation, const OptionsArgs& options, const ResultArgs& to,
               const LaunchArgs& launch) {
  const ban_fast::cuda::Key by = cuda_key(permutation);
  ban_fast::cuda::kd(matrix(student), matrix(teacher), selection(rows), &by, kd_options(options), result(to),
                     cuda_launch(launch));
}

void cuda_cwtm(const MatrixArgs& student, const MatrixArgs& teacher, const MatrixArgs& confidence,
               const SelectionArgs& rows, Address normalizer, bool by_label, const ResultArgs& to,
               const LaunchArgs& launch) {
  const ban_fast::Matrix logits = matrix(teacher), known = matrix(confidence);
  ban_fast::cuda::cwtm(matrix(student), known.data == nullptr ? &logits : nullptr,
                       known.data == nullptr ? nullptr : &known, at<const void>(normalizer), by_label, selection(rows),
                       result(to), cuda_launch(launch));
}

void cuda_dkpp_targets(const MatrixArgs& teacher, const SelectionArgs& rows, const CudaKeyArgs& permutation,
                       double temperature, Address targets, const LaunchArgs& launch) {
  ban_fast::cuda::dkpp_targets(matrix(teacher), selection(rows), cuda_key(permutation), temperature, at<void>(targets),
                               cuda_launch(launch));
}

void cuda_dkpp_permutation(Address argmax, std::int64_t rows, std::int64_t classes, const CudaKeyArgs& permutation,
                           Address sources, const LaunchArgs& launch) {
  ban_fast::cuda::dkpp_permutation(at<const std::int64_t>(argmax), rows, classes, cuda_key(permutation),
                                   at<std::int64_t>(sources), cuda_launch(launch));
}

void cuda_scale_gradient(Address gradient, int dtype, std::int64_t rows, std::int64_t classes, Address factors,
                         std::int64_t factor_stride, Address scale, const LaunchArgs& launch) {
  ban_fast::cuda::scale_gradient(at<void>(gradient), ban_fast::DType(dtype), rows, classes, at<const void>(factors),
                                 factor_stride, at<const void>(scale), cuda_launch(launch));
}

#endif

py::dict cuda_info() {
  py::dict info;
#ifdef BAN_FAST_WITH_CUDA
  info["built"] = true;
  info["runtime_version"] = ban_fast::cuda::runtime_version();
  info["architectures"] = std::string(BAN_FAST_CUDA_ARCHS);
  info["devices"] = ban_fast::cuda::device_count();
#else
  info["built"] = false;
#endif
  return info;
}

}  // namespace

PYBIND11_MODULE(_native, m) {
  m.doc() = "Native kernels of ban_fast over plain addresses; see ban_fast/backends/native.py.";
  m.attr("INTERFACE") = 1;  // as in backends/native.py
  ban_fast::add_usual_calls(m.ptr());
  m.def("kd", &kd);
  m.def("dkpp", &dkpp);
  m.def("cwtm", &cwtm);
  m.def("dkpp_targets", &dkpp_targets);
  m.def("dkpp_permutation", &dkpp_permutation);
  m.def("scale_gradient", &scale_gradient);
  m.def("show_views", &show_views);
  m.def("dense_activate", &dense_activate);
  m.def("dense_moments", &dense_moments);
  m.def("dense_deposit", &dense_deposit);
  m.def("dense_correct", &dense_correct);
  m.def("dense_pointwise", &dense_pointwise);
  m.def("dense_pointwise_backward", &dense_pointwise_backward);
  py::class_<ban_fast::PooledMemory>(m, "PooledMemory", py::buffer_protocol(), py::module_local(),
                                     "Memory of the pool for gradients, with the buffer protocol; its size in bytes.")
      .def(py::init<std::size_t>())
      .def_buffer(&bytes_of);
  m.def("pool_use", &pool_use);
  m.def("empty_pool", &ban_fast::empty_pool);
  m.def("instruction_set", &ban_fast::instruction_set,
        "Instruction set of the CPU kernels; the environment variable BAN_FAST_ISA can name another that is there.");
#ifdef BAN_FAST_WITH_CUDA
  m.def("cuda_kd", &cuda_kd);
  m.def("cuda_dkpp", &cuda_dkpp);
  m.def("cuda_cwtm", &cuda_cwtm);
  m.def("cuda_dkpp_targets", &cuda_dkpp_targets);
  m.def("cuda_dkpp_permutation", &cuda_dkpp_permutation);
  m.def("cuda_scale_gradient", &cuda_scale_gradient);
  m.def("cuda_scratch", [] { return ban_fast::cuda::kScratch; });
#endif
  m.def("cuda_info", &cuda_info,
        "What the CUDA part was built with: {built, runtime_version, architectures, devices}; {built: False} without "
        "it.");
}
