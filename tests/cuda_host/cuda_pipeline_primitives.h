// Replaces CUDA's header of asynchronous copies to shared memory: here a copy is made when its thread waits for it, so
// that a thread that does not wait reads the old contents.
#pragma once

#include "cuda_runtime.h"

namespace cuda_host {

void start_copy(void* to, const void* from, size_t bytes, size_t zeros);
void end_group_of_copies();
// Makes the copies of all groups except the last `left`.
void finish_copies(size_t left);

}  // namespace cuda_host

// The last `zeros` bytes are not read but set to 0.
inline void __pipeline_memcpy_async(void* to, const void* from, size_t bytes, size_t zeros = 0) {
  cuda_host::start_copy(to, from, bytes, zeros);
}
inline void __pipeline_commit() { cuda_host::end_group_of_copies(); }
inline void __pipeline_wait_prior(size_t left) { cuda_host::finish_copies(left); }
