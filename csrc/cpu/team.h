// The threads that torch computes with, for work of ours.
#pragma once

namespace ban_fast {

// Calls work(context) on each of `threads` threads of torch's OpenMP runtime, the caller's among them, and waits for all.
// False, and nothing called, where there is none to be had: a torch built without OpenMP, or a forked child, where the
// runtime would wait for threads that stayed with the parent.
bool run_on_torch_threads(int threads, void (*work)(void*), void* context);

}  // namespace ban_fast
