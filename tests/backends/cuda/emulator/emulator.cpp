// The emulator's fibers and what they wait for.
#include <sys/mman.h>
#include <ucontext.h>

#include <array>
#include <cstdlib>
#include <memory>
#include <random>
#include <vector>

#include "device.cuh"

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#else
#include <setjmp.h>
#endif

namespace emulator {

Limits limits{227 << 10, 228 << 10, 16};
std::uint32_t seed = 0;

namespace {

constexpr std::size_t kStack = 256 << 10;
constexpr int kWarp = 32;

struct Fiber;

// What some threads wait for: that all those expected have come.
struct Meeting {
  std::uint32_t lanes;  // of a warp, or 0 for a barrier
  std::size_t size;     // of the values exchanged
  int bits;
  std::uint32_t come = 0;
  std::array<std::array<char, 16>, kWarp> values;
  std::vector<Fiber*> waiting;
};

struct Block {
  std::unique_ptr<char, void (*)(void*)> shared{nullptr, std::free};
  int ended = 0;
  std::shared_ptr<Meeting> barrier;
  std::vector<std::vector<std::shared_ptr<Meeting>>> warps;  // those of lanes that are not complete
};

struct Fiber {
  Place place;
  Block* block;
  char* stack;
  bool started = false, done = false;
  ucontext_t context;
#if !defined(__SANITIZE_ADDRESS__)
  jmp_buf jump;
#endif
};

struct Cluster {
  Grid grid;
  std::vector<Block> blocks;
  std::vector<std::unique_ptr<Fiber>> fibers;
  std::vector<Fiber*> ready;
  std::shared_ptr<Meeting> barrier;
};

// One launch at a time.
Cluster* cluster;
Fiber* current;
const std::function<void()>* body;
std::string failure;

#if defined(__SANITIZE_ADDRESS__)
ucontext_t scheduler;
const void* scheduler_stack;
std::size_t scheduler_stack_size;
#else
jmp_buf scheduler_jump;
#endif

char* stack_number(std::size_t number) {
  static std::vector<char*> stacks;
  while (stacks.size() <= number) {
    void* memory = mmap(nullptr, kStack, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) throw std::bad_alloc();
    stacks.push_back(static_cast<char*>(memory));
  }
  return stacks[number];
}

// Back to the scheduler.
void leave() {
  Fiber* self = current;
#if defined(__SANITIZE_ADDRESS__)
  void* fake = nullptr;
  __sanitizer_start_switch_fiber(self->done ? nullptr : &fake, scheduler_stack, scheduler_stack_size);
  swapcontext(&self->context, &scheduler);
  __sanitizer_finish_switch_fiber(fake, &scheduler_stack, &scheduler_stack_size);
#else
  if (_setjmp(self->jump) == 0) _longjmp(scheduler_jump, 1);
#endif
}

void begin() {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(nullptr, &scheduler_stack, &scheduler_stack_size);
#endif
  try {
    (*body)();
  } catch (const std::exception& error) {
    failure = error.what();
  }
  current->done = true;
  ++current->block->ended;
  leave();
}

void resume(Fiber& fiber) {
  current = &fiber;
#if defined(__SANITIZE_ADDRESS__)
  void* fake = nullptr;
  if (!fiber.started) {
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack;
    fiber.context.uc_stack.ss_size = kStack;
    fiber.context.uc_link = nullptr;
    makecontext(&fiber.context, begin, 0);
    fiber.started = true;
  }
  __sanitizer_start_switch_fiber(&fake, fiber.stack, kStack);
  swapcontext(&scheduler, &fiber.context);
  __sanitizer_finish_switch_fiber(fake, nullptr, nullptr);
#else
  // A signal mask saved at every switch would be a system call.
  if (_setjmp(scheduler_jump) != 0) return;
  if (fiber.started) _longjmp(fiber.jump, 1);
  getcontext(&fiber.context);
  fiber.context.uc_stack.ss_sp = fiber.stack;
  fiber.context.uc_stack.ss_size = kStack;
  fiber.context.uc_link = nullptr;
  makecontext(&fiber.context, begin, 0);
  fiber.started = true;
  setcontext(&fiber.context);
#endif
}

std::shared_ptr<Meeting> meeting(std::uint32_t lanes, std::size_t size, int bits) {
  auto made = std::make_shared<Meeting>();
  made->lanes = lanes;
  made->size = size;
  made->bits = bits;
  return made;
}

// Waits at `place`, a barrier for `expected` threads.
void wait(std::shared_ptr<Meeting>& place, std::size_t expected) {
  if (place == nullptr) place = meeting(0, 0, 0);
  const std::shared_ptr<Meeting> here = place;
  here->waiting.push_back(current);
  if (here->waiting.size() == expected) {
    place = nullptr;
    cluster->ready.insert(cluster->ready.end(), here->waiting.begin(), here->waiting.end());
  }
  leave();
}

std::shared_ptr<Meeting> meet_lanes(std::uint32_t lanes, const void* value, std::size_t size, int bits) {
  const int lane = current->place.thread % kWarp;
  const std::uint32_t mine = 1u << lane;
  if ((lanes & mine) == 0) fail("a lane waits for lanes that it is not one of");
  auto& open = current->block->warps[std::size_t(current->place.thread / kWarp)];
  std::shared_ptr<Meeting> here;
  for (auto& other : open) {
    if ((other->lanes & lanes) == 0) continue;
    if (other->lanes != lanes || other->size != size || other->bits != bits) {
      fail("lanes wait for each other at different places");
    }
    here = other;
  }
  if (here == nullptr) open.push_back(here = meeting(lanes, size, bits));
  if (size > 0) std::memcpy(here->values[std::size_t(lane)].data(), value, size);
  here->come |= mine;
  here->waiting.push_back(current);
  if (here->come == lanes) {
    std::erase(open, here);
    cluster->ready.insert(cluster->ready.end(), here->waiting.begin(), here->waiting.end());
  }
  leave();
  return here;
}

std::string who_waits() {
  int waiting = 0, ended = 0;
  for (const auto& fiber : cluster->fibers) (fiber->done ? ended : waiting) += 1;
  return std::to_string(waiting) + " threads wait for others that never come, " + std::to_string(ended) + " have ended";
}

void make_cluster(Cluster& made, const Grid& grid, int first_block) {
  made.grid = grid;
  made.blocks.resize(std::size_t(grid.cluster));
  for (int rank = 0; rank < grid.cluster; ++rank) {
    Block& block = made.blocks[std::size_t(rank)];
    void* memory = nullptr;
    const std::size_t bytes = std::size_t(std::max(grid.shared_bytes, 1));
    if (posix_memalign(&memory, 16, bytes) != 0) throw std::bad_alloc();
    std::memset(memory, 0xa5, bytes);  // so that nothing is 0 that was not written
    block.shared.reset(static_cast<char*>(memory));
    block.warps.resize(std::size_t((grid.threads + kWarp - 1) / kWarp));
    for (int i = 0; i < grid.threads; ++i) {
      auto fiber = std::make_unique<Fiber>();
      fiber->place = {i, grid.threads, first_block + rank, grid.blocks, rank, grid.cluster, block.shared.get()};
      fiber->block = &block;
      fiber->stack = stack_number(made.fibers.size());
      made.ready.push_back(fiber.get());
      made.fibers.push_back(std::move(fiber));
    }
  }
}

void run_cluster(const Grid& grid, int first_block, std::mt19937& draw) {
  Cluster made;
  make_cluster(made, grid, first_block);
  cluster = &made;
  std::size_t left = made.fibers.size();
  while (left > 0) {
    if (made.ready.empty()) throw std::runtime_error(who_waits());
    std::vector<Fiber*> turn;
    turn.swap(made.ready);
    if (seed != 0) std::shuffle(turn.begin(), turn.end(), draw);
    for (Fiber* fiber : turn) {
      resume(*fiber);
      if (!failure.empty()) throw std::runtime_error(failure);
      if (fiber->done) --left;
    }
  }
}

}  // namespace

const Place& here() { return current->place; }

void fail(const std::string& what) { throw std::runtime_error(what); }

void sync_block() { wait(current->block->barrier, std::size_t(cluster->grid.threads)); }

void sync_cluster() { wait(cluster->barrier, cluster->fibers.size()); }

void sync_lanes(std::uint32_t lanes) { meet_lanes(lanes, nullptr, 0, 0); }

void exchange(std::uint32_t lanes, void* value, std::size_t size, int bits) {
  const int other = (current->place.thread % kWarp) ^ bits;
  if ((lanes >> other & 1u) == 0) fail("a lane takes the value of one that is not named");
  const std::shared_ptr<Meeting> met = meet_lanes(lanes, value, size, bits);
  std::memcpy(value, met->values[std::size_t(other)].data(), size);
}

void* in_block(const void* place, int rank) {
  const std::ptrdiff_t offset = static_cast<const char*>(place) - current->place.shared;
  if (offset < 0 || offset >= cluster->grid.shared_bytes) fail("not a place in shared memory");
  if (rank < 0 || rank >= cluster->grid.cluster) fail("no such block in the cluster");
  Block& block = cluster->blocks[std::size_t(rank)];
  if (block.ended > 0) fail("the shared memory of a block that has ended");
  return block.shared.get() + offset;
}

void run(const Grid& grid, const std::function<void()>& thread) {
  if (grid.blocks < 1 || grid.threads < 1 || grid.threads % kWarp != 0 || grid.blocks % grid.cluster != 0) {
    fail("a grid that no device would launch");
  }
  if (grid.shared_bytes > limits.shared_of_block) fail("more shared memory than a block can have");
  static std::mt19937 draw;
  draw.seed(seed);
  body = &thread;
  failure.clear();
  std::vector<int> order(std::size_t(grid.blocks / grid.cluster));
  for (std::size_t i = 0; i < order.size(); ++i) order[i] = int(i) * grid.cluster;
  if (seed != 0) std::shuffle(order.begin(), order.end(), draw);
  for (const int first : order) run_cluster(grid, first, draw);
}

}  // namespace emulator
