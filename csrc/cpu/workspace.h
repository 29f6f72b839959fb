// The memory in which a call works, and who keeps it between calls.  No torch.
#pragma once
#include <stdint.h>

#include <memory>
#include <new>

namespace adderops {
namespace cpu {

// A MemoryError in Python, and what was asked for.
class OutOfMemory : public std::bad_alloc {
 public:
  OutOfMemory(const char* op, int64_t bytes) noexcept;
  const char* what() const noexcept override { return text_; }

 private:
  char text_[128];
};

// Memory and its size, one object: what has no memory has no bytes.
struct Block {
  struct Free {
    void operator()(char* p) const;
  };
  std::unique_ptr<char, Free> memory;
  int64_t bytes = 0;
};

constexpr int64_t kAlignment = 4096;

// A call's workspace.  Fresh pages from the system would cost a small call more than its arithmetic does, so blocks of
// up to 32 MiB stay in a pool of the process, at most `most_kept` of them, and the next call takes one that is large
// enough, from whatever thread.  Throws OutOfMemory where there is no memory; the pool is then as good as before.
class Workspace {
 public:
  Workspace(const char* op, int64_t bytes, int64_t most_kept);
  ~Workspace();
  Workspace(const Workspace&) = delete;
  Workspace& operator=(const Workspace&) = delete;
  char* get() const { return block_.memory.get(); }

 private:
  Block block_;
  const int64_t most_kept_;
};

}  // namespace cpu
}  // namespace adderops
