// The executor, as the library and the race checker see it.
#pragma once
#include <stddef.h>
#include <stdint.h>

namespace simt {

enum class Order : int { kForward, kReverse, kRandom };

struct Settings {
  Order order = Order::kForward;  // of threads between barriers, and of blocks in the grid
  uint64_t seed = 1;
  // Fills fresh shared memory and the targets of unfinished copies: 0xff is a NaN in every type, but fminf() ignores
  // NaNs; other patterns are large finite numbers.
  uint8_t poison = 0xff;
};
struct Statistics {
  int64_t launches, blocks, barriers, collectives;
};
extern Settings settings;
extern Statistics statistics;

constexpr size_t kPadding = 4096;  // around shared arrays and global buffers

// Null unless a launch failed.  After an error nothing is launched until clear_error().
const char* error();
void clear_error();
// From a running CUDA thread: ends the launch with this error and does not return.
[[noreturn]] void fail(const char* format, ...) __attribute__((format(printf, 1, 2)));

// The running CUDA thread and its surroundings; -1 outside a kernel.
int running_thread();
bool on_own_stack(const void* address);
bool in_launch_parameters(const void* address, size_t bytes);

// The caller's arrays.  Once there are any, copies from elsewhere are errors; the padding counts as the array.
void add_global(const void* data, size_t bytes);
void forget_globals();

// Does a byte of [begin, end) differ from the poison?
bool written(const char* begin, const char* end, uint8_t poison);

}  // namespace simt
