#include "cpu/threads.h"

#include <pthread.h>
#include <signal.h>

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <exception>
#include <mutex>
#include <system_error>
#include <thread>
#include <vector>

#include "cpu/team.h"

namespace ban_fast {
namespace {

struct Job {
  std::int64_t count, chunk;
  RangeBody body;
  void* context;
  std::atomic<std::int64_t> next{0};
  std::atomic<bool> failed{false};
  std::exception_ptr failure;

  void work() noexcept {
    try {
      for (;;) {
        const std::int64_t begin = next.fetch_add(chunk, std::memory_order_relaxed);
        if (begin >= count) return;
        body(context, begin, std::min(begin + chunk, count));
      }
    } catch (...) {
      if (!failed.exchange(true)) failure = std::current_exception();
    }
  }
};

// For where torch's threads are not to be had. Workers sleep between jobs. A pool is never destroyed: its threads end
// with the process, and in a forked child, which has none of them, it is left behind as it is.
class Pool {
 public:
  // One job at a time: false where another thread's is running.
  bool try_run(Job& job, int helpers) {
    std::unique_lock<std::mutex> exclusive(running_, std::try_to_lock);
    if (!exclusive.owns_lock()) return false;
    {
      std::lock_guard<std::mutex> lock(mutex_);
      wanted_ = grow(helpers);
      job_ = &job;
      busy_ = 0;
      ++generation_;
    }
    wake_.notify_all();
    job.work();
    std::unique_lock<std::mutex> lock(mutex_);
    wanted_ = 0;  // a worker that has not woken by now is not needed
    done_.wait(lock, [this] { return busy_ == 0; });
    return true;
  }

 private:
  // Starts workers until there are `wanted`; returns how many there are of those, fewer where the system gives no more
  // threads.
  int grow(int wanted) {
    sigset_t all, before;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);  // workers inherit it: signals are for the threads of Python
    try {
      while (int(workers_.size()) < wanted) workers_.emplace_back([this] { serve(); });
    } catch (const std::system_error&) {
      wanted = int(workers_.size());
    }
    pthread_sigmask(SIG_SETMASK, &before, nullptr);
    return wanted;
  }

  void serve() {
    std::uint64_t seen = 0;
    std::unique_lock<std::mutex> lock(mutex_);
    for (;;) {
      wake_.wait(lock, [&] { return generation_ != seen && wanted_ > 0; });
      seen = generation_;
      --wanted_;
      ++busy_;
      Job* job = job_;
      lock.unlock();
      job->work();
      lock.lock();
      if (--busy_ == 0) done_.notify_one();
    }
  }

  std::mutex running_, mutex_;
  std::condition_variable wake_, done_;
  std::vector<std::thread> workers_;
  Job* job_ = nullptr;
  int wanted_ = 0, busy_ = 0;
  std::uint64_t generation_ = 0;
};

std::atomic<Pool*> current_pool{nullptr};

Pool& pool() {
  Pool* found = current_pool.load(std::memory_order_acquire);
  if (found != nullptr) return *found;
  static std::once_flag registered;
  std::call_once(registered, [] { pthread_atfork(nullptr, nullptr, [] { current_pool.store(nullptr); }); });
  Pool* fresh = new Pool;
  if (current_pool.compare_exchange_strong(found, fresh)) return *fresh;
  delete fresh;  // another thread was first; this one has no workers yet
  return *found;
}

}  // namespace

void parallel_for(std::int64_t count, std::int64_t chunk, int threads, RangeBody body, void* context) {
  if (count <= 0) return;
  const std::int64_t chunks = (count + chunk - 1) / chunk;
  const int helpers = int(std::min<std::int64_t>(threads, chunks)) - 1;
  if (helpers > 0) {
    Job job;
    job.count = count;
    job.chunk = chunk;
    job.body = body;
    job.context = context;
    // All of torch's threads, as torch does: GNU's runtime ends those that a smaller team leaves out.
    const auto work = [](void* opaque) { static_cast<Job*>(opaque)->work(); };
    if (run_on_torch_threads(threads, work, &job) || pool().try_run(job, helpers)) {
      if (job.failed) std::rethrow_exception(job.failure);
      return;
    }
  }
  body(context, 0, count);
}

}  // namespace ban_fast
