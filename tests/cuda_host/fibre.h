// Fibres: functions with their own stacks, between which a thread of the CPU switches.
#pragma once

#include <cstddef>

namespace cuda_host {

// A stack and what runs on it. The thread that made a fibre starts and resumes it; only the fibre itself pauses.
class Fibre {
 public:
  Fibre();
  ~Fibre();
  Fibre(const Fibre&) = delete;
  Fibre& operator=(const Fibre&) = delete;

  // Runs `body(argument)` until it pauses or returns. If an earlier body has not returned, its stack is discarded.
  void start(void (*body)(void*), void* argument);
  // Continues after pause().
  void resume();
  // Returns control to the start() or resume() that runs this fibre.
  void pause();

 private:
  static void enter(Fibre* fibre);
  void switch_to();

  static constexpr size_t kStackBytes = 256 * 1024;
  void* memory_;
  void* stack_pointer_ = nullptr;
  void* caller_stack_pointer_ = nullptr;
  // State for AddressSanitizer, which must be told about every change of stacks.
  void* fake_stack_ = nullptr;
  void* caller_fake_stack_ = nullptr;
  const void* caller_stack_ = nullptr;
  size_t caller_stack_bytes_ = 0;
  void (*body_)(void*) = nullptr;
  void* argument_ = nullptr;
};

}  // namespace cuda_host
