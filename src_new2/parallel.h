// Loops of the CPU's ops on torch's threads.
#pragma once

#include <atomic>
#include <cstdint>
#include <exception>
#include <stdexcept>

namespace erniem_fast {

// `torch_parallel_for` of torch's stable ABI. Callers pass it as an argument, so that the library is built without
// torch and one build serves every version of torch that has the function.
using Range = void (*)(int64_t begin, int64_t end, void* context);
using ParallelFor = int32_t (*)(int64_t begin, int64_t end, int64_t grain, Range range, void* context);

// The least work that is worth waking a thread, in elements: the value of torch's own pointwise kernels.
constexpr int64_t GRAIN = 32768;

// The state that the parts of a loop share. An exception must not cross torch's frames, because they are C's: the first
// one is kept, and `parallel` throws it again on its caller's thread.
template <typename Body>
struct Loop {
  const Body& range;
  std::atomic_flag failed = ATOMIC_FLAG_INIT;
  std::exception_ptr error = nullptr;

  static void run_part(int64_t begin, int64_t end, void* context) noexcept {
    Loop& loop = *static_cast<Loop*>(context);
    try {
      loop.range(begin, end);
    } catch (...) {
      if (!loop.failed.test_and_set()) loop.error = std::current_exception();
    }
  }
};

// Calls `range(begin, end)` for parts of [0, size), where each index costs as much as `elements` pointwise ones.
//
// Throws what `range` throws.
template <typename Body>
void parallel(ParallelFor run, int64_t size, int64_t elements, const Body& range) {
  const int64_t grain = 1 + GRAIN / (1 + elements);
  Loop<Body> loop = {range};
  const bool done = run(0, size, grain, Loop<Body>::run_part, &loop) == 0;
  if (loop.error != nullptr) std::rethrow_exception(loop.error);
  if (!done) throw std::runtime_error("torch_parallel_for failed");
}

}  // namespace erniem_fast
