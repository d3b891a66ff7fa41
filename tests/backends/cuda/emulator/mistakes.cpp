// Kernels with a mistake each, that the emulator must find.
#include "device.cuh"

namespace {

enum class Mistake { none, no_barrier, divergent_barrier, unnamed_lane, different_lanes, astray, ended_block };

struct Task {
  Mistake mistake;
  int* result;
};

// Every thread writes its number, and thread 0 adds up all of them.
void add_up(const Task task) {
  using namespace ban_fast::cuda::device;
  int* const numbers = reinterpret_cast<int*>(shared_memory());
  numbers[thread()] = thread();
  if (task.mistake == Mistake::divergent_barrier && thread() == 3) return;
  if (task.mistake != Mistake::no_barrier) sync_block();
  if (task.mistake == Mistake::unnamed_lane) exchange(0xffffu, 0, 16);
  if (task.mistake == Mistake::different_lanes) sync_lanes(thread() % 32 < 16 ? 0xffffu : ~0u);
  if (task.mistake == Mistake::astray) copy16(shared_memory() + 4, shared_memory() + 16);
  if (task.mistake == Mistake::ended_block && cluster_rank() == 0) {
    sync_block();
    task.result[0] = in_block(numbers, 1)[0];
    sync_block();
    task.result[0] = in_block(numbers, 1)[0];
  }
  if (thread() != 0 || cluster_rank() != 0) return;
  int sum = 0;
  for (int i = 0; i < threads(); ++i) sum += numbers[i];
  task.result[0] = sum;
}

}  // namespace

void run_with_mistake(int mistake, int* result) {
  constexpr int kThreads = 64;
  const int cluster = Mistake(mistake) == Mistake::ended_block ? 2 : 1;
  ban_fast::cuda::device::launch(add_up, {cluster, kThreads, kThreads * int(sizeof(int)), cluster}, nullptr,
                                 Task{Mistake(mistake), result});
}
