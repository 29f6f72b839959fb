// What the bindings share (conv2d.cpp has it): the device of a call, its stream, and its errors.
#pragma once
#include "kernels.h"

namespace adderops {
namespace cuda {

// Raises what a launch or a question returned, unless it is a success.
void check(const char* op, cudaError_t status);

// Of the device with this index; raises where none of the kernels runs there.
Device properties(const char* op, int index);

// The stream that torch queues work on, of the device with this index.
cudaStream_t current_stream(int index);

}  // namespace cuda
}  // namespace adderops
