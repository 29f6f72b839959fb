// The memory that a call works in, and the pool that keeps it between calls.  No torch.
#pragma once
#include <stdint.h>

#include <memory>
#include <new>

namespace adderops {
namespace cpu {

// Becomes a MemoryError in Python; its text says how much was asked for.
class OutOfMemory : public std::bad_alloc {
 public:
  OutOfMemory(const char* op, int64_t bytes) noexcept;
  const char* what() const noexcept override { return text_; }

 private:
  char text_[128];
};

// Memory and its size in one object.  Without memory, bytes is 0.
struct Buffer {
  struct Free {
    void operator()(char* p) const;
  };
  std::unique_ptr<char, Free> memory;
  int64_t bytes = 0;
};

constexpr int64_t kAlignment = 4096;

// The workspace of one call.  Fresh pages from the system would cost a small call more than its arithmetic, so buffers
// of up to 32 MiB stay in a pool of the process, at most `most_kept` of them, and the next call on any thread takes one
// that is large enough.  Throws OutOfMemory if the allocation fails; the pool still works then.
class Workspace {
 public:
  Workspace(const char* op, int64_t bytes, int64_t most_kept);
  ~Workspace();
  Workspace(const Workspace&) = delete;
  Workspace& operator=(const Workspace&) = delete;
  char* get() const { return buffer_.memory.get(); }

 private:
  Buffer buffer_;
  const int64_t most_kept_;
};

}  // namespace cpu
}  // namespace adderops
