// The functions that every library of the executor exports to ctypes.
#pragma once
#include <stdint.h>

#define EXPORTED __attribute__((visibility("default")))

extern "C" {

// order: of threads and blocks, 0 forward, 1 reverse, 2 random by the seed; poison: the byte that fills fresh memory.
EXPORTED void simt_configure(int order, uint64_t seed, int poison);
// An array of the caller with 4096 bytes of padding on both sides.  elements: null, or for each byte whether it is part
// of the tensor.
EXPORTED void simt_watch(const char* name, void* data, int64_t bytes, int writable, int initialised,
                         const uint8_t* elements);
EXPORTED void simt_forget();
// The findings of the race checker since the last call, one per line; empty without the checker.
EXPORTED const char* simt_findings();
// launches, blocks, barriers of blocks, collectives of warps since the library was loaded.
EXPORTED void simt_statistics(int64_t* four);
}
