// Stands in for CUDA's header of copies to shared memory that go on while their thread does: here they are made when it
// waits for them, so that who does not wait reads what was there before. Addresses must be multiples of their bytes.
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
