#include "workspace.h"

#include <cinttypes>
#include <cstdio>
#include <cstdlib>
#include <mutex>
#include <utility>

#include "../sizes.h"

namespace adderops {
namespace cpu {
namespace {

constexpr int64_t kMostBytes = 32 << 20;  // of a buffer in the pool
constexpr int kPlaces = 64;

// Buffers that no call uses.  A call that finds the pool locked does without it, so nobody ever waits: no thread, and
// no child process that was forked while another thread held the lock.
struct Pool {
  std::mutex mutex;
  Buffer places[kPlaces];

  // The smallest buffer of at least `bytes`.  If none is large enough, an empty one, and the largest is freed: a larger
  // one will be given back instead.
  Buffer take(int64_t bytes) {
    Buffer taken;
    const std::unique_lock<std::mutex> lock(mutex, std::try_to_lock);
    if (!lock) return taken;
    Buffer* best = nullptr;
    for (Buffer& b : places) {
      if (!b.memory) continue;
      const bool fits = b.bytes >= bytes;
      if (!best || (best->bytes >= bytes ? fits && b.bytes < best->bytes : b.bytes > best->bytes)) best = &b;
    }
    if (best) taken = {std::move(best->memory), std::exchange(best->bytes, 0)};
    return taken.bytes >= bytes ? std::move(taken) : Buffer{};
  }

  void give(Buffer buffer, int64_t most) {
    if (buffer.bytes > kMostBytes) return;
    const std::unique_lock<std::mutex> lock(mutex, std::try_to_lock);
    if (!lock) return;
    for (int64_t i = 0; i < kPlaces && i < most; ++i)
      if (!places[i].memory) {
        places[i] = std::move(buffer);
        return;
      }
  }
};

// Never destroyed: threads may still compute while the process ends.
Pool& pool() {
  alignas(Pool) static char memory[sizeof(Pool)];
  static Pool* const pool = new (memory) Pool;
  return *pool;
}

Buffer allocate(const char* op, int64_t bytes) {
  const int64_t whole = product(sum(bytes, kAlignment - 1) / kAlignment, kAlignment);
  Buffer buffer{std::unique_ptr<char, Buffer::Free>(static_cast<char*>(std::aligned_alloc(kAlignment, whole))), whole};
  if (!buffer.memory) throw OutOfMemory(op, bytes);
  return buffer;
}

}  // namespace

OutOfMemory::OutOfMemory(const char* op, int64_t bytes) noexcept {
  const bool known = bytes < kTooLarge;
  std::snprintf(text_, sizeof(text_), "%s: cannot allocate %s%" PRId64 " bytes of workspace", op,
                known ? "" : "more than ", bytes);
}

void Buffer::Free::operator()(char* p) const { std::free(p); }

Workspace::Workspace(const char* op, int64_t bytes, int64_t most_kept)
    : buffer_(pool().take(bytes)), most_kept_(most_kept) {
  if (!buffer_.memory) buffer_ = allocate(op, bytes);
}

Workspace::~Workspace() { pool().give(std::move(buffer_), most_kept_); }

}  // namespace cpu
}  // namespace adderops
