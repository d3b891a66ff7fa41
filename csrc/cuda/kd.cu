// KD and DKPP on a device: from options to the launch.
#include <algorithm>
#include <cmath>

#include "distill_launch.cuh"

namespace ban_fast::cuda {
namespace {

struct CountTask {
  Selection selection;
  double* counts;  // [blocks]
};

BAN_FAST_KERNEL(kLongThreads, 1) count_rows(BAN_FAST_TASK(CountTask) task) {
  Mailbox* const mail = reinterpret_cast<Mailbox*>(device::shared_memory());
  const std::int64_t first = std::int64_t(device::block()) * device::threads() + device::thread();
  const double kept =
      count_kept(task.selection, first, std::int64_t(device::blocks()) * device::threads(), mail);
  if (device::thread() == 0) task.counts[device::block()] = kept;
}

void launch_distill(DistillTask<double>& task, const Launch& launch) { launch_double(task, launch); }

void launch_distill(DistillTask<float>& task, const Launch& launch) {
  if (task.selection.classes <= kMostShort) return launch_short(task, launch);
  const bool held = task.student.dtype == DType::f32 ? try_shared_single(task, launch) : try_shared_half(task, launch);
  if (!held) launch_streamed_single(task, launch);
}

// Rows whose labels every block counts itself, from the cache, so that a launch is saved.
constexpr std::int64_t kCountedByAll = 4096;

template <class T>
void distill(const Matrix& student, const Matrix& teacher, const Selection& selection, const Key* key,
             const KDOptions& options, const LossResult& result, const Launch& launch) {
  const bool has_labels = selection.labels != nullptr;
  const double temperature = options.temperature;
  double* const counts = launch.scratch + 2 * kMostBlocks;
  const Permuting permuting{key != nullptr,
                            key != nullptr ? key->seed : 0,
                            key != nullptr ? key->step : 0,
                            key != nullptr ? key->step_at : nullptr,
                            key != nullptr ? key->sample_ids : nullptr,
                            FeistelShape(std::uint32_t(selection.classes - 1))};
  DistillTask<T> task{
      .student = student,
      .teacher = teacher,
      .selection = selection,
      .permuting = permuting,
      .temperature = Temperature<T>(temperature),
      .entropy = options.cross_entropy,
      .is_mean = options.reduction == Reduction::mean,
      .kd_factor = options.scale_t2 ? temperature * temperature : 1.0,
      .kd_slope = options.kd_weight * (options.scale_t2 ? temperature : 1.0 / temperature),
      .label_slope = has_labels ? options.label_weight : 0.0,
      .gradient = result.gradient,
      .grad_scale = result.gradient != nullptr && student.dtype == DType::f16 ? result.grad_scale : nullptr,
      .counts = nullptr,
      .count_blocks = 0,
      .ending = {static_cast<T*>(result.loss), static_cast<T*>(result.kd), static_cast<T*>(result.label),
                 options.reduction == Reduction::none, has_labels, options.kd_weight != 0.0,
                 has_labels && options.label_weight != 0.0, options.kd_weight, options.label_weight, launch.scratch,
                 launch.counter},
      .shared = {},
  };
  if (task.is_mean && has_labels && selection.rows > kCountedByAll) {
    task.counts = counts;
    task.count_blocks = std::min(blocks_for(selection.rows, 4 * kLongThreads), kMostCounters);
    device::launch(count_rows, {task.count_blocks, kLongThreads, int(sizeof(Mailbox))}, launch.stream,
                   CountTask{selection, counts});
  }
  launch_distill(task, launch);
}

}  // namespace

void kd(const Matrix& student, const Matrix& teacher, const Selection& selection, const Key* key,
        const KDOptions& options, const LossResult& result, const Launch& launch) {
  const device::Guard guard(launch.device);
  if (is_double(student.dtype)) {
    distill<double>(student, teacher, selection, key, options, result, launch);
  } else {
    distill<float>(student, teacher, selection, key, options, result, launch);
  }
}

}  // namespace ban_fast::cuda
