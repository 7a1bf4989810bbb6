#include "fibre.h"

#include <sys/mman.h>

#include <cstdint>
#include <cstdlib>
#include <new>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

// Pushes the callee-saved registers, writes the stack pointer to `*save`, and continues on the stack `load`, from which
// it pops the same registers and the return address. ucontext would make a system call.
extern "C" void cuda_host_switch(void** save, void* load);

#if defined(__x86_64__)
asm(R"(
.text
.hidden cuda_host_switch
.globl cuda_host_switch
.type cuda_host_switch, @function
cuda_host_switch:
  endbr64
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size cuda_host_switch, .-cuda_host_switch
)");
#elif defined(__aarch64__)
asm(R"(
.text
.hidden cuda_host_switch
.globl cuda_host_switch
.type cuda_host_switch, %function
cuda_host_switch:
  sub sp, sp, #160
  stp x19, x20, [sp, #0]
  stp x21, x22, [sp, #16]
  stp x23, x24, [sp, #32]
  stp x25, x26, [sp, #48]
  stp x27, x28, [sp, #64]
  stp x29, x30, [sp, #80]
  stp d8, d9, [sp, #96]
  stp d10, d11, [sp, #112]
  stp d12, d13, [sp, #128]
  stp d14, d15, [sp, #144]
  mov x9, sp
  str x9, [x0]
  mov sp, x1
  ldp x19, x20, [sp, #0]
  ldp x21, x22, [sp, #16]
  ldp x23, x24, [sp, #32]
  ldp x25, x26, [sp, #48]
  ldp x27, x28, [sp, #64]
  ldp x29, x30, [sp, #80]
  ldp d8, d9, [sp, #96]
  ldp d10, d11, [sp, #112]
  ldp d12, d13, [sp, #128]
  ldp d14, d15, [sp, #144]
  add sp, sp, #160
  ret
.size cuda_host_switch, .-cuda_host_switch
)");
#else
#error "the host shim for CUDA knows how to switch stacks on x86-64 and arm64 only"
#endif

namespace cuda_host {
namespace {

// A new fibre's function gets no argument, so it finds the fibre here.
thread_local Fibre* entering = nullptr;

}  // namespace

Fibre::Fibre()
    : memory_(mmap(nullptr, kStackBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0)) {
  if (memory_ == MAP_FAILED) throw std::bad_alloc();
}

Fibre::~Fibre() { munmap(memory_, kStackBytes); }

void Fibre::start(void (*body)(void*), void* argument) {
#if defined(__SANITIZE_ADDRESS__)
  __asan_unpoison_memory_region(memory_, kStackBytes);
#endif
  body_ = body;
  argument_ = argument;
  fake_stack_ = nullptr;
  auto** top = reinterpret_cast<void**>(static_cast<char*>(memory_) + kStackBytes);
  const auto function = reinterpret_cast<void*>(+[]() { enter(entering); });
#if defined(__x86_64__)
  // Six registers, the return address, and a word in place of the caller's return address, which keeps the stack
  // aligned.
  top -= 8;
  for (int i = 0; i < 8; ++i) top[i] = nullptr;
  top[6] = function;
#else
  top -= 20;
  for (int i = 0; i < 20; ++i) top[i] = nullptr;
  top[11] = function;
#endif
  stack_pointer_ = top;
  entering = this;
  switch_to();
}

void Fibre::resume() { switch_to(); }

void Fibre::switch_to() {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(&caller_fake_stack_, memory_, kStackBytes);
#endif
  cuda_host_switch(&caller_stack_pointer_, stack_pointer_);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(caller_fake_stack_, nullptr, nullptr);
#endif
}

void Fibre::pause() {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(&fake_stack_, caller_stack_, caller_stack_bytes_);
#endif
  cuda_host_switch(&stack_pointer_, caller_stack_pointer_);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(fake_stack_, &caller_stack_, &caller_stack_bytes_);
#endif
}

void Fibre::enter(Fibre* fibre) {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(nullptr, &fibre->caller_stack_, &fibre->caller_stack_bytes_);
#endif
  fibre->body_(fibre->argument_);
  fibre->pause();
  std::abort();  // a body that has returned is never resumed
}

}  // namespace cuda_host
