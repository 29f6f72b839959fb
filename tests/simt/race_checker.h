// Watches every access of kernels compiled with -fsanitize=thread, which only inserts calls: race_checker.cpp defines
// the functions called, and the sanitizer's own library is not linked.  Without SIMT_RACE_CHECKER nothing is watched.
//
// Two accesses to the same byte are ordered if one thread makes both, or a barrier of the block or of the lanes of a
// warp lies between them.  The blocks of a launch are not ordered; launches follow each other.
#pragma once
#include <stddef.h>
#include <stdint.h>

namespace simt {
namespace race {

// A cp.async writes at any time from kCopyIssued to kCopyArrived.
enum class Kind { kRead, kWrite, kCopyIssued, kCopyArrived };

#if defined(SIMT_RACE_CHECKER)
void begin_launch();
void begin_block();
void block_barrier();
void warp_barrier(int warp, uint32_t mask);
void watch_shared(const char* name, const void* data, size_t bytes);
void forget_shared();
// With kPadding bytes around it that belong to no array.  `elements`: which bytes belong to the tensor, null: all.
void watch_global(const char* name, const void* data, size_t bytes, bool writable, bool initialised,
                  const uint8_t* elements);
void forget_global();
void access(const void* address, size_t bytes, Kind kind, const void* pc);
const char* findings();  // one per line; places in the code as {offset in the library}
void clear_findings();
#else
inline void begin_launch() {}
inline void begin_block() {}
inline void block_barrier() {}
inline void warp_barrier(int, uint32_t) {}
inline void watch_shared(const char*, const void*, size_t) {}
inline void forget_shared() {}
inline void watch_global(const char*, const void*, size_t, bool, bool, const uint8_t*) {}
inline void forget_global() {}
inline void access(const void*, size_t, Kind, const void*) {}
inline const char* findings() { return ""; }
inline void clear_findings() {}
#endif

}  // namespace race
}  // namespace simt
